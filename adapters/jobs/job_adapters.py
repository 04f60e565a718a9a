"""The adapters that a job trains, one or a fleet: their values, and the statements on their rows.

`revert` points each live alias that the job moved back at the version that was live before.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.catalog import queries
from adapters.catalog.versions import Publication, Published
from adapters.errors import AdapterDeleted
from adapters.jobs.job import Job
from adapters.names import LIVE
from adapters.storage.schema import job_adapters, rows_in

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


ALL, WAITING = Selection(), Selection(status=AdapterStatus.WAITING)
NO_REPORTS: Mapping[int, Mapping[str, Any]] = MappingProxyType({})
_FIELDS = [_columns[name] for name in JobAdapter.__dataclass_fields__]


def insert(connection: Connection, job_id: str, adapters: Sequence[JobAdapter]) -> None:
    """Store the adapters that a job trains, each with the current number of deletions of its name."""
    if not adapters:
        return
    deletions = queries.deletions(connection, [adapter.name for adapter in adapters])
    values = []
    for adapter in adapters:
        row = {name: getattr(adapter, name) for name in JobAdapter.__dataclass_fields__}
        values.append(row | {"job": job_id, "deletions": deletions.get(adapter.name, 0)})
    connection.execute(sa.insert(job_adapters), values)


def list_adapters(connection: Connection, job_id: str, selection: Selection = ALL) -> list[JobAdapter]:
    """Return the selected adapters of a job, in the order of the selection."""
    of_job = _columns.job == job_id
    sort_keys = {Order.NAME: (_columns.name,), Order.GAIN: (_columns.gain.asc().nulls_last(), _columns.position)}
    statement = sa.select(*_FIELDS).where(of_job).limit(selection.limit)
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


def summarize(connection: Connection, job_id: str) -> dict[str, int]:
    """Return the numbers of a job's adapters by outcome, and of those whose live alias moved.

    The prior of a fleet has no group and does not count.
    """
    counts = (sa.func.count(), sa.func.count(sa.case((_columns.moved_live, 1))))
    statement = sa.select(_columns.outcome, *counts).where(_columns.job == job_id, _columns.group.is_not(None))
    rows = connection.execute(statement.group_by(_columns.outcome)).all()
    totals = {outcome: number for outcome, number, _ in rows}
    return {str(name): totals.get(name, 0) for name in AdapterOutcome} | {"moved": sum(moved for *_, moved in rows)}


def count_adapters(connection: Connection, job_id: str) -> dict[str, int]:
    """Return the numbers of a job's adapters: published, failed, and in total."""
    counts = (sa.func.count(_columns.version), sa.func.count(_columns.error), sa.func.count())
    row = connection.execute(sa.select(*counts).where(_columns.job == job_id)).one()
    return dict(zip(("published", "failed", "total"), row, strict=True))


def deleted_since(connection: Connection, adapters: Iterable[JobAdapter]) -> list[JobAdapter]:
    """Return those whose names were deleted after the job was queued, whether or not they exist again."""
    adapters = list(adapters)
    deletions = queries.deletions(connection, [adapter.name for adapter in adapters])
    return [adapter for adapter in adapters if deletions.get(adapter.name, 0) != adapter.deletions]


def adapters_at(connection: Connection, job_id: str, positions: Sequence[int]) -> list[JobAdapter]:
    """Return a job's adapters at these positions."""
    statement = sa.select(*_FIELDS).where(_columns.job == job_id)
    return [JobAdapter(**row._mapping) for row in rows_in(connection, statement, _columns.position, positions)]


def admit(connection: Connection, claim: Job, publications: Sequence[Publication]) -> list[bool]:
    """Return which publications of a job may become versions; the others fail, because their names were deleted.

    Raises `AdapterDeleted` if the job trains only that one, and `ValueError` for a publication without position.
    """
    positions = [publication.position for publication in publications if publication.position is not None]
    if len(positions) < len(publications):
        raise ValueError("a job's publication needs a position")
    failures = {}
    for deleted in deleted_since(connection, adapters_at(connection, claim.id, positions)):
        error = AdapterDeleted(f"the adapter {deleted.name!r} was deleted after this job was queued")
        if deleted.name == claim.adapter:
            raise error
        failures[deleted.position] = error.members()
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


def fail_waiting(connection: Connection, job_id: str, error: Mapping[str, Any]) -> None:
    """Store the error that ended the job in the rows of its adapters that have neither version nor error."""
    failed = {"error": dict(error), "outcome": AdapterOutcome.FAILED}
    connection.execute(sa.update(job_adapters).where(_columns.job == job_id, _WAITS).values(failed))


def _set(connection: Connection, job_id: str, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        is_adapter = (_columns.job == job_id, _columns.position == sa.bindparam("b_position"))
        connection.execute(sa.update(job_adapters).where(*is_adapter), rows)


class SkipReason(StrEnum):
    """Why an adapter of the job was left as it is."""

    NOT_PUBLISHED = "not_published"
    """The job published no version of it."""
    NEVER_LIVE = "never_live"
    """The job's version did not become live when it was published."""
    ADAPTER_DELETED = "adapter_deleted"
    """It was deleted since."""
    LIVE_MOVED = "live_moved"
    """Its live alias no longer points at the job's version."""
    VERSION_GONE = "version_gone"
    """The version that live pointed at before is no longer there."""


@dataclass(frozen=True, slots=True)
class RevertedAdapter:
    """A live alias that was pointed back."""

    name: str
    version: int
    """Version of the job, which was live."""
    to: int | None
    """Version that is live again; None if none was live before."""


@dataclass(frozen=True, slots=True)
class SkippedAdapter:
    """An adapter of the job that was left as it is."""

    name: str
    version: int | None
    reason: SkipReason
    detail: str


@dataclass(frozen=True, slots=True)
class RevertResult:
    """Result of a revert: every adapter of the job is in one of the two lists."""

    reverted: Sequence[RevertedAdapter]
    skipped: Sequence[SkippedAdapter]


def revert(connection: Connection, job_id: str) -> RevertResult:
    """Point back every live alias for which that is possible, and increment the revision once."""
    adapters = list_adapters(connection, job_id)
    names = [adapter.name for adapter in adapters]
    live = queries.alias_targets(connection, names, LIVE)
    deleted = {adapter.position for adapter in deleted_since(connection, adapters)}
    replaced = [(adapter.name, adapter.replaced) for adapter in adapters if adapter.replaced is not None]
    existing = queries.existing_versions(connection, replaced)
    reverted, skipped = [], []
    for adapter in adapters:
        is_gone = adapter.replaced is not None and (adapter.name, adapter.replaced) not in existing
        reason = _reason(adapter, live, is_deleted=adapter.position in deleted, is_gone=is_gone)
        if reason is not None:
            current = f"it is {live[adapter.name]}" if adapter.name in live else "nothing is live"
            detail = _DETAILS[reason].format(adapter=adapter, current=current)
            skipped.append(SkippedAdapter(adapter.name, adapter.version, reason, detail))
        elif adapter.version is not None:
            reverted.append(RevertedAdapter(adapter.name, adapter.version, adapter.replaced))
    if reverted:
        queries.set_alias(connection, LIVE, {back.name: back.to for back in reverted if back.to is not None})
        queries.remove_alias(connection, LIVE, [back.name for back in reverted if back.to is None])
        queries.increment_revision(connection)
    return RevertResult(reverted, skipped)


_DETAILS: Mapping[SkipReason, str] = {
    SkipReason.NOT_PUBLISHED: "the job published no version of {adapter.name}",
    SkipReason.NEVER_LIVE: "{adapter.name}@{adapter.version} was published without moving live",
    SkipReason.ADAPTER_DELETED: "{adapter.name} was deleted since",
    SkipReason.LIVE_MOVED: "live of {adapter.name} is no longer version {adapter.version}: {current}",
    SkipReason.VERSION_GONE: "{adapter.name}@{adapter.replaced}, which was live before, is no longer there",
}


def _reason(adapter: JobAdapter, live: Mapping[str, int], *, is_deleted: bool, is_gone: bool) -> SkipReason | None:
    if adapter.version is None:
        return SkipReason.NOT_PUBLISHED
    if not adapter.moved_live:
        return SkipReason.NEVER_LIVE
    if is_deleted:
        return SkipReason.ADAPTER_DELETED
    if live.get(adapter.name) != adapter.version:
        return SkipReason.LIVE_MOVED
    return SkipReason.VERSION_GONE if is_gone else None
