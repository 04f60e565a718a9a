"""One training job: its states, its values, and the statements on its row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.errors import ClaimLost, JobNotFound, QueueFull
from adapters.jobs.training_job import TrainingJob
from adapters.storage.schema import DEFAULT_TENANT, job_adapters, jobs


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
class Job:
    """One job in the queue."""

    sequence: int
    """Position in the order in which jobs were queued."""
    id: str
    adapter: str
    """The name that it trains, or the template of a fleet's names."""
    status: JobStatus
    created_at: str
    started_at: str | None
    """When a trainer first claimed it."""
    finished_at: str | None
    attempt: int
    """Claims so far; a job that its trainer released was not claimed."""
    fence: int
    """Fencing token, raised by every claim: a trainer with an old one cannot publish."""
    lease_until: float | None
    base: str
    feature_space: str | None
    training: TrainingJob
    data_file: str | None
    """The blob with its own data; None once the job has ended."""
    progress: Mapping[str, Any] | None
    history: Sequence[tuple[int, float | None]]
    metrics: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    log: Sequence[LogLine] = ()
    """Its newest lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """The part of a job that its watchers see."""

    status: JobStatus
    attempt: int
    fence: int
    progress: Mapping[str, Any] | None
    metrics: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    log: Sequence[LogLine]

    @property
    def ended(self) -> bool:
        """Whether the job has ended."""
        return not TRANSITIONS[self.status]


# Number of the newest lines of a job's log that are kept.
MAX_LOG_LINES = 200
_MAX_LINE_CHARACTERS = 500
# Sorts after every character of an id.
_AFTER_ALL = "\U0010ffff"
_STATE = [jobs.c[name] for name in JobState.__dataclass_fields__]
_LISTED = [column for column in jobs.c if column.name not in ("history", "log")]


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
    values["training"] = TrainingJob.from_json(values.pop("spec"))
    values["status"] = JobStatus(values["status"])
    values["history"] = [(step, loss) for step, loss in values.get("history", ())]
    return Job(**values | {"log": _lines(values.get("log"))})


def list_jobs(
    connection: Connection,
    *,
    status: JobStatus | None = None,
    adapter: str | None = None,
    prefix: str | None = None,
    before: int | None = None,
    limit: int = 100,
) -> list[Job]:
    """Return jobs with sequence numbers below `before`, newest first, without history and log.

    adapter: a name that they train, alone or in a fleet. prefix: the beginning of their ids.
    """
    statement = sa.select(*_LISTED).where(jobs.c.tenant == DEFAULT_TENANT)
    if status is not None:
        statement = statement.where(jobs.c.status == status)
    if adapter is not None:
        statement = statement.where(jobs.c.id.in_(sa.select(job_adapters.c.job).where(job_adapters.c.name == adapter)))
    if prefix is not None:
        # A range, which SQLite finds in the index on ids.
        statement = statement.where(jobs.c.id >= prefix, jobs.c.id < prefix + _AFTER_ALL)
    if before is not None:
        statement = statement.where(jobs.c.sequence < before)
    statement = statement.order_by(jobs.c.sequence.desc()).limit(limit)
    return [job_from_row(row) for row in connection.execute(statement)]


def states(connection: Connection, job_ids: Sequence[str]) -> dict[str, JobState]:
    """Return the states of these jobs, at most a few hundred."""
    by_id = {}
    for row in connection.execute(sa.select(jobs.c.id, *_STATE).where(jobs.c.id.in_(job_ids))):
        values = row._asdict()
        job_id, status, lines = values.pop("id"), JobStatus(values.pop("status")), _lines(values.pop("log"))
        by_id[job_id] = JobState(status=status, log=lines, **values)
    return by_id


def claimable(connection: Connection, now: float, base: str) -> Job | None:
    """Return the oldest job for this base layer, by its fingerprint, that is queued or whose lease has expired."""
    expired = (jobs.c.status == JobStatus.RUNNING) & (jobs.c.lease_until <= now)
    # Found by the index on status, which leaves few jobs: an index on the base would find every job that there was.
    statement = sa.select(jobs).where((jobs.c.status == JobStatus.QUEUED) | expired, jobs.c.base == base)
    row = connection.execute(statement.order_by(jobs.c.sequence).limit(1)).one_or_none()
    return None if row is None else job_from_row(row)


def update(connection: Connection, job: Job, **values: Any) -> None:
    """Set columns of a job's row."""
    connection.execute(sa.update(jobs).where(jobs.c.id == job.id).values(**values))


def change_status(connection: Connection, job: Job, to: JobStatus, **values: Any) -> Job:
    """Change a job's status by a legal transition, set other columns, and return the job as it is then."""
    if to not in TRANSITIONS[job.status]:
        raise ValueError(f"a job cannot go from {job.status} to {to}")
    update(connection, job, status=to, **values)
    return get(connection, job.id)


def append_log(connection: Connection, claim: Job, text: str, *, at: str) -> None:
    """Append a line to a job's log; if the log is full, the oldest line is dropped."""
    lines = _lines(connection.scalars(sa.select(jobs.c.log).where(jobs.c.id == claim.id)).one())
    number = lines[-1].number + 1 if lines else 1
    update(connection, claim, log=[*lines[1 - MAX_LOG_LINES :], LogLine(at, text[:_MAX_LINE_CHARACTERS], number)])


def _lines(stored: Sequence[Sequence[Any]] | None) -> list[LogLine]:
    return [LogLine(*line) for line in stored or ()]


def check_claim(connection: Connection, claim: Job) -> None:
    """Raise `ClaimLost` if the job was cancelled or claimed again since `claim`."""
    # Called five times a second: history and spec, which may be long, are not read.
    statement = sa.select(jobs.c.status, jobs.c.fence).where(jobs.c.id == claim.id)
    status, fence = connection.execute(statement).one()
    if status != JobStatus.RUNNING or fence != claim.fence:
        raise ClaimLost(f"job {claim.id} is {status} at fence {fence}; this claim has fence {claim.fence}")


def check_room(connection: Connection, max_queued: int, base: str) -> None:
    """Raise `QueueFull` if `max_queued` jobs for this base layer, by its fingerprint, are queued.

    Jobs for another base layer do not count: no trainer of this service takes them, so they would fill the queue for
    good.
    """
    queued = (jobs.c.status == JobStatus.QUEUED, jobs.c.base == base)
    waiting = connection.scalars(sa.select(sa.func.count()).select_from(jobs).where(*queued)).one()
    if waiting >= max_queued:
        raise QueueFull(f"{waiting} jobs wait already, as many as may", expected=f"fewer than {max_queued}")
