"""Metrics of a version or a job as rows of a table: the adapter beside what it has to beat."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.training.metrics import HIGHER_IS_BETTER, PRIMARY

_SIDES = {"adapter": "Adapter", "base": "Base alone", "trivial": "Guess", "live": "Live before"}
_TRAINING = (("Loss", "train_loss", "base_train_loss"), ("Accuracy", "train_accuracy", "base_train_accuracy"))


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric on the same rows, of each side."""

    name: str
    higher_is_better: bool
    values: tuple[Any, ...]

    @property
    def best(self) -> int | None:
        """Which side is best; None where not two of them have a value."""
        there = [(value, place) for place, value in enumerate(self.values) if isinstance(value, int | float)]
        if len(there) < 2:
            return None
        return (max if self.higher_is_better else min)(there)[1]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What came of rows that were not trained on."""

    rows: int
    sides: tuple[str, ...]
    measures: tuple[Measure, ...]


@dataclass(frozen=True, slots=True)
class Headline:
    """The one metric that a list shows."""

    name: str
    adapter: float
    base: float | None


def held_out(metrics: Mapping[str, Any] | None) -> HeldOut | None:
    """The comparison on held-out rows; None where none were held out."""
    told = (metrics or {}).get("held_out")
    if told is None:
        return None
    sides = [side for side in _SIDES if told.get(side) is not None]
    measures = [
        Measure(name, better, tuple(told[side].get(name) for side in sides))
        for name, better in HIGHER_IS_BETTER.items()
        if name in told["adapter"]
    ]
    return HeldOut(told["rows"], tuple(_SIDES[side] for side in sides), tuple(measures))


def losses(metrics: Mapping[str, Any] | None) -> list[tuple[str, Any, Any]]:
    """Name, adapter, base of what a job says of the rows that it was trained on."""
    told = metrics or {}
    return [(label, told[ours], told.get(bases)) for label, ours, bases in _TRAINING if told.get(ours) is not None]


def headline(metrics: Mapping[str, Any] | None) -> Headline | None:
    """The task's headline on held-out rows, else the loss on them, else on the training rows."""
    told = metrics or {}
    sides = told.get("held_out")
    if sides is not None:
        for name, _ in PRIMARY.values():
            if isinstance(value := sides["adapter"].get(name), int | float):
                return Headline(name, value, sides["base"].get(name))
    for name, bases in (("validation_loss", "base_validation_loss"), ("train_loss", "base_train_loss")):
        if isinstance(value := told.get(name), int | float):
            return Headline(name, value, told.get(bases))
    return None
