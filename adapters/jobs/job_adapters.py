"""The adapters that a job trains, one or a fleet: their values, the statements on their rows, and the job's tally."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.access.quotas import AdapterQuota
from adapters.catalog import queries
from adapters.catalog.versions import Publication, Published
from adapters.errors import AdapterDeleted, QuotaExceeded
from adapters.jobs.job import Job
from adapters.storage.database import Database
from adapters.storage.pending_blobs import BlobWriter
from adapters.storage.schema import batched, job_adapters, jobs, rows_in
from adapters.storage.slices import write_in_slices

# Adapters of a new job that one transaction stores.
STORED_AT_ONCE = 500
# Adapters that one transaction reads: it takes some milliseconds.
_LISTED_AT_ONCE = 1000

_columns = job_adapters.c
_WAITS = _columns.version.is_(None) & _columns.error.is_(None)


class AdapterStatus(StrEnum):
    """State of one adapter of a job."""

    WAITING = "waiting"
    """Neither published nor failed. It stays so if the job was cancelled."""
    PUBLISHED = "published"
    """It has a version."""
    FAILED = "failed"
    """It has an error."""


class AdapterOutcome(StrEnum):
    """Outcome of an adapter of a job, compared with what answered under its name before."""

    BETTER = "better"
    SAME = "same"
    """The difference is within its standard error."""
    WORSE = "worse"
    FAILED = "failed"
    """It was not trained."""


class Order(StrEnum):
    """Order of the adapters of a job in a list."""

    POSITION = "position"
    NAME = "name"
    GAIN = "gain"
    """The smallest gain first; adapters without one are last."""


_CONDITIONS: Mapping[AdapterStatus, sa.ColumnElement[bool]] = {
    AdapterStatus.WAITING: _WAITS,
    AdapterStatus.PUBLISHED: _columns.version.is_not(None),
    AdapterStatus.FAILED: _columns.error.is_not(None),
}


@dataclass(frozen=True, slots=True)
class JobAdapter:
    """One adapter that a job trains."""

    name: str
    group: str | None
    """The value that its rows have in common; None if the job is not a fleet."""
    rows: int
    position: int = 0
    """Its position among the adapters of its job, from 0 on."""
    deletions: int = 0
    """Number of times that the name had been deleted when the job was queued."""
    version: int | None = None
    digest: str | None = None
    metrics: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    moved_live: bool = False
    """Whether its publish moved live."""
    replaced: int | None = None
    """Number of the version that was live before; None if none was."""
    outcome: str | None = None
    """An `AdapterOutcome`; None if it was not evaluated."""
    gain: float | None = None
    """Mean gain per row over what its name answered with before."""
    report: Mapping[str, Any] | None = None
    """`evaluation`, `decision`, `auto` and `warnings` of its fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A part of the adapters of a job, in an order."""

    status: AdapterStatus | None = None
    outcomes: Collection[AdapterOutcome] = ()
    """Empty for all."""
    order: Order = Order.POSITION
    after: int | None = None
    """Position of the adapter behind which it begins."""
    limit: int | None = None


def _outcome_key(outcome: str) -> str:
    return f"outcome_{outcome}"


_IS_GROUP = _columns.group.is_not(None)
# What the tally of a job has: counting a fleet after each of its frames would take longer than training it.
_COUNTS: Mapping[str, sa.ColumnElement[bool]] = {
    "total": sa.true(),
    "published": _columns.version.is_not(None),
    "failed": _columns.error.is_not(None),
    "waiting": _WAITS,
    **{_outcome_key(outcome): _IS_GROUP & (_columns.outcome == outcome) for outcome in AdapterOutcome},
    "moved": _IS_GROUP & _columns.moved_live,
}
_COUNTED = [sa.func.count(sa.case((condition, 1))).label(name) for name, condition in _COUNTS.items()]

ALL, WAITING = Selection(), Selection(status=AdapterStatus.WAITING)
NO_REPORTS: Mapping[int, Mapping[str, Any]] = MappingProxyType({})
_FIELDS = [_columns[name] for name in JobAdapter.__dataclass_fields__]
# Without those that may be long.
_BRIEF = [column for column in _FIELDS if column.name not in ("metrics", "error", "report")]


def insert(connection: Connection, job_id: str, adapters: Sequence[JobAdapter], *, tenant: str) -> None:
    """Store the adapters that a job trains, each with the current number of deletions of its name."""
    if not adapters:
        return
    deletions = queries.deletions(connection, [adapter.name for adapter in adapters], tenant=tenant)
    values = []
    for adapter in adapters:
        row = {name: getattr(adapter, name) for name in JobAdapter.__dataclass_fields__}
        values.append(row | {"job": job_id, "tenant": tenant, "deletions": deletions.get(adapter.name, 0)})
    connection.execute(sa.insert(job_adapters), values)


@contextmanager
def storing(
    database: Database, writer: BlobWriter, job_id: str, adapters: Sequence[JobAdapter], *, tenant: str
) -> Iterator[Callable[[Connection], None]]:
    """Store the adapters that a job trains; yield what the transaction that stores the job has to call for that.

    Many adapters are stored before their job, in slices. Without it, no statement finds them.
    """

    def store(connection: Connection, part: Sequence[JobAdapter]) -> None:
        insert(connection, job_id, part, tenant=tenant)

    if len(adapters) <= STORED_AT_ONCE:
        yield lambda connection: store(connection, adapters)
        return
    with writer.pending(job_id) as publish:
        slices = (adapters[first : first + STORED_AT_ONCE] for first in range(0, len(adapters), STORED_AT_ONCE))
        write_in_slices(database, slices, store)
        yield publish


def tally_of_new(adapters: Sequence[JobAdapter]) -> Mapping[str, int]:
    """Return the tally of a job that has not begun."""
    return dict.fromkeys(_COUNTS, 0) | dict.fromkeys(("total", "waiting"), len(adapters))


def list_adapters(
    connection: Connection, job_id: str, selection: Selection = ALL, *, brief: bool = False
) -> list[JobAdapter]:
    """Return the selected adapters of a job, in the order of the selection; `brief` leaves out their long members."""
    of_job = _columns.job == job_id
    sort_keys = {Order.NAME: (_columns.name,), Order.GAIN: (_columns.gain.asc().nulls_last(), _columns.position)}
    statement = sa.select(*(_BRIEF if brief else _FIELDS)).where(of_job).limit(selection.limit)
    statement = statement.order_by(*sort_keys.get(selection.order, (_columns.position,)))
    if selection.status is not None:
        statement = statement.where(_CONDITIONS[selection.status])
    if selection.outcomes:
        statement = statement.where(_columns.outcome.in_(selection.outcomes))
    if selection.after is not None:
        last = sa.select(*_FIELDS).where(of_job, _columns.position == selection.after)
        row = connection.execute(last).one_or_none()
        statement = statement.where(sa.false() if row is None else _is_behind(row, selection.order))
    return [JobAdapter(**row._mapping) for row in connection.execute(statement)]


def list_all(database: Database, job_id: str, selection: Selection) -> list[JobAdapter]:
    """Return all selected adapters of a job, whatever their number."""
    parts = slices(database, job_id, replace(selection, limit=_LISTED_AT_ONCE))
    return [adapter for part in parts for adapter in part]


def slices(database: Database, job_id: str, selection: Selection, *, brief: bool = False) -> Iterator[list[JobAdapter]]:
    """Yield the selected adapters in lists of at most the selection's limit, each read in a transaction of its own.

    Nothing can be committed during such a transaction, and a fleet may have a million adapters.
    """
    while True:
        with database.read() as connection:
            part = list_adapters(connection, job_id, selection, brief=brief)
        if part:
            yield part
        if len(part) != selection.limit:
            return
        selection = replace(selection, after=part[-1].position)


def _is_behind(last: sa.Row[Any], order: Order) -> sa.ColumnElement[bool]:
    """Return the condition for the adapters that follow one in this order."""
    is_later, has_none = _columns.position > last.position, _columns.gain.is_(None)
    if order is Order.NAME:
        return sa.and_(_columns.name > last.name)
    if order is Order.POSITION:
        return sa.and_(is_later)
    if last.gain is None:
        return sa.and_(has_none, is_later)
    return sa.or_(_columns.gain > last.gain, sa.and_(_columns.gain == last.gain, is_later), has_none)


def read_tally(connection: Connection, job_id: str) -> Counter[str]:
    """Return the tally of a job's adapters; count them if an older release queued the job."""
    tally = connection.scalars(sa.select(jobs.c.tally).where(jobs.c.id == job_id)).one()
    return _count(connection, job_id) if tally is None else Counter(tally)


def progress_of(tally: Mapping[str, int]) -> dict[str, int]:
    """Return the numbers of a job's adapters: published, failed, and in total."""
    return {name: tally[name] for name in ("published", "failed", "total")}


def summary_of(tally: Mapping[str, int]) -> dict[str, int]:
    """Return the numbers of a job's adapters by outcome, and of those whose live alias moved.

    The prior of a fleet has no group and does not count.
    """
    return {str(name): tally[_outcome_key(name)] for name in AdapterOutcome} | {"moved": tally["moved"]}


def deleted_since(connection: Connection, adapters: Iterable[JobAdapter], *, tenant: str) -> list[JobAdapter]:
    """Return those whose names were deleted after the job was queued, whether or not they exist again."""
    adapters = list(adapters)
    deletions = queries.deletions(connection, [adapter.name for adapter in adapters], tenant=tenant)
    return [adapter for adapter in adapters if deletions.get(adapter.name, 0) != adapter.deletions]


def adapters_at(connection: Connection, job_id: str, positions: Sequence[int]) -> list[JobAdapter]:
    """Return a job's adapters at these positions."""
    statement = sa.select(*_FIELDS).where(_columns.job == job_id)
    return [JobAdapter(**row._mapping) for row in rows_in(connection, statement, _columns.position, positions)]


def admit(connection: Connection, claim: Job, publications: Sequence[Publication]) -> list[bool]:
    """Return which publications of a job may become versions; the others fail.

    Their names were deleted, or they exceed a limit of the tenant. Raises that error if the job trains only that one,
    and `ValueError` for a publication without position.
    """
    positions = [publication.position for publication in publications if publication.position is not None]
    if len(positions) < len(publications):
        raise ValueError("a job's publication needs a position")
    failures = {}
    adapters = adapters_at(connection, claim.id, positions)
    for deleted in deleted_since(connection, adapters, tenant=claim.tenant):
        error = AdapterDeleted(f"the adapter {deleted.name!r} was deleted after this job was queued")
        if deleted.name == claim.adapter:
            raise error
        failures[deleted.position] = error.members()
    if claim.training.is_fleet:
        # A job of one adapter fails when it is published.
        quota = AdapterQuota(connection, [publication.name for publication in publications], tenant=claim.tenant)
        for publication, position in zip(publications, positions, strict=True):
            try:
                if position not in failures:
                    quota.take(publication.name, len(publication.adapter.canonical_bytes))
            except QuotaExceeded as exceeded:
                failures[position] = exceeded.members()
    fail(connection, claim.id, list(failures.items()))
    return [position not in failures for position in positions]


def record(
    connection: Connection, job_id: str, published: Sequence[Published], reports: Mapping[int, Mapping[str, Any]]
) -> None:
    """Store the version and the report of each published adapter, found by its position."""
    rows = []
    for item in published:
        row = {name: getattr(item.version, name) for name in ("version", "digest", "metrics")}
        report = None if item.position is None else reports.get(item.position)
        decision = (report or {}).get("decision") or {}
        row |= {"report": report, "outcome": decision.get("outcome"), "gain": decision.get("gain")}
        rows.append(row | {"b_position": item.position, "moved_live": item.moved_live, "replaced": item.replaced})
    _set(connection, job_id, rows)


def fail(connection: Connection, job_id: str, failures: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    """Store the errors of the adapters at these positions."""
    values = {"outcome": AdapterOutcome.FAILED}
    _set(connection, job_id, [{"b_position": position, "error": dict(error), **values} for position, error in failures])


def fail_waiting(connection: Connection, job_id: str, error: Mapping[str, Any], *, first: int, last: int) -> None:
    """Store the error that ended the job in the rows at these positions that have neither version nor error."""
    are_next = (_columns.job == job_id, _columns.position.between(first, last))
    failed = {"error": dict(error), "outcome": AdapterOutcome.FAILED}
    with _tallied(connection, job_id, _columns.position.between(first, last)):
        connection.execute(sa.update(job_adapters).where(*are_next, _WAITS).values(failed))


def last_position(connection: Connection, job_id: str) -> int:
    """Return the greatest position of a job's adapters; -1 if it has none."""
    statement = sa.select(sa.func.max(_columns.position)).where(_columns.job == job_id)
    last = connection.scalars(statement).one()
    return -1 if last is None else int(last)


def _set(connection: Connection, job_id: str, rows: Sequence[dict[str, Any]]) -> None:
    is_adapter = (_columns.job == job_id, _columns.position == sa.bindparam("b_position"))
    for part in batched(rows):
        with _tallied(connection, job_id, _columns.position.in_([row["b_position"] for row in part])):
            connection.execute(sa.update(job_adapters).where(*is_adapter), part)


def find_drift(connection: Connection, job_id: str) -> dict[str, int]:
    """Return what has to be added to the tally of a job to make it that of a count; empty if it is right."""
    counted, tally = _count(connection, job_id), read_tally(connection, job_id)
    return {name: counted[name] - tally[name] for name in _COUNTS if counted[name] != tally[name]}


def correct_tally(connection: Connection, job_id: str, drift: Mapping[str, int]) -> None:
    """Add to the tally of a job."""
    tally = read_tally(connection, job_id)
    tally.update(drift)
    _store_tally(connection, job_id, tally)


def _store_tally(connection: Connection, job_id: str, tally: Mapping[str, int]) -> None:
    connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(tally=dict(tally)))


@contextmanager
def _tallied(connection: Connection, job_id: str, changed: sa.ColumnElement[bool]) -> Iterator[None]:
    """Keep the tally of a job while the block changes those of its adapters that a condition selects."""
    tally, before = read_tally(connection, job_id), _count(connection, job_id, changed)
    yield
    tally.update(_count(connection, job_id, changed))
    tally.subtract(before)
    _store_tally(connection, job_id, tally)


def _count(connection: Connection, job_id: str, *conditions: sa.ColumnElement[bool]) -> Counter[str]:
    row = connection.execute(sa.select(*_COUNTED).where(_columns.job == job_id, *conditions)).one()
    return Counter(row._asdict())
