"""Settings of a training: one declaration of each, and the resolved specification that a fit reads."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from adapters.errors import IgnoredField, InvalidCombination, MissingField, OutOfRange, RankTooLarge, shorten
from adapters.lora.adapter import MAX_ALPHA, scaling_of
from adapters.training.limits import MAX_STEPS
from adapters.training.planning.split import Split

# Class weights that give every class of the training rows the same total weight.
BALANCED = "balanced"
# Value of a setting that the data decide.
AUTO: Literal["auto"] = "auto"
Auto = Literal["auto"]


class Method(StrEnum):
    """Method that finds the factors."""

    ADAMW = "adamw"
    """AdamW (Loshchilov & Hutter 2019)."""
    SGD = "sgd"
    """Stochastic gradient descent, optionally with momentum."""
    CLOSED_FORM = "closed_form"
    """The exact minimum of the squared error at the rank, from one decomposition."""


class Loss(StrEnum):
    """Loss that is minimised: the weighted mean of the losses of the rows."""

    MSE = "mse"
    """Squared error, the mean over outputs."""
    HUBER = "huber"
    """Squared error up to a distance and linear beyond it (Huber 1964), the mean over outputs."""
    CROSS_ENTROPY = "cross_entropy"
    """Softmax cross-entropy with one class per row."""
    BINARY_CROSS_ENTROPY = "binary_cross_entropy"
    """Logistic loss of each output, the mean over outputs: several labels per row."""
    COSINE = "cosine"
    """1 - cos(output, target)."""
    MULTIPLE_NEGATIVES = "multiple_negatives"
    """Cross-entropy of the row's own target among the targets of its batch, by cosine (Henderson et al. 2017)."""


class Init(StrEnum):
    """Initialization of the factors."""

    ZERO_DELTA = "zero_delta"
    """A = 0 and B Kaiming-uniform, as in PEFT: the first answer is the base layer's."""
    RANDN = "randn"
    """Both standard normal."""
    FACTORS = "factors"
    """A and B from the data file."""


class Schedule(StrEnum):
    """Schedule of the learning rate after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    """Linear decay that would reach 0 one step after the last."""
    COSINE = "cosine"
    """Half a cosine (Loshchilov & Hutter 2017, eq. 5) to the same end."""


class Candidate(StrEnum):
    """What `method: auto` compares."""

    BASE = "base"
    """ΔW = 0: the base layer as it is."""
    RIDGE = "ridge"
    """Ridge towards the base layer."""
    RIDGE_IN_BASE_METRIC = "ridge_in_base_metric"
    """Ridge towards the base layer, with the penalty in the metric of W."""
    OWN_HEAD = "own_head"
    """A layer of its own that ignores the base layer: ΔW = W* - W, at full rank."""
    FLEET_MEAN = "fleet_mean"
    """What the other groups of the fleet have in common, and a ridge towards it."""
    CLUSTER_MEAN = "cluster_mean"
    """What a part of the other groups has in common, and a ridge towards it."""
    ADAMW = "adamw"
    """AdamW, with a rate and a number of steps that the training rows choose."""


GRADIENT_METHODS = (Method.ADAMW, Method.SGD)
_EXACT_METHODS = (Method.CLOSED_FORM,)
# Losses with a ridge that one decomposition minimises: of classes, in a few steps.
RIDGE_LOSSES = (Loss.MSE, Loss.CROSS_ENTROPY, Loss.BINARY_CROSS_ENTROPY)
# Settings of a loss that only gradient descent takes into account.
GRADIENT_LOSS_SETTINGS = ("label_smoothing", "class_weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Declaration of one setting, as the annotation of a dataclass field."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    methods: tuple[Method, ...] = tuple(Method)
    """Methods that use it."""
    losses: tuple[Loss, ...] = tuple(Loss)
    """Losses that use it."""
    is_top_level: bool = False
    """Whether it is a member of the request itself, and not of its `training`."""
    description: str | None = None
    exact_default: Any = None
    """Its value in a request that names a method and leaves it out, if that is not the default."""
    # `settings_of` reads the rest from the field itself.
    kind: Any = None
    """Its type, without null and auto."""
    takes_null: bool = False
    takes_auto: bool = False
    default: Any = None

    @property
    def bounds(self) -> dict[str, float]:
        """Its bounds by operator: `ge`, `gt`, `le`, `lt`."""
        operators = ("ge", "gt", "le", "lt")
        return {name: value for name in operators if (value := getattr(self, name)) is not None}


def settings_of(model: type) -> Mapping[str, Setting]:
    """Return the table of the settings that a dataclass declares, by name and in the order of its fields."""
    hints = get_type_hints(model, include_extras=True)
    table = {}
    for field in fields(model):
        if get_origin(hints[field.name]) is not Annotated:
            continue
        annotation, declaration = get_args(hints[field.name])
        kinds = get_args(annotation) or (annotation,)
        (kind,) = (kind for kind in kinds if kind not in (NoneType, Auto))
        takes = {"takes_null": NoneType in kinds, "takes_auto": Auto in kinds}
        exact = field.default if declaration.exact_default is None else declaration.exact_default
        table[field.name] = replace(declaration, kind=kind, default=field.default, exact_default=exact, **takes)
    return MappingProxyType(table)


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStopping:
    """Rule that ends a training when the held-out loss stops falling; the best step is restored."""

    patience: Annotated[int, Setting(ge=1, le=1_000_000, description="Evaluations without a better one.")] = 10
    min_delta: Annotated[float, Setting(ge=0, le=1e30, description="Better is lower by more than this.")] = 0.0
    evaluate_every: Annotated[int | None, Setting(ge=1, le=MAX_STEPS, description="Steps; null means an epoch.")] = None


@dataclass(frozen=True, slots=True)
class InitFactors:
    """Factors to start from, as the request gives them."""

    A: object
    B: object


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Reference to the adapter to start from, or to shrink towards, as the request gives it."""

    adapter: object


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedSettings:
    """Settings of a training as requested: the table of all settings, one declaration per line.

    The defaults are those of a request that leaves the method to the data, which then decide `auto` settings and those
    that only some methods use.
    """

    rank: Annotated[int | Auto, Setting(ge=1, is_top_level=True, exact_default=4)] = AUTO
    alpha: Annotated[
        float | Auto | None,
        Setting(gt=0, le=MAX_ALPHA, is_top_level=True, description="Defaults to the rank, so that s = 1."),
    ] = None
    method: Annotated[Method | Auto, Setting(exact_default=Method.ADAMW)] = AUTO
    loss: Annotated[Loss | Auto, Setting(exact_default=Loss.MSE)] = AUTO
    bias: Annotated[bool | Auto, Setting(exact_default=False, description="Train the factor `bias` too.")] = AUTO
    epochs: Annotated[int | Auto, Setting(ge=1, le=10_000_000, methods=GRADIENT_METHODS)] = 50
    learning_rate: Annotated[float | Auto, Setting(gt=0, le=1e6, methods=GRADIENT_METHODS)] = 0.01
    batch_size: Annotated[
        int | Auto | None, Setting(ge=1, le=2**31, methods=GRADIENT_METHODS, description="Null means all rows.")
    ] = 64
    seed: Annotated[int, Setting(ge=0, lt=2**63)] = 0
    init: Annotated[
        object,
        Setting(
            methods=GRADIENT_METHODS,
            description="Where the factors start; `zero_delta` begins with the base layer's own answers.",
        ),
    ] = Init.ZERO_DELTA
    """`Init.ZERO_DELTA`, `Init.RANDN`, `InitFactors` or `AdapterSource`."""
    validation_fraction: Annotated[float, Setting(ge=0, lt=1)] = 0
    ridge: Annotated[float | Auto, Setting(ge=0, le=1e30, methods=_EXACT_METHODS)] = 0
    weight_decay: Annotated[float, Setting(ge=0, le=1000, methods=GRADIENT_METHODS)] = 0
    momentum: Annotated[float, Setting(ge=0, lt=1, methods=(Method.SGD,))] = 0
    clip_norm: Annotated[float | None, Setting(gt=0, le=1e30, methods=GRADIENT_METHODS)] = None
    schedule: Annotated[Schedule, Setting(methods=GRADIENT_METHODS)] = Schedule.CONSTANT
    warmup_steps: Annotated[int, Setting(ge=0, le=MAX_STEPS, methods=GRADIENT_METHODS)] = 0
    early_stopping: Annotated[EarlyStopping | None, Setting(methods=GRADIENT_METHODS)] = None
    max_steps: Annotated[int | None, Setting(ge=1, le=MAX_STEPS, methods=GRADIENT_METHODS)] = None
    max_seconds: Annotated[float | None, Setting(gt=0, le=1e7, methods=GRADIENT_METHODS)] = None
    huber_delta: Annotated[float, Setting(gt=0, le=1e30, losses=(Loss.HUBER,))] = 1.0
    label_smoothing: Annotated[float, Setting(ge=0, lt=1, losses=(Loss.CROSS_ENTROPY,))] = 0.0
    class_weights: Annotated[
        object, Setting(losses=(Loss.CROSS_ENTROPY,), description='"balanced", or one number above 0 a class.')
    ] = None
    temperature: Annotated[float, Setting(ge=1e-4, le=1e4, losses=(Loss.MULTIPLE_NEGATIVES,))] = 0.05
    prior: Annotated[AdapterSource | None, Setting(methods=_EXACT_METHODS)] = None
    keep_statistics: Annotated[bool, Setting(methods=_EXACT_METHODS)] = False
    given: frozenset[str] = frozenset()
    """Fields of the request, and of its `training`, that the client sent."""

    @property
    def needs_statistics(self) -> bool:
        """Return whether a setting makes sense only for the exact minimum, so that the method is not open."""
        return self.prior is not None or self.keep_statistics

    def complete(self, loss: Loss, *, is_fleet: bool, max_rank: int) -> "RequestedSettings":
        """Return the settings with this loss, and with a value or `auto` for every setting that was left out.

        They are `auto` if the method is open, or if it is closed_form because of `prior` or `keep_statistics`. If the
        request names a method, or if a fleet has a prior, they have the values of a named method.
        """
        method = Method.CLOSED_FORM if self.method == AUTO and self.needs_statistics else self.method
        is_open = self.method == AUTO and not (self.needs_statistics and is_fleet)
        left_out = [name for name, setting in SETTINGS.items() if setting.takes_auto and name not in self.given]
        values: dict[str, Any] = {name: AUTO if is_open else SETTINGS[name].exact_default for name in left_out}
        if values.get("rank", AUTO) != AUTO:
            values["rank"] = min(values["rank"], max_rank)
        if method != AUTO and "bias" not in self.given:
            values["bias"] = SETTINGS["bias"].exact_default
        return replace(self, **values | {"loss": loss, "method": method})

    def check(self, *, max_rank: int) -> None:
        """Check complete settings: that the service accepts the rank, and that the settings go together.

        Raises `RankTooLarge`, `IgnoredField`, `InvalidCombination` or `MissingField`.
        """
        if self.rank != AUTO and self.rank > max_rank:
            detail, expected = f"rank is {shorten(self.rank)}, at most {max_rank} is accepted", f"at most {max_rank}"
            raise RankTooLarge(detail, field="rank", given=self.rank, expected=expected)
        for name, setting in SETTINGS.items():
            if name in self.given and self.loss not in setting.losses:
                raise self.ignored(name, f"with {self.loss}")
        if self.method == Method.CLOSED_FORM:
            self._check_closed_form()
        if self.method == AUTO:
            return
        self.check_used_by(self.method, f"with {self.method}")
        if self.bias == AUTO:
            detail = f"bias can be auto only with the method auto, which tries both; {self.method} was given"
            raise InvalidCombination(
                detail, field="training.bias", given=AUTO, expected=f"a boolean with {self.method}"
            )
        if self.loss is Loss.MULTIPLE_NEGATIVES and "batch_size" not in self.given:
            detail = "multiple_negatives takes the negatives from the row's batch: say how large it is"
            raise MissingField(detail, field="training.batch_size", expected="a batch_size, or auto")

    def _check_closed_form(self) -> None:
        accepted = (Loss.MSE,) if self.needs_statistics else RIDGE_LOSSES
        if self.loss not in accepted:
            expected = f"{' or '.join(accepted)} with closed_form"
            detail = f"closed_form minimises squared error, or a ridge loss of classes, and here no {self.loss}"
            raise InvalidCombination(detail, field="training.loss", given=self.loss, expected=expected)
        for name in GRADIENT_LOSS_SETTINGS:
            if name in self.given:
                raise self.ignored(name, "with closed_form")

    def check_used_by(self, method: Method, context: str, *, unless_auto: bool = False) -> None:
        """Raise `IgnoredField` for a setting that was sent and that the method does not use."""
        for name in unused_settings(method):
            if name in self.given and not (unless_auto and getattr(self, name) == AUTO):
                raise self.ignored(name, context)

    def ignored(self, name: str, context: str) -> IgnoredField:
        """Return the error for a setting without effect in this context."""
        given = getattr(self, name)
        if is_dataclass(given):
            given = {member.name: getattr(given, member.name) for member in fields(given)}
        return no_effect(field_of(name), context, given=given)


def no_effect(field: str, context: str, **details: Any) -> IgnoredField:
    """Return the error for a field without effect in this context."""
    name = field.rpartition(".")[2]
    return IgnoredField(
        f"{field} has no effect {context}: leave it out", field=field, expected=f"{name} left out {context}", **details
    )


# Every setting, by name.
SETTINGS = settings_of(RequestedSettings)
_default = {name: setting.exact_default for name, setting in SETTINGS.items()}


def field_of(name: str) -> str:
    """Return the path of a setting in a request."""
    return name if SETTINGS[name].is_top_level else f"training.{name}"


def unused_settings(method: Method) -> tuple[str, ...]:
    """Return the settings that a method does not use."""
    return tuple(name for name, setting in SETTINGS.items() if method not in setting.methods)


_FROM_JSON: Mapping[str, Callable[[Any], Any]] = {
    "method": Method,
    "loss": Loss,
    "init": Init,
    "schedule": Schedule,
    "split": Split.from_json,
    "candidates": lambda names: tuple(map(Candidate, names)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """Resolved settings of one training; held-out rows still choose among `try_ranks`, `try_rates` and ridges."""

    rank: int
    alpha: float
    rslora: bool = False
    method: Method = _default["method"]
    loss: Loss = _default["loss"]
    bias: bool = _default["bias"]
    epochs: int = _default["epochs"]
    learning_rate: float = _default["learning_rate"]
    batch_size: int | None = _default["batch_size"]
    """Rows per step; None means all of them."""
    seed: int = _default["seed"]
    init: Init = _default["init"]
    split: Split | None = None
    """None if no rows are held out, or if a separate data set is."""
    ridge: float = _default["ridge"]
    weight_decay: float = _default["weight_decay"]
    momentum: float = _default["momentum"]
    clip_norm: float | None = _default["clip_norm"]
    """Largest norm of the gradient over all factors of an adapter."""
    schedule: Schedule = _default["schedule"]
    warmup_steps: int = _default["warmup_steps"]
    """Steps of the linear warm-up from 0."""
    patience: int | None = None
    """Evaluations without a better held-out loss that end the training; None never does."""
    min_delta: float = 0.0
    """A held-out loss is better if it is lower by more than this."""
    evaluate_every: int | None = None
    """Steps between evaluations; None means an epoch."""
    max_steps: int | None = _default["max_steps"]
    max_seconds: float | None = _default["max_seconds"]
    huber_delta: float = _default["huber_delta"]
    label_smoothing: float = _default["label_smoothing"]
    class_weights: str | tuple[float, ...] | None = _default["class_weights"]
    temperature: float = _default["temperature"]
    classes: int | None = None
    """Number of leading outputs that the task uses; None means all."""
    keep_statistics: bool = _default["keep_statistics"]
    try_ranks: tuple[int, ...] = ()
    """Ranks among which the held-out loss chooses; empty keeps `rank`."""
    try_rates: tuple[float, ...] = ()
    """Learning rates among which it chooses; empty keeps `learning_rate`."""
    try_ridges: bool = False
    """Whether the held-out loss chooses the ridge."""
    alpha_is_rank: bool = False
    """Whether alpha is the chosen rank."""
    candidates: tuple[Candidate, ...] = ()
    """Candidates that `auto` compares, with `rank` as the largest rank; empty trains exactly `method`."""
    try_bias: bool = False
    """Whether the candidates are tried with a bias and without one; otherwise `bias` says."""
    try_steps: bool = False
    """Whether the candidate `adamw` chooses its number of steps, at most those of `epochs`."""

    @property
    def scaling(self) -> float:
        """Return s, the factor of the low-rank term."""
        return scaling_of(self.alpha, self.rank, rslora=self.rslora)

    @property
    def is_exact(self) -> bool:
        """Return whether one decomposition gives the factors."""
        return self.method is Method.CLOSED_FORM

    def batch(self, training_rows: int) -> int:
        """Return the rows per step."""
        return min(self.batch_size or training_rows, training_rows)

    def steps_an_epoch(self, training_rows: int) -> int:
        """Return the steps of an epoch; a last short batch counts."""
        return math.ceil(training_rows / self.batch(training_rows))

    def steps(self, training_rows: int) -> int:
        """Return the largest number of steps of the training."""
        if self.is_exact or (self.candidates and Candidate.ADAMW not in self.candidates):
            return 1
        steps = self.epochs * self.steps_an_epoch(training_rows)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def check_steps(self, training_rows: int) -> None:
        """Raise `OutOfRange` if the training has more than `MAX_STEPS` steps."""
        steps, batch = self.steps(training_rows), self.batch(training_rows)
        if steps > MAX_STEPS:
            detail = f"{self.epochs} epochs of {training_rows} rows in batches of {batch} are {steps} steps"
            expected = f"at most {MAX_STEPS} steps"
            raise OutOfRange(detail, field="training.epochs", given=self.epochs, expected=expected)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainingSpec":
        """Return the specification that `dataclasses.asdict` made `values` of, here or in an earlier release."""
        members = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        for name, value in members.items():
            if name in _FROM_JSON:
                members[name] = _FROM_JSON[name](value)
            elif isinstance(value, list):
                members[name] = tuple(value)
        return cls(**members)
