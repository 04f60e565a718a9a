"""Checks of a data folder before anything is created, migrated or swept.

The catalogue and the folder of blobs must belong together, and the catalogue's pages must be whole.

The store id, a random string, is stored three times:

- in the table `catalog`, with the catalogue's revision;
- with the blobs, in `blobs/store-id` or in the object `store-id`. It is written after the catalogue's id is committed.
  If a crash comes in between, the catalogue has an id and the blobs have none, and the next start writes it;
- in `store-id` in the data folder, which records the store that was last opened in this folder. A backup that is
  restored into an empty folder does not have this file. The blobs may then be newer than the catalogue, because they
  were copied after it. If the file exists and blobs are newer, an older catalogue was restored next to the live blobs.

The check does not import SQLAlchemy or torch, because the supervisor runs it before it starts other processes.
"""

import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import quote

from adapters.errors import CatalogBusy, CatalogNotLoadable
from adapters.storage.blob_location import BlobLocation
from adapters.storage.blobs import BLOBS, STORE_ID, Blobs, blob_key, revision_of, write_id
from adapters.storage.blobs import read_id as read_stored_id

CATALOG = "catalog.sqlite3"
MIGRATION_LOCK = "migrate.lock"
# Folder, in the data folder, with a locked file for each `serve` and `trainer` that runs.
# An unlocked file belongs to a process that did not end cleanly.
RUNNING = "running"
# The same for each process that writes blobs.
WRITERS = "writers"
# Folder, in the data folder, of the checkpoints of running fits.
CHECKPOINTS = "checkpoints"
_MIGRATIONS = Path(__file__).parent / "migrations" / "versions"
_BUSY_SECONDS = 15
_SECONDS_BEFORE_LOG = 3.0
_MOST_FINDINGS = 10
# Begins the store id of a catalogue that `adapters.maintenance.move` has not completed.
UNFINISHED = "unfinished-copy-of-"
_REFERENCES = (
    *(("versions", "file"), ("versions", "statistics"), ("trashed_versions", "file")),
    *(("dataset_versions", "file"), ("jobs", "data_file")),
)

log = logging.getLogger(__name__)


class CatalogIdentity(NamedTuple):
    """Store id, revision and references that a catalogue holds."""

    store_id: str | None
    """None if an older release wrote the catalogue."""
    revision: int
    references: frozenset[str] = frozenset()
    """Names of the blobs that rows refer to; empty if they were not read."""
    pending: frozenset[str] = frozenset()
    """Keys of the blobs that are being written, if the references were read."""


class IdentifiedCatalog(Protocol):
    """A catalogue that is not the file in the data folder."""

    name: str

    def identity(self, *, with_references: bool) -> CatalogIdentity | None:
        """Return store id and revision, and if asked for the blobs that rows refer to."""

    def raise_revision(self, revision: int) -> None:
        """Raise the revision to that of blobs which are newer."""


class CatalogFile:
    """The catalogue in the data folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CATALOG
        self.name = str(self.path)

    def identity(self, *, with_references: bool) -> CatalogIdentity | None:
        """Return store id and revision, and if asked for the blobs that rows refer to; None without a catalogue."""
        return _read_catalog(self.path, with_references=with_references)

    def raise_revision(self, revision: int) -> None:
        """Raise the revision to that of blobs which are newer."""
        with connected(self.path) as connection:
            connection.execute("PRAGMA journal_mode=TRUNCATE")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("UPDATE catalog SET revision = max(revision, ?)", (revision,))


def check_store(folder: Path, catalog: IdentifiedCatalog | None = None, *, blobs: Blobs | None = None) -> None:
    """Raise `CatalogNotLoadable` if the catalogue and the blobs of a store do not belong together.

    By default, the catalogue is the file in the data folder, and the blobs are there too. Writes nothing, but SQLite
    rolls back a transaction that a crash left in the catalogue's journal. Raises `CatalogBusy` if the catalogue stays
    locked for `_BUSY_SECONDS`, and `StorageFailed` if a bucket does not answer.
    """
    blobs = blobs or BlobLocation(folder=folder).open()
    # Read the blobs before the catalogue. If another process publishes in between, the catalogue looks newer than the
    # blobs, which is no error. In the other order, the blobs would look newer.
    opened_here = read_id(folder / STORE_ID)
    with _readable(folder / BLOBS):
        folder_id = blobs.read_store_id()
        names = blobs.names() if folder_id is None else []
    with suppress(FileNotFoundError), _readable(folder / WRITERS):
        os.listdir(folder / WRITERS)
    name = CATALOG if catalog is None else catalog.name
    catalog = catalog or CatalogFile(folder)
    identity = catalog.identity(with_references=folder_id is None)
    refuse_unfinished(catalog.name, identity)
    if folder_id is not None and identity is not None:
        # A bucket may have millions of names, so only those that may be newer are listed, and the catalogue is read
        # again after that.
        with _readable(folder / BLOBS):
            names = blobs.names_after(identity.revision)
        if names:
            identity = catalog.identity(with_references=False)
    mismatch = _mismatch(blobs, identity, folder_id=folder_id, names=names, opened_here=opened_here)
    if mismatch is not None:
        count = len(_names(folder, blobs))
        accepted = "make a new, empty catalogue" if identity is None else "take the catalogue as it is"
        raise CatalogNotLoadable(
            f"{folder}: the catalogue {name} and the files in {BLOBS}/ do not belong together: {mismatch}.\n"
            "- Put back the one that was moved or is not mounted yet. From a backup, restore the catalogue and the"
            " blobs together into a new, empty folder ('Restore' in docs/operations.md).\n"
            f"- To {accepted}, start once with --accept-catalog. Of the {count} files in {BLOBS}/, those that it"
            f" does not refer to move to {folder / 'quarantine'}/kept-<time>/. Nothing was changed."
        )


def refuse_unfinished(name: str, identity: CatalogIdentity | None) -> None:
    """Raise `CatalogNotLoadable` if a catalogue is a copy of another one, and not complete."""
    if identity is not None and identity.store_id is not None and identity.store_id.startswith(UNFINISHED):
        raise CatalogNotLoadable(
            f"the catalogue {name} is an unfinished copy of the store {identity.store_id.removeprefix(UNFINISHED)}: "
            "repeat the command that made it (loraplex migrate or loraplex restore)"
        )


def newest_revision(folder: Path, *, blobs: Blobs | None = None) -> int:
    """Return the greatest revision in the names of the blobs; 0 if there are none."""
    return max(map(revision_of, _names(folder, blobs)), default=0)


def unreferenced(folder: Path, catalog: IdentifiedCatalog | None = None, *, blobs: Blobs | None = None) -> list[str]:
    """Return the blobs that are neither referenced nor pending in the catalogue: all of them if there is none."""
    names = _names(folder, blobs)
    identity = (catalog or CatalogFile(folder)).identity(with_references=True)
    references, pending = (identity.references, identity.pending) if identity else (frozenset(), frozenset())
    return sorted(name for name in names if name not in references and blob_key(name) not in pending)


def read_id(path: Path) -> str | None:
    """Return the id in a file; None if the file is missing or empty. Raises `CatalogNotLoadable`."""
    with _readable(path):
        return read_stored_id(path)


def catalog_bytes(folder: Path) -> int:
    """Return the size of the catalogue; 0 if it is missing. Raises `CatalogNotLoadable` if it cannot be looked at."""
    path = folder / CATALOG
    with _readable(path), suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def complete_store(
    folder: Path,
    catalog: IdentifiedCatalog | None = None,
    *,
    blobs: Blobs | None = None,
    accept: bool = False,
    revision_at_least: int = 0,
) -> None:
    """Write the id files that are missing in a store that was checked and whose database was migrated.

    If blobs are newer than the catalogue, as after a restore, the catalogue's revision is raised to the newest blob's,
    so that the next check passes. With `accept`, the catalogue's id overwrites both id files. `revision_at_least` is
    the newest revision among the blobs that were moved to the quarantine.
    """
    blobs = blobs or BlobLocation(folder=folder).open()
    opened_here = read_id(folder / STORE_ID)
    if not accept and opened_here is not None:
        with _readable(folder / BLOBS):
            if opened_here == blobs.read_store_id():
                return
    catalog = catalog or CatalogFile(folder)
    with migration_lock(folder):
        newest = max(newest_revision(folder, blobs=blobs), revision_at_least)
        identity = catalog.identity(with_references=False)
        if identity is None or identity.store_id is None:
            finding = "its table catalog has no row" if identity is None else "it has no store id"
            raise damaged(folder / CATALOG, finding)
        store_id, revision = identity.store_id, identity.revision
        if newest > revision:
            newer = sum(revision_of(name) > revision for name in _names(folder, blobs))
            log.warning("the catalogue's revision goes from %d to %d; %d blobs are newer", revision, newest, newer)
            catalog.raise_revision(newest)
        # The data folder's file comes last, because newer blobs are an error if it exists. It must not exist before
        # the catalogue's revision is raised.
        blobs.write_store_id(store_id)
        write_id(folder / STORE_ID, store_id)


@contextmanager
def migration_lock(folder: Path) -> Iterator[None]:
    """Hold the lock for migrating and completing a store: `write_id` uses one temporary file for all processes.

    Waits for as long as another process holds it, because a migration may be long, and logs that once.
    """
    path = folder / MIGRATION_LOCK
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = "waiting for another process that migrates the catalogue and holds the lock %s"
            timer = threading.Timer(_SECONDS_BEFORE_LOG, log.warning, (message, path))
            timer.start()
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            finally:
                timer.cancel()
        yield


@contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    """Open an existing catalogue without SQLAlchemy, and close it at the end of the block.

    The connection is not read-only, because SQLite must roll back a transaction that a crash left in the journal before
    it can read. Raises `CatalogBusy` and `CatalogNotLoadable`, also for SQLite errors inside the block.
    """
    try:
        uri = f"file:{quote(str(path))}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
            yield connection
    except UnicodeDecodeError as error:
        # SQLite's message about a damaged schema has bytes of it.
        raise damaged(path, str(error)) from error
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise CatalogBusy(f"the catalogue {path} is locked by another process") from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise damaged(path, str(error)) from error
        raise CatalogNotLoadable(f"the catalogue {path} cannot be opened: {error}") from error


def damaged(path: Path, finding: str) -> CatalogNotLoadable:
    """Return the error for a catalogue whose file is corrupt."""
    detail = f"the catalogue {path} is damaged: {finding}; restore it from a backup (docs/operations.md)"
    return CatalogNotLoadable(detail)


def check_schema(folder: Path) -> None:
    """Raise `CatalogNotLoadable` if the tables of a catalogue are those of another release."""
    newest = max(path.stem[:4] for path in _MIGRATIONS.glob("[0-9]*.py"))
    with connected(folder / CATALOG) as connection:
        revisions = [revision for (revision,) in connection.execute("SELECT version_num FROM alembic_version")]
    if revisions != [newest]:
        raise CatalogNotLoadable(
            f"the catalogue {folder / CATALOG} has the tables of another release ({', '.join(revisions)}; this one has"
            f" {newest}): start the service once to upgrade them"
        )


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


def _mismatch(
    blobs: Blobs, catalog: CatalogIdentity | None, *, folder_id: str | None, names: list[str], opened_here: str | None
) -> str | None:
    """Return why the catalogue and the blobs do not belong together; None if they do."""
    owner_of_blobs = f"the blobs belong to the store {folder_id}"
    if catalog is None:
        if folder_id is None and not names:
            return None
        rest = owner_of_blobs if folder_id is not None else f"there are {len(names)} blobs"
        return f"the catalogue is missing or empty, and {rest}"
    if folder_id is None:
        return _mismatch_without_id(blobs, catalog, names=names, opened_here=opened_here)
    if catalog.store_id != folder_id:
        store = catalog.store_id or "of an older release, without an id"
        return f"the catalogue belongs to the store {store}, and {owner_of_blobs}"
    newer = [name for name in names if revision_of(name) > catalog.revision]
    if newer and opened_here == folder_id:
        newest = max(map(revision_of, newer))
        revisions = f"it is at revision {catalog.revision}, and {len(newer)} blobs at up to {newest}"
        return f"the catalogue is older than the blobs: {revisions}"
    return None


def _mismatch_without_id(
    blobs: Blobs, catalog: CatalogIdentity, *, names: list[str], opened_here: str | None
) -> str | None:
    """Return why a catalogue does not belong to a folder of blobs that has no store id; None if it does."""
    missing = catalog.references.difference(names)
    if catalog.store_id is None:
        # First start of this release on a store of an older one. Some blobs may have been lost before: refuse the
        # store only if all of them are missing.
        if missing and len(missing) == len(catalog.references):
            return f"the catalogue refers to {len(missing)} blobs, and none of them is there"
        return None
    if blobs.read_store_id() == catalog.store_id:
        return None  # Another process wrote the id after `check_store` read it.
    if missing:
        return f"the folder of blobs has no store id, and {len(missing)} blobs that the catalogue refers to are missing"
    unreferenced_names = set(names).difference(catalog.references)
    if unreferenced_names and opened_here == catalog.store_id:
        count = len(unreferenced_names)
        return f"the folder of blobs has no store id, and {count} blobs that the catalogue does not refer to"
    return None


def _read_catalog(path: Path, *, with_references: bool) -> CatalogIdentity | None:
    """Return the catalogue's identity; None if the file is missing or empty, or has no row in the table `catalog`."""
    if catalog_bytes(path.parent) == 0:
        return None
    with connected(path) as connection:
        connection.execute("BEGIN")
        columns = _columns(connection, "catalog")
        if not columns:
            return None
        store_id = "store_id" if "store_id" in columns else "NULL"
        row = connection.execute(f"SELECT {store_id}, revision FROM catalog").fetchone()
        if row is None:
            return None
        if not with_references:
            return CatalogIdentity(*_checked(path, row))
        references = frozenset[str]().union(*(_values(connection, table, column) for table, column in _REFERENCES))
        return CatalogIdentity(*_checked(path, row), references, _values(connection, "pending_blobs", "key"))


def _checked(path: Path, row: tuple[object, object] | None) -> tuple[str | None, int]:
    """Return the store id and the revision in a row; raise `CatalogNotLoadable` if there is none or it is damaged."""
    if row is None:
        raise damaged(path, "its table catalog has no row")
    store_id, revision = row
    if not isinstance(revision, int):
        raise damaged(path, f"its revision is {'NULL' if revision is None else 'not a whole number'}")
    if not isinstance(store_id, str | None):
        raise damaged(path, "its store id is not text")
    return store_id, revision


def _names(folder: Path, blobs: Blobs | None = None) -> list[str]:
    """Return the names of the blobs of a data folder. Raises `CatalogNotLoadable`."""
    with _readable(folder / BLOBS):
        return (blobs or BlobLocation(folder=folder).open()).names()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise `CatalogNotLoadable` if the system cannot read a file or a folder. A missing one is left to the caller."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CatalogNotLoadable(f"{path} cannot be read: {error.strerror}") from error


def _values(connection: sqlite3.Connection, table: str, column: str) -> frozenset[str]:
    """Return the values of a column; none if an older release wrote the catalogue without the column."""
    if column not in _columns(connection, table):
        return frozenset()
    rows = connection.execute(f"SELECT DISTINCT {column} FROM {table} WHERE {column} IS NOT NULL")
    return frozenset(value for (value,) in rows)


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
