"""Results of calls, as values. Fields that a newer service adds are ignored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from loraplex.errors import BadRow, JobCancelled, JobFailed, LoraplexError
from loraplex.frames import Columns, Tabular, to_pandas

Json = Mapping[str, Any]


class JobStatus(StrEnum):
    """Status of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Return whether the status is final."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class AdapterRef(NamedTuple):
    """Reference to the version that answered or was made: `name@version` always means the same bytes."""

    name: str
    version: int
    digest: str | None = None
    """SHA-256 of its bytes; None if the answer does not give it, as in the binary form."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class Label(NamedTuple):
    """Class of a row, with the probability that the adapter gives it."""

    label: str | int
    """Name of the class, or its index if neither adapter nor base layer has labels."""
    probability: float


class LossPoint(NamedTuple):
    """Loss of the batch of one step before its update; a closed form has the steps 0 (the base layer) and 1."""

    step: int
    loss: float


class LogLine(NamedTuple):
    """Line of a job's log."""

    time: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction(Tabular):
    """Outputs of the layer for some rows."""

    outputs: Any
    """(N, out_features), or (out_features,) for a single row: a tensor if a tensor was given, otherwise NumPy float32.
    """
    adapter: AdapterRef | None
    """The version that answered; None for the base layer and for one adapter per row."""
    adapters: Sequence[AdapterRef] = ()
    """The distinct versions, if each row has its own adapter."""
    row_adapters: Sequence[int | None] | None = None
    """Index in `adapters` of the version that answered each row; None for the base layer."""
    queue_ms: float = 0.0
    """Time of waiting in the service; the sum if the request was sent in parts."""
    forward_ms: float = 0.0
    """Time of computation; the sum if the request was sent in parts."""
    index: Any = field(default=None, repr=False, compare=False)
    """Index of the pandas DataFrame or Series that was given, which `to_pandas` keeps; otherwise None."""

    def to_pandas(self) -> Any:
        """Return a row of outputs for each row: `output_0`, …, after the `adapter` if each row has its own."""
        frame = to_pandas(self)
        return frame if self.index is None else frame.set_index(self.index)

    def _columns(self) -> Columns:
        from loraplex.arrays import array  # imports numpy

        outputs = array(self.outputs, field="outputs")
        columns: dict[str, Any] = {}
        if self.row_adapters is not None:
            columns["adapter"] = [None if row is None else str(self.adapters[row]) for row in self.row_adapters]
        columns |= {f"output_{output}": outputs[..., output].reshape(-1) for output in range(outputs.shape[-1])}
        return columns


class Classification(list[list[Label]], Tabular):
    """The most probable classes of each row, in order of probability."""

    __slots__ = ()

    def _columns(self) -> Columns:
        width = max(map(len, self), default=0)
        columns: dict[str, Sequence[Any]] = {}
        for rank in range(width):
            suffix = "" if width == 1 else f"_{rank + 1}"
            labels = [row[rank] if rank < len(row) else None for row in self]
            columns |= {
                f"{name}{suffix}": [None if label is None else getattr(label, name) for label in labels]
                for name in Label._fields
            }
        return columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Base(Tabular):
    """The base layer."""

    in_features: int
    out_features: int
    bias: bool
    dtype: str
    device: str
    fingerprint: str
    feature_space: str | None
    labels: Sequence[str | int] | None = None
    """Labels of the first outputs; None if there are none."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Version(Tabular):
    """Immutable version of an adapter."""

    adapter: str
    version: int
    digest: str
    rank: int
    alpha: float
    rslora: bool
    scaling: float
    bytes: int
    base: str
    """Fingerprint of the base layer that it was made for."""
    feature_space: str | None
    labels: Sequence[str | int] | None
    created_at: str
    source: str
    job: str | None
    lineage: Json | None = None
    """Settings and data of its training; None for an upload. Lists omit long members, such as column names."""
    metrics: Json | None
    """Lists omit members that have an entry for each output or class."""
    effect: Json
    """`relative_norm`: ‖ΔW‖ / ‖W‖."""

    @property
    def reference(self) -> str:
        """Return `name@version`."""
        return f"{self.adapter}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter(Tabular):
    """An adapter."""

    name: str
    created_at: str
    aliases: Mapping[str, int]
    live: Version | None
    """The version that the bare name means."""
    versions: int
    """Number of versions."""
    problem: str | None = None
    """Code of the error that `predict` meets on this service: `base_mismatch`, `feature_space_mismatch` or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress of a job."""

    step: int
    steps: int
    loss: float | None = None
    seconds_left: float | None = None
    adapters: Json | None = None
    """Of a fleet: `published`, `failed`, `total`."""


class Outcome(StrEnum):
    """How an adapter compares with what its name answered with before it."""

    BETTER = "better"
    SAME = "same"
    WORSE = "worse"
    FAILED = "failed"
    """The adapter of a fleet was not trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures of an adapter, and of what it is compared with, on rows that neither trained nor chose it."""

    by: str
    """`held_out`, `cross_validation`, `leave_one_out` or `training`."""
    rows: int
    metric: str
    """`accuracy` and `label_accuracy` are better if they are higher, `mse` and `loss` if they are lower."""
    adapter: float | None
    base: float | None
    live: float | None
    """Of the version that was live; None if there was none, or if it cannot be compared."""
    guess: float | None
    """Of the best constant answer, such as the most frequent class."""
    intervals: Mapping[str, Sequence[float]]
    """95 % intervals of the figures, by their names."""
    gain: float | None
    """Mean gain per row over the live version, or over the base layer if there is none."""
    gain_error: float | None
    """Standard error of the gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether live moved to the new version, and the reason."""

    moved: bool
    reason: str
    outcome: Outcome | None
    """None without an evaluation."""
    gain: float | None
    """Gain that decided; in a fleet, with a part of the gain of the other groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What `method: auto` tried, or the reason for not trying it."""

    candidate: str
    figure: float | None
    settings: Json
    skipped: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `method: auto` compared, and what it took."""

    metric: str
    """`log_loss` or `mse`: lower is better."""
    rows: int
    by: str
    taken: str
    reason: str
    candidates: Sequence[Candidate]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOutcomes:
    """Number of adapters of a fleet by outcome, and of those that are live."""

    better: int
    same: int
    worse: int
    failed: int
    moved: int


class ClassFigures(NamedTuple):
    """Figures of one class, or of one label of several per row; `rows` is a sum of weights if there are some."""

    label: str | int
    rows: float
    precision: float | None
    """Share of right answers among the rows with this answer; None if there are none."""
    recall: float | None
    """Share of right answers among the rows of the class; None if there are none."""
    f1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedAdapter(Tabular):
    """Figures of one adapter, or of the base layer, in the result of an evaluation."""

    adapter: str | None
    """`name@version`; None for the base layer."""
    figure: float | None
    """The metric of the evaluation; None if the outputs could not be matched to the rows."""
    interval: Sequence[float] | None
    """95 % interval of the figure: low and high."""
    gain: float | None
    """Mean gain per row over the first entry, positive if better; None for the first entry."""
    gain_error: float | None
    """Standard error of the gain."""
    metrics: Json | None
    classes: Sequence[ClassFigures] | None
    """Of the classes that are true or answered; None for numbers, and for more than 1,000 classes."""
    confusion: Sequence[Sequence[float]] | None
    """Rows by true class and answer, in the order of `classes`; None for more than 50 classes."""
    missing_labels: Sequence[str | int]
    """Labels of the rows that it cannot answer with, the first 20; and the number of rows that have such a label."""
    missing_rows: int
    problem: str | None
    """Why it could not be evaluated on the rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult(Tabular):
    """Result of an evaluation: several adapters side by side on the same rows, in the order of the request."""

    metric: str
    """`accuracy` and `label_accuracy` are better if they are higher, `mse` if it is lower."""
    rows: int
    adapters: Sequence[EvaluatedAdapter]


class Suspect(NamedTuple):
    """Row whose label the other rows contradict."""

    row: int
    label: str | int
    suggested: str | int
    """The label that the other rows suggest."""
    score: float
    """The higher, the stronger is the contradiction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFields(Tabular):
    """Training job, in the state in which it was fetched."""

    id: str
    kind: str = "train"
    """`train`, `update` or `evaluation`."""
    status: JobStatus
    adapter: str
    """Name of the adapter; of a fleet, its template."""
    created_at: str
    started_at: str | None
    finished_at: str | None
    attempt: int
    progress: Progress | None
    metrics: Json | None
    result: AdapterRef | EvaluationResult | None
    """The version of its adapter, or the result of an evaluation; None for a fleet."""
    error: LoraplexError | None
    """The reason for the failure, as the error that it would raise."""
    spec: Json
    """The resolved settings."""
    evaluation: Evaluation | None = None
    """None if nothing was evaluated, and for a fleet, whose adapters have one each."""
    decision: Decision | None = None
    auto: Comparison | None = None
    summary: FleetOutcomes | None = None
    """Of a fleet."""
    warnings: Sequence[str] = ()
    """Findings of the fit; `spec` has the warnings about the settings."""
    history: Sequence[LossPoint] = ()
    """Losses during the training; empty in a list of jobs."""
    log: Sequence[LogLine] = ()
    """Log of the job; empty in a list of jobs."""


J = TypeVar("J", bound=JobFields)


def succeeded(job: J) -> J:
    """Return the job; raise `JobFailed` or `JobCancelled` if it did not succeed."""
    if job.status is JobStatus.CANCELLED:
        raise JobCancelled(f"job {job.id} ({job.adapter}) was cancelled", job=job)
    if job.status is JobStatus.FAILED:
        reason = "without a reason" if job.error is None else f"{job.error.code}: {job.error.detail}"
        raise JobFailed(f"job {job.id} ({job.adapter}) failed, {reason}", job=job) from job.error
    return job


@dataclass(frozen=True, slots=True, kw_only=True)
class JobAdapter(Tabular):
    """Adapter that a job trains."""

    name: str
    group: str | None
    rows: int
    version: int | None
    digest: str | None
    metrics: Json | None
    error: LoraplexError | None
    moved_live: bool
    replaced: int | None
    outcome: Outcome | None = None
    """None if nothing was evaluated."""
    gain: float | None = None
    """Mean gain per row over what the name answered with before."""
    evaluation: Evaluation | None = None
    decision: Decision | None = None
    auto: Comparison | None = None
    warnings: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Resolved settings of a training, with the memory and time that it needs."""

    spec: Json
    memory_bytes: float
    seconds: float
    adapters: int
    scratch_bytes: float = 0
    """Disk space of the trainer for a fleet that does not fit in its memory; 0 if it fits."""


class Back(NamedTuple):
    """Live alias that a revert moved back; `to` is None if no version is live now."""

    name: str
    version: int
    to: int | None


class Skipped(NamedTuple):
    """Adapter that a revert left unchanged."""

    name: str
    version: int | None
    reason: str
    detail: str


class Reverted(NamedTuple):
    """Result of a revert: every adapter of the job is in one of the two lists."""

    reverted: Sequence[Back]
    skipped: Sequence[Skipped]


@dataclass(frozen=True, slots=True)
class Event:
    """Event of a job."""

    name: str
    """`status`, `progress`, `log` or `metrics`."""
    data: Json
    id: str | None
    """Id from which the stream can be resumed."""


class Column(NamedTuple):
    """Column of a data set."""

    name: str
    type: str
    width: int | None
    nulls: int
    not_finite: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetVersion(Tabular):
    """Immutable version of a data set."""

    dataset: str
    version: int
    digest: str
    created_at: str
    content_type: str
    rows: int
    bytes: int
    columns: Sequence[Column] = ()
    """Empty in a list."""
    bad_rows: Sequence[BadRow] = ()
    """The first 20 rows that cannot be used for training; empty in a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset(Tabular):
    """A data set."""

    name: str
    created_at: str
    versions: int
    newest: DatasetVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview(Tabular):
    """Rows of a data set."""

    dataset: str
    version: int
    offset: int
    rows: Sequence[Mapping[str, Any]]
    next_offset: int | None
