"""Tables of metrics: the adapter compared with the base layer, a trivial guess and the previous live version."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.training.evaluation.metrics import HIGHER_IS_BETTER, PRIMARY

_SIDES = {"adapter": "Adapter", "base": "Base alone", "trivial": "Guess", "live": "Live before"}
# Rows, metric and member of metrics without `held_out`, as a fleet's adapters have. Members of the base have a prefix
# `base_`.
_WITHOUT_EVALUATION = (
    ("held-out", "accuracy", "validation_accuracy"),
    ("held-out", "loss", "validation_loss"),
    ("training", "loss", "train_loss"),
)
_TRAINING = (("Loss", "train_loss", "base_train_loss"), ("Accuracy", "train_accuracy", "base_train_accuracy"))


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric of all compared models on the same rows."""

    name: str
    higher_is_better: bool
    values: tuple[Any, ...]
    ranked: tuple[bool, ...]
    """Whether each model can be the best one."""

    @property
    def best(self) -> int | None:
        """Index of the model with the best value; None if fewer than two ranked models have a value."""
        candidates = [
            (value, index)
            for index, (value, ranked) in enumerate(zip(self.values, self.ranked, strict=True))
            if ranked and isinstance(value, int | float)
        ]
        if len(candidates) < 2:
            return None
        return (max if self.higher_is_better else min)(candidates)[1]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Comparison on rows that were not trained on."""

    rows: int | None
    """None if the number is unknown."""
    sides: tuple[str, ...]
    measures: tuple[Measure, ...]


@dataclass(frozen=True, slots=True)
class Headline:
    """Metric that a list shows."""

    rows: str
    """Rows that it was computed on: `held-out` or `training`."""
    name: str
    adapter: float
    base: float | None


def held_out(metrics: Mapping[str, Any] | None) -> HeldOut | None:
    """Return the comparison on held-out rows, or None if none were held out."""
    comparison = (metrics or {}).get("held_out") or _validation(metrics or {})
    if comparison is None:
        return None
    sides = [side for side in _SIDES if comparison.get(side) is not None]
    measures = [
        Measure(
            name,
            better,
            tuple(comparison[side].get(name) for side in sides),
            # Class frequencies are calibrated by construction, so that the guess is not ranked.
            tuple(not (name == "calibration_error" and side == "trivial") for side in sides),
        )
        for name, better in HIGHER_IS_BETTER.items()
        if name in comparison["adapter"]
    ]
    return HeldOut(comparison.get("rows"), tuple(_SIDES[side] for side in sides), tuple(measures))


def losses(metrics: Mapping[str, Any] | None) -> list[tuple[str, Any, Any]]:
    """Return name, adapter and base of each metric on the rows of the training."""
    members = metrics or {}
    return [
        (label, members[ours], members.get(bases)) for label, ours, bases in _TRAINING if members.get(ours) is not None
    ]


def headline(metrics: Mapping[str, Any] | None) -> Headline | None:
    """Return the main metric on held-out rows, or accuracy or loss on them, or the loss on training rows."""
    members = metrics or {}
    sides = members.get("held_out")
    if sides is not None:
        for name in PRIMARY.values():
            if isinstance(value := sides["adapter"].get(name), int | float):
                return Headline("held-out", name, value, sides["base"].get(name))
    for rows, name, member in _WITHOUT_EVALUATION:
        if isinstance(value := members.get(member), int | float):
            return Headline(rows, name, value, members.get(f"base_{member}"))
    return None


def _validation(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the metrics of held-out rows in the form of `held_out`, or None if no rows were held out."""
    names = [name for name in ("loss", "accuracy") if metrics.get(f"validation_{name}") is not None]
    if not names:
        return None
    return {
        "adapter": {name: metrics[f"validation_{name}"] for name in names},
        "base": {name: metrics.get(f"base_validation_{name}") for name in names},
    }
