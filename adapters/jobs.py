"""One training job: its states, its record, and the statements on its row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.errors import ClaimLost, JobNotFound, QueueFull
from adapters.tables import DEFAULT_TENANT, jobs


class Status(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    """Waits for a trainer."""
    RUNNING = "running"
    """A trainer holds its lease."""
    SUCCEEDED = "succeeded"
    """Its version is published."""
    FAILED = "failed"
    """It ended with an error and published nothing."""
    CANCELLED = "cancelled"
    """A client ended it, and it published nothing."""


MOVES: Mapping[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELLED}),
    # Back to queued: a trainer that stops hands its lease back. Running again: another trainer claims it, because
    # its lease has run out.
    Status.RUNNING: frozenset({Status.QUEUED, Status.RUNNING, Status.SUCCEEDED, Status.FAILED, Status.CANCELLED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training, as it stands in the queue."""

    sequence: int
    """The order in which jobs were queued."""
    id: str
    adapter: str
    status: Status
    created_at: str
    started_at: str | None
    """When a trainer first claimed it."""
    finished_at: str | None
    attempt: int
    """Claims so far; a lease that was handed back does not count."""
    fence: int
    """Goes up with every claim: a trainer whose number is old may not publish."""
    lease_until: float | None
    base: str
    feature_space: str | None
    deletions: int
    """How often the adapter had been deleted when the job was queued."""
    spec: Mapping[str, Any]
    """`shown`, the settings as a client reads them; `resolved`, as the fit does; `steps`; `publish`."""
    data_file: str | None
    """The blob with the data; None once the job has ended."""
    progress: Mapping[str, Any] | None
    history: Sequence[Sequence[float]]
    metrics: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    log: Sequence[Sequence[str]] | None = None
    """What happened on the way, each a time and a sentence."""


def get(connection: Connection, job_id: str) -> Job:
    """One job; raises `JobNotFound`."""
    row = connection.execute(sa.select(jobs).where(jobs.c.tenant == DEFAULT_TENANT, jobs.c.id == job_id)).one_or_none()
    if row is None:
        raise JobNotFound(f"there is no job {job_id!r}", field="id", given=job_id)
    return as_job(row)


def as_job(row: sa.Row[Any]) -> Job:
    """A row of the jobs table as the value that the rest of the house knows."""
    values = row._asdict()
    values.pop("tenant")
    values["status"] = Status(values["status"])
    values.setdefault("history", [])
    return Job(**values)


def update(connection: Connection, job: Job, **values: Any) -> Job:
    """Write columns of a job's row; returns the job as it is now."""
    connection.execute(sa.update(jobs).where(jobs.c.id == job.id).values(**values))
    return get(connection, job.id)


def move(connection: Connection, job: Job, to: Status, **values: Any) -> Job:
    """Move a job to another status by one of the legal moves, and write columns with it."""
    if to not in MOVES[job.status]:
        raise ValueError(f"a job cannot go from {job.status} to {to}")
    return update(connection, job, status=to, **values)


def check_holds(connection: Connection, claim: Job) -> None:
    """Raises `ClaimLost` where the job was cancelled or claimed again since `claim`."""
    # Asked five times a second: without the history and the spec, which may be long.
    statement = sa.select(jobs.c.status, jobs.c.fence).where(jobs.c.id == claim.id)
    status, fence = connection.execute(statement).one()
    if status != Status.RUNNING or fence != claim.fence:
        raise ClaimLost(f"job {claim.id} is {status} at fence {fence}; this claim has fence {claim.fence}")


def check_room(connection: Connection, max_queued: int) -> None:
    """Raises `QueueFull` where as many jobs wait as may."""
    waiting = connection.scalars(
        sa.select(sa.func.count()).select_from(jobs).where(jobs.c.status == Status.QUEUED)
    ).one()
    if waiting >= max_queued:
        raise QueueFull(f"{waiting} jobs wait already, as many as may", expected=f"fewer than {max_queued}")
