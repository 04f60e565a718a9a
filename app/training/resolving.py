"""From a request's settings, and what the data decided of them, to a spec."""

from typing import Any

import numpy as np

from adapters.arrays import vector
from adapters.errors import MissingField, OutOfRange, WrongShape, WrongType
from adapters.training.settings import BALANCED, Loss, Schedule, TrainingSpec
from app.training.auto import Decided
from app.training.rows import Rows
from app.training.schemas import TrainRequest, is_auto
from app.training.starts import Start

_AS_GIVEN = (
    "loss",
    "bias",
    "epochs",
    "learning_rate",
    "batch_size",
    "seed",
    "ridge",
    "weight_decay",
    "momentum",
    "clip_norm",
    "schedule",
    "warmup_steps",
    "max_steps",
    "max_seconds",
    "huber_delta",
    "label_smoothing",
    "temperature",
    "keep_statistics",
)
"""Settings that the request and the spec call the same."""


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
    values: dict[str, Any] = {name: getattr(training, name) for name in _AS_GIVEN}
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
    if named is None and rows.classes_N is None and len(rows.targets.shape) == 2:
        named = rows.targets.shape[1]
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
