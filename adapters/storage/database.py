"""The seam `Database`: transactions on the catalogue, and watches that notice the changes of other processes.

`sqlite_database` implements it for one machine, and `postgres_database` for several. Statements are portable: they are
SQLAlchemy Core, and tables and migrations are the same on both.
"""

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from adapters.errors import CatalogNotLoadable
from adapters.storage.store_identity import IdentifiedCatalog
from adapters.strict_json import replace_nan

_MIGRATIONS = Path(__file__).parent / "migrations"
# Changed names that a watch lists. Reading them takes a millisecond, on the event loop.
MAX_CHANGES = 1000
UNKNOWN_OUTCOME = "it is unknown whether the change was stored; look before you repeat it"


class CommitWatch(Protocol):
    """Watch of all changes, for a poll."""

    def change_number(self) -> int:
        """Return a number that is another one if anything was committed since the last call; raise `CatalogBusy`."""

    def close(self) -> None:
        """Close the connection."""


class CatalogWatch(Protocol):
    """Watch of the catalogue's revision, checked before every batch. For one event loop."""

    access_revision: int
    """Access revision at the last reading: it changes if a key is revoked or a limit is set."""
    epoch: int
    """Multiple of a large number that is added to both revisions, a higher one after each connection; 0 on SQLite."""

    def begin_read(self) -> "asyncio.Future[float] | None":
        """Begin to read the revision, and return a future that ends when it has been read; None if nothing is to wait.

        The future may be shared, so it must not be cancelled. Its result is 0, or the age of the revision in seconds if
        the database cannot be reached and the setting MAX_STALE_SECONDS allows an older one. It raises
        `CatalogUnavailable`.
        """

    def revision(self) -> int:
        """Return a revision that is no older than the last commit acknowledged before this call.

        If `begin_read` returned a future, that is the last commit acknowledged before its call. Raises `CatalogBusy` at
        once if a commit is under way: try again in a millisecond.
        """

    def changes_since(self, revision: int) -> Sequence[tuple[str, str]] | None:
        """Return the tenant and name of each change after a revision, up to the last call of `revision` or later.

        None means that anything may have changed: there are too many changes, or they are no longer listed. Raises
        `CatalogBusy` as `revision` does.
        """

    def limits(self, tenant: str) -> Mapping[str, Any]:
        """Return the limits of a tenant by name; empty if there is no such tenant. Raises what `revision` raises."""

    def close(self) -> None:
        """Close the connection."""


class WriterLocks(Protocol):
    """Locks of the processes that write blobs, for those on other machines. A lock ends with its process."""

    def hold(self, owner: str) -> None:
        """Hold the lock of an owner from now on; raise `CatalogUnavailable`."""

    def live(self, owners: Collection[str], connection: Connection | None = None) -> set[str]:
        """Return those of these owners whose locks are held, by any process.

        A caller in a transaction passes its connection: if each transaction waited for a second connection of the
        pool, those that hold the last ones would wait for each other.
        """

    def release(self) -> None:
        """Release the lock."""


class Database(IdentifiedCatalog, Protocol):
    """Transactions on the catalogue. JSON is stored without NaN and infinities, which become null.

    A method raises `CatalogUnavailable` if the database cannot be reached, and `CatalogBusy` if a lock cannot be had.
    """

    def read(self) -> AbstractContextManager[Connection]:
        """Read in one consistent transaction; raise `CatalogBusy`, `StorageFailed` or `TooManyOpenFiles`."""

    def write(self) -> AbstractContextManager[Connection]:
        """Write in one transaction, committed and durable when this ends without an error.

        Other writers of the catalogue wait for its end. Raises `CatalogBusy`, `StorageFull`, `StorageFailed` and
        `TooManyOpenFiles`. Nothing was stored then, unless the error has `outcome_unknown`.
        """

    def write_job(self) -> AbstractContextManager[Connection]:
        """Write rows of jobs, of token buckets or of usage as `write` does, and beside other writers if possible.

        The caller locks rows in one order, so that transactions do not deadlock.
        """

    def server_time(self, connection: Connection) -> float | None:
        """Return the time by the database's clock, in seconds since the epoch; None if it has no clock of its own."""

    def revision(self) -> int:
        """Return the catalogue's revision; raise what `read` raises."""

    def writer_locks(self) -> WriterLocks | None:
        """Return locks that every process on the catalogue sees; None if files of the data folder are such locks."""

    def durability_warnings(self) -> Sequence[str]:
        """Return what keeps acknowledged changes from being durable, in sentences; raise what `read` raises."""

    def catalog_watch(self) -> CatalogWatch:
        """Open a watch of the catalogue's revision."""

    def commit_watch(self) -> CommitWatch:
        """Open a watch of all changes, those of jobs for one."""

    def close(self) -> None:
        """Close every connection, except those of watches."""


def migrate(connection: Connection) -> None:
    """Create the tables, or bring them up to date, in the transaction of a connection."""
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def check_tables(connection: Connection, name: str) -> None:
    """Raise `CatalogNotLoadable` if a database has no tables, or those of another release."""
    versions = MigrationContext.configure(connection).get_current_heads()
    newest = ScriptDirectory.from_config(_config()).get_current_head()
    if not versions:
        raise CatalogNotLoadable(f"the catalogue {name} has no tables: no service has been started with it")
    if versions != (newest,):
        raise CatalogNotLoadable(
            f"the catalogue {name} has the tables of another release: {', '.join(versions)}; this one has {newest}. Use"
            " the release that its services have, or start a service of this one to upgrade them"
        )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config


def to_json(value: object) -> str:
    """Return a value as JSON, with null in place of NaN and infinities, which databases refuse."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(replace_nan(value), allow_nan=False)
