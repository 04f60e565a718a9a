"""Jobs, their adapters and their results as clients see them."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasPath, BaseModel, BeforeValidator, Field

from adapters.jobs.job import JobStatus
from adapters.jobs.job_adapters import AdapterOutcome
from adapters.jobs.revert import SkipReason
from adapters.jobs.training_job import JobKind
from adapters.training.settings import Candidate
from app.http.errors import JobProblem
from app.http.schemas.adapters import without_lists
from app.http.schemas.fields import AnswerBody, PageBody, RequestBody, ShownAs


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


class ClassFiguresBody(BaseModel):
    """Figures of one class of the rows, or of one label."""

    label: str | int
    rows: float = Field(description="Rows of the class, or the sum of their weights.")
    precision: float | None
    recall: float | None
    f1: float


class EvaluatedBody(BaseModel):
    """Figures of one adapter, or of the base layer."""

    adapter: str | None = Field(description="`name@version`; null for the base layer.")
    figure: float | None = Field(description="The metric of the evaluation; null if the outputs could not be matched.")
    interval: tuple[float, float] | None = Field(description="95 % interval of the figure.")
    gain: float | None = Field(description="Mean gain per row over the first entry, positive if better.")
    gain_error: float | None = Field(description="Standard error of the gain.")
    metrics: dict[str, Any] | None
    classes: list[ClassFiguresBody] | None = Field(description="Of the classes that are true or answered.")
    confusion: list[list[float]] | None = Field(description="Rows by truth and answer, in the order of `classes`.")
    missing_labels: list[str | int] = Field(description="Labels of the rows that it cannot answer with; the first 20.")
    missing_rows: int
    problem: str | None = Field(description="Why it could not be evaluated on the rows.")


class EvaluationResultBody(BaseModel):
    """Result of an evaluation: all entries on the same rows."""

    metric: str = Field(description="`accuracy`, `label_accuracy`, or `mse`, of which lower is better.")
    rows: int
    adapters: list[EvaluatedBody]


class EvaluationBody(BaseModel):
    """Figures of the adapter, the base layer, the live version and a trivial guess, all on the same rows."""

    by: Literal["held_out", "cross_validation", "leave_one_out", "training"]
    rows: int
    metric: Literal["accuracy", "mse", "label_accuracy", "loss"]
    adapter: float | None
    base: float | None
    live: float | None = Field(description="Null if no version was live, or if it could not be compared.")
    guess: float | None = Field(description="The most frequent class, or the mean target, of the training rows.")
    intervals: dict[str, Any] = Field(description="Interval of 95 % by figure: low and high.")
    gain: float | None = Field(description="Mean gain per row over what the name answered with before.")
    gain_error: float | None = Field(description="Standard error of the gain.")


class DecisionBody(BaseModel):
    """Whether live moved to the new version, and why."""

    moved: bool
    reason: str
    outcome: Literal["better", "same", "worse"] | None
    gain: float | None


class CandidateBody(BaseModel):
    """One candidate of `method: auto`."""

    candidate: Annotated[str, ShownAs(Candidate)]
    figure: float | None
    settings: dict[str, Any]
    skipped: str | None = Field(description="Why it was not tried; null if it was.")


class AutoBody(BaseModel):
    """What `method: auto` tried, and what it took."""

    metric: Literal["log_loss", "mse"]
    rows: int
    by: str
    taken: Annotated[str, ShownAs(Candidate)]
    reason: str
    candidates: list[CandidateBody]


class SummaryBody(BaseModel):
    """Adapters of a fleet by outcome, and those whose live version moved."""

    better: int
    same: int
    worse: int
    failed: int
    moved: int


def _reported(name: str, *, default: object = None, description: str | None = None) -> Any:
    """Return the declaration of a field that is a member of the report of a job or of an adapter."""
    return Field(default, validation_alias=AliasPath("report", name), description=description)


Evaluation = Annotated[dict[str, Any] | None, ShownAs(EvaluationBody | None)]
Decision = Annotated[dict[str, Any] | None, ShownAs(DecisionBody | None)]
Auto = Annotated[dict[str, Any] | None, ShownAs(AutoBody | None)]
Metrics = Annotated[
    dict[str, Any] | None, Field(description="Losses and metrics by name; docs/training.md lists them.")
]
Error = Annotated[dict[str, Any] | None, ShownAs(JobProblem | None)]
# A loss that was not finite is stored as null.
StoredLoss = Annotated[float, BeforeValidator(lambda loss: math.nan if loss is None else loss)]


def _without_classes(result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return a result without the lists whose size grows with the classes of an evaluation."""
    if result is None or "adapters" not in result:
        return result
    left_out = {"classes": None, "confusion": None}
    adapters = [entry | left_out | {"metrics": without_lists(entry["metrics"])} for entry in result["adapters"]]
    return {**result, "adapters": adapters}


_SHOWN_RESULT = ShownAs(ResultBody | EvaluationResultBody | None)


class JobBody(AnswerBody):
    """Job, without the figures of each class of an evaluation."""

    id: str
    kind: Annotated[str, ShownAs(JobKind)]
    status: Annotated[str, ShownAs(JobStatus)]
    adapter: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    attempt: int
    progress: Annotated[dict[str, Any] | None, ShownAs(ProgressBody | None)]
    metrics: Metrics
    result: Annotated[dict[str, Any] | None, BeforeValidator(_without_classes), _SHOWN_RESULT]
    error: Error
    spec: Annotated[dict[str, Any], BeforeValidator(lambda training: training.description)] = Field(
        validation_alias="training", description="The resolved settings, with rows and digest in place of inline data."
    )
    evaluation: Evaluation = _reported("evaluation")
    decision: Decision = _reported("decision")
    auto: Auto = _reported("auto")
    summary: Annotated[dict[str, Any] | None, ShownAs(SummaryBody | None)] = _reported(
        "summary", description="Of a fleet: its adapters by outcome."
    )
    warnings: list[str] = _reported("warnings", default=[], description="Findings of the fit; `spec` has the plan's.")


class LogLine(AnswerBody):
    """Line of a job's log."""

    time: str = Field(validation_alias="at")
    text: str


class JobWithHistory(JobBody):
    """Job with its loss history and its log."""

    result: Annotated[dict[str, Any] | None, _SHOWN_RESULT]

    history: list[tuple[int, StoredLoss]]
    log: list[LogLine]


class JobPage(PageBody[JobBody]):
    """Page of the list of jobs."""


class JobAdapterBody(AnswerBody):
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
    outcome: Annotated[str | None, ShownAs(AdapterOutcome | None)] = Field(
        description="Comparison with what the name answered with before; null if nothing was evaluated."
    )
    gain: float | None
    evaluation: Evaluation = _reported("evaluation")
    decision: Decision = _reported("decision")
    auto: Auto = _reported("auto")
    warnings: list[str] = _reported("warnings", default=[])


class JobAdapterPage(PageBody[JobAdapterBody]):
    """Page of the list of a job's adapters."""


class SuspectBody(AnswerBody):
    """Row whose label the other rows contradict."""

    row: int
    label: str | int
    suggested: str | int = Field(description="The label that the other rows suggest.")
    score: float = Field(description="The higher, the stronger is the contradiction.")


class SuspectPage(PageBody[SuspectBody]):
    """Page of the list of a job's suspects."""


class RetryRequest(RequestBody):
    """Part of a job to train again."""

    outcomes: list[Literal["better", "same", "worse", "failed"]] = Field(["failed"], min_length=1)
    training: dict[str, Any] = Field({}, description="Settings of a training, in place of the job's.")


class BackBody(AnswerBody):
    """Live alias that a revert moved back. If `to` is null, no version is live now."""

    name: str
    version: int = Field(serialization_alias="from")
    to: int | None


class SkippedBody(AnswerBody):
    """Adapter of the job that was not changed."""

    name: str
    version: int | None
    reason: Annotated[str, ShownAs(SkipReason)]
    detail: str


class RevertBody(AnswerBody):
    """Result of a revert: every adapter of the job is in one of the two lists."""

    reverted: list[BackBody]
    skipped: list[SkippedBody]
