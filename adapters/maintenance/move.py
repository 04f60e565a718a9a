"""Moves of a store between a data folder and PostgreSQL with a bucket. The source is only read.

To PostgreSQL and a bucket:

1. The target's catalogue gets the id `unfinished-copy-of-` with the store's, and then the bucket the store's id. From
   now on, every service refuses the target, and a repetition of the command accepts it. A bucket that has the store's
   id without such a catalogue is in use, and refused.
2. Each blob is compared with the digests of its rows, copied, and read back. Checkpoints are copied.
3. The rows of each table are copied in batches. The number of rows and a digest of each table are compared.
4. In one transaction, the target's catalogue gets the store's id and its revision: the copy is complete.

To a folder, the rows are first copied to a file elsewhere, and then the blobs. The file gets its name,
`catalog.sqlite3`, in the last step; a folder without it is unfinished.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

from adapters.errors import MigrationFailed
from adapters.maintenance.blob_checks import Damage, Part, Problem, damage_of, read_parts, referenced_files
from adapters.maintenance.catalog_reader import opened_reader
from adapters.maintenance.snapshot import copy_database, long_read, snapshot_of_folder
from adapters.maintenance.table_copy import Report, TableSum, copied_tables, copy_tables, finish_copy, sum_tables
from adapters.storage.blob_location import BlobLocation
from adapters.storage.blobs import Blobs, sync_folder
from adapters.storage.database import Database
from adapters.storage.pending_blobs import live_owners
from adapters.storage.schema import batched, catalog, tenants
from adapters.storage.sqlite_database import SqliteDatabase
from adapters.storage.store_identity import CATALOG, CHECKPOINTS, RUNNING, UNFINISHED, WRITERS

if TYPE_CHECKING:
    from adapters.storage.object_blobs import ObjectBlobs
    from adapters.storage.postgres_database import PostgresDatabase

APPLICATION = "loraplex migrate"
_THREADS = 4
_MOST_LISTED = 20
_SECONDS_BETWEEN_REPORTS = 2.0
_CHECKPOINT = re.compile(r"([^.]+\.\d+)\.safetensors")
# Sessions of any role, other than this command's. PostgreSQL hides the type of other roles' sessions; its own workers
# have no role.
_SESSIONS = sa.text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usesysid IS NOT NULL"
    " AND coalesce(backend_type, 'client backend') = 'client backend'"
    " AND application_name IS DISTINCT FROM :application"
)


@dataclass(slots=True)
class BlobCounts:
    """Blobs that a move looked at."""

    copied: int = 0
    bytes: int = 0
    """Bytes of the copied ones."""
    present: int = 0
    """Those that an earlier run had copied."""
    trusted: int = 0
    """Those of them that were not compared."""
    missing: int = 0
    """Those that were removed while the service ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Result of a move."""

    store_id: str
    revision: int
    is_complete: bool
    """Whether the target is complete; after a move of the blobs alone, by an earlier run."""
    blobs: BlobCounts
    checkpoints: int = 0
    tables: Mapping[str, TableSum] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveOptions:
    """How a move is done, and where it reports its progress."""

    scratch: Path
    """An empty folder for a copy of the catalogue."""
    blobs_only: bool = False
    """Copy the blobs, beside a running service, and no rows."""
    trusts_copies: bool = False
    """Do not read the blobs again that an earlier run has copied, unless the target is complete."""
    report: Report = lambda _: None


def open_postgres(url: str, *, migrates: bool) -> "PostgresDatabase":
    """Open a PostgreSQL database with an `application_name` that distinguishes this command from services."""
    # The extra `postgres` installs what this needs.
    from adapters.storage.postgres_database import PostgresDatabase

    named = sa.make_url(url).update_query_dict({"application_name": APPLICATION})
    return PostgresDatabase(named.render_as_string(hide_password=False), migrates=migrates)


def move_to_servers(folder: Path, database: Database, blobs: "ObjectBlobs", options: MoveOptions) -> Move:
    """Copy a data folder to a database and a bucket, which have to be empty, or to have an unfinished copy of it.

    Raises `MigrationFailed`, also if a service runs on the folder and rows are to be copied, `CatalogNotLoadable`,
    `CatalogUnavailable` and `StorageFailed`.
    """
    if not options.blobs_only:
        _check_is_stopped(folder)
    before = _state(folder)
    with snapshot_of_folder(folder, options.scratch) as snapshot:
        source_blobs = BlobLocation(folder=folder).open()
        with snapshot.read() as connection:
            store_id, revision = connection.execute(sa.select(catalog.c.store_id, catalog.c.revision)).one()
        if (folder_id := source_blobs.read_store_id()) not in (None, store_id):
            raise MigrationFailed(f"the catalogue belongs to the store {store_id}, and the blobs to {folder_id}")
        is_complete = begin_copy(database, store_id, blobs)
        counts = copy_blobs(snapshot, source_blobs, blobs, options=options, only_compares=is_complete)
        if options.blobs_only:
            return Move(store_id=store_id, revision=revision, is_complete=is_complete, blobs=counts)
        saved = [] if is_complete else _checkpoints(folder)
        for name, path in saved:
            blobs.put_checkpoint(name, path)

        def check_source() -> None:
            _check_is_stopped(folder)
            if _state(folder) != before:
                raise MigrationFailed(f"the catalogue of {folder} was changed during the copy: repeat the command")

        tables = copy_rows(
            snapshot, database, is_complete=is_complete, check_source=check_source, report=options.report
        )
    return Move(
        store_id=store_id, revision=revision, is_complete=True, blobs=counts, checkpoints=len(saved), tables=tables
    )


def move_to_folder(folder: Path, database: Database, blobs: "ObjectBlobs", options: MoveOptions) -> Move:
    """Copy a database and a bucket to a data folder, which has to be empty, or to have an unfinished copy of them.

    Raises what `move_to_servers` raises.
    """
    if not options.blobs_only:
        _check_has_no_sessions(database)
    target = BlobLocation(folder=folder).open()
    identity = database.identity(with_references=False)
    if identity is None or identity.store_id is None or identity.store_id.startswith(UNFINISHED):
        raise MigrationFailed(f"the catalogue {database.name} is unfinished or has no store")
    if (bucket_id := blobs.read_store_id()) != identity.store_id:
        raise MigrationFailed(f"the catalogue belongs to the store {identity.store_id}, and the blobs to {bucket_id}")
    if (folder / CATALOG).exists() or target.read_store_id() not in (None, identity.store_id):
        raise MigrationFailed(f"{folder} has another store, or a complete copy: take an empty folder")
    if target.read_store_id() is None and folder.exists() and any(folder.iterdir()):
        raise MigrationFailed(f"{folder} is not empty: take an empty folder")
    copied = copy_database(database, options.scratch / CATALOG, report=options.report)
    with closing(SqliteDatabase(options.scratch)) as snapshot:
        target.create_folder()
        target.write_store_id(identity.store_id)
        # What a run that was killed was writing.
        target.remove(set(target.names(with_temporary=True)).difference(target.names()))
        counts = copy_blobs(snapshot, blobs, target, options=options)
        with snapshot.read() as connection:
            row, tables = connection.execute(sa.select(catalog)).one(), sum_tables(connection)
    if options.blobs_only:
        return Move(store_id=identity.store_id, revision=row.revision, is_complete=False, blobs=counts)
    names = blobs.checkpoints()
    for name in names:
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        blobs.fetch_checkpoint(name, folder / CHECKPOINTS / f"{name}.safetensors")
    _check_has_no_sessions(database)
    with long_read(database) as connection:
        # The revision alone would not do: jobs, keys and usage do not raise it.
        if connection.execute(sa.select(catalog)).one() != row or sum_tables(connection) != copied:
            raise MigrationFailed(f"the catalogue {database.name} was changed during the copy: repeat the command")
    place_catalog(options.scratch / CATALOG, folder)
    return Move(
        store_id=identity.store_id,
        revision=row.revision,
        is_complete=True,
        blobs=counts,
        checkpoints=len(names),
        tables=tables,
    )


def begin_copy(database: Database, store_id: str, blobs: "ObjectBlobs | None" = None) -> bool:
    """Make sure that a service refuses the target until the copy is complete; return whether it is complete already.

    Without `blobs`, only the rows are copied. Raises `MigrationFailed` if the target is neither empty nor a copy of the
    store. A bucket of the same store whose catalogue is not the target's belongs to a service.
    """
    blobs_id = None if blobs is None else blobs.read_store_id()
    with database.read() as connection:
        catalog_id = connection.scalars(sa.select(catalog.c.store_id)).one()
        is_empty = all(_is_empty(connection, table) for table in copied_tables())
    unfinished = f"{UNFINISHED}{store_id}"
    advice = "take an empty database and an empty prefix"
    if catalog_id == store_id and (blobs_id == store_id or (blobs is None and not is_empty)):
        return True
    if blobs_id not in (None, store_id):
        raise MigrationFailed(f"the blobs of the target belong to the store {blobs_id}, not to {store_id}: {advice}")
    if catalog_id != unfinished and not is_empty:
        raise MigrationFailed(f"the catalogue {database.name} has the store {catalog_id}, not {store_id}: {advice}")
    if blobs is not None and blobs_id == store_id and catalog_id != unfinished:
        raise MigrationFailed(
            f"{blobs.url} has the blobs of the store {store_id}, and the catalogue {database.name} is no copy of it: a "
            f"service may use them, so {advice}"
        )
    if blobs is not None and blobs_id is None and blobs.names():
        raise MigrationFailed(f"the target has blobs that belong to no store: {advice}")
    # Before the bucket's id, with which a repetition is only accepted if the catalogue has this one.
    with database.write() as connection:
        connection.execute(sa.update(catalog).values(store_id=unfinished))
    if blobs is not None:
        blobs.create_folder()
        blobs.write_store_id(store_id)
    return False


def _is_empty(connection: sa.Connection, table: sa.Table) -> bool:
    statement = sa.select(sa.literal(1)).select_from(table).limit(1)
    if table is tenants:
        # The migrations insert it.
        statement = statement.where(tenants.c.name != "default")
    return connection.execute(statement).first() is None


def copy_rows(
    snapshot: SqliteDatabase,
    database: Database,
    *,
    is_complete: bool,
    check_source: Callable[[], object] = lambda: None,
    report: Report = lambda _: None,
) -> Mapping[str, TableSum]:
    """Copy every table and complete the target, or compare the tables if it is complete; return their sums.

    `check_source` is called before the target is completed, and may raise.
    """
    with snapshot.read() as source:
        if not is_complete:
            sums = copy_tables(source, database, report=report)
            check_source()
            with database.write() as connection:
                finish_copy(source, connection)
            return sums
        with long_read(database) as connection:
            sums = sum_tables(connection)
            same_revision = connection.execute(sa.select(catalog)).one() == source.execute(sa.select(catalog)).one()
        expected = sum_tables(source)
    different = [name for name in expected if sums[name] != expected[name]]
    if different or not same_revision:
        tables = ", ".join(different) or catalog.name
        raise MigrationFailed(
            f"the target is a complete copy, and it or the source has changed since: {tables}. Nothing was copied: use "
            "the target, or take an empty one"
        )
    return sums


def copy_blobs(
    snapshot: SqliteDatabase, source: Blobs, target: Blobs, *, options: MoveOptions, only_compares: bool = False
) -> BlobCounts:
    """Copy the blobs that rows refer to, and check each: before in the source, and after in the target.

    Raises `MigrationFailed` with what is damaged or missing in the source, after all others were copied.
    """
    with opened_reader(snapshot.path.parent) as reader:
        referenced = sorted(set(referenced_files(reader)))
        there = set(target.names())
        progress = _Progress(len(referenced), options.report)
        copier = _BlobCopier(source, target, there, options=options, only_compares=only_compares)
        with ThreadPoolExecutor(_THREADS) as pool:
            for names in batched(referenced):
                parts = read_parts(reader, names)
                for outcome in pool.map(copier.copy, names, (parts[name] for name in names)):
                    progress.add(outcome)
    if progress.damages:
        raise _damaged_source(progress.damages)
    if not (options.blobs_only or only_compares):
        # Of an earlier run beside the service, which has removed them since.
        target.set_aside(there.difference(referenced))
    return progress.counts


def _damaged_source(damages: Sequence[Damage]) -> MigrationFailed:
    listed = [f"- {damage.part}: {damage.detail}" for damage in damages[:_MOST_LISTED]]
    if len(damages) > _MOST_LISTED:
        listed.append(f"- and {len(damages) - _MOST_LISTED} more")
    return MigrationFailed(
        f"{len(damages)} parts of blobs are missing or damaged in the source, and no rows were copied. Repair them "
        "with loraplex doctor --repair, and --remove-lost if there is no other copy:\n" + "\n".join(listed)
    )


class _Outcome(NamedTuple):
    """Result of copying one blob."""

    copied_bytes: int | None = None
    """None if it was not copied."""
    is_missing: bool = False
    """Whether it was removed while the service ran."""
    is_trusted: bool = False
    """Whether a copy that is there was not compared."""
    damages: Sequence[Damage] = ()


class _Progress:
    """Counts of the blobs so far, reported now and then."""

    def __init__(self, total: int, report: Report) -> None:
        self.counts = BlobCounts()
        self.damages: list[Damage] = []
        self._done, self._total = 0, total
        self._report = report
        self._reported_at = time.monotonic()

    def add(self, outcome: _Outcome) -> None:
        """Count a blob."""
        self.damages += outcome.damages
        if outcome.copied_bytes is not None:
            self.counts.copied += 1
            self.counts.bytes += outcome.copied_bytes
        elif outcome.is_missing:
            self.counts.missing += 1
        elif not outcome.damages:
            self.counts.present += 1
            self.counts.trusted += outcome.is_trusted
        self._done += 1
        if self._done == self._total or time.monotonic() - self._reported_at > _SECONDS_BETWEEN_REPORTS:
            self._reported_at = time.monotonic()
            self._report(f"blobs: {self._done:,} of {self._total:,}, {self.counts.bytes:,} bytes copied")


class _BlobCopier:
    """Copies blobs of one store, from several threads."""

    def __init__(
        self, source: Blobs, target: Blobs, there: set[str], *, options: MoveOptions, only_compares: bool
    ) -> None:
        self._source, self._target = source, target
        self._there = there
        self._options = options
        self._only_compares = only_compares

    def copy(self, name: str, parts: Sequence[Part]) -> _Outcome:
        """Copy a blob unless the target has it; return what became of it."""
        is_there = name in self._there
        if is_there and self._options.trusts_copies and not self._only_compares:
            return _Outcome(is_trusted=True)
        with self._source.stored_copy(name) as path:
            # Before the check of the parts: if the file changes after it, the copy does not have this digest.
            digest = _digest_of(path)
            damages = damage_of(path, parts)
            if digest is None or damages:
                # Beside a service, it may have been removed since the catalogue was read.
                if self._options.blobs_only and {damage.problem for damage in damages} == {Problem.MISSING_BLOB}:
                    return _Outcome(is_missing=True)
                if not damages:
                    raise MigrationFailed(f"the blob {name} cannot be read in the source")
                return _Outcome(damages=damages)
            if is_there and self._target.has_digest(name, digest):
                return _Outcome()
            if self._only_compares:
                raise MigrationFailed(f"the target is a complete copy, but the blob {name} is missing or damaged there")
            if is_there:
                self._target.remove([name])
            self._target.write_file(name, path)
            size = path.stat().st_size
        if not self._target.has_digest(name, digest):
            raise MigrationFailed(f"the blob {name} has other bytes in the target than were written")
        return _Outcome(size)


def place_catalog(path: Path, folder: Path) -> None:
    """Copy a catalogue into a data folder, durably and atomically."""
    partial = folder / f"{CATALOG}.partial"
    with path.open("rb") as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target)
        target.flush()
        os.fsync(target.fileno())
    partial.rename(folder / CATALOG)
    sync_folder(folder)


def _digest_of(path: Path) -> str | None:
    """Return the digest of a file; None if it cannot be read, which `damage_of` reports."""
    with suppress(OSError), path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    return None


def _checkpoints(folder: Path) -> list[tuple[str, Path]]:
    """Return name and path of the checkpoints of jobs that have not ended."""
    paths = sorted((folder / CHECKPOINTS).glob("*"))
    return [(match[1], path) for path in paths if (match := _CHECKPOINT.fullmatch(path.name))]


def _state(folder: Path) -> tuple[int, int]:
    """Return what changes with each change of the catalogue in a folder."""
    with suppress(FileNotFoundError):
        status = (folder / CATALOG).stat()
        return status.st_size, status.st_mtime_ns
    return 0, 0


def _check_is_stopped(folder: Path) -> None:
    """Raise `MigrationFailed` if a process uses a data folder."""
    if live_owners(folder / RUNNING) or live_owners(folder / WRITERS):
        raise MigrationFailed(
            f"a service runs on {folder}: stop it to copy the rows, or copy the blobs alone first (--blobs-only)"
        )


def _check_has_no_sessions(database: Database) -> None:
    with database.read() as connection:
        sessions = connection.scalar(_SESSIONS, {"application": APPLICATION})
    if sessions:
        raise MigrationFailed(
            f"{sessions} sessions are connected to {database.name}: stop all services to copy the rows, or copy the "
            "blobs alone first (--blobs-only)"
        )
