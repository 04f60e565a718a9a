"""From a request's settings to a spec: what does not go together is refused, what is left open is decided."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adapters.errors import IgnoredField, InvalidCombination, MissingField, OutOfRange, WrongShape, WrongType
from adapters.matrices import vector
from adapters.training.spec import BALANCED, Loss, Method, Schedule, TrainingSpec
from adapters.training.split import By, Split
from app.training.rows import Rows
from app.training.schemas import TrainingBody, TrainRequest, is_auto
from app.training.starts import Start

_OF_GRADIENTS = (
    "epochs",
    "learning_rate",
    "batch_size",
    "init",
    "weight_decay",
    "momentum",
    "clip_norm",
    "schedule",
    "warmup_steps",
    "early_stopping",
    "max_steps",
    "max_seconds",
)
_OF_THE_CLOSED_FORM = ("ridge", "prior", "keep_statistics")
IGNORED: Mapping[Method, tuple[str, ...]] = {
    Method.CLOSED_FORM: _OF_GRADIENTS,
    Method.ADAMW: (*_OF_THE_CLOSED_FORM, "momentum"),
    Method.SGD: _OF_THE_CLOSED_FORM,
}
"""Fields that a method has no use for: giving one is a mistake, and said so."""
_OF_LOSSES = {
    "huber_delta": (Loss.HUBER,),
    "label_smoothing": (Loss.CROSS_ENTROPY,),
    "class_weights": (Loss.CROSS_ENTROPY,),
    "temperature": (Loss.MULTIPLE_NEGATIVES,),
}
_RANKS = (1, 2, 4, 8, 16, 32, 64)
_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
_FEWEST_ROWS = 10
"""Rows below which none are held out to decide by."""
_FULL_BATCH_ROWS = 256
_STEPS = 1000


@dataclass(slots=True)
class Decided:
    """What the data decided of a request that left it open, and why."""

    split: Split | None = None
    method: Method = Method.ADAMW
    values: dict[str, Any] = field(default_factory=dict)
    """Fields of the spec."""
    why: dict[str, str] = field(default_factory=dict)
    """By the request's field."""


def check_settings(training: TrainingBody) -> Method | None:
    """The method, or None where it is open; raises `IgnoredField` or `InvalidCombination`."""
    loss = Loss(training.loss)
    for name, losses in _OF_LOSSES.items():
        if training.gave(name) and loss not in losses:
            _refuse(name, training, f"with {loss}")
    method = None if is_auto(training.method) else Method(training.method)
    if method is Method.CLOSED_FORM and loss is not Loss.MSE:
        raise InvalidCombination(
            f"closed_form minimises squared error, which has an exact solution; {loss} has none: use adamw or sgd",
            field="training.loss",
            given=training.loss,
            expected="mse with closed_form",
        )
    for name in IGNORED[method] if method is not None else ():
        if training.gave(name):
            _refuse(name, training, f"with {method}")
    if loss is Loss.MULTIPLE_NEGATIVES and not training.gave("batch_size"):
        raise MissingField(
            "multiple_negatives takes the negatives from the row's batch: say how large it is",
            field="training.batch_size",
            expected="a batch_size, or auto",
        )
    return method


def decide(request: TrainRequest, rows: Rows, split: Split | None, *, holds_out: bool, most_rank: int) -> Decided:
    """Everything that the request leaves to the data; `holds_out`: whether it says which rows are held out."""
    training, fleet = request.training, rows.fleet is not None and "{" in str(request.name)
    decided = Decided(split, *_method(training))
    if decided.values.pop("why", None):
        decided.why["method"] = decided.values.pop("because")
        for name in IGNORED[decided.method]:
            if training.gave(name) and not is_auto(getattr(training, name)):
                _refuse(name, training, f"with {decided.method}, which auto came to ({decided.why['method']})")
    exact = decided.method is Method.CLOSED_FORM
    open_fields = [name for name in ("rank", "learning_rate", "ridge") if _is_open(request, name, exact)]
    if fleet and open_fields:
        raise InvalidCombination(
            f"{open_fields[0]} cannot be auto for a fleet: each group would need another",
            field=open_fields[0] if open_fields[0] == "rank" else f"training.{open_fields[0]}",
            given="auto",
            expected="a value for all of its groups",
        )
    if open_fields and not holds_out:
        _hold_out(decided, rows, open_fields)
    by_rows = decided.split is not None or (holds_out and bool(open_fields))
    _rank(decided, request, by_rows, most_rank)
    if not exact:
        groups = len(rows.fleet.values) if fleet and rows.fleet is not None else None
        _gradient(decided, training, rows.count, groups, by_rows)
    elif is_auto(training.ridge):
        decided.values |= {"try_ridges": True} if by_rows else {"ridge": 1.0}
        decided.why["ridge"] = "by held-out loss" if by_rows else f"fewer than {_FEWEST_ROWS} rows: 1"
    return decided


def _method(training: TrainingBody) -> tuple[Method, dict[str, Any]]:
    if not is_auto(training.method):
        return Method(training.method), {}
    given = [name for name in _OF_GRADIENTS if training.gave(name) and not is_auto(getattr(training, name))]
    if Loss(training.loss) is not Loss.MSE:
        return Method.ADAMW, {"why": True, "because": f"{training.loss} has no exact solution"}
    if given:
        return Method.ADAMW, {"why": True, "because": f"{given[0]} was given, which closed_form has no use for"}
    return Method.CLOSED_FORM, {"why": True, "because": "squared loss has an exact solution: nothing to tune"}


def _is_open(request: TrainRequest, name: str, exact: bool) -> bool:
    if name == "rank":
        return is_auto(request.rank)
    return is_auto(getattr(request.training, name)) and (name == "ridge") == exact


def _hold_out(decided: Decided, rows: Rows, open_fields: list[str]) -> None:
    """Rows to decide by, where the request says nothing of them."""
    if rows.count < _FEWEST_ROWS:
        return
    by = By.ROWS if rows.groups is None else By.GROUP
    decided.split = Split(by=by)
    decided.why["split"] = (
        f"{' and '.join(open_fields)} by held-out loss: a fifth of the {'groups' if by is By.GROUP else 'rows'}"
    )


def _rank(decided: Decided, request: TrainRequest, by_rows: bool, most: int) -> None:
    if not is_auto(request.rank):
        return
    if by_rows:
        ranks = tuple(rank for rank in _RANKS if rank <= most)
        decided.values |= {"rank": ranks[-1], "try_ranks": ranks}
        decided.why["rank"] = (
            f"the smallest of {', '.join(map(str, ranks))} that is about as good as the best, by held-out loss"
        )
    else:
        decided.values["rank"] = 1
        decided.why["rank"] = f"fewer than {_FEWEST_ROWS} rows: 1"


def _gradient(decided: Decided, training: TrainingBody, rows: int, groups: int | None, by_rows: bool) -> None:
    values, why = decided.values, decided.why
    # A fleet's groups train each by itself: what counts is how many rows one of them has.
    rows = rows if groups is None else max(1, rows // groups)
    if is_auto(training.batch_size):
        few = rows <= _FULL_BATCH_ROWS
        negatives = Loss(training.loss) is Loss.MULTIPLE_NEGATIVES
        values["batch_size"] = min(rows, _FULL_BATCH_ROWS) if negatives else None if few else 64
        told = f"{rows} rows" if groups is None else f"about {rows} rows a group"
        why["batch_size"] = f"{told}: " + ("all of them in each step" if few else str(values["batch_size"]))
    batch = values.get("batch_size", training.batch_size) or rows
    if is_auto(training.epochs):
        steps_an_epoch = -(-rows // min(batch, rows))
        values["epochs"] = max(5, -(-_STEPS // steps_an_epoch))
        why["epochs"] = f"about {_STEPS} steps, at least 5 epochs"
        if by_rows and training.early_stopping is None:
            values["patience"] = 20
            why["epochs"] += "; fewer where 20 evaluations of the held-out loss brought nothing"
    if is_auto(training.learning_rate):
        if by_rows:
            values |= {"learning_rate": 0.01, "try_rates": _RATES}
            why["learning_rate"] = f"the best of {', '.join(f'{rate:g}' for rate in _RATES)} in short trials"
        else:
            values["learning_rate"] = 0.01
            why["learning_rate"] = f"fewer than {_FEWEST_ROWS} rows: 0.01"


def make_spec(
    request: TrainRequest, rows: Rows, start: Start, decided: Decided, *, holds_out: bool, outputs: int
) -> TrainingSpec:
    """All settings, decided but for what held-out rows decide. Raises the `InvalidInput` that names the field."""
    training, stopping = request.training, request.training.early_stopping
    if stopping is not None and not holds_out and decided.split is None:
        raise MissingField(
            "early_stopping looks at the loss of held-out rows, and none are held out",
            field="split",
            expected="a split, or training.validation_fraction",
        )
    plain: tuple[str, ...] = (
        "loss",
        "bias",
        "epochs",
        "learning_rate",
        "batch_size",
        "seed",
        "ridge",
        "weight_decay",
        "momentum",
    )
    plain += ("clip_norm", "schedule", "warmup_steps", "max_steps", "max_seconds", "huber_delta", "label_smoothing")
    plain += ("temperature", "keep_statistics")
    values: dict[str, Any] = {name: getattr(training, name) for name in plain}
    values["rank"] = request.rank
    values |= decided.values
    alpha_is_rank = request.alpha is None or is_auto(request.alpha)
    alpha = (
        start.alpha if alpha_is_rank and start.alpha is not None else values["rank"] if alpha_is_rank else request.alpha
    )
    classes = _classes(rows, outputs)
    if stopping is not None:
        values |= {"patience": stopping.patience, "min_delta": stopping.min_delta}
        values["evaluate_every"] = stopping.evaluate_every
    values |= {
        "alpha": float(alpha or 0),
        "alpha_is_rank": alpha_is_rank and start.alpha is None,
        "rslora": start.rslora,
        "method": decided.method,
        "loss": Loss(training.loss),
        "schedule": Schedule(training.schedule),
        "init": start.init,
        "split": decided.split,
        "classes": classes,
        "class_weights": _class_weights(training.class_weights, classes or outputs),
    }
    return TrainingSpec(**values)


def _classes(rows: Rows, outputs: int) -> int | None:
    """How many outputs are the task's; None where all are."""
    named = len(rows.labels) if rows.labels is not None else None
    if named is None and rows.classes_N is None and len(rows.target_shape) == 2:
        named = rows.target_shape[1]
    return None if named == outputs else named


def _class_weights(given: object, classes: int) -> str | tuple[float, ...] | None:
    field_name, expected = "training.class_weights", f'"balanced", or {classes} numbers above 0'
    if given is None or given == BALANCED:
        return given
    if not isinstance(given, list):
        raise WrongType(f"{field_name} is no list of numbers", field=field_name, given=given, expected=expected)
    if len(given) != classes:
        raise WrongShape(
            f"{field_name} has {len(given)} numbers for {classes} classes",
            field=field_name,
            given=f"{len(given)} numbers",
            expected=expected,
        )
    weights_C = vector(given, field=field_name, length=classes)
    if not ((weights_C > 0) & (weights_C <= np.float32(1e30))).all():
        raise OutOfRange(
            f"{field_name}: not every number is above 0 and at most 1e30",
            field=field_name,
            given=given,
            expected=expected,
        )
    return tuple(map(float, given))


def _refuse(name: str, training: TrainingBody, why: str) -> None:
    raise IgnoredField(
        f"training.{name} has no effect {why}: leave it out",
        field=f"training.{name}",
        given=getattr(training, name) if not hasattr(getattr(training, name), "model_dump") else None,
        expected=f"{name} left out {why}",
    )
