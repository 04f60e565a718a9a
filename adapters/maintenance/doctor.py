"""Doctor: the checks of a data folder, which change nothing.

The folder may be in use. Every finding is therefore looked at twice: what a process changed meanwhile is no finding.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.errors import CatalogNotLoadable, StorageFailed
from adapters.jobs import job_adapters
from adapters.maintenance.blob_checks import Damage, Part, Problem, read_parts, referenced_files, stored_damage
from adapters.maintenance.catalog_reader import CatalogReader, SqliteReader, opened_reader
from adapters.storage import totals
from adapters.storage.blob_location import BlobLocation
from adapters.storage.blobs import BLOBS, Blobs, blob_key
from adapters.storage.database import Database
from adapters.storage.schema import batched, jobs, metadata
from adapters.storage.sqlite_database import SqliteDatabase
from adapters.storage.store_identity import CATALOG, catalog_bytes, check_schema, check_store
from adapters.storage.turns import Task, last_turn

# A larger catalogue is checked a table at a time, because no other process can commit meanwhile.
_MAX_BYTES_AT_ONCE = 256 * 2**20
_MOST_FINDINGS = 1000
# What SQLite says of an index that does not have the rows of its table.
_INDEX_WORDS = ("missing from index", "wrong # of entries in index", "non-unique entry in index")
_JSON_COLUMNS = (
    *((table, name) for table in ("versions", "trashed_versions") for name in ("metrics", "labels", "lineage")),
    *(("jobs", "spec"), ("jobs", "history"), ("jobs", "progress"), ("jobs", "result"), ("jobs", "error")),
    *(("dataset_versions", "columns"), ("dataset_versions", "bad_rows")),
)

# Opens the catalogue for short reads.
Opened: TypeAlias = Callable[[], AbstractContextManager[CatalogReader]]

_INDEXES = sa.text(
    "SELECT c.oid::bigint AS oid, c.relname, i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
    " JOIN pg_class t ON t.oid = i.indrelid JOIN pg_am a ON a.oid = c.relam AND a.amname = 'btree'"
    " WHERE t.relnamespace = current_schema()::regnamespace AND t.relname = ANY(:tables) ORDER BY c.relname"
)
_HAS_AMCHECK = sa.text(
    "SELECT CASE WHEN to_regprocedure('bt_index_check(regclass,boolean)') IS NULL THEN false"
    " ELSE has_function_privilege(to_regprocedure('bt_index_check(regclass,boolean)')::oid, 'EXECUTE') END"
)
_CHECK_INDEX = sa.text("SELECT bt_index_check(CAST(:index AS oid)::regclass, true)")


class Finding(NamedTuple):
    """Something that is wrong with a data folder."""

    problem: Problem
    subject: str
    """The row, blob or file with the damage, such as `adapter acme@3`."""
    detail: str
    part: Part | None = None
    """The bytes that are damaged, if it is about a blob that a row refers to."""


@dataclass(slots=True)
class Diagnosis:
    """Findings about a data folder, and how much was checked."""

    findings: list[Finding] = field(default_factory=list)
    blobs: int = 0
    """Number of blobs that were read."""

    def has(self, *problems: Problem) -> bool:
        """Return whether there is a finding of one of these problems."""
        return any(finding.problem in problems for finding in self.findings)


def diagnose(folder: Path, blobs: Blobs | None = None, database: Database | None = None) -> Diagnosis:
    """Check the catalogue, every reference in it, every blob and its digest, and find orphans.

    The catalogue and the blobs are in the folder by default. Raises `CatalogNotLoadable` if there is nothing to check,
    `CatalogBusy` if the catalogue stays locked, and `StorageFailed` if a bucket does not answer.
    """
    blobs = blobs or BlobLocation(folder=folder).open()
    diagnosis = Diagnosis()
    findings = diagnosis.findings
    try:
        check_store(folder, database, blobs=blobs)
    except CatalogNotLoadable as error:
        findings.append(Finding(Problem.STORE_MISMATCH, str(folder), error.detail))
    if database is None and catalog_bytes(folder) == 0:
        if not findings:
            raise CatalogNotLoadable(f"{folder} has no catalogue {CATALOG}: there is nothing to check")
        return diagnosis
    opened = partial(opened_reader, folder, database)
    findings += integrity_findings(folder, database)
    for check in (_json_values, _references):
        findings += _collect(opened, check)
    try:
        diagnosis.blobs = _check_blobs(opened, blobs, findings)
        findings += find_orphans(opened, blobs)
    except CatalogNotLoadable as error:
        findings.append(Finding(Problem.DAMAGED_CATALOG, CATALOG, error.detail))
    if not diagnosis.has(Problem.DAMAGED_CATALOG, Problem.DAMAGED_INDEX, Problem.STORE_MISMATCH):
        findings += _wrong_totals(folder, database)
    # One damaged page keeps several checks from ending.
    diagnosis.findings = list(dict.fromkeys(findings))
    return diagnosis


def integrity_findings(folder: Path, database: Database | None = None) -> list[Finding]:
    """Return what the database finds wrong with the pages and the indexes of the catalogue."""
    if database is None:
        return _collect(partial(opened_reader, folder), _integrity)
    not_durable = [Finding(Problem.NOT_DURABLE, database.name, text) for text in database.durability_warnings()]
    return [*_damaged_indexes(database), *not_durable]


def _damaged_indexes(database: Database) -> Iterator[Finding]:
    """Find the indexes of PostgreSQL that are not valid, and with its extension `amcheck` those that are damaged."""
    with database.read() as connection:
        indexes = connection.execute(_INDEXES, {"tables": list(metadata.tables)}).all()
        has_check = connection.scalar(_HAS_AMCHECK)
    for index in indexes:
        if not index.indisvalid:
            yield Finding(Problem.DAMAGED_INDEX, index.relname, "it is not valid: its creation did not end")
        elif has_check:
            try:
                with database.read() as connection:
                    connection.execute(_CHECK_INDEX, {"index": index.oid})
            except StorageFailed as error:
                yield Finding(Problem.DAMAGED_INDEX, index.relname, str(error.__cause__).splitlines()[0])


def find_orphans(opened: Opened, blobs: Blobs) -> list[Finding]:
    """Return the blobs and temporary files that are neither referenced nor pending for a process that runs."""
    suspects = _unreferenced(opened, blobs.names(with_temporary=True))
    # A deletion may have committed between the two steps of the first look, or not have removed its file yet.
    suspects = _unreferenced(opened, suspects)
    present = set(blobs.names(with_temporary=True)) if suspects else set()
    detail = "no row refers to it, and no process is writing it"
    return [Finding(Problem.ORPHAN, f"{BLOBS}/{name}", detail) for name in suspects if name in present]


class Drift(NamedTuple):
    """Difference between running totals and a count."""

    subject: str
    differences: Mapping[str, int]
    """Counted numbers less stored ones, by name."""
    correct: Callable[[Connection], None]
    """Adds the differences to the totals."""
    last_correction: float | None
    """Last turn of `Task.CORRECT` before the count. If there is a later one, the differences may be added already."""


def find_drifts(database: Database) -> Iterator[Drift]:
    """Compare the totals of each tenant and the tally of each job with a count; yield those that differ.

    A count and its totals are read in one transaction, during which no other process can commit.
    """
    with database.read() as connection:
        last = last_turn(connection, Task.CORRECT)
        of_tenants = totals.find_drift(connection)
        job_ids = connection.scalars(sa.select(jobs.c.id)).all()
    for tenant, differences in of_tenants.items():
        changes: dict[str, Any] = {"tenant": tenant, **differences}
        yield Drift(f"totals of the tenant {tenant}", differences, partial(totals.add_to_totals, **changes), last)
    for job_id in job_ids:
        with database.read() as connection:
            last = last_turn(connection, Task.CORRECT)
            differences = job_adapters.find_drift(connection, job_id)
        if differences:
            correct = partial(job_adapters.correct_tally, job_id=job_id, drift=differences)
            yield Drift(f"tally of the job {job_id}", differences, correct, last)


def _wrong_totals(folder: Path, database: Database | None) -> list[Finding]:
    with ExitStack() as stack:
        if database is None:
            try:
                check_schema(folder)
            except CatalogNotLoadable:
                return []  # an older release, which has none
            database = stack.enter_context(closing(SqliteDatabase(folder)))
        return [
            Finding(
                Problem.WRONG_TOTAL,
                drift.subject,
                ", ".join(f"{name} {difference:+,}" for name, difference in drift.differences.items()) + " by a count",
            )
            for drift in find_drifts(database)
        ]


def _collect(opened: Opened, check: Callable[[CatalogReader], Iterable[Finding]]) -> list[Finding]:
    """Return the findings of a check, at most `_MOST_FINDINGS`; damage that keeps it from ending is the last one."""
    findings: list[Finding] = []
    try:
        with opened() as catalog:
            for finding in check(catalog):
                findings.append(finding)
                if len(findings) == _MOST_FINDINGS:
                    break
    except CatalogNotLoadable as error:
        findings.append(Finding(Problem.DAMAGED_CATALOG, CATALOG, error.detail))
    return findings


def _integrity(catalog: CatalogReader) -> Iterator[Finding]:
    ((pages,),), ((page_bytes,),) = (catalog.rows(f"PRAGMA {name}") for name in ("page_count", "page_size"))
    scopes: list[object] = [_MOST_FINDINGS]
    if pages * page_bytes > _MAX_BYTES_AT_ONCE:
        scopes = [name for (name,) in catalog.rows("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for scope in scopes:
        for (text,) in catalog.rows(f"PRAGMA integrity_check({scope})"):
            if text != "ok":
                is_index = any(words in text for words in _INDEX_WORDS)
                problem = Problem.DAMAGED_INDEX if is_index else Problem.DAMAGED_CATALOG
                yield Finding(problem, CATALOG, text)


def _json_values(catalog: CatalogReader) -> Iterator[Finding]:
    if not isinstance(catalog, SqliteReader):
        return  # PostgreSQL stores nothing else in such a column.
    for table, column in _JSON_COLUMNS:
        # SQLite refuses NaN, which old releases stored, so that Python has the last word.
        is_suspect = f"{column} IS NOT NULL AND NOT json_valid({column})"
        for row, text in _rows(catalog, table, f"rowid, {column}", is_suspect, needs=column):
            if not _is_json(text):
                yield Finding(Problem.DAMAGED_CATALOG, f"{table}.{column}", f"the value of row {row} is not JSON")


def _is_json(text: object) -> bool:
    with suppress(TypeError, ValueError):
        json.loads(text)  # type: ignore[arg-type]
        return True
    return False


def _rows(
    catalog: CatalogReader, table: str, columns: str, condition: str, *, needs: str
) -> Iterator[Sequence[object]]:
    """Yield columns of the rows, called `t`, that fulfil a condition; none if the table does not have `needs`."""
    if needs in catalog.columns(table):
        yield from catalog.rows_where(table, columns, condition)


class _Rule(NamedTuple):
    """Condition that no row of a table fulfils."""

    table: str
    key: tuple[str, str]
    """Columns that identify a row."""
    violation: str
    """SQL of the condition."""
    detail: str
    needs: str = ""
    """Column without which the rule does not hold yet."""


_TARGET = "AS v WHERE v.tenant = t.tenant AND v.adapter = t.adapter AND v.version = t.version"
_MADE = "adapters AS a WHERE a.tenant = t.tenant AND a.name = t.adapter AND a.next_version > t.version"
_SET = "datasets AS d WHERE d.tenant = t.tenant AND d.name = t.dataset AND d.next_version > t.version"
_OF_SET = "dataset_versions AS v WHERE v.tenant = t.tenant AND v.dataset = t.name"
_JOB = "SELECT 1 FROM jobs AS j WHERE j.id = t.job"
_PENDING = "SELECT 1 FROM pending_blobs AS p WHERE p.key = t.job"
_ALIAS, _VERSION = ("adapter", "alias"), ("adapter", "version")
_NO_OWNER = "it belongs to no name, or its number was not given yet"
_RULES = (
    _Rule("aliases", _ALIAS, f"NOT EXISTS (SELECT 1 FROM versions {_TARGET})", "it points to no version"),
    _Rule(
        *("trashed_aliases", _ALIAS, f"NOT EXISTS (SELECT 1 FROM trashed_versions {_TARGET})"),
        "it points to no version in the trash",
    ),
    _Rule("versions", _VERSION, f"NOT EXISTS (SELECT 1 FROM {_MADE} AND NOT a.deleted)", _NO_OWNER),
    _Rule("trashed_versions", _VERSION, f"NOT EXISTS (SELECT 1 FROM {_MADE})", _NO_OWNER),
    _Rule("trashed_versions", _VERSION, f"EXISTS (SELECT 1 FROM versions {_TARGET})", "it is deleted and exists"),
    _Rule(
        *("dataset_versions", ("dataset", "version"), f"NOT EXISTS (SELECT 1 FROM {_SET} AND NOT d.deleted)"), _NO_OWNER
    ),
    _Rule(
        *("datasets", ("tenant", "name"), f"NOT t.deleted AND NOT EXISTS (SELECT 1 FROM {_OF_SET})"),
        "the data set has no version",
    ),
    _Rule(
        *("job_adapters", ("job", "position"), f"NOT EXISTS ({_JOB}) AND NOT EXISTS ({_PENDING})"),
        "it belongs to no job",
        # Of a release whose pending rows may have the ids of jobs.
        needs="tenant",
    ),
)


def _references(catalog: CatalogReader) -> Iterator[Finding]:
    for rule in _RULES:
        for key in _rows(catalog, rule.table, ", ".join(rule.key), rule.violation, needs=rule.needs or rule.key[1]):
            yield Finding(Problem.DANGLING_REFERENCE, f"{rule.table} {'@'.join(map(str, key))}", rule.detail)


def _check_blobs(opened: Opened, blobs: Blobs, findings: list[Finding]) -> int:
    """Check the blobs that rows refer to, and append what is wrong; return the number of blobs that were read."""
    names, count = blobs.names(), 0
    with opened() as catalog:
        for some in batched(names):
            for file, parts in read_parts(catalog, some).items():
                count += 1
                findings += confirmed_damage(catalog, blobs, stored_damage(blobs, file, parts))
        for some in batched(set(referenced_files(catalog)).difference(names)):
            for file, parts in read_parts(catalog, some).items():
                findings += confirmed_damage(catalog, blobs, stored_damage(blobs, file, parts))
    return count


def confirmed_damage(catalog: CatalogReader, blobs: Blobs, damages: Iterable[Damage]) -> Iterator[Finding]:
    """Yield the damage that is there at a second look too, if its row still is."""
    for before in damages:
        parts = read_parts(catalog, [before.part.file]).get(before.part.file, ())
        if before.part in parts:
            for damage in stored_damage(blobs, before.part.file, [before.part]):
                yield Finding(damage.problem, str(damage.part), damage.detail, damage.part)


def _unreferenced(opened: Opened, names: Sequence[str]) -> list[str]:
    """Return the names that are neither referenced nor pending for a process that runs."""
    # The names come before the rows: a blob that is published in between is pending before its file exists.
    orphans: list[str] = []
    with opened() as catalog:
        # Older releases did not have the table.
        has_pending = bool(catalog.columns("pending_blobs"))
        for some in batched(names):
            marks = ", ".join("?" * len(some))
            statement = f"SELECT key, owner FROM pending_blobs WHERE key IN ({marks})"
            pending = catalog.rows(statement, [blob_key(name) for name in some]) if has_pending else []
            live = catalog.live_owners({owner for _, owner in pending}) if pending else set()
            being_written = {key for key, owner in pending if owner in live}
            referenced = read_parts(catalog, some)
            orphans += [name for name in some if name not in referenced and blob_key(name) not in being_written]
    return orphans
