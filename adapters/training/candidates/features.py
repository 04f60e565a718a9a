"""Features in which a ridge is applied: the inputs, or the inputs in the metric of W, with a constant for the bias.

A ridge on coefficients of x·L penalises tr(ΔW·Σ⁻¹·ΔWᵀ) for Σ = L·Lᵀ. With Σ ∝ 0.9·WᵀW + 0.1·1, it costs little to
change ΔW along directions that the base layer reads, and much along those that it ignores.
"""

# G groups · N rows · I in_features · J features · C outputs of the task
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from adapters.lora.base_layer import BaseLayer

# What L is: W's own metric, 1, or the inverse standard deviations of the inputs.
Kind = Literal["base_metric", "inputs", "standardized"]
_METRIC_SHARE = 0.9
# Square of the constant for classes, relative to the mean square of the other features: the bias has a penalty too,
# because a few rows say little about the frequencies of classes.
_CONSTANT_SQUARE = 0.3


class Moments(NamedTuple):
    """Moments of the inputs of all rows."""

    mean_I: Tensor
    covariance_II: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FeatureMap:
    """φ(x) = [(x - μ)·L, c] / scale. Without a bias, μ = 0 and there is no c."""

    factor_IJ: Tensor | None
    """L; None for the inputs themselves."""
    mean_I: Tensor
    constant: float | None
    """c; None without a bias, or with one that has no penalty (`free_intercept`)."""
    scale: float
    free_intercept: bool
    is_base_metric: bool

    def __call__(self, x_NI: Tensor) -> Tensor:
        """Return the features of inputs (…, N, I) float64, (…, N, J)."""
        features = x_NI - self.mean_I
        if self.factor_IJ is not None:
            features = features @ self.factor_IJ
        if self.constant is not None:
            features = torch.cat([features, features.new_full((*features.shape[:-1], 1), self.constant)], dim=-1)
        return features / self.scale

    def update(self, theta_JC: Tensor, intercept_C: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ΔW (…, C, I) and the change of the bias (…, C), or None, of coefficients (…, J, C)."""
        theta_JC = theta_JC / self.scale
        bias_C = intercept_C
        if self.constant is not None:
            bias_C, theta_JC = self.constant * theta_JC[..., -1, :], theta_JC[..., :-1, :]
        delta_IC = theta_JC if self.factor_IJ is None else self.factor_IJ @ theta_JC
        if bias_C is not None:
            bias_C = bias_C - self.mean_I @ delta_IC
        return delta_IC.mT, bias_C


def feature_map(base: BaseLayer, moments: Moments, *, kind: Kind, bias: bool, free_intercept: bool) -> FeatureMap:
    """Return the features for a kind of ridge, scaled so that the mean square of φ(x) is about 1."""
    mean_I = moments.mean_I if bias else torch.zeros_like(moments.mean_I)
    second_II = moments.covariance_II
    if not bias:
        second_II = second_II + moments.mean_I[:, None] * moments.mean_I
    factor_II = None
    if kind == "base_metric":
        factor_II = base_metric_factor(base)
    elif kind == "standardized":
        deviation_I = second_II.diagonal().clamp_min(0).sqrt()
        # A column that is constant up to rounding stays as small as it is.
        least = 1e-6 * float(deviation_I.max())
        factor_II = torch.diag(torch.where(deviation_I > least, deviation_I, 1.0).reciprocal())
    if factor_II is None:
        square = float(second_II.diagonal().sum())
    else:
        square = float((factor_II * (second_II @ factor_II)).sum())
    square = square if square > 0 else 1.0
    has_constant = bias and not free_intercept
    return FeatureMap(
        factor_IJ=factor_II,
        mean_I=mean_I,
        constant=(_CONSTANT_SQUARE * square) ** 0.5 if has_constant else None,
        scale=square**0.5,
        free_intercept=bias and free_intercept,
        is_base_metric=kind == "base_metric",
    )


def base_metric_factor(base: BaseLayer) -> Tensor:
    """Return L (I, I) float64 with L·Lᵀ = 0.9·WᵀW·I/tr(WᵀW) + 0.1·1."""
    weight_OI = base.weight_OI.double()
    gram_II = weight_OI.T @ weight_OI
    I, trace = len(gram_II), float(gram_II.diagonal().sum())
    share = _METRIC_SHARE if trace > 0 else 0.0
    metric_II = share * gram_II * (I / trace if trace > 0 else 0.0)
    factor_II: Tensor = torch.linalg.cholesky(metric_II + (1 - share) * torch.eye(I, dtype=torch.float64))
    return factor_II
