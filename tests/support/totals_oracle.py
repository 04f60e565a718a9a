"""Totals of each tenant, counted past the code under test."""

from pathlib import Path

from tests.support.databases import rows_of

_COUNTS = {
    "adapters": "SELECT tenant, COUNT(*) FROM adapters WHERE NOT deleted GROUP BY tenant",
    "versions": "SELECT tenant, COUNT(*) FROM versions GROUP BY tenant",
    "version_bytes": "SELECT tenant, SUM(bytes) FROM versions GROUP BY tenant",
    "trashed_bytes": "SELECT tenant, SUM(bytes) FROM trashed_versions GROUP BY tenant",
    "datasets": "SELECT tenant, COUNT(*) FROM datasets WHERE NOT deleted GROUP BY tenant",
    "dataset_bytes": "SELECT tenant, SUM(bytes) FROM dataset_versions GROUP BY tenant",
}


def count_totals(folder: Path) -> set[tuple[str, str, int]]:
    """Count; each entry is a tenant, the name of a total, and its value, unless it is 0."""
    return {
        (tenant, name, int(number))
        for name, statement in _COUNTS.items()
        for tenant, number in rows_of(folder, statement)
        if number
    }


def stored_totals(folder: Path) -> set[tuple[str, str, int]]:
    """Return the stored totals in the same form."""
    columns = ", ".join(_COUNTS)
    rows = rows_of(folder, f"SELECT tenant, {columns} FROM totals")
    return {(row[0], name, value) for row in rows for name, value in zip(_COUNTS, row[1:], strict=True) if value}
