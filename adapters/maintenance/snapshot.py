"""Snapshots of a catalogue: a SQLite file with the rows that one transaction sees, whatever database they are in.

The source is only read. Backups have such a file, and a store is copied to other storage from one.
"""

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.clock import rfc3339
from adapters.errors import CatalogBusy, CatalogNotLoadable
from adapters.maintenance.table_copy import Report, TableSum, copy_tables, finish_copy
from adapters.storage.database import Database
from adapters.storage.schema import catalog, job_adapters, jobs, pending_blobs, tenants
from adapters.storage.sqlite_database import SqliteDatabase
from adapters.storage.store_identity import CATALOG, check_integrity, connected

_BUSY_SECONDS = 15
# A transaction that is read from for longer than other sessions may be idle.
_LONG_READ = sa.text("SET LOCAL idle_in_transaction_session_timeout = '1h'")
# Adapters of a job that is not stored yet: its id is pending meanwhile.
_UNSTORED = "DELETE FROM job_adapters WHERE job IN (SELECT key FROM pending_blobs) AND job NOT IN (SELECT id FROM jobs)"

_UNSTORED_JOBS = (
    sa.select(job_adapters.c.job)
    .where(job_adapters.c.job.in_(sa.select(pending_blobs.c.key)), job_adapters.c.job.not_in(sa.select(jobs.c.id)))
    .distinct()
)


def copy_file(catalog: Path, target: Path) -> None:
    """Copy a catalogue in use to a new file, without a change to the folder that it is in.

    The copy has the tables that the catalogue has. Raises `CatalogBusy` and `CatalogNotLoadable`.
    """
    uri = f"file:{quote(str(catalog))}?mode=ro"
    try:
        with (
            closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS)) as source,
            closing(sqlite3.connect(target)) as copy,
        ):
            source.backup(copy)
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0)
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise CatalogBusy(f"the catalogue {catalog} is locked by another process") from error
        if code != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise CatalogNotLoadable(f"the catalogue {catalog} cannot be read: {error}") from error
        _copy_with_journal(catalog, target)
    remove_pending(target)


def remove_pending(path: Path) -> None:
    """Remove the pending blobs and the unstored jobs from a copy of a catalogue, because their owners are elsewhere."""
    with connected(path) as connection:
        if connection.execute("PRAGMA table_info(pending_blobs)").fetchone():
            connection.execute(_UNSTORED)
            connection.execute("DELETE FROM pending_blobs")


def copy_database(database: Database, target: Path, *, report: Report = lambda _: None) -> dict[str, TableSum]:
    """Copy the catalogue of a database to a new SQLite file; raise what reading it raises.

    Return the sums of the tables of the database, which has the adapters of jobs that are being stored too.
    """
    folder = target.with_name(f"{target.name}.new")
    folder.mkdir()
    with closing(SqliteDatabase(folder)) as copy, long_read(database) as source:
        sums = copy_tables(source, copy, report=report)
        with copy.write() as connection:
            finish_copy(source, connection)
            for job_id in source.scalars(_UNSTORED_JOBS).all():
                connection.execute(sa.delete(job_adapters).where(job_adapters.c.job == job_id))
    (folder / CATALOG).rename(target)
    shutil.rmtree(folder)
    return sums


def _copy_with_journal(catalog: Path, target: Path) -> None:
    """Copy a catalogue whose last writer died in a transaction. Only the copy rolls that back."""
    journal = Path(f"{catalog}-journal")
    before = [(path.stat().st_size, path.stat().st_mtime_ns) for path in (catalog, journal)]
    shutil.copyfile(journal, f"{target}-journal")
    shutil.copyfile(catalog, target)
    if before != [(path.stat().st_size, path.stat().st_mtime_ns) for path in (catalog, journal)]:
        raise CatalogBusy(f"the catalogue {catalog} was changed while it was copied; try again")


@contextmanager
def long_read(database: Database) -> Iterator[Connection]:
    """Read in one transaction that may be idle for long."""
    with database.read() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(_LONG_READ)
        yield connection


@contextmanager
def snapshot_of_folder(folder: Path, scratch: Path) -> Iterator[SqliteDatabase]:
    """Yield a copy of the catalogue of a data folder, upgraded to the tables of this release and checked.

    What the upgrade of an older catalogue makes up depends on its file alone, so that a repetition has the same rows.
    """
    if not (folder / CATALOG).exists():
        raise CatalogNotLoadable(f"{folder} has no catalogue {CATALOG}")
    copy_file(folder / CATALOG, scratch / CATALOG)
    check_integrity(scratch / CATALOG)
    with connected(scratch / CATALOG) as old:
        has_tenants, has_ids = (
            column in {row[1] for row in old.execute(f"PRAGMA table_info({table})")}
            for table, column in (("tenants", "name"), ("catalog", "store_id"))
        )
        has_id = has_ids and old.execute("SELECT store_id FROM catalog").fetchone()[0] is not None
    with closing(SqliteDatabase(scratch)) as database, (folder / CATALOG).open("rb") as file:
        with database.write() as connection:
            if not has_id:
                store_id = hashlib.file_digest(file, "sha256").hexdigest()[:32]
                connection.execute(sa.update(catalog).values(store_id=store_id))
            if not has_tenants:
                created_at = rfc3339(os.fstat(file.fileno()).st_mtime)
                connection.execute(sa.update(tenants).values(created_at=created_at))
        yield database
