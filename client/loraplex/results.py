"""What the service answers with, as values. Members that a newer service adds are passed over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from loraplex.errors import BadRow, LoraplexError

Json = Mapping[str, Any]


class JobStatus(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing follows it."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class AdapterRef(NamedTuple):
    """Which version answered, or was made: `name@version` never means other bytes."""

    name: str
    version: int
    digest: str | None = None
    """Of its bytes; None where the answer did not say (the binary form does not)."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class Label(NamedTuple):
    """One class of a row, and how probable the adapter thinks it is."""

    label: str | int
    """Its name; its index where neither adapter nor base gives one."""
    probability: float


class LossPoint(NamedTuple):
    """The loss of one step's batch before its update; a closed form has 0 (the base layer's) and 1."""

    step: int
    loss: float


class LogLine(NamedTuple):
    """Something that happened in a job."""

    time: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The layer's answer to some rows."""

    outputs: Any
    """(N, out_features), or (out_features,) for one row: a torch tensor where one came in, else float32 of numpy."""
    adapter: AdapterRef | None
    """What answered; None is the base layer, or several (below)."""
    adapters: Sequence[AdapterRef] = ()
    """With an adapter a row: the distinct ones."""
    row_adapters: Sequence[int | None] | None = None
    """With an adapter a row: which of `adapters` answered each; None is the base layer."""
    queue_ms: float = 0.0
    """Waited in the service; of a request that was sent in parts, the sum."""
    forward_ms: float = 0.0
    """Computed, the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The frozen layer."""

    in_features: int
    out_features: int
    bias: bool
    dtype: str
    device: str
    fingerprint: str
    feature_space: str | None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One immutable version of an adapter."""

    adapter: str
    version: int
    digest: str
    rank: int
    alpha: float
    rslora: bool
    scaling: float
    bytes: int
    base: str
    """Fingerprint of the layer that it was made for."""
    feature_space: str | None
    labels: Sequence[str | int] | None
    created_at: str
    source: str
    job: str | None
    lineage: Json | None = None
    """What it was trained from and how; None for an upload. In a list it is without its lists, such as column names."""
    metrics: Json | None
    """In a list without those that have an entry for each output or class."""
    effect: Json
    """`relative_norm`: ‖ΔW‖ / ‖W‖."""

    @property
    def reference(self) -> str:
        """`name@version`."""
        return f"{self.adapter}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter."""

    name: str
    created_at: str
    aliases: Mapping[str, int]
    live: Version | None
    """What its bare name means."""
    versions: int
    """How many there are."""
    problem: str | None = None
    """Code of the error that `predict` meets on this service: `base_mismatch`, `feature_space_mismatch` or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a job is."""

    step: int
    steps: int
    loss: float | None
    seconds_left: float | None
    adapters: Json | None
    """Of a fleet: `published`, `failed`, `total`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFields:
    """One training job as it stood when it was asked for."""

    id: str
    status: JobStatus
    adapter: str
    """The adapter's name; of a fleet the template."""
    created_at: str
    started_at: str | None
    finished_at: str | None
    attempt: int
    progress: Progress | None
    metrics: Json | None
    result: AdapterRef | None
    error: LoraplexError | None
    """Why it failed, as the error that it would be."""
    spec: Json
    """The settings, resolved."""
    history: Sequence[LossPoint] = ()
    """Losses on the way; empty in a list of jobs."""
    log: Sequence[LogLine] = ()
    """The same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobAdapter:
    """One adapter that a job trains."""

    name: str
    group: str | None
    rows: int
    version: int | None
    digest: str | None
    metrics: Json | None
    error: LoraplexError | None
    moved_live: bool
    replaced: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a training would be and take."""

    spec: Json
    memory_bytes: float
    seconds: float
    adapters: int


class Back(NamedTuple):
    """A live alias that a revert pointed back; `to` None: no version is live now."""

    name: str
    version: int
    to: int | None


class Skipped(NamedTuple):
    """An adapter that a revert left as it is."""

    name: str
    version: int | None
    reason: str
    detail: str


class Reverted(NamedTuple):
    """Every adapter of a job, each in one of the two."""

    reverted: Sequence[Back]
    skipped: Sequence[Skipped]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a job tells while it goes on."""

    name: str
    """`status`, `progress`, `log` or `metrics`."""
    data: Json
    id: str | None
    """Where to go on from."""


class Column(NamedTuple):
    """A column of a data set."""

    name: str
    type: str
    width: int | None
    nulls: int
    not_finite: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetVersion:
    """One immutable version of a data set."""

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
    """The first 20 that cannot be trained on where their column is used; empty in a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One data set."""

    name: str
    created_at: str
    versions: int
    newest: DatasetVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """Some rows of a data set."""

    dataset: str
    version: int
    offset: int
    rows: Sequence[Mapping[str, Any]]
    next_offset: int | None
