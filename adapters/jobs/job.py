"""One training job: its states, its values, and the statements on its row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.errors import ClaimLost, JobNotFound
from adapters.jobs.training_job import TrainingJob
from adapters.storage.schema import DEFAULT_TENANT, jobs


class JobStatus(StrEnum):
    """State of a job."""

    QUEUED = "queued"
    """Waiting for a trainer."""
    RUNNING = "running"
    """A trainer holds its lease."""
    SUCCEEDED = "succeeded"
    """Its adapters are published."""
    FAILED = "failed"
    """It ended with an error. Of a fleet, what was published before stays."""
    CANCELLED = "cancelled"
    """A client ended it. Of a fleet, what was published before stays."""


TRANSITIONS: Mapping[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED}),
    # To queued: a trainer that stops releases the job. To running: another trainer claims it after its lease expired.
    JobStatus.RUNNING: frozenset(
        {JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


class LogLine(NamedTuple):
    """A line of a job's log."""

    at: str
    text: str
    number: int
    """Counts all lines from 1 on, also those that are no longer kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """The part of a job that its watchers see."""

    status: JobStatus
    attempt: int
    """Claims so far; a job that its trainer released was not claimed."""
    fence: int
    """Fencing token, raised by every claim: a trainer with an old one cannot publish."""
    progress: Mapping[str, Any] | None
    metrics: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    log: Sequence[LogLine] = ()
    """Its newest lines."""

    @property
    def ended(self) -> bool:
        """Whether the job has ended."""
        return not TRANSITIONS[self.status]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(JobState):
    """One job in the queue."""

    sequence: int
    """Position in the order in which jobs were queued."""
    id: str
    adapter: str
    """The name that it trains, or the template of a fleet's names."""
    created_at: str
    started_at: str | None
    """When a trainer first claimed it."""
    finished_at: str | None
    lease_until: float | None
    base: str
    feature_space: str | None
    training: TrainingJob
    data_file: str | None
    """The blob with its own data; None once the job has ended."""
    history: Sequence[tuple[int, float | None]]


_STATE = [jobs.c[name] for name in JobState.__dataclass_fields__]


def get(connection: Connection, job_id: str) -> Job:
    """Return one job; raise `JobNotFound`."""
    require(connection, job_id)
    return job_from_row(connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one())


def require(connection: Connection, job_id: str) -> None:
    """Raise `JobNotFound` if there is no such job."""
    statement = sa.select(jobs.c.id).where(jobs.c.tenant == DEFAULT_TENANT, jobs.c.id == job_id)
    if connection.execute(statement).one_or_none() is None:
        raise JobNotFound(f"there is no job {job_id!r}", field="id", given=job_id)


def job_from_row(row: sa.Row[Any]) -> Job:
    """Return the job that a row of the table of jobs describes."""
    values = row._asdict()
    values.pop("tenant")
    history = [(step, loss) for step, loss in values.get("history", ())]
    training = TrainingJob.from_json(values.pop("spec"))
    return Job(**values | _parsed(values) | {"training": training, "history": history})


def _parsed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"status": JobStatus(values["status"]), "log": [LogLine(*line) for line in values.get("log") or ()]}


def states(connection: Connection, job_ids: Sequence[str]) -> dict[str, JobState]:
    """Return the states of these jobs, at most a few hundred."""
    by_id = {}
    for row in connection.execute(sa.select(jobs.c.id, *_STATE).where(jobs.c.id.in_(job_ids))):
        values = row._asdict()
        by_id[values.pop("id")] = JobState(**values | _parsed(values))
    return by_id


def update(connection: Connection, job: Job, **values: Any) -> None:
    """Set columns of a job's row."""
    connection.execute(sa.update(jobs).where(jobs.c.id == job.id).values(**values))


def change_status(connection: Connection, job: Job, to: JobStatus, **values: Any) -> Job:
    """Change a job's status by a legal transition, set other columns, and return the job as it is then."""
    if to not in TRANSITIONS[job.status]:
        raise ValueError(f"a job cannot go from {job.status} to {to}")
    update(connection, job, status=to, **values)
    return get(connection, job.id)


def check_claim(connection: Connection, claim: Job) -> None:
    """Raise `ClaimLost` if the job was cancelled or claimed again since `claim`."""
    # Called five times a second: history and spec, which may be long, are not read.
    statement = sa.select(jobs.c.status, jobs.c.fence).where(jobs.c.id == claim.id)
    status, fence = connection.execute(statement).one()
    if status != JobStatus.RUNNING or fence != claim.fence:
        raise ClaimLost(f"job {claim.id} is {status} at fence {fence}; this claim has fence {claim.fence}")
