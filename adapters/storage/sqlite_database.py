"""The embedded database: durable commits, one writer at a time, migrations at start.

No module but this one and `store_identity`, which looks at a catalogue before anything else does, opens the file.
"""

import asyncio
import json
import logging
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.util import CommandError
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DatabaseError, InvalidRequestError

from adapters.errors import CatalogBusy, CatalogNotLoadable, LoraplexError, StorageFailed, StorageFull, TooManyOpenFiles
from adapters.storage.blobs import DISK_FULL, NO_DESCRIPTORS
from adapters.storage.database import MAX_CHANGES, UNKNOWN_OUTCOME, migrate, to_json
from adapters.storage.store_identity import CatalogFile, migration_lock

_BUSY_MILLISECONDS = 15_000
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
# Messages of SQLite and Python, without an error code, about a truncated or overwritten file or schema.
_DAMAGED_WORDS = (
    *("unsupported file format", "Could not decode to UTF-8"),
    *("no such table", "no such column", "has no column named"),
)
# Python cannot decode SQLite's message about a schema that is damaged.
_ERRORS = (DatabaseError, sqlite3.DatabaseError, UnicodeDecodeError)
# What the code that reads rows raises if one is missing that another one needs, or has an impossible value.
_CONTRADICTIONS = (LookupError, TypeError, ValueError, InvalidRequestError)
_FAILED = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL}
# Codes of a COMMIT that is certainly rolled back: they come from what precedes the truncation of the journal.
_UNDONE = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE}
_PROBE_BYTES = 2**18

# The call with which SQLite syncs.
_sync = getattr(os, "fdatasync", os.fsync)

log = logging.getLogger(__name__)


class SqliteDatabase(CatalogFile):
    """The seam `Database`: transactions on the catalogue in `folder`, in portable SQL. Opening it migrates its tables.

    JSON is stored without NaN and infinities, which become null. `make_room` is called when the disk is full, before
    the error is raised.
    """

    def __init__(self, folder: Path, *, make_room: Callable[[], object] = lambda: None) -> None:
        super().__init__(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._make_room = make_room
        url = sa.URL.create("sqlite", database=str(self.path))
        # As many connections as threads ask for: a reader never waits for another reader.
        self._engine = sa.create_engine(url, pool_size=8, max_overflow=-1, json_serializer=to_json)
        sa.event.listen(self._engine, "connect", _configure)
        sa.event.listen(self._engine, "begin", _begin)
        self._writing = self._engine.execution_options(writes=True)
        # Two writers in one process would wait in SQLite's busy handler, which sleeps; a lock wakes at once.
        self._writer = threading.Lock()
        try:
            self._migrate(folder)
        except (CommandError, *_ERRORS, StorageFailed) as error:
            # Not a database, damaged, or migrated by a newer release.
            raise CatalogNotLoadable(f"the catalogue {self.path} cannot be opened: {error}") from error
        # Opened now, because later there may be no file descriptor left.
        self._watch: SqliteCatalogWatch | None = self.catalog_watch()
        self._watching = threading.Lock()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Read in one consistent transaction; raise `CatalogBusy`, `StorageFailed` or `TooManyOpenFiles`."""
        with _translated(), _transaction(self._engine) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Write in one transaction, committed and on disk when this ends without an error.

        It begins by taking the write lock: a read that turns into a write later would fail at once if another process
        had written in between. Raises `CatalogBusy`, `StorageFull`, `StorageFailed` and
        `TooManyOpenFiles`. Nothing was stored then, unless the error has `outcome_unknown`.
        """
        if not self._writer.acquire(timeout=_BUSY_MILLISECONDS / 1000):
            raise CatalogBusy("the catalogue is written to by many at once; try again")
        before, committing, unknown = 0, False, False
        try:
            with _transaction(self._writing) as connection:
                # Before the first change: a transaction that outgrows SQLite's cache locks readers out early.
                before = self._commits.change_number()
                yield connection
                committing = True
            return
        except (DatabaseError, sqlite3.DatabaseError) as error:
            failure = error
            unknown = committing and _code(error) not in _UNDONE and not self._is_rolled_back(before)
        finally:
            self._writer.release()
        ours = _translate(failure, folder=self.path.parent, outcome_unknown=unknown)
        if ours is None:
            raise failure
        if isinstance(ours, StorageFull):
            self._make_room()
        raise ours from failure

    # One connection at a time may write, so a transaction of the queue is like any other.
    write_job = write

    def server_time(self, _connection: Connection) -> float | None:
        """Return None: the processes have the clock of this machine."""
        return None

    def revision(self) -> int:
        """Return the catalogue's revision; raise `CatalogBusy` at once while a commit is under way."""
        with self._watching:
            self._watch = self._watch or self.catalog_watch()
            return self._watch.revision()

    def writer_locks(self) -> None:
        """Return nothing: all processes are on one machine."""

    def durability_warnings(self) -> Sequence[str]:
        """Return nothing: every commit is synced."""
        return ()

    def catalog_watch(self) -> "SqliteCatalogWatch":
        """Open a watch of the catalogue's revision."""
        return SqliteCatalogWatch(self.path)

    def commit_watch(self) -> "SqliteCommitWatch":
        """Open a watch of all changes, those of jobs for one."""
        return SqliteCommitWatch(self.path)

    def close(self) -> None:
        """Close every connection, except those of watches."""
        self._engine.dispose()
        with self._watching:
            if self._watch is not None:
                self._watch.close()
            self._watch = None
        if "_commits" in vars(self):
            self._commits.close()

    @cached_property
    def _commits(self) -> "SqliteCommitWatch":
        """Watch that is used by the holder of the write lock only."""
        return self.commit_watch()

    def _is_rolled_back(self, before: int) -> bool:
        """Return whether the transaction of a failed COMMIT is certainly rolled back.

        The COMMIT may have failed before the journal was truncated, which rolls the transaction back, or after it,
        which leaves it stored, perhaps not durably.
        """
        try:
            # If there is still a journal, this rolls the transaction back. The connection of `_commits` must not be
            # the one that does so: its number would change.
            with self.read() as connection:
                connection.exec_driver_sql("SELECT revision FROM catalog").one()
            return self._commits.change_number() == before
        except LoraplexError:
            return False

    def _migrate(self, folder: Path) -> None:
        # `api` and `trainer` start together: one migrates, the other waits and then has nothing to do.
        with migration_lock(folder), self.write() as connection:
            migrate(connection)


class SqliteCommitWatch:
    """A connection that never writes and never waits, for questions that are asked before every batch.

    SQLite's `data_version` changes with the commits of all other connections, in this process and others, and reading
    it takes microseconds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._openings = 0
        self._connection = self._open()

    def change_number(self) -> int:
        """Return a number that every commit changes; raise `CatalogBusy` at once while one is under way."""
        try:
            row = self._connection.execute("PRAGMA data_version").fetchone()
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            # Repeat it to raise our own error: the context manager would take a third of the time of every call.
            (row,) = self._read("PRAGMA data_version")
        return self._openings * 2**32 + int(row[0])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)

    def _read(self, statement: str, parameters: Sequence[int | str] = ()) -> Sequence[Any]:
        try:
            with _translated():
                return self._connection.execute(statement, parameters).fetchall()
        except UnicodeDecodeError as error:
            raise _damage_of_file(error) from error
        except StorageFailed:
            # A connection that has met an empty file refuses it even after it is whole again. A new one counts anew.
            with suppress(sqlite3.DatabaseError):
                fresh = self._open()
                self._connection.close()
                self._connection, self._openings = fresh, self._openings + 1
            raise


class SqliteCatalogWatch(SqliteCommitWatch):
    """The seam `CatalogWatch`: the catalogue's revision, checked before every batch. For one thread at a time."""

    _seen = _revision = -1
    epoch = 0
    access_revision = -1
    """Access revision at the last call of `revision`: it changes if a key is revoked or a limit is set."""

    def begin_read(self) -> "asyncio.Future[float] | None":
        """Return None: `revision` reads it in microseconds."""
        return None

    def revision(self) -> int:
        """Return a revision that is no older than the last commit acknowledged before this call.

        Raises `CatalogBusy` at once if a commit is under way: try again in a millisecond.
        """
        # Read before the revision: a commit in between changes it again, and the next call sees that.
        change_number = self.change_number()
        if change_number != self._seen:
            (row,) = self._read("SELECT revision, access_revision FROM catalog")
            self._revision, self.access_revision = int(row[0]), int(row[1])
            self._seen = change_number
        return self._revision

    def limits(self, tenant: str) -> Mapping[str, Any]:
        """Return the limits of a tenant by name; empty if there is no such tenant. Raises what `revision` raises."""
        rows = self._read("SELECT limits FROM tenants WHERE name = ?", (tenant,))
        limits: Mapping[str, Any] = json.loads(rows[0][0]) if rows else {}
        return limits

    def changes_since(self, revision: int) -> Sequence[tuple[str, str]] | None:
        """Return the tenant and name of each change after a revision, up to the last call of `revision` or later.

        None means that anything may have changed: there are too many changes, or they are no longer listed. Raises
        `CatalogBusy` as `revision` does.
        """
        statement = "SELECT revision, tenant, name FROM changes WHERE revision > ? ORDER BY revision LIMIT ?"
        rows = self._read(statement, (revision, MAX_CHANGES + 1))
        listed = {number for number, _, _ in rows if number <= self._revision}
        if len(rows) > MAX_CHANGES or len(listed) != self._revision - revision:
            return None
        return [(tenant, name) for _, tenant, name in rows]


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # `_begin` says BEGIN, so that it can say IMMEDIATE
    connection.execute(f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}")
    # With DELETE, FULL does not sync the journal's removal: a power loss could roll an answered commit back.
    # Not WAL: SQLite 3.7.0 to 3.51.2 can corrupt a database when its WAL is reset.
    connection.execute("PRAGMA journal_mode=TRUNCATE")
    connection.execute("PRAGMA synchronous=FULL")


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _transaction(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        try:
            with connection.begin():
                yield connection
        except (DatabaseError, sqlite3.DatabaseError) as error:
            # The connection's cache of a file that has failed may be wrong. It is closed after its rollback, not
            # before: a cursor that is still in use would keep it open, and the catalogue locked.
            if _is_damage(error) or _code(error) & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL):
                connection.invalidate()
            raise
        except _CONTRADICTIONS as error:
            if damage := _damage(error, connection):
                raise damage from error
            raise


def _damage(error: Exception, connection: Connection) -> StorageFailed | None:
    """Return the error to raise if rows that contradict each other come from a damaged file, and not from a defect."""
    if not isinstance(error, JSONDecodeError):
        with suppress(*_ERRORS):
            if connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar() == "ok":
                return None
    return _damage_of_file(error)


def _damage_of_file(error: Exception) -> StorageFailed:
    reason = f"{type(error).__name__}: {error}"
    detail = f"the catalogue's file is damaged and has to be restored from a backup ({reason})"
    log.error("%s", detail)
    return StorageFailed(detail)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (DatabaseError, sqlite3.DatabaseError) as error:
        if ours := _translate(error):
            raise ours from error
        raise


def _cause(error: BaseException) -> BaseException:
    return (error.orig or error) if isinstance(error, DatabaseError) else error


def _code(error: BaseException) -> int:
    """Return SQLite's extended code of an error; 0 if it has none."""
    return int(getattr(_cause(error), "sqlite_errorcode", 0))


def _is_damage(error: BaseException) -> bool:
    return _code(error) & 0xFF in _DAMAGED or any(words in str(_cause(error)) for words in _DAMAGED_WORDS)


def _translate(error: Exception, *, folder: Path | None = None, outcome_unknown: bool = False) -> LoraplexError | None:
    """Return our own error for one of SQLite; None if storage is not its cause. `folder` is given for a write."""
    code, is_damage = _code(error) & 0xFF, _is_damage(error)
    if code in _BUSY:
        return CatalogBusy("the catalogue is locked by another process; try again")
    if not is_damage and code not in _FAILED:
        return None
    kind: type[LoraplexError] = StorageFailed
    if is_damage:
        what = "the catalogue's file is damaged and has to be restored from a backup"
    elif (trial := _trial(folder)) in NO_DESCRIPTORS:
        kind, what = TooManyOpenFiles, "the process has no file descriptors left for the catalogue"
    elif folder is not None and (code == sqlite3.SQLITE_FULL or trial in DISK_FULL):
        kind, what = StorageFull, "the disk is full"
    else:
        what = f"the catalogue cannot be {'read' if folder is None else 'written'}"
    if folder is not None:
        what += f": {UNKNOWN_OUTCOME if outcome_unknown else 'nothing was stored'}"
    detail = f"{what} ({getattr(_cause(error), 'sqlite_errorname', 'SQLite')}: {_cause(error)})"
    log.error("%s", detail)
    return kind(detail, outcome_unknown=outcome_unknown)


def _trial(folder: Path | None) -> int:
    """Return the error number of opening a file, and of writing one in `folder`; 0 if there is no error.

    SQLite does not say why it cannot open a file or why an fsync failed.
    """
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
        if folder is not None:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                _sync(file.fileno())
                file.truncate(0)
    except OSError as error:
        return error.errno or 0
    return 0
