"""Requests to train as clients send them. docs/training.md has every field, its bound and its default."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler

from app.http.schemas.adapters import NOT_NULL, Labels, Matrix
from app.openapi.field_schemas import OrWord, ShownAs

AUTO = "auto"
"""In place of a value that the data are to decide."""
Method = Literal["adamw", "sgd", "closed_form", "auto"]
Loss = Literal["mse", "huber", "cross_entropy", "binary_cross_entropy", "cosine", "multiple_negatives"]
Metric = Literal[
    "loss",
    "accuracy",
    "macro_f1",
    "micro_f1",
    "exact_match",
    "calibration_error",
    "r2_mean",
    "mae_mean",
    "rmse",
    "cosine",
    "recall_at_1",
    "recall_at_5",
    "recall_at_10",
    "mrr",
]
_COLUMNS = {
    "oneOf": [
        {"type": "object", "properties": {"column": {"type": "string"}}, "required": ["column"]},
        {
            "type": "object",
            "properties": {"columns": {"type": "array", "items": {"type": "string"}}},
            "required": ["columns"],
        },
        {"type": "object", "properties": {"prefix": {"type": "string"}}, "required": ["prefix"]},
    ]
}


def is_auto(value: object) -> bool:
    """Whether a field is left to the data."""
    return value == AUTO


def _or_auto(value: object, check: ValidatorFunctionWrapHandler) -> Any:
    return value if is_auto(value) else check(value)


class _OrAuto(OrWord):
    word = AUTO


# Not a union: pydantic names the branch of a union, and not the field alone, where neither fits.
OrAuto = _OrAuto(_or_auto)
Vector = list[float]
Selected = Annotated[Any, Field(json_schema_extra=_COLUMNS)]
Column = Annotated[str | None, NOT_NULL]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def gave(self, name: str) -> bool:
        """Whether the client sent this field."""
        return name in self.model_fields_set


class InlineData(_Request):
    """Rows in the request itself."""

    inputs: Matrix
    targets: Annotated[Any, ShownAs(list[Vector] | Vector | list[int] | list[str] | list[list[str]])] = Field(
        description="Rows of numbers, or one number a row if the layer has one output; one class a row "
        "(cross_entropy); a list of labels, or of 0 and 1, a row (binary_cross_entropy)."
    )
    weights: Annotated[Any, NOT_NULL, ShownAs(Vector)] = Field(None, description="One number ≥ 0 a row.")
    groups: Annotated[Any, NOT_NULL, ShownAs(list[str] | list[int])] = Field(
        None, description="One string or whole number a row: what a split by group keeps together."
    )
    labels: Labels = Field(None, description="What the first outputs are called, as classes.")
    corpus: Annotated[Any, NOT_NULL, ShownAs(list[Vector])] = Field(
        None, description="Rows of numbers: the documents that held-out queries are to find their own among."
    )


class CorpusBody(_Request):
    """Documents in a data set."""

    dataset: Annotated[Any, ShownAs(str)] = Field(description="Reference to a data set: name, or name@3.")
    documents: Selected


class DatasetData(_Request):
    """Rows of a stored data set."""

    dataset: Annotated[Any, ShownAs(str)] = Field(description="Reference to a data set: name, or name@3.")
    inputs: Selected
    targets: Selected
    weight: Column = Field(None, description="A column of numbers ≥ 0: what each row counts.")
    group: Column = Field(None, description="A column: what a split by group keeps together.")
    group_by: Column = Field(None, description="A column: one adapter for each of its values, a fleet.")
    labels: Labels = Field(None, description="What the first outputs are called, as classes.")
    corpus: Annotated[CorpusBody | None, NOT_NULL] = None


class SplitBody(_Request):
    """Which rows are held out."""

    by: Literal["rows", "group", "time", "column"] | None = None
    column: Column = Field(
        None, description="With time: what orders rows. With column: 1, true or validation hold out."
    )
    fraction: float = Field(0.2, gt=0, lt=1)
    stratify: bool = Field(False, description="Split each class by itself in this fraction.")
    dataset: Annotated[Any, ShownAs(str | None)] = Field(
        None, description="A data set that is held out whole, in place of all the others."
    )


class EarlyStoppingBody(_Request):
    """When to wait no longer for a better held-out loss; the best step is restored."""

    patience: int = Field(10, ge=1, le=1_000_000, description="Evaluations without a better one.")
    min_delta: float = Field(0.0, ge=0, le=1e30, description="Better is lower by more than this.")
    evaluate_every: int | None = Field(None, ge=1, le=10_000_000, description="Steps; null means an epoch.")


class InitFactors(_Request):
    """Factors to start from."""

    A: Matrix
    B: Matrix


class InitAdapter(_Request):
    """An adapter to start from."""

    adapter: Annotated[Any, ShownAs(str)]


class PriorBody(_Request):
    """The adapter to shrink towards."""

    adapter: Annotated[Any, ShownAs(str)]


class TrainingBody(_Request):
    """How to train."""

    method: Method = "adamw"
    loss: Loss = "mse"
    bias: bool = Field(False, description="Train the factor `bias` too.")
    epochs: Annotated[int, Field(ge=1, le=10_000_000), OrAuto] = 50
    learning_rate: Annotated[float, Field(gt=0, le=1e6), OrAuto] = 0.01
    batch_size: Annotated[int | None, Field(ge=1, le=2**31), OrAuto] = Field(64, description="Null means all rows.")
    seed: int = Field(0, ge=0, lt=2**63)
    init: Annotated[Any, ShownAs(Literal["zero_delta", "randn"] | InitFactors | InitAdapter)] = Field(
        "zero_delta", description="Where the factors start; `zero_delta` begins with the base layer's own answers."
    )
    validation_fraction: float = Field(0, ge=0, lt=1)
    ridge: Annotated[float, Field(ge=0, le=1e30), OrAuto] = 0
    weight_decay: float = Field(0, ge=0, le=1000)
    momentum: float = Field(0, ge=0, lt=1)
    clip_norm: float | None = Field(None, gt=0, le=1e30)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0, le=10_000_000)
    early_stopping: EarlyStoppingBody | None = None
    max_steps: int | None = Field(None, ge=1, le=10_000_000)
    max_seconds: float | None = Field(None, gt=0, le=1e7)
    huber_delta: float = Field(1.0, gt=0, le=1e30)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: Annotated[Any, ShownAs(Literal["balanced"] | Vector | None)] = Field(
        None, description='"balanced", or one number above 0 a class.'
    )
    temperature: float = Field(0.05, ge=1e-4, le=1e4)
    prior: PriorBody | None = None
    keep_statistics: bool = False


class GateBody(_Request):
    """When live moves."""

    when: Literal["always", "never", "if_better"]
    metric: Metric = "loss"
    margin: float = Field(0.0, ge=0, le=1e30)
    min_rows: int = Field(50, ge=1, le=10**9)


Publish = Annotated[Any, ShownAs(Literal["always", "never"] | GateBody)]


class TrainRequest(_Request):
    """An adapter to train, or a fleet of them."""

    name: Annotated[Any, ShownAs(str)] = Field(description="A name; for a fleet a template such as acme-{tenant}.")
    rank: Annotated[int, Field(ge=1), OrAuto]
    alpha: Annotated[float | None, NOT_NULL, Field(gt=0, le=1e6), OrAuto] = Field(
        None, description="Defaults to the rank, so that s = 1."
    )
    data: Annotated[Any, ShownAs(InlineData | DatasetData)] = Field(
        description="Rows inline, or columns of a data set."
    )
    split: SplitBody | None = None
    training: TrainingBody = Field(default_factory=TrainingBody)
    publish: Publish = Field("always", description="When `live` moves to the new version.")


class UpdateRequest(_Request):
    """Rows to add to what a closed form came from, and rows to forget."""

    add: Annotated[Any, ShownAs(InlineData | DatasetData)] = Field(None, description="Rows, as for training.")
    forget: Annotated[Any, ShownAs(InlineData | DatasetData)] = Field(
        None, description="Rows that were trained on, as for training."
    )
    publish: Publish = "always"


class PlanBody(BaseModel):
    """What would be trained, as far as that is known before it is."""

    spec: dict[str, Any]
    estimate: dict[str, float]
    adapters: int
