"""Metrics of a version or a job as rows of a table: the adapter beside what it has to beat."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.training.evaluation.metrics import HIGHER_IS_BETTER, PRIMARY

_SIDES = {"adapter": "Adapter", "base": "Base alone", "trivial": "Guess", "live": "Live before"}
_UNEVALUATED = (
    ("held-out", "accuracy", "validation_accuracy"),
    ("held-out", "loss", "validation_loss"),
    ("training", "loss", "train_loss"),
)
"""Rows, metric and member of metrics without `held_out`, such as those of a fleet's adapter; the base's has `base_`."""
_TRAINING = (("Loss", "train_loss", "base_train_loss"), ("Accuracy", "train_accuracy", "base_train_accuracy"))


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric on the same rows, of each side."""

    name: str
    higher_is_better: bool
    values: tuple[Any, ...]
    ranked: tuple[bool, ...]
    """Whether a side may be the best one."""

    @property
    def best(self) -> int | None:
        """Return the side with the best value; None if fewer than two of the ranked sides have one."""
        there = [
            (value, place)
            for place, (value, ranked) in enumerate(zip(self.values, self.ranked, strict=True))
            if ranked and isinstance(value, int | float)
        ]
        if len(there) < 2:
            return None
        return (max if self.higher_is_better else min)(there)[1]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What came of rows that were not trained on."""

    rows: int | None
    """None if it is not known how many."""
    sides: tuple[str, ...]
    measures: tuple[Measure, ...]


@dataclass(frozen=True, slots=True)
class Headline:
    """The one metric that a list shows."""

    rows: str
    """The rows that it was computed on: `held-out` or `training`."""
    name: str
    adapter: float
    base: float | None


def held_out(metrics: Mapping[str, Any] | None) -> HeldOut | None:
    """The comparison on held-out rows; None where none were held out."""
    told = (metrics or {}).get("held_out") or _validation(metrics or {})
    if told is None:
        return None
    sides = [side for side in _SIDES if told.get(side) is not None]
    measures = [
        Measure(
            name,
            better,
            tuple(told[side].get(name) for side in sides),
            # Class frequencies are calibrated by construction: that says nothing about how good a guess they are.
            tuple(not (name == "calibration_error" and side == "trivial") for side in sides),
        )
        for name, better in HIGHER_IS_BETTER.items()
        if name in told["adapter"]
    ]
    return HeldOut(told.get("rows"), tuple(_SIDES[side] for side in sides), tuple(measures))


def losses(metrics: Mapping[str, Any] | None) -> list[tuple[str, Any, Any]]:
    """Name, adapter, base of what a job says of the rows that it was trained on."""
    told = metrics or {}
    return [(label, told[ours], told.get(bases)) for label, ours, bases in _TRAINING if told.get(ours) is not None]


def headline(metrics: Mapping[str, Any] | None) -> Headline | None:
    """The task's headline on held-out rows, else accuracy or loss on them, else the loss on the training rows."""
    told = metrics or {}
    sides = told.get("held_out")
    if sides is not None:
        for name, _ in PRIMARY.values():
            if isinstance(value := sides["adapter"].get(name), int | float):
                return Headline("held-out", name, value, sides["base"].get(name))
    for rows, name, member in _UNEVALUATED:
        if isinstance(value := told.get(member), int | float):
            return Headline(rows, name, value, told.get(f"base_{member}"))
    return None


def _validation(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what is known of held-out rows in the form of `held_out`; None if no rows were held out."""
    names = [name for name in ("loss", "accuracy") if metrics.get(f"validation_{name}") is not None]
    if not names:
        return None
    return {
        "adapter": {name: metrics[f"validation_{name}"] for name in names},
        "base": {name: metrics.get(f"base_validation_{name}") for name in names},
    }
