"""Metrics of regression: R², absolute and squared errors, and the cosine of output and target."""

# N rows · O outputs
import torch
from torch import Tensor

from adapters.training.evaluation.metrics.weighting import Metrics, effective_rows, number, numbers, row_weights, slices

# Most outputs for which metrics per output are reported.
MAX_REPORTED_OUTPUTS = 1000


def measure_regression(outputs_NO: Tensor, targets_NO: Tensor, *, weights_N: Tensor | None = None) -> Metrics:
    """Return the metrics of finite outputs and targets (N, O), and weights (N,) ≥ 0.

    `r2_per_output`, `mae_per_output`, `rmse_per_output` (None past 1,000 outputs); `r2_mean` over the outputs that
    have one, `mae_mean`, `rmse` over all elements; `cosine`, the mean over rows. R² of an output whose target is the
    same in all rows with a weight is None. The cosine with a zero vector is 0.
    """
    rows, outputs = targets_NO.shape
    weights = row_weights(weights_N, targets_NO)
    total = weights.sum()
    absolute_O, squared_O = torch.zeros(2, outputs, dtype=torch.float64, device=weights.device)
    cosine = torch.zeros((), dtype=torch.float64, device=weights.device)
    for part in slices(rows, outputs):
        output, target, weight_N = outputs_NO[part].double(), targets_NO[part].double(), weights[part]
        error = output - target
        absolute_O += weight_N @ error.abs()
        squared_O += weight_N @ error.square_()
        cosine += weight_N @ cosine_of(output, target)
    spread_O = _sum_of_squares(targets_NO, weights)
    r2_O = torch.where(spread_O > 0, 1 - squared_O / spread_O, torch.nan)
    mae_O, mse_O = absolute_O / total, squared_O / total
    has_few_outputs = outputs <= MAX_REPORTED_OUTPUTS
    return {
        "rows": rows,
        "effective_rows": effective_rows(weights),
        "r2_mean": number(r2_O.nanmean()),
        "mae_mean": number(mae_O.mean()),
        "rmse": number(mse_O.mean().sqrt()),
        "cosine": number(cosine / total),
        "r2_per_output": numbers(r2_O) if has_few_outputs else None,
        "mae_per_output": numbers(mae_O) if has_few_outputs else None,
        "rmse_per_output": numbers(mse_O.sqrt()) if has_few_outputs else None,
    }


def measure_trivial_regression(mean_O: Tensor, targets_NO: Tensor, *, weights_N: Tensor | None = None) -> Metrics:
    """Return the metrics of always answering with the mean of the training targets, (O,), as `measure_regression`.

    It has no `loss`, because the caller knows which loss the training has: that of `mean_O.expand(N, -1)`.
    """
    mean_O = mean_O.to(targets_NO.device, torch.float64)
    return measure_regression(mean_O.expand(targets_NO.shape[0], -1), targets_NO, weights_N=weights_N)


def cosine_of(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosine of the angle between vectors, (…, O) twice -> (…); 0 if one vector is 0."""
    lengths = torch.linalg.vector_norm(one, dim=-1) * torch.linalg.vector_norm(other, dim=-1)
    cosines: Tensor = torch.linalg.vecdot(one, other) / lengths
    return torch.where(lengths > 0, cosines, 0.0)


def _sum_of_squares(targets_NO: Tensor, weights_N: Tensor) -> Tensor:
    """Return Σ w·(t − mean)², (O,), exactly 0 for a constant target."""
    rows, outputs = targets_NO.shape
    # Relative to a row with a weight, so that a constant is 0 in every row, whatever the rounding of its mean.
    origin_O = targets_NO[weights_N.argmax()].double()
    shift_O = torch.zeros(outputs, dtype=torch.float64, device=weights_N.device)
    spread_O = torch.zeros_like(shift_O)
    for part in slices(rows, outputs):
        shift_O += weights_N[part] @ (targets_NO[part].double() - origin_O)
    shift_O /= weights_N.sum()
    for part in slices(rows, outputs):
        spread_O += weights_N[part] @ (targets_NO[part].double() - origin_O - shift_O).square_()
    return spread_O
