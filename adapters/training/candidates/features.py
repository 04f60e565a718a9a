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
# A layer with fewer outputs than this share of its inputs is a low-rank part of the metric.
_FEW_OUTPUTS = 4
# Square of the constant for classes, relative to the mean square of the other features: the bias has a penalty too,
# because a few rows say little about the frequencies of classes.
_CONSTANT_SQUARE = 0.3


class Moments(NamedTuple):
    """Moments of the inputs of all rows."""

    mean_I: Tensor
    covariance_II: Tensor


class Factor(NamedTuple):
    """L = [low-rank part, s·1] or a dense matrix."""

    rows_KI: Tensor
    """Transpose of the low-rank part, or of L."""
    identity: float
    """s; 0 without that part."""

    def features(self, x_NI: Tensor) -> Tensor:
        """Return x·L, (…, N, J)."""
        low_NK = x_NI @ self.rows_KI.T
        return low_NK if self.identity == 0 else torch.cat([low_NK, self.identity * x_NI], dim=-1)

    def weights(self, theta_JC: Tensor) -> Tensor:
        """Return L·θ, (…, I, C)."""
        K = len(self.rows_KI)
        low_IC = self.rows_KI.T @ theta_JC[..., :K, :]
        return low_IC if self.identity == 0 else low_IC + self.identity * theta_JC[..., K:, :]

    def square(self, second_II: Tensor) -> float:
        """Return the mean square of x·L for inputs with these second moments."""
        low = float((self.rows_KI @ second_II * self.rows_KI).sum())
        return low + self.identity**2 * float(second_II.diagonal().sum())


@dataclass(frozen=True, slots=True, eq=False)
class FeatureMap:
    """φ(x) = [(x - μ)·L, c] / scale. Without a bias, μ = 0 and there is no c."""

    factor: Factor | None
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
        if self.factor is not None:
            features = self.factor.features(features)
        if self.constant is not None:
            features = torch.cat([features, features.new_full((*features.shape[:-1], 1), self.constant)], dim=-1)
        return features / self.scale

    def update(self, theta_JC: Tensor, intercept_C: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ΔW (…, C, I) and the change of the bias (…, C), or None, of coefficients (…, J, C)."""
        theta_JC = theta_JC / self.scale
        bias_C = intercept_C
        if self.constant is not None:
            bias_C, theta_JC = self.constant * theta_JC[..., -1, :], theta_JC[..., :-1, :]
        delta_IC = theta_JC if self.factor is None else self.factor.weights(theta_JC)
        if bias_C is not None:
            bias_C = bias_C - self.mean_I @ delta_IC
        return delta_IC.mT, bias_C


def feature_map(base: BaseLayer, moments: Moments, *, kind: Kind, bias: bool, free_intercept: bool) -> FeatureMap:
    """Return the features for a kind of ridge, scaled so that the mean square of φ(x) is about 1."""
    mean_I = moments.mean_I if bias else torch.zeros_like(moments.mean_I)
    second_II = moments.covariance_II
    if not bias:
        second_II = second_II + moments.mean_I[:, None] * moments.mean_I
    factor = None
    if kind == "base_metric":
        factor = base_metric_factor(base)
    elif kind == "standardized":
        deviation_I = second_II.diagonal().clamp_min(0).sqrt()
        # A column that is constant up to rounding stays as small as it is.
        least = 1e-6 * float(deviation_I.max())
        factor = Factor(torch.diag(torch.where(deviation_I > least, deviation_I, 1.0).reciprocal()), 0.0)
    square = float(second_II.diagonal().sum()) if factor is None else factor.square(second_II)
    square = square if square > 0 else 1.0
    has_constant = bias and not free_intercept
    return FeatureMap(
        factor=factor,
        mean_I=mean_I,
        constant=(_CONSTANT_SQUARE * square) ** 0.5 if has_constant else None,
        scale=square**0.5,
        free_intercept=bias and free_intercept,
        is_base_metric=kind == "base_metric",
    )


def base_metric_factor(base: BaseLayer) -> Factor:
    """Return L with L·Lᵀ = 0.9·WᵀW·I/tr(WᵀW) + 0.1·1."""
    weight_OI = base.weight_OI.double()
    O, I = weight_OI.shape
    square = float(weight_OI.square().sum())
    if square == 0:
        return Factor(weight_OI[:0], 1.0)
    low_OI, identity = (_METRIC_SHARE * I / square) ** 0.5 * weight_OI, (1 - _METRIC_SHARE) ** 0.5
    if _FEW_OUTPUTS * O <= I:
        return Factor(low_OI, identity)
    # As many features as inputs: the Cholesky factor.
    metric_II = low_OI.T @ low_OI + identity**2 * torch.eye(I, dtype=torch.float64)
    return Factor(torch.linalg.cholesky(metric_II).T.contiguous(), 0.0)
