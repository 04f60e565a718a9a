"""The adapters that a job trains, one or a fleet: statements on their rows, in a transaction that the caller holds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.catalog import queries
from adapters.catalog.versions import Publication, Published
from adapters.errors import AdapterDeleted
from adapters.jobs.job import Job
from adapters.storage.schema import batched, job_adapters

_columns = job_adapters.c
_WAITS = _columns.version.is_(None) & _columns.error.is_(None)


class AdapterStatus(StrEnum):
    """What has become of one adapter of a job."""

    WAITING = "waiting"
    """Nothing yet; nothing ever, where the job was cancelled."""
    PUBLISHED = "published"
    """It has a version."""
    FAILED = "failed"
    """It has an error."""


_IS: Mapping[AdapterStatus, sa.ColumnElement[bool]] = {
    AdapterStatus.WAITING: _WAITS,
    AdapterStatus.PUBLISHED: _columns.version.is_not(None),
    AdapterStatus.FAILED: _columns.error.is_not(None),
}


@dataclass(frozen=True, slots=True)
class JobAdapter:
    """One adapter that a job trains."""

    name: str
    group: str | None
    """The value that its rows have in common; None where the job is no fleet."""
    rows: int
    position: int = 0
    """Its place among the adapters of its job, from 0 on."""
    deletions: int = 0
    """How often an adapter of that name had been deleted when the job was queued."""
    version: int | None = None
    digest: str | None = None
    metrics: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    moved_live: bool = False
    """Whether its publish moved live."""
    replaced: int | None = None
    """Where live pointed before that; None: nowhere."""


_FIELDS = [_columns[name] for name in JobAdapter.__dataclass_fields__]


def insert(connection: Connection, job_id: str, adapters: Sequence[JobAdapter]) -> None:
    """Store what a job is to train, in that order, each with its name's deletions as they are now."""
    deletions = queries.deletions(connection, [adapter.name for adapter in adapters])
    values = [
        {
            "job": job_id,
            "position": position,
            "name": adapter.name,
            "group": adapter.group,
            "rows": adapter.rows,
            "deletions": deletions.get(adapter.name, 0),
            "moved_live": False,
        }
        for position, adapter in enumerate(adapters)
    ]
    connection.execute(sa.insert(job_adapters), values)


def list_adapters(
    connection: Connection,
    job_id: str,
    *,
    outcome: AdapterStatus | None = None,
    after: int | None = None,
    limit: int | None = None,
) -> list[JobAdapter]:
    """A job's adapters in their order, those of one outcome, from past position `after` on."""
    statement = sa.select(*_FIELDS).where(_columns.job == job_id).order_by(_columns.position).limit(limit)
    if outcome is not None:
        statement = statement.where(_IS[outcome])
    if after is not None:
        statement = statement.where(_columns.position > after)
    return [JobAdapter(**row._mapping) for row in connection.execute(statement)]


def count_adapters(connection: Connection, job_id: str) -> dict[str, int]:
    """How many of a job's adapters are published and how many failed, of how many in all."""
    counts = (sa.func.count(_columns.version), sa.func.count(_columns.error), sa.func.count())
    row = connection.execute(sa.select(*counts).where(_columns.job == job_id)).one()
    return dict(zip(("published", "failed", "total"), row, strict=True))


def deleted_since(connection: Connection, adapters: Iterable[JobAdapter]) -> list[JobAdapter]:
    """Those whose names were deleted after the job was queued, whether or not they exist again."""
    asked = list(adapters)
    now = queries.deletions(connection, [adapter.name for adapter in asked])
    return [adapter for adapter in asked if now.get(adapter.name, 0) != adapter.deletions]


def adapters_at(connection: Connection, job_id: str, positions: Sequence[int]) -> list[JobAdapter]:
    """A job's adapters at these positions."""
    found: list[JobAdapter] = []
    for part in batched(positions):
        statement = sa.select(*_FIELDS).where(_columns.job == job_id, _columns.position.in_(part))
        found += [JobAdapter(**row._mapping) for row in connection.execute(statement)]
    return found


def admit(connection: Connection, claim: Job, publications: Sequence[Publication]) -> list[bool]:
    """Which publications of a job may become versions; those whose adapters were deleted since fail.

    Raises `AdapterDeleted` where the job trains just that one, and `ValueError` for a publication without position.
    """
    positions = [publication.position for publication in publications if publication.position is not None]
    if len(positions) < len(publications):
        raise ValueError("a job's publication says which of the job's adapters it is")
    failures = {}
    for deleted in deleted_since(connection, adapters_at(connection, claim.id, positions)):
        error = AdapterDeleted(f"the adapter {deleted.name!r} was deleted after this job was queued")
        if deleted.name == claim.adapter:
            raise error
        failures[deleted.position] = error.members()
    fail(connection, claim.id, list(failures.items()))
    return [position not in failures for position in positions]


def record(connection: Connection, job_id: str, published: Sequence[Published]) -> None:
    """Store what each was published as; each knows its position."""
    _set(
        connection,
        job_id,
        published,
        lambda made: {
            "b_position": made.position,
            "version": made.version.version,
            "digest": made.version.digest,
            "metrics": made.version.metrics,
            "moved_live": made.moved_live,
            "replaced": made.replaced,
        },
    )


def fail(connection: Connection, job_id: str, failures: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    """Store why each of these positions has no version."""
    _set(connection, job_id, failures, lambda failed: {"b_position": failed[0], "error": dict(failed[1])})


def fail_waiting(connection: Connection, job_id: str, error: Mapping[str, Any]) -> None:
    """Store the error that ended the job with every adapter that has neither version nor error."""
    connection.execute(sa.update(job_adapters).where(_columns.job == job_id, _WAITS).values(error=dict(error)))


def _set(connection: Connection, job_id: str, items: Sequence[Any], values: Callable[[Any], dict[str, Any]]) -> None:
    if not items:
        return
    mine = (_columns.job == job_id, _columns.position == sa.bindparam("b_position"))
    connection.execute(sa.update(job_adapters).where(*mine), [values(item) for item in items])
