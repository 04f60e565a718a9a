"""Training requests as clients send them, and their translation to the domain's values.

docs/training.md has every field, its bound and its default. Settings are declared in `adapters.training.settings`; the
models here are built from that table.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model

from adapters.errors import OutOfRange, WrongType
from adapters.training.evaluation.gate import When
from adapters.training.planning import request as domain
from adapters.training.planning.evaluation_plan import MAX_COMPARED
from adapters.training.planning.split import SplitBy
from adapters.training.settings import (
    AUTO,
    SETTINGS,
    AdapterSource,
    EarlyStopping,
    Init,
    RequestedSettings,
    Setting,
    settings_of,
)
from adapters.training.settings import InitFactors as DomainInitFactors
from app.http.bodies import object_of_body, read_as
from app.http.schemas.fields import NOT_NULL, OR_AUTO, Labels, Matrix, RequestBody, ShownAs

Metric = Literal[
    "loss", "accuracy", "macro_f1", "micro_f1", "exact_match", "calibration_error",
    "r2_mean", "mae_mean", "rmse", "cosine",
    "recall_at_1", "recall_at_5", "recall_at_10", "mrr",
]  # fmt: skip
_STRING = {"type": "string"}
_SELECTORS = {"column": _STRING, "columns": {"type": "array", "items": _STRING}, "prefix": _STRING}
_SELECTED = {
    "oneOf": [{"type": "object", "properties": {name: kind}, "required": [name]} for name, kind in _SELECTORS.items()]
}
_GROUP = "One string or whole number a row. A split by group keeps rows of the same group together."
_CORPUS = "Rows of numbers: the documents. Each held-out query is searched for its own document in them."
_LABELS = "What the first outputs are called, as classes."
_DATASET = "Reference to a data set: name, or name@3."
# Values of `publish` that are no object.
_WORDS = (When.ALWAYS, When.NEVER, When.IF_NOT_WORSE)
Vector = list[float]
Selected = Annotated[Any, Field(json_schema_extra=_SELECTED)]
Column = Annotated[str | None, NOT_NULL]
Reference = Annotated[Any, ShownAs(str)]


class InlineData(RequestBody):
    """Rows in the request itself."""

    inputs: Matrix
    targets: Annotated[Any, ShownAs(list[Vector] | Vector | list[int] | list[str] | list[list[str]])] = Field(
        description="Rows of numbers, or one number a row if the layer has one output; one class a row "
        "(cross_entropy); a list of labels, or of 0 and 1, a row (binary_cross_entropy)."
    )
    weights: Annotated[Any, NOT_NULL, ShownAs(Vector)] = Field(None, description="One number ≥ 0 a row.")
    groups: Annotated[Any, NOT_NULL, ShownAs(list[str] | list[int])] = Field(None, description=_GROUP)
    labels: Labels = Field(None, description=_LABELS)
    corpus: Annotated[Any, NOT_NULL, ShownAs(list[Vector])] = Field(None, description=_CORPUS)


class CorpusBody(RequestBody):
    """Documents in a data set."""

    dataset: Reference = Field(description=_DATASET)
    documents: Selected


class DatasetData(RequestBody):
    """Rows of a stored data set."""

    dataset: Reference = Field(description=_DATASET)
    inputs: Selected
    targets: Selected
    weight: Column = Field(None, description="A column of numbers ≥ 0: what each row counts.")
    group: Column = Field(None, description="A column. A split by group keeps rows of the same value together.")
    group_by: Column = Field(None, description="A column: one adapter for each of its values, a fleet.")
    labels: Labels = Field(None, description=_LABELS)
    corpus: Annotated[CorpusBody | None, NOT_NULL] = None


class InitFactors(RequestBody):
    """Factors to start from."""

    A: Matrix
    B: Matrix


class InitAdapter(RequestBody):
    """An adapter to start from."""

    adapter: Reference


class PriorBody(InitAdapter):
    """The adapter to shrink towards."""


_SHOWN_AS: dict[str, Any] = {
    "init": Annotated[Any, ShownAs(Literal["zero_delta", "randn"] | InitFactors | InitAdapter)],
    "class_weights": Annotated[Any, ShownAs(Literal["balanced"] | Vector | None)],
}


def _field(name: str, setting: Setting, models: Mapping[Any, Any]) -> Any:
    """Return the type and the default of a model's field for a setting."""
    kind, default = models.get(setting.kind, setting.kind), setting.default
    if name in _SHOWN_AS:
        kind = _SHOWN_AS[name]
    elif isinstance(kind, type) and issubclass(kind, StrEnum):
        words = [*kind, AUTO] if setting.takes_auto else [*kind]
        kind = Literal[tuple(map(str, words))]
    else:
        kind = kind | None if setting.takes_null else kind
        kind = Annotated[kind, _bounds(setting)] if setting.bounds else kind
        kind = Annotated[kind, OR_AUTO] if setting.takes_auto else kind
    default = str(default) if isinstance(default, StrEnum) else default
    return kind, Field(default, description=setting.description)


def _bounds(setting: Setting) -> Any:
    return Field(**setting.bounds)  # type: ignore[call-overload]  # the names of operators are its keywords


def _declared(setting: Setting) -> Any:
    return Field(setting.default, description=setting.description, **setting.bounds)  # type: ignore[call-overload]


def _model(
    name: str, doc: str | None, table: Mapping[str, Setting], models: Mapping[Any, Any] = MappingProxyType({})
) -> type[RequestBody]:
    fields = {field: _field(field, setting, models) for field, setting in table.items()}
    return create_model(name, __base__=RequestBody, __doc__=doc, __module__=__name__, **fields)


EarlyStoppingBody = _model("EarlyStoppingBody", EarlyStopping.__doc__, settings_of(EarlyStopping))
TrainingBody = _model(
    "TrainingBody",
    "How to train.",
    {name: setting for name, setting in SETTINGS.items() if not setting.is_top_level},
    {EarlyStopping: EarlyStoppingBody, AdapterSource: PriorBody},
)
_SPLIT, _PUBLISH = settings_of(domain.SplitRequest), settings_of(domain.PublishRequest)
_REQUEST = settings_of(domain.TrainingRequest)


class SplitBody(RequestBody):
    """Which rows are held out."""

    by: Literal["rows", "group", "time", "column"] | None = None
    column: Column = Field(None, description="With time: orders rows. With column: 1, true or validation hold out.")
    fraction: float = _declared(_SPLIT["fraction"])
    stratify: bool = _declared(_SPLIT["stratify"])
    dataset: Annotated[Any, ShownAs(str | None)] = Field(None, description="A data set that is held out whole.")


class GateBody(RequestBody):
    """When live moves."""

    when: Literal["always", "never", "if_not_worse", "if_better"]
    metric: Metric = "loss"
    margin: float = _declared(_PUBLISH["margin"])
    min_rows: int = _declared(_PUBLISH["min_rows"])


Rows = Annotated[Any, ShownAs(InlineData | DatasetData)]
Publish = Annotated[Any, ShownAs(Literal["always", "never", "if_not_worse"] | GateBody)]


class TrainRequest(RequestBody):
    """An adapter to train, or a fleet of them."""

    name: Reference = Field(description="A name; for a fleet a template such as acme-{tenant}.")
    rank: Annotated[int, _bounds(SETTINGS["rank"]), OR_AUTO] = SETTINGS["rank"].default
    alpha: Annotated[float | None, NOT_NULL, _bounds(SETTINGS["alpha"]), OR_AUTO] = Field(
        None, description=SETTINGS["alpha"].description
    )
    data: Rows = Field(description="Rows inline, or columns of a data set.")
    split: Annotated[SplitBody | None, OR_AUTO] = Field(
        _REQUEST["split"].default, description="Which rows are held out; null holds none out and evaluates nothing."
    )
    training: TrainingBody = Field(default_factory=TrainingBody)  # type: ignore[valid-type]  # it is built from a table
    publish: Publish = Field(_PUBLISH["when"].default, description="When `live` moves to the new version.")
    fleet_prior: Annotated[Any, NOT_NULL, ShownAs(str)] = Field(
        None, description="Of a fleet: name of an adapter for what its groups have in common, for tenants without rows."
    )


class UpdateRequest(RequestBody):
    """Rows to add to what a closed form came from, and rows to forget."""

    add: Rows = Field(None, description="Rows, as for training.")
    forget: Rows = Field(None, description="Rows that were trained on, as for training.")
    publish: Publish = "always"


class EvaluateRequest(RequestBody):
    """Adapters to compare, and the labelled rows to compare them on."""

    adapters: Annotated[
        list[Any],
        Field(min_length=1, max_length=MAX_COMPARED, json_schema_extra={"items": {"type": ["string", "null"]}}),
    ] = Field(
        description="References (`acme`, `acme@3`), and null for the bare base layer. The first is compared with."
    )
    data: Rows = Field(description="Rows, as for training; outputs are matched to their targets by label.")


class PlanBody(BaseModel):
    """Plan of a training: the resolved settings, the estimated cost, and the number of adapters."""

    spec: dict[str, Any]
    estimate: dict[str, float]
    adapters: int


def training_request(body: object) -> domain.TrainingRequest:
    """Return a training request from its JSON value; raise `InvalidInput` for its first error."""
    sent = object_of_body(body)
    request = read_as(TrainRequest, sent)
    training: RequestBody = request.training
    given = frozenset(request.model_fields_set | training.model_fields_set)
    return domain.TrainingRequest(
        name=request.name,
        rows=_row_source(request.data, field="data"),
        split=_split(request.split) if isinstance(request.split, SplitBody) else request.split,
        settings=_settings(training, rank=request.rank, alpha=request.alpha, given=given),
        publish=_publish(request.publish),
        fleet_prior=request.fleet_prior,
        body=sent,
    )


def update_request(body: object) -> domain.UpdateRequest:
    """Return an update request from its JSON value; raise `InvalidInput` for its first error."""
    request = read_as(UpdateRequest, object_of_body(body))
    rows = {
        field: _row_source(getattr(request, field), field=field) for field in ("add", "forget") if request.gave(field)
    }
    return domain.UpdateRequest(rows=rows, publish=_publish(request.publish))


def evaluation_request(body: object) -> domain.EvaluationRequest:
    """Return an evaluation request from its JSON value; raise `InvalidInput` for its first error."""
    request = read_as(EvaluateRequest, object_of_body(body))
    return domain.EvaluationRequest(adapters=request.adapters, rows=_row_source(request.data, field="data"))


def _row_source(value: object, *, field: str) -> domain.RowSource:
    if not isinstance(value, dict):
        raise WrongType(f"{field} must be an object", field=field, given=value, expected="rows, or a data set")
    if "dataset" not in value:
        return domain.InlineRows(**dict(read_as(InlineData, value, within=field)))
    members = dict(read_as(DatasetData, value, within=field))
    corpus = members.pop("corpus")
    return domain.DatasetColumns(**members, corpus=None if corpus is None else domain.CorpusColumns(**dict(corpus)))


def _split(body: SplitBody) -> domain.SplitRequest:
    by = None if body.by is None else SplitBy(body.by)
    return domain.SplitRequest(**dict(body) | {"by": by}, given=frozenset(body.model_fields_set))


def _settings(body: RequestBody, *, rank: Any, alpha: Any, given: frozenset[str]) -> RequestedSettings:
    values: dict[str, Any] = {"rank": rank, "alpha": alpha, **dict(body)}
    for name, setting in SETTINGS.items():
        if isinstance(setting.kind, type) and issubclass(setting.kind, StrEnum) and values[name] != AUTO:
            values[name] = setting.kind(values[name])
    stopping, prior = values["early_stopping"], values["prior"]
    values["early_stopping"] = None if stopping is None else EarlyStopping(**dict(stopping))
    values["prior"] = None if prior is None else AdapterSource(prior.adapter)
    values["init"] = _init(values["init"])
    return RequestedSettings(**values, given=given)


def _init(value: object) -> object:
    field = "training.init"
    if isinstance(value, str) and value in (Init.ZERO_DELTA, Init.RANDN):
        return Init(value)
    if not isinstance(value, dict):
        expected = '"zero_delta", "randn", {"A", "B"} or {"adapter": reference}'
        raise WrongType(f"{field} must be {expected}", field=field, given=value, expected=expected)
    if "adapter" in value:
        return AdapterSource(read_as(InitAdapter, value, within=field).adapter)
    factors = read_as(InitFactors, value, within=field)
    return DomainInitFactors(factors.A, factors.B)


def _publish(value: object) -> domain.PublishRequest:
    if isinstance(value, dict):
        body = read_as(GateBody, value, within="publish")
        members = dict(body) | {"when": When(body.when)}
        return domain.PublishRequest(**members, given=frozenset(body.model_fields_set), as_sent=value)
    if isinstance(value, str) and value in _WORDS:
        return domain.PublishRequest(when=When(value), as_sent=value)
    expected = '"always", "never", "if_not_worse" or {"when": "if_better", …}'
    error = OutOfRange if isinstance(value, str) else WrongType
    raise error(f"publish must be {expected}", field="publish", given=value, expected=expected)
