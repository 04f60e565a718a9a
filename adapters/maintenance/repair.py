"""Repair of what the doctor found.

Bytes that are lost are restored from another copy with the same digest: that of another version, or a file in
quarantine. Orphans move to quarantine, and damaged indexes are built again. Nothing is repaired in a folder whose
catalogue is damaged or does not belong to the blobs.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.access import audit
from adapters.access.audit import Action, Change
from adapters.errors import CatalogNotLoadable
from adapters.maintenance.blob_checks import SOURCES, Part, Problem, damage_of, read_parts
from adapters.maintenance.catalog_reader import opened_reader
from adapters.maintenance.doctor import Diagnosis, Finding, diagnose, find_drifts, integrity_findings
from adapters.storage import schema
from adapters.storage.blob_location import BlobLocation
from adapters.storage.blobs import BLOBS, Blobs, sync_folder
from adapters.storage.database import Database
from adapters.storage.pending_blobs import BlobWriter, live_owners
from adapters.storage.quarantine import Quarantine
from adapters.storage.sqlite_database import SqliteDatabase
from adapters.storage.store_identity import CATALOG, RUNNING, check_schema, connected
from adapters.storage.totals import add_to_totals
from adapters.storage.turns import Task, last_turn, store_turn

_CHUNK_BYTES = 2**20
_LOST = (Problem.MISSING_BLOB, Problem.SHORT_BLOB, Problem.WRONG_BYTES)


class Repair(NamedTuple):
    """Result of the repair of one finding."""

    finding: Finding
    is_repaired: bool
    action: str


class Owner(NamedTuple):
    """Adapter or data set whose rows are repaired or removed."""

    tenant: str
    table: sa.Table
    name: str


def repair(
    folder: Path,
    diagnosis: Diagnosis,
    blobs: Blobs | None = None,
    database: Database | None = None,
    *,
    remove_lost: bool = False,
) -> list[Repair]:
    """Repair what can be repaired; return what was done about each finding, in the same order.

    blobs, database: those in the folder by default.
    remove_lost: remove the versions whose bytes have no other copy, the statistics that are lost, and the aliases that
    point to no version. Raises `CatalogNotLoadable` if the tables are those of another release.
    """
    if diagnosis.has(Problem.STORE_MISMATCH):
        return [Repair(finding, False, _ADVICE.get(finding.problem, "not repaired")) for finding in diagnosis.findings]
    done: list[Repair] = []
    if database is None:
        check_schema(folder)
        if damage := integrity_findings(folder):
            left = _rebuild_indexes(folder)
            if left:
                return [Repair(finding, False, _ADVICE.get(finding.problem, "not repaired")) for finding in left]
            done = [Repair(finding, True, "the indexes were built again") for finding in damage]
            # The damage may have hidden the rest.
            diagnosis = diagnose(folder, blobs)
    with ExitStack() as stack:
        blobs = blobs or BlobLocation(folder=folder).open()
        surgeon = _Surgeon(folder, blobs, database, stack, remove_lost=remove_lost)
        return [*done, *(Repair(finding, *surgeon.treat(finding)) for finding in diagnosis.findings)]


_DAMAGED = "not repaired: stop the service and repeat this, or restore a backup"
_ADVICE = {
    Problem.STORE_MISMATCH: "not repaired: see 'A start that is refused' in docs/operations.md",
    Problem.DAMAGED_CATALOG: _DAMAGED,
    Problem.DAMAGED_INDEX: _DAMAGED,
    Problem.NOT_DURABLE: "not repaired: change the settings of the server",
}


def _rebuild_indexes(folder: Path) -> list[Finding]:
    """Keep a copy of the catalogue, and build its indexes again; return what SQLite still finds wrong with it."""
    catalog = folder / CATALOG
    kept = Quarantine(folder, now=time.time).new_kept_folder() / CATALOG
    # Damaged tables end both ways with an error, and nothing has changed.
    with suppress(CatalogNotLoadable), connected(catalog) as connection:
        # Not a copy of the file: closing it would release the locks that this process has on it.
        with closing(sqlite3.connect(kept)) as copy:
            connection.backup(copy)
        connection.execute("PRAGMA journal_mode=TRUNCATE")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("REINDEX")
    findings = integrity_findings(folder)
    # An index whose first page is damaged cannot be cleared, only left out of a new file. What another process commits
    # meanwhile would be lost.
    if not findings or live_owners(folder / RUNNING):
        return findings
    fresh = kept.with_name("rebuilt.sqlite3")
    with suppress(CatalogNotLoadable):
        _copy_tables(catalog, fresh)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.rename(catalog)
        sync_folder(folder)
    fresh.unlink(missing_ok=True)
    return integrity_findings(folder)


def _copy_tables(catalog: Path, target: Path) -> None:
    """Copy the tables to a new file without reading an index, and build the indexes there."""
    statement = "SELECT type, name, sql FROM old.sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"
    # `connected` opens files that exist.
    target.touch()
    with connected(target) as connection:
        connection.execute("ATTACH ? AS old", (str(catalog),))
        connection.execute("BEGIN")
        entries = connection.execute(statement).fetchall()
        for kind, name, sql in entries:
            if kind == "table":
                connection.execute(sql)
                # With the condition, SQLite copies rows instead of the pages of the table and its indexes.
                connection.execute(f"INSERT INTO main.{name} SELECT * FROM old.{name} NOT INDEXED WHERE true")
        connection.execute("DELETE FROM main.sqlite_sequence")
        connection.execute("INSERT INTO main.sqlite_sequence SELECT * FROM old.sqlite_sequence")
        for kind, _, sql in entries:
            if kind == "index":
                connection.execute(sql)
        connection.execute("COMMIT")


class _Surgeon:
    """Repairs one store."""

    def __init__(
        self, folder: Path, blobs: Blobs, database: Database | None, stack: ExitStack, *, remove_lost: bool
    ) -> None:
        self._folder = folder
        self._remove_lost = remove_lost
        self._opened = partial(opened_reader, folder, database)
        self._database: Database = database or stack.enter_context(closing(SqliteDatabase(folder)))
        self._quarantine = Quarantine(folder, now=time.time)
        self._blobs = blobs
        self._writer = BlobWriter(self._database, self._blobs, folder)
        stack.callback(self._writer.close)
        # Names of the blobs after the sweep.
        self._swept: set[str] | None = None

    def treat(self, finding: Finding) -> tuple[bool, str]:
        """Repair what a finding is about; return whether that was possible, and what was done."""
        if finding.problem is Problem.ORPHAN:
            return self._sweep(finding)
        if finding.problem in _LOST and finding.part is not None:
            return self._restore(finding.part)
        if finding.problem is Problem.WRONG_TOTAL:
            return self._correct()
        if finding.problem is Problem.DAMAGED_INDEX:
            return self._rebuild(finding)
        if finding.problem is Problem.DANGLING_REFERENCE and self._remove_lost:
            return self._remove_dangling(finding)
        return False, _ADVICE.get(finding.problem, "not repaired")

    def _rebuild(self, finding: Finding) -> tuple[bool, str]:
        """Build an index of PostgreSQL again; writers of its table wait meanwhile."""
        with self._database.write() as connection:
            quoted = connection.dialect.identifier_preparer.quote_identifier(finding.subject)
            connection.execute(sa.text(f"REINDEX INDEX {quoted}"))
        return True, "the index was built again"

    def _sweep(self, finding: Finding) -> tuple[bool, str]:
        if self._swept is None:
            self._writer.sweep()
            self._swept = set(self._blobs.names(with_temporary=True))
        is_gone = Path(finding.subject).name not in self._swept
        return is_gone, f"moved to {self._quarantine.folder}" if is_gone else "it could not be moved"

    def _restore(self, part: Part) -> tuple[bool, str]:
        """Write the bytes of a part to a new blob, from another copy if there is one."""
        with closing(self._copies(part)) as copies:
            for path, offset, source in copies:
                return self._restore_from(path, offset, source, part)
        return self._remove(part) if self._remove_lost else (False, "there is no other copy of its bytes")

    def _restore_from(self, path: Path, offset: int, source: str, part: Part) -> tuple[bool, str]:
        with self._writer.upload() as upload:
            name = upload.write(_copier(path, offset, part.bytes or 0))
            with self._database.write() as connection:
                moved = sa.update(_table(part)).where(*_is_row(part)).values({part.source.column: name} | _start(part))
                if is_moved := connection.execute(moved).rowcount == 1:
                    upload.publish(connection)
                    _increment_revision(connection)
                    _record(connection, [_owner(part)], Action.ADAPTER_REPAIR, Action.DATASET_REPAIR)
        self._set_aside_unused(part.file)
        return is_moved, f"its bytes were copied from {source}"

    def _copies(self, part: Part) -> Generator[tuple[Path, int, str], None, None]:
        """Yield the files that have the bytes of a part, with the offset and what they are: other blobs first.

        Those of the quarantine in the folder follow. A file is there until the next one.
        """
        if part.digest is None or part.bytes is None:
            return
        # Of a data set too: its copy may be a slice of a longer file.
        wanted = part._replace(source=part.source._replace(is_whole=False))
        for file, offset in self._rows_with(part.digest, part.bytes):
            with self._blobs.stored_copy(file) as path:
                if not damage_of(path, [wanted._replace(offset=offset)]):
                    yield path, offset, f"{BLOBS}/{file}"
        candidates = []
        for path in sorted(self._quarantine.folder.rglob("*")):
            if path.is_file() and path.name.endswith(part.file):
                candidates.append((path, part.offset))
            elif path.is_file() and path.stat().st_size == part.bytes:
                candidates.append((path, 0))
        for path, offset in candidates:
            if not damage_of(path, [wanted._replace(offset=offset)]):
                yield path, offset, str(path.relative_to(self._folder))

    def _rows_with(self, digest: str, length: int) -> list[tuple[str, int]]:
        """Return the blob and offset of each row whose bytes have this digest."""
        with self._opened() as catalog:
            return [
                (file, offset)
                for source in SOURCES
                if source.location[2] != "NULL"
                for file, offset in catalog.rows(
                    f"SELECT {source.column}, {source.location[0]} FROM {source.table} WHERE digest = ? AND bytes = ?",
                    (digest, length),
                )
            ]

    def _remove(self, part: Part) -> tuple[bool, str]:
        """Remove the row of a part whose bytes are lost, or its reference to lost statistics."""
        table, is_row = _table(part), _is_row(part)
        if part.source.table == "jobs":
            return False, "the job fails when it runs: cancel it"
        with self._database.write() as connection:
            if part.source.column == "statistics":
                connection.execute(sa.update(table).where(*is_row).values(statistics=None))
                action = "the reference to the statistics was removed"
            else:
                if connection.execute(sa.delete(table).where(*is_row)).rowcount:
                    _subtract_from_totals(connection, part)
                _remove_consequences(connection, _owner(part))
                action = "the version was removed"
            _increment_revision(connection)
            _record(connection, [_owner(part)], Action.ADAPTER_LOSE, Action.DATASET_LOSE)
        self._set_aside_unused(part.file)
        return True, action

    def _remove_dangling(self, finding: Finding) -> tuple[bool, str]:
        table = finding.subject.partition(" ")[0]
        if table not in ("aliases", "trashed_aliases", "datasets"):
            return False, "not repaired"
        # Looked for without the write lock: it takes seconds if there are a million adapters.
        with self._database.read() as connection:
            losers = _find_dangling(connection)
        with self._database.write() as connection:
            for owner in losers:
                _remove_consequences(connection, owner)
            _increment_revision(connection)
            _record(connection, losers, Action.ADAPTER_LOSE, Action.DATASET_LOSE)
        return True, "the reference was removed"

    def _correct(self) -> tuple[bool, str]:
        """Add to the totals and tallies what a count says they lack. Changes meanwhile add to them as always."""
        while not self._correct_once():
            pass
        return True, "it was corrected by a count"

    def _correct_once(self) -> bool:
        """Count once; return whether all corrections were made. A repair on another machine may make them too."""
        own: float | None = None
        for drift in find_drifts(self._database):
            with self._database.write() as connection:
                if last_turn(connection, Task.CORRECT) not in (drift.last_correction, own):
                    return False
                drift.correct(connection)
                own = store_turn(self._database, connection, Task.CORRECT, now=time.time)
        return True

    def _set_aside_unused(self, file: str) -> None:
        """Move a damaged blob to quarantine if no row refers to it any more."""
        with self._opened() as catalog:
            is_used = bool(read_parts(catalog, [file]))
        if not is_used:
            self._blobs.set_aside([file])


# Versions, and their owners or aliases.
_ALIASES = ((schema.aliases, schema.versions), (schema.trashed_aliases, schema.trashed_versions))
_OWNERS = ((schema.adapters, schema.versions, "adapter"), (schema.datasets, schema.dataset_versions, "dataset"))


def _points_to_none(aliases: sa.Table, versions: sa.Table) -> sa.ColumnElement[bool]:
    return ~sa.exists().where(*(versions.c[name] == aliases.c[name] for name in ("tenant", "adapter", "version")))


def _has_no_version(owners: sa.Table, versions: sa.Table, name: str) -> sa.ColumnElement[bool]:
    is_owned = (versions.c.tenant == owners.c.tenant, versions.c[name] == owners.c.name)
    return ~owners.c.deleted & ~sa.exists().where(*is_owned)


def _find_dangling(connection: Connection) -> set[Owner]:
    """Return the adapters with an alias to no version, and the adapters and data sets without versions."""
    losers: set[Owner] = set()
    for aliases, versions in _ALIASES:
        rows = connection.execute(
            sa.select(aliases.c.tenant, aliases.c.adapter).where(_points_to_none(aliases, versions))
        )
        losers |= {Owner(row.tenant, schema.adapters, row.adapter) for row in rows}
    for owners, versions, name in _OWNERS:
        rows = connection.execute(
            sa.select(owners.c.tenant, owners.c.name).where(_has_no_version(owners, versions, name))
        )
        losers |= {Owner(row.tenant, owners, row.name) for row in rows}
    return losers


def _remove_consequences(connection: Connection, owner: Owner) -> None:
    """Remove its aliases that point to no version, and mark it as deleted if it has none."""
    for aliases, versions in _ALIASES if owner.table is schema.adapters else ():
        are_its = (aliases.c.tenant == owner.tenant, aliases.c.adapter == owner.name)
        connection.execute(sa.delete(aliases).where(*are_its, _points_to_none(aliases, versions)))
    for owners, versions, name in _OWNERS:
        if owner.table is owners:
            is_it = (owners.c.tenant == owner.tenant, owners.c.name == owner.name)
            is_lost = (*is_it, _has_no_version(owners, versions, name))
            lost = connection.execute(sa.update(owners).where(*is_lost).values(deleted=True)).rowcount
            add_to_totals(connection, tenant=owner.tenant, **{owners.name: -lost})


def _subtract_from_totals(connection: Connection, part: Part) -> None:
    """Change the totals of a tenant whose version was removed."""
    table, number_of_bytes = part.source.table, part.bytes or 0
    changes = {
        "versions": {"versions": -1, "version_bytes": -number_of_bytes},
        "trashed_versions": {"trashed_bytes": -number_of_bytes},
        "dataset_versions": {"dataset_bytes": -number_of_bytes},
    }
    add_to_totals(connection, tenant=str(part.key[0]), **changes[table])


def _owner(part: Part) -> Owner:
    tenant, name = map(str, part.key[:2])
    return Owner(tenant, schema.datasets if part.source.table == "dataset_versions" else schema.adapters, name)


def _record(connection: Connection, owners: Iterable[Owner], of_adapter: Action, of_dataset: Action) -> None:
    """Add an entry of the audit log for each adapter and each data set."""
    for owner in owners:
        action = of_dataset if owner.table is schema.datasets else of_adapter
        audit.record(connection, [Change(action, f"{owner.table.name}/{owner.name}")], tenant=owner.tenant)


def _table(part: Part) -> sa.Table:
    return schema.metadata.tables[part.source.table]


def _is_row(part: Part) -> Sequence[sa.ColumnElement[bool]]:
    """Return the conditions for the row of a part, as long as it refers to the same blob."""
    table = _table(part)
    is_key = [table.c[name] == value for name, value in zip(part.source.key, part.key, strict=True)]
    return [*is_key, table.c[part.source.column] == part.file]


def _start(part: Part) -> dict[str, int]:
    """Return the columns that say that the bytes are at the beginning of the blob."""
    return {"offset": 0} if "offset" in _table(part).c else {}


def _copier(path: Path, offset: int, length: int) -> Callable[[BinaryIO], None]:
    def copy(target: BinaryIO) -> None:
        with path.open("rb") as source:
            source.seek(offset)
            left = length
            while left and (chunk := source.read(min(left, _CHUNK_BYTES))):
                target.write(chunk)
                left -= len(chunk)

    return copy


def _increment_revision(connection: Connection) -> None:
    """Raise the revision, so that every process drops what it has cached of the catalogue."""
    revision = schema.catalog.c.revision
    connection.execute(sa.update(schema.catalog).values(revision=revision + 1))
