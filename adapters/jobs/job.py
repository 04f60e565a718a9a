"""One training job: its states and its values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa

from adapters.access.audit import Actor
from adapters.jobs.training_job import JobKind, TrainingJob


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
    JobStatus.RUNNING: frozenset(JobStatus),
    **dict.fromkeys((JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED), frozenset[JobStatus]()),
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
    report: Mapping[str, Any] | None = None
    """`evaluation`, `decision`, `auto` and `warnings` of the fit; of a fleet that has ended, `summary`."""
    log: Sequence[LogLine] = ()
    """Its newest lines."""

    @property
    def ended(self) -> bool:
        """Whether the job has ended."""
        return not TRANSITIONS[self.status]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(JobState):
    """One job in the queue."""

    tenant: str
    """The tenant that it belongs to: its names and references are those of this tenant."""
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
    submitted_by: Actor
    """Who submitted it, and makes the changes that its trainer makes."""

    @property
    def kind(self) -> JobKind:
        """Return what the job does."""
        return self.training.kind


def job_from_row(row: sa.Row[Any]) -> Job:
    """Return the job that a row of the table of jobs describes."""
    values = row._asdict()
    values.pop("kind")
    parsed = _parsed(values) | {
        "training": TrainingJob.from_json(values.pop("spec")),
        "history": [(step, loss) for step, loss in values.get("history", ())],
        "submitted_by": Actor(**values["submitted_by"] or {}),
    }
    return Job(**values | parsed)


def state_from_row(row: sa.Row[Any]) -> JobState:
    """Return the state in a row with the columns of `JobState` and others."""
    values = {name: getattr(row, name) for name in JobState.__dataclass_fields__}
    return JobState(**values | _parsed(values))


def _parsed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"status": JobStatus(values["status"]), "log": [LogLine(*line) for line in values.get("log") or ()]}
