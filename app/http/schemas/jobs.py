"""Jobs, their adapters and their results as clients see them."""

import math
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from adapters.jobs.job import Job, JobStatus
from adapters.jobs.job_adapters import JobAdapter, RevertResult, SkipReason
from app.openapi.field_schemas import ShownAs
from app.openapi.problems import JobProblem


class ProgressBody(BaseModel):
    """Progress of a job; it may be null until the first step."""

    step: int
    steps: int
    loss: float | None
    seconds_left: float | None = None
    adapters: dict[str, int] | None = Field(None, description="Of a fleet: adapters published, failed and in total.")


class ResultBody(BaseModel):
    """Version that a job of one adapter published."""

    name: str
    version: int
    digest: str


Metrics = Annotated[
    dict[str, Any] | None, Field(description="Losses and metrics by name; docs/training.md lists them.")
]
Error = Annotated[dict[str, Any] | None, ShownAs(JobProblem | None)]


class JobBody(BaseModel):
    """Training job."""

    id: str
    status: Annotated[str, ShownAs(JobStatus)]
    adapter: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    attempt: int
    progress: Annotated[dict[str, Any] | None, ShownAs(ProgressBody | None)]
    metrics: Metrics
    result: Annotated[dict[str, Any] | None, ShownAs(ResultBody | None)]
    error: Error
    spec: dict[str, Any] = Field(description="The resolved settings, with rows and digest in place of inline data.")

    @classmethod
    def of(cls, job: Job) -> "JobBody":
        """Return a job as clients see it in a list."""
        own = {name: getattr(job, name) for name in JobBody.model_fields if name != "spec"}
        return cls(**own, spec=dict(job.training.description))


class LogLine(BaseModel):
    """Line of a job's log."""

    time: str
    text: str


class JobWithHistory(JobBody):
    """Training job with its loss history and its log."""

    history: list[tuple[int, float]]
    log: list[LogLine]

    @classmethod
    def of(cls, job: Job) -> "JobWithHistory":
        """Return a job as clients see it by itself."""
        return cls(
            **dict(JobBody.of(job)),
            # A loss that was not finite is stored as null.
            history=[(int(step), math.nan if loss is None else float(loss)) for step, loss in job.history],
            log=[LogLine(time=line.at, text=line.text) for line in job.log],
        )


class JobPage(BaseModel):
    """Page of the list of jobs."""

    data: list[JobBody]
    next_cursor: str | None


class JobAdapterBody(BaseModel):
    """Adapter that a job trains."""

    name: str
    group: str | None
    rows: int
    version: int | None
    digest: str | None
    metrics: Metrics
    error: Error
    moved_live: bool
    replaced: int | None

    @classmethod
    def of(cls, adapter: JobAdapter) -> "JobAdapterBody":
        """Return an adapter of a job as clients see it."""
        return cls(**{name: getattr(adapter, name) for name in cls.model_fields})


class JobAdapterPage(BaseModel):
    """Page of the list of a job's adapters."""

    data: list[JobAdapterBody]
    next_cursor: str | None


class BackBody(BaseModel):
    """Live alias that was restored. If `to` is null, no version is live now."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    name: str
    version: int = Field(alias="from")
    to: int | None


class SkippedBody(BaseModel):
    """Adapter of the job that was not changed."""

    name: str
    version: int | None
    reason: Annotated[str, ShownAs(SkipReason)]
    detail: str


class RevertBody(BaseModel):
    """Result of a revert: every adapter of the job is in one of the two lists."""

    reverted: list[BackBody]
    skipped: list[SkippedBody]

    @classmethod
    def of(cls, done: RevertResult) -> "RevertBody":
        """Return the result of a revert as clients see it."""
        return cls(
            reverted=[BackBody(name=back.name, version=back.version, to=back.to) for back in done.reverted],
            skipped=[SkippedBody(**asdict(skipped)) for skipped in done.skipped],
        )
