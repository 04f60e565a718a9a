"""PostgreSQL: the seam `Database` for processes on several machines.

Every transaction begins with one statement, which also takes the lock of its kind:

| transaction | isolation | lock |
|---|---|---|
| read | REPEATABLE READ READ ONLY | none |
| write | READ COMMITTED | one advisory lock, until its end: writers of the catalogue take turns |
| write of jobs | READ COMMITTED | the rows that it reads `FOR UPDATE` |
| migration | READ COMMITTED | an advisory lock of its own |

A statement under READ COMMITTED sees what was committed before it, so that a writer that has waited for the lock sees
the changes of the one before. Timeouts of the session end the transaction of a client that is stopped, and its locks.
"""

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import sqlalchemy as sa
from alembic.util import CommandError
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from adapters.errors import (
    CatalogBusy,
    CatalogNotLoadable,
    CatalogUnavailable,
    LoraplexError,
    OutOfRange,
    StorageFailed,
    StorageFull,
)
from adapters.storage.database import UNKNOWN_OUTCOME, check_tables, migrate, to_json
from adapters.storage.postgres_watch import CallCounter, PostgresCatalogWatch
from adapters.storage.schema import catalog, dataset_versions, jobs, metadata, pending_blobs, trashed_versions, versions
from adapters.storage.store_identity import CatalogIdentity

# Seconds that a transaction waits for a lock, and that it may be idle: a stopped process blocks others for no longer.
_LOCK_SECONDS = 5
_IDLE_SECONDS = 10
# Seconds after which a host that does not acknowledge packets counts as gone.
_NETWORK_SECONDS = 10
_CONNECT_SECONDS = 5
# Connections of one process. The watch has one more.
_POOL_SIZE, _MAX_OVERFLOW = 4, 16
# Seconds that opening waits for a server which is still starting.
_START_SECONDS = 30.0
_START_PAUSE_SECONDS = 0.5
# Keys of the advisory locks.
_CATALOG_LOCK, _MIGRATION_LOCK = 0x6C6F7261, 0x6C6F7262
_READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_WRITE = f"BEGIN; SELECT pg_advisory_xact_lock({_CATALOG_LOCK})"
_WRITE_JOB = "BEGIN"
_MIGRATE = (
    "BEGIN; SET LOCAL lock_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0;"
    f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"
)
# SQLSTATE codes and classes by the error that they are. A code comes before its class.
_ERRORS: dict[str, type[LoraplexError]] = {
    # The lock timeout, the idle timeout, a cancelled statement, a deadlock, a conflict.
    **dict.fromkeys(("55P03", "25P03", "57014", "40P01", "40001"), CatalogBusy),
    # Too many connections; a server that has become a standby.
    **dict.fromkeys(("08", "57", "53300", "25006"), CatalogUnavailable),
    "53100": StorageFull,
    **dict.fromkeys(("53", "58", "XX"), StorageFailed),
}
_DURABILITY = sa.text(
    "SELECT current_setting('synchronous_commit') AS synchronous_commit, current_setting('fsync') AS fsync,"
    " current_setting('synchronous_standby_names') AS standby_names,"
    " (SELECT count(*) FROM pg_stat_replication) AS standbys"
)
_TABLE_BYTES = sa.text(
    "SELECT sum(pg_total_relation_size(oid)) FROM pg_class"
    " WHERE relnamespace = current_schema()::regnamespace AND relname = ANY(:tables)"
)
# The keys are numbers of 64 bits, in two halves.
_ADVISORY_LOCKS = sa.text(
    "SELECT classid::bigint AS classid, objid::bigint AS objid FROM pg_locks WHERE locktype = 'advisory' AND granted"
    " AND objsubid = 1 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
_REFERENCES = (
    *(versions.c.file, versions.c.statistics, trashed_versions.c.file),
    *(dataset_versions.c.file, jobs.c.data_file),
)

log = logging.getLogger(__name__)


class PostgresDatabase:
    """Transactions on the catalogue in a PostgreSQL database. Opening it migrates its tables by default."""

    def __init__(self, url: str, *, max_stale_seconds: float = 0.0, migrates: bool = True) -> None:
        """Connect, and wait for a server that is starting; raise `CatalogUnavailable` or `CatalogNotLoadable`.

        Without `migrates`, tables of another release are an error: a command must not upgrade them under services that
        are older.
        """
        parsed = sa.make_url(url)
        self.name = parsed.render_as_string()
        self._max_stale_seconds = max_stale_seconds
        self._engine = sa.create_engine(
            parsed,
            pool_size=_POOL_SIZE,
            max_overflow=_MAX_OVERFLOW,
            pool_timeout=_LOCK_SECONDS,
            json_serializer=to_json,
            connect_args=_session(parsed),
        )
        # The statement that begins a transaction is sent here, so that it also takes the lock.
        sa.event.listen(self._engine, "connect", lambda connection, _record: connection.set_autocommit(True))
        self._writer_locks: list[PostgresWriterLocks] = []
        _, arguments = self._engine.dialect.create_connect_args(parsed)
        self._arguments = {**arguments, **_session(parsed)}
        try:
            self._open(_MIGRATE if migrates else _READ)
        except BaseException as error:
            self._engine.dispose()
            if isinstance(error, CommandError):
                raise CatalogNotLoadable(f"the catalogue {self.name} cannot be opened: {error}") from error
            raise

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Read in one consistent transaction; raise `CatalogUnavailable` or `StorageFailed`."""
        with self._transaction(_READ) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Write in one transaction, committed when this ends without an error.

        Raises `CatalogBusy` if the lock cannot be had in some seconds, `CatalogUnavailable`, `StorageFull` and
        `StorageFailed`. Nothing was stored then, unless the error has `outcome_unknown`.
        """
        with self._transaction(_WRITE) as connection:
            yield connection

    @contextmanager
    def write_job(self) -> Iterator[Connection]:
        """Write rows that are locked one by one, without the catalogue's lock; raise what `write` raises."""
        with self._transaction(_WRITE_JOB) as connection:
            yield connection

    def server_time(self, connection: Connection) -> float | None:
        """Return the time by the server's clock, in seconds since the epoch."""
        return float(connection.scalars(sa.text("SELECT extract(epoch FROM clock_timestamp())")).one())

    def revision(self) -> int:
        """Return the catalogue's revision; raise what `read` raises."""
        with self.read() as connection:
            return int(connection.scalars(sa.select(catalog.c.revision)).one())

    def identity(self, *, with_references: bool) -> CatalogIdentity | None:
        """Return store id and revision, and if asked for the blobs that rows refer to."""
        with self.read() as connection:
            store_id, revision = connection.execute(sa.select(catalog.c.store_id, catalog.c.revision)).one()
            if not with_references:
                return CatalogIdentity(store_id, revision)
            parts = (sa.select(column).where(column.is_not(None)) for column in _REFERENCES)
            references = frozenset(connection.scalars(sa.union(*parts)))
            pending = frozenset(connection.scalars(sa.select(pending_blobs.c.key)))
            return CatalogIdentity(store_id, revision, references, pending)

    def raise_revision(self, revision: int) -> None:
        """Raise the catalogue's revision to that of blobs which are newer."""
        with self.write() as connection:
            is_older = catalog.c.revision < revision
            connection.execute(sa.update(catalog).where(is_older).values(revision=revision))

    def writer_locks(self) -> "PostgresWriterLocks":
        """Return locks that processes on other machines see."""
        self._writer_locks.append(PostgresWriterLocks(self, self._arguments))
        return self._writer_locks[-1]

    def durability_warnings(self) -> Sequence[str]:
        """Return what keeps acknowledged changes from being durable, in sentences; raise what `read` raises."""
        with self.read() as connection:
            row = connection.execute(_DURABILITY).one()
        warnings = []
        if row.fsync == "off":
            warnings.append("fsync=off: a crash of the server's machine may damage the catalogue")
        if row.synchronous_commit == "off":
            warnings.append("synchronous_commit=off: a crash of the server loses the last acknowledged changes")
        if row.standbys and not row.standby_names:
            warnings.append(
                f"synchronous_standby_names is empty: {row.standbys} standbys replicate asynchronously only, and a "
                "failover loses the last acknowledged changes"
            )
        elif row.standbys and row.synchronous_commit == "local":
            warnings.append("synchronous_commit=local: a failover loses the last acknowledged changes")
        return warnings

    def vacuum(self) -> int:
        """Free what deleted rows took, beside readers and writers; return the bytes by which the tables are smaller."""
        preparer, before = self._engine.dialect.identifier_preparer, self._size()
        tables = ", ".join(map(preparer.format_table, metadata.sorted_tables))
        with self._engine.connect() as connection:
            connection.exec_driver_sql(f"VACUUM (ANALYZE) {tables}")
        return before - self._size()

    def _size(self) -> int:
        with self.read() as connection:
            return int(connection.scalar(_TABLE_BYTES, {"tables": list(metadata.tables)}) or 0)

    def catalog_watch(self) -> PostgresCatalogWatch:
        """Open a watch of the catalogue's revision, which connects when it is first used."""
        return PostgresCatalogWatch(self._arguments, max_stale_seconds=self._max_stale_seconds)

    def commit_watch(self) -> CallCounter:
        """Return a watch that reports a change at every call: PostgreSQL has no number that each commit changes."""
        return CallCounter()

    def close(self) -> None:
        """Close every connection, except those of watches."""
        for locks in self._writer_locks:
            locks.release()
        self._engine.dispose()

    def _open(self, begin: str) -> None:
        give_up = time.monotonic() + _START_SECONDS
        while True:
            try:
                # Replicas start together: one migrates, the others wait and then have nothing to do.
                with self._transaction(begin) as connection:
                    self._check_encoding(connection)
                    if begin == _MIGRATE:
                        migrate(connection)
                    else:
                        check_tables(connection, self.name)
                return
            except CatalogUnavailable as error:
                if time.monotonic() > give_up:
                    raise
                log.warning("the catalogue cannot be opened yet: %s", error.detail)
            time.sleep(_START_PAUSE_SECONDS)

    def _check_encoding(self, connection: Connection) -> None:
        encoding = connection.scalar(sa.text("SHOW server_encoding"))
        if encoding != "UTF8":
            detail = f"the database {self.name} has the encoding {encoding}: create it with ENCODING 'UTF8'"
            raise CatalogNotLoadable(detail)

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Connection]:
        is_committing = False
        try:
            with self._begin(begin) as connection:
                yield connection
                is_committing = True
                connection.commit()
        except (DBAPIError, psycopg.Error, sa.exc.TimeoutError) as error:
            ours = _translate(error, writes=begin != _READ, is_committing=is_committing)
            if ours is None:
                raise
            raise ours from error

    def _begin(self, begin: str) -> Connection:
        """Return a connection in a transaction that has begun.

        A connection of the pool may have died since its last use, for one because the server was restarted. Nothing has
        happened in the transaction yet, so that another connection is tried.
        """
        try:
            return self._begin_once(begin)
        except (DBAPIError, psycopg.OperationalError) as error:
            if _kind(error) is not CatalogUnavailable:
                raise
        self._engine.dispose()
        return self._begin_once(begin)

    def _begin_once(self, begin: str) -> Connection:
        connection = self._engine.connect()
        try:
            connection.begin()
            driver: Any = connection.connection.dbapi_connection
            driver.execute(begin)
        except BaseException as error:
            # After a lock timeout, the connection is as good as before.
            if not isinstance(error, psycopg.Error) or _kind(error) is not CatalogBusy:
                connection.invalidate()
            connection.close()
            raise
        return connection


class PostgresWriterLocks:
    """Locks of writers of blobs: advisory locks of sessions, which end with the process or its connection.

    If the server was restarted, a lock is held again from the next call of `hold` on. A sweep in between deletes the
    pending rows of the owner, and a change that needs one of them stores nothing.
    """

    def __init__(self, database: PostgresDatabase, arguments: Mapping[str, Any]) -> None:
        self._database = database
        self._arguments = dict(arguments)
        self._connection: psycopg.Connection[Any] | None = None

    def hold(self, owner: str) -> None:
        """Hold the lock of an owner from now on; raise `CatalogUnavailable`. For one thread at a time."""
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.execute("SELECT 1")
                return
            self.release()
        try:
            self._connection = psycopg.connect(**self._arguments, autocommit=True)
            self._connection.execute("SELECT pg_advisory_lock(%s)", [_lock_key(owner)])
        except psycopg.Error as error:
            self.release()
            ours = _translate(error, writes=False, is_committing=False)
            if ours is None:
                raise
            raise ours from error

    def live(self, owners: Collection[str], connection: Connection | None = None) -> set[str]:
        """Return those of these owners whose locks are held, by any process."""
        if connection is None:
            with self._database.read() as own:
                return self.live(owners, own)
        held = {(row.classid << 32) + row.objid for row in connection.execute(_ADVISORY_LOCKS)}
        return {owner for owner in owners if _lock_key(owner) % 2**64 in held}

    def release(self) -> None:
        """Release the lock."""
        if self._connection is not None:
            # Of a connection that is closed, the server releases the lock a moment later.
            with suppress(psycopg.Error):
                self._connection.execute("SELECT pg_advisory_unlock_all()")
            self._connection.close()
            self._connection = None


def _lock_key(owner: str) -> int:
    """Return the key of the lock of an owner, which is the hex digits of a UUID: a signed number of 64 bits."""
    key = int(owner[:16], 16)
    return key - 2**64 if key >= 2**63 else key


def _session(url: sa.URL) -> dict[str, Any]:
    """Return the arguments of every connection; those in the URL take precedence."""
    # The server notices too that a host is gone, and then releases the locks of its sessions.
    probes = {"idle": _NETWORK_SECONDS, "interval": 2, "count": 3}
    settings = {
        "lock_timeout": f"{_LOCK_SECONDS}s",
        "idle_in_transaction_session_timeout": f"{_IDLE_SECONDS}s",
        "tcp_user_timeout": f"{_NETWORK_SECONDS}s",
        **{f"tcp_keepalives_{name}": value for name, value in probes.items()},
        "jit": "off",
    }
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    arguments = {
        "application_name": "loraplex",
        "client_encoding": "UTF8",
        "connect_timeout": _CONNECT_SECONDS,
        "tcp_user_timeout": _NETWORK_SECONDS * 1000,
        **{f"keepalives_{name}": value for name, value in probes.items()},
        # Of several hosts, the primary. A standby would answer with an older revision.
        "target_session_attrs": "read-write",
    }
    given = {name: value for name, value in url.query.items() if isinstance(value, str)}
    return arguments | given | {"options": f"{options} {given.get('options', '')}".strip()}


def _kind(error: Exception) -> type[LoraplexError] | None:
    """Return the class of our error for one of the driver or the pool; None if it is a defect of the service."""
    if isinstance(error, sa.exc.TimeoutError):
        return CatalogBusy
    cause = error.orig if isinstance(error, DBAPIError) else error
    state = getattr(cause, "sqlstate", None)
    if isinstance(cause, psycopg.DataError) and "NUL" in str(cause):
        return OutOfRange
    if state is None:
        # The driver's own errors: the connection was lost or refused.
        is_lost = isinstance(cause, psycopg.OperationalError | psycopg.InterfaceError)
        return CatalogUnavailable if is_lost else None
    return _ERRORS.get(state) or _ERRORS.get(state[:2])


def _translate(error: Exception, *, writes: bool, is_committing: bool) -> LoraplexError | None:
    kind = _kind(error)
    if kind is None:
        return None
    if kind is OutOfRange:
        return OutOfRange("a text has the character NUL, which the database cannot store", expected="text without NUL")
    cause = error.orig if isinstance(error, DBAPIError) else error
    # A COMMIT whose connection is lost may have been stored, or be stored yet.
    unknown = writes and is_committing and kind is CatalogUnavailable
    what = {
        CatalogBusy: "the catalogue is locked by another process; try again",
        CatalogUnavailable: "the catalogue's database cannot be reached",
        StorageFull: "the disk of the catalogue's database is full",
        StorageFailed: "the catalogue's database failed",
    }[kind]
    if writes and kind is not CatalogBusy:
        what += f": {UNKNOWN_OUTCOME if unknown else 'nothing was stored'}"
    # That a server cannot be reached is logged once, by the watch.
    if unknown or kind in (StorageFull, StorageFailed):
        log.error("%s (%s)", what, " ".join(str(cause).split()))
    return kind(what if kind is CatalogBusy else f"{what} ({type(cause).__name__})", outcome_unknown=unknown)
