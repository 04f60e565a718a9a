"""Whether a catalogue and a folder of blobs belong together, checked before anything is created, migrated or swept.

Three places say so:

- the table `catalog`: a random store id and the revision;
- `blobs/store-id`: the same id. It is written after the catalogue's is committed, so a crash in between leaves a
  catalogue with an id and a folder without one, and the next start completes the pair;
- `store-id` in the data folder: the id of the pair that was opened here. A restore into an empty folder does not have
  it. Blobs that were copied after the catalogue may then be newer than it. If the file is there, newer blobs mean that
  an older catalogue was put back beside the live blobs.

This module imports neither SQLAlchemy nor torch: the supervisor checks before it starts anything.
"""

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from adapters.blobs import BLOBS, STORE_ID, blob_names, revision_of, sync_folder
from adapters.errors import CatalogBusy, CatalogNotLoadable

CATALOG = "catalog.sqlite3"
_BUSY_SECONDS = 15
_REFERENCES = (("versions", "file"), ("versions", "statistics"), ("dataset_versions", "file"), ("jobs", "data_file"))

log = logging.getLogger(__name__)


class Identity(NamedTuple):
    """What the database says of the store."""

    store_id: str | None
    """None if the catalogue is of an older release."""
    revision: int
    references: frozenset[str]
    """Blobs that rows refer to; only read if the folder of blobs has no id."""


def check_store(folder: Path) -> None:
    """Raise `CatalogNotLoadable` if the catalogue and the blobs in a data folder do not belong together.

    Changes nothing. Raises `CatalogBusy` if the catalogue is locked for long.
    """
    # The folder before the catalogue: whatever is published meanwhile makes the catalogue newer, never the blobs.
    opened_here = read_id(folder / STORE_ID)
    folder_id = read_id(folder / BLOBS / STORE_ID)
    names = blob_names(folder / BLOBS)
    catalog = _read_catalog(folder / CATALOG, with_references=folder_id is None)
    found = _mismatch(folder, catalog, folder_id=folder_id, names=names, opened_here=opened_here)
    if found is not None:
        raise CatalogNotLoadable(
            f"the catalogue {folder / CATALOG} and the blobs in {folder / BLOBS} do not belong together: {found}. "
            "Nothing was changed. Restore the catalogue and the blobs that belong together (docs/operations.md), or "
            "start once with --accept-catalog to take the catalogue as it is: blobs that it does not refer to then go "
            f"to {folder / 'quarantine'}"
        )


def newest_revision(folder: Path) -> int:
    """Return the greatest revision in the name of a blob."""
    return max(map(revision_of, blob_names(folder / BLOBS)), default=0)


def unreferenced(folder: Path) -> list[Path]:
    """Return the blobs that no row of the catalogue refers to. Nobody may be publishing meanwhile."""
    names = blob_names(folder / BLOBS)
    catalog = _read_catalog(folder / CATALOG, with_references=True)
    references = catalog.references if catalog else frozenset()
    return [folder / BLOBS / name for name in sorted(set(names).difference(references))]


def read_id(path: Path) -> str | None:
    """Return the id in a file; None if there is none."""
    try:
        return path.read_text(errors="replace").strip() or None
    except FileNotFoundError:
        return None


def complete_store(folder: Path, *, accept: bool = False, revision_at_least: int = 0) -> None:
    """Write the ids that a checked store lacks, once its database has been migrated.

    If blobs are newer than the catalogue, as after a restore, its revision is raised to theirs, so that the next check
    passes. With `accept`, the catalogue's id replaces whatever the folder has; `revision_at_least` is the newest of the
    blobs that were moved out of the way.
    """
    mark, folder_mark = folder / STORE_ID, folder / BLOBS / STORE_ID
    if not accept and (opened_here := read_id(mark)) is not None and opened_here == read_id(folder_mark):
        return
    with _opened_alone(folder), connected(folder / CATALOG) as connection:
        newest = max(newest_revision(folder), revision_at_least)
        store_id, revision = connection.execute("SELECT store_id, revision FROM catalog").fetchone()
        if newest > revision:
            newer = sum(revision_of(name) > revision for name in blob_names(folder / BLOBS))
            log.warning("the catalogue's revision goes from %d to %d; %d blobs are newer", revision, newest, newer)
            connection.execute("PRAGMA journal_mode=TRUNCATE")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("UPDATE catalog SET revision = max(revision, ?)", (newest,))
        # In this order: with the second file, newer blobs are an error.
        _write_id(folder_mark, store_id)
        _write_id(mark, store_id)


@contextmanager
def _opened_alone(folder: Path) -> Iterator[None]:
    """Hold the lock under which a store is migrated and completed: two writers would share a temporary file."""
    with (folder / "migrate.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to an existing catalogue, without SQLAlchemy; raises `CatalogBusy` and `CatalogNotLoadable`.

    It may write, because what a crash left in the journal has to be rolled back before anything can be read.
    """
    try:
        uri = f"file:{quote(str(path))}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
            yield connection
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise CatalogBusy(f"the catalogue {path} is locked by another process") from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise damaged(path, str(error)) from error
        raise CatalogNotLoadable(f"the catalogue {path} cannot be opened: {error}") from error


def damaged(path: Path, finding: str) -> CatalogNotLoadable:
    """The error of a catalogue whose file is not what SQLite has written."""
    return CatalogNotLoadable(
        f"the catalogue {path} is damaged: {finding}; restore it from a backup (docs/operations.md)"
    )


def _write_id(path: Path, store_id: str) -> None:
    """Write an id to a file, durably: a crash leaves the whole id or what was there before."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(store_id)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(path.parent)


def _mismatch(
    folder: Path, catalog: Identity | None, *, folder_id: str | None, names: list[str], opened_here: str | None
) -> str | None:
    """Return what does not fit, in words; None if everything does."""
    if catalog is None:
        if folder_id is not None:
            return f"the catalogue is missing or empty, and the blobs are of the store {folder_id}"
        return f"the catalogue is missing or empty, and there are {len(names)} blobs" if names else None
    if folder_id is None:
        return _mismatch_without_id(folder, catalog, names=names, opened_here=opened_here)
    if catalog.store_id is None:
        return f"the catalogue is of an older release without a store id, and the blobs are of the store {folder_id}"
    if catalog.store_id != folder_id:
        return f"the catalogue is of the store {catalog.store_id}, and the blobs are of the store {folder_id}"
    newer = [name for name in names if revision_of(name) > catalog.revision]
    if newer and opened_here == folder_id:
        newest = max(map(revision_of, newer))
        return (
            f"the catalogue is older than the blobs: it is at revision {catalog.revision}, and {len(newer)} blobs are "
            f"newer, up to revision {newest}"
        )
    return None


def _mismatch_without_id(folder: Path, catalog: Identity, *, names: list[str], opened_here: str | None) -> str | None:
    missing = catalog.references.difference(names)
    if catalog.store_id is None:
        # The first start of this release on an older store: a single lost blob must not stop it.
        if missing and len(missing) == len(catalog.references):
            return f"the catalogue refers to {len(missing)} blobs, and none of them is there"
        return None
    if read_id(folder / BLOBS / STORE_ID) == catalog.store_id:
        return None  # another process has completed the pair since
    if missing:
        return f"the folder of blobs has no store id, and {len(missing)} blobs that the catalogue refers to are missing"
    strangers = set(names).difference(catalog.references)
    if strangers and opened_here == catalog.store_id:
        return f"the folder of blobs has no store id, and {len(strangers)} blobs that the catalogue does not refer to"
    return None


def _read_catalog(path: Path, *, with_references: bool) -> Identity | None:
    """Return what the catalogue says of the store; None if it is missing, empty or without tables."""
    try:
        if path.stat().st_size == 0:
            return None
    except FileNotFoundError:
        return None
    with connected(path) as connection:
        connection.execute("BEGIN")
        columns = _columns(connection, "catalog")
        if not columns:
            return None
        store_id = "store_id" if "store_id" in columns else "NULL"
        row = connection.execute(f"SELECT {store_id}, revision FROM catalog").fetchone()
        references: set[str] = set()
        if with_references:
            for table, column in _REFERENCES:
                if column in _columns(connection, table):
                    statement = f"SELECT DISTINCT {column} FROM {table} WHERE {column} IS NOT NULL"
                    references.update(file for (file,) in connection.execute(statement))
        return Identity(row[0], int(row[1]), frozenset(references)) if row else None


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
