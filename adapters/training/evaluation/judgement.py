"""Judgement of a new adapter against its incumbent: the live version, or the base layer if no version can be compared.

Both have an error for each row that neither trained nor chose the new adapter: 0 or 1 for classes, the squared error
for numbers. The gain of a row is the incumbent's error minus that of the new adapter. See
docs/explanation/the-evaluation.md.
"""

# N rows · K of these, on which everything is compared
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.lora.adapter import Adapter

# Rows with the mean gain of the other groups of a fleet that are added to the rows of a group.
PSEUDO_ROWS = 20
CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
# Differences of squared errors below this share of the largest of them are rounding.
_ROUNDING = 1e-12
_EVIDENCE = np.dtype([("key", "<i8"), ("error", "<f4")])


class Outcome(StrEnum):
    """How a new adapter compares with its incumbent."""

    BETTER = "better"
    """Its gain is above the standard error."""
    SAME = "same"
    """Its gain is at most one standard error from 0."""
    WORSE = "worse"
    """Its gain is below minus the standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Whether a new adapter should become live, and why."""

    outcome: Outcome
    gain: float
    """Mean gain per row, shrunk towards the other groups' mean."""
    error: float
    """Standard error of the mean gain."""
    moves: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """Report of a job on one adapter, apart from its losses."""

    evaluation: Mapping[str, Any] | None = None
    """Figures of the adapter and of everything that it was compared with; None if nothing was evaluated."""
    judgement: Judgement | None = None
    auto: Mapping[str, Any] | None = None
    """Candidates that `method: auto` compared, and its choice."""
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "AdapterReport":
        """Return the report from the JSON of `to_json`."""
        judgement = values["judgement"]
        if judgement is not None:
            judgement = Judgement(**{**judgement, "outcome": Outcome(judgement["outcome"])})
        return cls(**{**values, "judgement": judgement, "warnings": tuple(values["warnings"])})


@dataclass(frozen=True, slots=True, eq=False)
class RowEvidence:
    """Rows that a version was trained on, each with the error of a fit without it, to compare a later version.

    keys_N: (N,) int64, a hash of each row with its target. errors_N: (N,) float32, NaN if there was no such fit.
    """

    keys_N: NDArray[np.int64]
    errors_N: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """Return 12 bytes per row, little-endian: key, error."""
        rows = np.empty(len(self.keys_N), _EVIDENCE)
        rows["key"], rows["error"] = self.keys_N, self.errors_N
        return rows.tobytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> "RowEvidence":
        """Return the evidence from the bytes of `to_bytes`."""
        rows = np.frombuffer(content, _EVIDENCE)
        return cls(rows["key"].astype(np.int64), rows["error"].astype(np.float32))

    def look_up(self, keys_K: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Return whether each row was trained on, (K,) bool, and its error in a fit without it, (K,), or NaN."""
        order = np.argsort(self.keys_N, kind="stable")
        positions = np.minimum(np.searchsorted(self.keys_N[order], keys_K), len(order) - 1)
        if len(order) == 0:
            return np.zeros(len(keys_K), bool), np.full(len(keys_K), np.nan, np.float32)
        trained_K = self.keys_N[order][positions] == keys_K
        return trained_K, np.where(trained_K, self.errors_N[order][positions], np.float32(np.nan))


@dataclass(frozen=True, slots=True, eq=False)
class LiveVersion:
    """Live version of the name of a new adapter."""

    adapter: Adapter | None
    """None if it cannot be compared."""
    evidence: RowEvidence | None = None
    unjudged: str | None = None
    """Why it cannot be compared."""


def judge(
    errors: Mapping[str, Tensor],
    *,
    by: str,
    metric: str,
    is_regression: bool,
    weights_N: Tensor | None = None,
    others_gain: float | None = None,
) -> tuple[dict[str, Any], Judgement]:
    """Return the evaluation and the judgement from the errors of several models on the same rows.

    errors: (N,) float64 of each of `adapter`, `base`, `guess` and, if there is one, `live`. NaN in `live` is a row on
    which the live version cannot be judged. by: the origin of the rows, `held_out` or `cross_validation`. metric: name
    of the figure; it is 1 - mean error if the name ends with `accuracy`, and otherwise the mean error. others_gain:
    mean gain per row of the other groups of a fleet.
    """
    weights_N = torch.ones_like(errors["adapter"]) if weights_N is None else weights_N.double()
    live_N = errors.get("live")
    judged_N = None if live_N is None else torch.isfinite(live_N) & (weights_N > 0)
    has_live = judged_N is not None and bool(judged_N.any())
    # Everything is compared on the same rows: those on which the live version can be judged, if there is one.
    selected_N = judged_N if has_live and judged_N is not None else weights_N > 0
    own = {name: errors_N[selected_N] for name, errors_N in errors.items() if name != "live" or has_live}
    weights_K = weights_N[selected_N]
    compared = "live" if has_live else "base"
    gain, error, rows = _gain(own[compared] - own["adapter"], weights_K, is_bounded=not is_regression)
    means = {name: _mean(errors_K, weights_K) for name, errors_K in own.items()}
    shrunk = gain
    if others_gain is not None:
        shrunk = (rows * gain + PSEUDO_ROWS * others_gain) / (rows + PSEUDO_ROWS)
    evaluation = _evaluation(own, means, weights_K, metric=metric, is_bounded=not is_regression)
    evaluation = {"by": by, "rows": len(weights_K), "metric": metric, **evaluation}
    evaluation |= {"live": evaluation.get("live"), "gain": gain, "gain_error": error}
    return evaluation, _decide(shrunk, error, means, compared, is_regression=is_regression)


def relative_gain(gain: float, error: float, *, is_regression: bool) -> tuple[float, float]:
    """Return a group's mean gain as it counts for other groups, and the unit of it.

    error: mean error of what answers now. The numbers of two groups may be of different size, so gains of squared
    errors are shares of that error, from -1 to 1.
    """
    if not is_regression:
        return gain, 1.0
    return (max(-1.0, min(1.0, gain / error)) if error > 0 else 0.0), error


def warnings_of(evaluation: Mapping[str, Any], live: LiveVersion | None, *, has_base: bool) -> Iterator[str]:
    """Yield warnings: a live version that was not compared, and models that are worse than the trivial guess.

    live: the live version, even if it was not compared. has_base: whether the base layer has weights other than 0.
    """
    if live is not None and evaluation["live"] is None:
        yield f"the live version was not compared: {live.unjudged or 'it was trained on all of these rows'}"
    guess, metric = evaluation["guess"], evaluation["metric"]
    sign = 1 if metric.endswith("accuracy") else -1
    rounding = 0.0 if sign > 0 else _ROUNDING * max(guess, evaluation["adapter"], evaluation["base"])
    if sign * (evaluation["adapter"] - guess) < -rounding:
        figures = f"{metric} {evaluation['adapter']:.3g} against {guess:.3g}"
        yield f"the adapter is worse than a trivial guess: {figures}"
    # By the better end of the interval, so that a few rows do not cause a warning by chance.
    best = max(sign * bound for bound in evaluation["intervals"]["base"])
    if has_base and metric.endswith("accuracy") and best < sign * guess:
        figures = f"{metric} {evaluation['base']:.3g} against {guess:.3g}"
        yield f"the base layer is worse than a trivial guess: {figures}; are its labels in the order of its outputs?"


def _decide(gain: float, error: float, means: Mapping[str, float], compared: str, *, is_regression: bool) -> Judgement:
    outcome = Outcome.BETTER if gain > error else Outcome.WORSE if gain < -error else Outcome.SAME
    other = "the live version" if compared == "live" else "the base layer"
    reason = f"its gain over {other} is {gain:.3g} a row, with a standard error of {error:.2g}"
    moves = gain >= 0
    # Of a constant target, both may be 0 up to rounding.
    if is_regression and means["adapter"] - means["guess"] > _ROUNDING * max(means.values()):
        # R² below 0: a constant would be a better answer.
        moves, reason = False, f"it is worse than the mean of the targets (R² below 0); {reason}"
    return Judgement(outcome=outcome, gain=gain, error=error, moves=moves, reason=reason)


def _gain(gains_K: Tensor, weights_K: Tensor, *, is_bounded: bool) -> tuple[float, float, float]:
    """Return the weighted mean gain, its standard error, and the effective number of rows.

    is_bounded: the gains are of classes, from -1 to 1. The error then counts one more row of gain 1 and one of gain -1,
    so that it is not 0 if all answers on a few rows are the same (after Agresti & Min 2005).
    """
    total = float(weights_K.sum())
    mean = float(gains_K @ weights_K) / total
    rows = total**2 / float(weights_K.square().sum())
    squares = float(gains_K.square() @ weights_K) / total * rows + (2.0 if is_bounded else 0.0)
    count = rows + (2.0 if is_bounded else 0.0)
    center = mean * rows / count
    variance = max(0.0, squares / count - center**2)
    return mean, math.sqrt(variance / max(1.0, count - (0.0 if is_bounded else 1.0))), rows


def _evaluation(
    errors: Mapping[str, Tensor], means: Mapping[str, float], weights_K: Tensor, *, metric: str, is_bounded: bool
) -> dict[str, Any]:
    """Return the figure of each model, and the 95 % intervals."""
    is_share = metric.endswith("accuracy")
    figures = {name: 1 - mean if is_share else mean for name, mean in means.items()}
    rows = float(weights_K.sum()) ** 2 / float(weights_K.square().sum())
    intervals = {}
    for name, figure in figures.items():
        if is_share and is_bounded:
            intervals[name] = wilson_interval(figure, rows)
        else:
            _, error, _ = _gain(errors[name], weights_K, is_bounded=False)
            intervals[name] = [figure - _Z * error, figure + _Z * error]
    return {**figures, "intervals": intervals}


def wilson_interval(share: float, rows: float) -> Sequence[float]:
    """Return the 95 % interval of a share of `rows` rows (Wilson 1927)."""
    # Rounding may have put it just outside 0 to 1.
    share = min(1.0, max(0.0, share))
    spread = _Z * math.sqrt(share * (1 - share) / rows + _Z**2 / (4 * rows**2))
    center, scale = share + _Z**2 / (2 * rows), 1 + _Z**2 / rows
    return [max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)]


def _mean(errors_K: Tensor, weights_K: Tensor) -> float:
    return float(errors_K @ weights_K) / float(weights_K.sum())
