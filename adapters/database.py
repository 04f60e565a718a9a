"""The SQLite file behind the catalogue: durable commits, one writer at a time, migrations at start."""

import fcntl
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DatabaseError, OperationalError

from adapters.errors import CatalogBusy, CatalogNotLoadable, StorageFull
from adapters.store_identity import CATALOG

_BUSY_MILLISECONDS = 15_000
_MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """Transactions on the catalogue in `folder`. Opening it brings its tables up to date.

    `make_room` is called when the disk is full, before the error is raised.
    """

    def __init__(self, folder: Path, *, make_room: Callable[[], object] = lambda: None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._make_room = make_room
        self.path = folder / CATALOG
        # A pool as deep as the web server's threads: a reader never waits for another reader.
        url = sa.URL.create("sqlite", database=str(self.path))
        self._engine = sa.create_engine(url, pool_size=8, max_overflow=56)
        sa.event.listen(self._engine, "connect", _configure)
        sa.event.listen(self._engine, "begin", _begin)
        self._writing = self._engine.execution_options(writes=True)
        # Two writers in one process would wait in SQLite's busy handler, which sleeps; a lock wakes at once.
        self._writer = threading.Lock()
        try:
            self._migrate(folder / "migrate.lock")
        except (CommandError, DatabaseError, sqlite3.DatabaseError) as error:
            # Not a database, damaged, or migrated by a newer release.
            raise CatalogNotLoadable(f"the catalogue {self.path} cannot be opened: {error}") from error

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent look; raises `CatalogBusy`."""
        with _translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction, committed and on disk when this ends without an error.

        It begins by taking the write lock: a read that turns into a write later would fail at once where
        another process has written in between. Raises `CatalogBusy` and `StorageFull`.
        """
        if not self._writer.acquire(timeout=_BUSY_MILLISECONDS / 1000):
            raise CatalogBusy("the catalogue is written to by many at once; try again")
        try:
            with _translated(), self._writing.begin() as connection:
                yield connection
        except StorageFull:
            self._make_room()
            raise
        finally:
            self._writer.release()

    def close(self) -> None:
        """Give back every pooled connection."""
        self._engine.dispose()

    def _migrate(self, lock_file: Path) -> None:
        # `api` and `trainer` start together: one migrates, the other waits and finds nothing to do.
        with lock_file.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            config = Config()
            config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
            with self.write() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")


class ChangeWatch:
    """Whether any connection, in this process or another, has committed since the last look.

    A connection of its own that never writes and never waits: SQLite's `data_version` moves for everyone else's
    commits, and reading it costs microseconds.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)

    def data_version(self) -> int:
        """A number that changes with every commit; raises `CatalogBusy` at once where one is under way."""
        try:
            row = self._connection.execute("PRAGMA data_version").fetchone()
        except sqlite3.OperationalError:
            # Once more, in the service's own terms: the context costs as much as a third of the look.
            with _translated():
                row = self._connection.execute("PRAGMA data_version").fetchone()
        return int(row[0])

    def revision(self) -> int:
        """The catalogue's revision; raises `CatalogBusy` at once where a commit is under way."""
        with _translated():
            row = self._connection.execute("SELECT revision FROM catalog").fetchone()
        return int(row[0])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


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
def _translated() -> Iterator[None]:
    try:
        yield
    except (OperationalError, sqlite3.OperationalError) as error:
        cause = error.orig if isinstance(error, OperationalError) else error
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise CatalogBusy("the catalogue is locked by another process; try again") from error
        if code == sqlite3.SQLITE_FULL:
            raise StorageFull("the disk is full: the catalogue could not be written") from error
        raise
