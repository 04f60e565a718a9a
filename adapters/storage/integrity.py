"""Check of the pages of a catalogue's file by SQLite itself. It imports neither SQLAlchemy nor torch."""

from pathlib import Path

from adapters.storage.store_identity import connected, damaged

_MOST_FINDINGS = 10


def check_integrity(path: Path, *, by_table: bool = False) -> None:
    """Raise `CatalogNotLoadable` if a page of the catalogue is damaged.

    Writers wait meanwhile; with `by_table`, they only wait for one table at a time. Does nothing if there is no
    catalogue yet. Raises `CatalogBusy` if it is locked for long.
    """
    if not path.exists():
        return
    findings: list[str] = []
    with connected(path) as connection:
        tables: list[str | int] = [_MOST_FINDINGS]
        if by_table:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            findings += [text for (text,) in connection.execute(f"PRAGMA quick_check({table})") if text != "ok"]
    if findings:
        raise damaged(path, "; ".join(findings[:_MOST_FINDINGS]))
