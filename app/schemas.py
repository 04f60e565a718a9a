"""Requests and answers as clients see them.

Arrays are `Any` here: they are checked by `adapters.matrices`, which is as strict and far faster.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from adapters import versions as domain
from adapters.base_layer import BaseLayer
from adapters.jobs import Job

Matrix = Annotated[
    Any, Field(json_schema_extra={"type": "array", "items": {"type": "array", "items": {"type": "number"}}})
]


def _not_null(value: object) -> object:
    if value is None:
        raise ValueError("it may be left out, but not be null")
    return value


Alpha = Annotated[float | None, BeforeValidator(_not_null)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def gave(self, name: str) -> bool:
        """Whether the client sent this field."""
        return name in self.model_fields_set


class PredictRequest(_Request):
    """Rows, and the adapter for all of them or one for each."""

    adapter: Any = Field(None, description="Reference, or null for the bare base layer.")
    adapters: Any = Field(None, description="One reference or null a row.")
    inputs: Matrix


class DataBody(_Request):
    """Inline training data."""

    inputs: Matrix
    targets: Any = Field(description="Rows of numbers (mse) or one class index a row (cross_entropy).")


class TrainingBody(_Request):
    """How to train."""

    method: Literal["adamw", "sgd", "closed_form"] = "adamw"
    loss: Literal["mse", "cross_entropy"] = "mse"
    epochs: int = Field(50, ge=1, le=10_000_000)
    learning_rate: float = Field(0.01, gt=0, le=1e6)
    batch_size: int | None = Field(64, ge=1, le=2**31)
    seed: int = Field(0, ge=0, lt=2**63)
    init: Any = Field("zero_delta", description='"zero_delta", "randn", {"A", "B"} or {"adapter": reference}.')
    validation_fraction: float = Field(0, ge=0, lt=1)
    ridge: float = Field(0, ge=0, le=1e30)


class TrainRequest(_Request):
    """An adapter to train."""

    name: Any
    rank: int = Field(ge=1)
    alpha: Alpha = Field(None, gt=0, le=1e6, description="Defaults to the rank, so that s = 1.")
    data: DataBody
    training: TrainingBody = Field(default_factory=TrainingBody)
    publish: Literal["always", "never"] = "always"


class FactorsUpload(_Request):
    """An adapter's factors."""

    A: Matrix = Field(description="(out, r)")
    B: Matrix = Field(description="(r, in)")
    alpha: Alpha = Field(None, ge=-1e6, le=1e6, description="Defaults to the rank, so that s = 1.")
    bias: Annotated[Any, BeforeValidator(_not_null)] = Field(None, description="(out)")


class PeftUpload(_Request):
    """An adapter's factors under PEFT's names, which are the other way round."""

    lora_A: Matrix = Field(description="(r, in)")
    lora_B: Matrix = Field(description="(out, r)")
    lora_alpha: Alpha = Field(None, ge=-1e6, le=1e6, description="Defaults to the rank, so that s = 1.")


class LiveRequest(_Request):
    """The version that a bare name shall mean."""

    version: int = Field(ge=1)


class InitFactors(_Request):
    """Factors to start a training from."""

    A: Matrix
    B: Matrix


class InitAdapter(_Request):
    """An adapter to start a training from."""

    adapter: Any


class VersionBody(BaseModel):
    """One immutable version."""

    adapter: str
    version: int
    digest: str
    rank: int
    alpha: float
    rslora: bool
    scaling: float
    bytes: int
    base: str
    feature_space: str | None
    created_at: str
    source: str
    job: str | None
    metrics: dict[str, float | None] | None
    effect: dict[str, float | None]

    @classmethod
    def of(cls, version: domain.Version) -> "VersionBody":
        """A version as its clients see it."""
        own = {name: getattr(version, name) for name in cls.model_fields if name != "effect"}
        return cls(**own, effect={"relative_norm": version.relative_norm})


class AdapterBody(BaseModel):
    """One adapter."""

    name: str
    created_at: str
    aliases: dict[str, int]
    live: VersionBody | None
    versions: int

    @classmethod
    def of(cls, adapter: domain.AdapterSummary) -> "AdapterBody":
        """An adapter as its clients see it."""
        return cls(
            name=adapter.name,
            created_at=adapter.created_at,
            aliases=dict(adapter.aliases),
            live=None if adapter.live is None else VersionBody.of(adapter.live),
            versions=adapter.versions,
        )


class JobBody(BaseModel):
    """One training job."""

    id: str
    status: str
    adapter: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    attempt: int
    progress: dict[str, Any] | None
    metrics: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    spec: dict[str, Any]

    @classmethod
    def of(cls, job: Job) -> "JobBody":
        """A job as its clients see it in a list."""
        own = {name: getattr(job, name) for name in JobBody.model_fields if name != "spec"}
        return cls(**own, spec=job.spec["shown"])


class JobWithHistory(JobBody):
    """One training job with the losses on its way."""

    history: list[tuple[int, float]]

    @classmethod
    def of(cls, job: Job) -> "JobWithHistory":
        """A job as its clients see it by itself."""
        return cls(**dict(JobBody.of(job)), history=[(int(step), float(loss)) for step, loss in job.history])


class BaseBody(BaseModel):
    """The frozen layer."""

    in_features: int
    out_features: int
    bias: bool
    dtype: str
    device: str
    fingerprint: str
    feature_space: str | None
    source: str

    @classmethod
    def of(cls, base: BaseLayer, feature_space: str | None) -> "BaseBody":
        """The base layer as clients see it."""
        return cls(
            in_features=base.in_features,
            out_features=base.out_features,
            bias=base.bias_O is not None,
            dtype=base.dtype,
            device=str(base.device),
            fingerprint=base.fingerprint,
            feature_space=feature_space,
            source=base.source,
        )


class AdapterPage(BaseModel):
    """A part of the list of adapters."""

    data: list[AdapterBody]
    next_cursor: str | None


class VersionPage(BaseModel):
    """A part of an adapter's list of versions."""

    data: list[VersionBody]
    next_cursor: str | None


class JobPage(BaseModel):
    """A part of the list of jobs."""

    data: list[JobBody]
    next_cursor: str | None
