"""What right and wrong decisions add up to: Wilson's interval, F1, calibration."""

# N rows · K classes or labels · B bins
import math
from statistics import NormalDist

import torch
from torch import Tensor

CONFIDENCE = 0.95
BINS = 15
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def wilson(share: float | None, rows: float) -> list[float] | None:
    """[low, high]: the 95 % score interval of a proportion seen on so many (effective) rows; None without any.

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n), Wilson 1927.
    """
    if share is None or rows <= 0:
        return None
    squared = _Z * _Z / rows
    middle = share + squared / 2
    spread = math.sqrt(squared * max(0.0, share * (1 - share)) + squared * squared / 4)
    low = max(0.0, (middle - spread) / (1 + squared))
    # Rounding alone would end some intervals of all right just short of 1.
    high = 1.0 if share >= 1 else min(1.0, (middle + spread) / (1 + squared))
    return [low, high]


def f1(hit: Tensor, present: Tensor, predicted: Tensor) -> Tensor:
    """2·hit / (present + predicted), elementwise: weights of the rows that have it, were said to, and both.

    0 where nothing has it and nothing was said to (scikit-learn's `zero_division=0`).
    """
    either = present + predicted
    return torch.where(either > 0, 2 * hit / either, 0.0)


def calibration_gaps(probability_N: Tensor, outcome_N: Tensor, weights_N: Tensor) -> Tensor:
    """(B,) Σ w·(outcome − probability) over the rows of each bin; bin m is (m/15, (m+1)/15], and the first has 0.

    The expected calibration error (Guo et al. 2017, eq. 3) is Σ|gap| / Σw: gaps of chunks add up.
    """
    edges = torch.arange(1, BINS, dtype=torch.float64, device=probability_N.device) / BINS
    bin_N = torch.bucketize(probability_N, edges)
    return torch.bincount(bin_N, weights_N * (outcome_N - probability_N), minlength=BINS)
