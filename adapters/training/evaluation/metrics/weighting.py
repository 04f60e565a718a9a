"""Row weights, chunks of rows, and conversion of results to JSON values, for all metrics."""

# N rows
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# The largest temporary: 8 MiB of float64.
CHUNK_ELEMENTS = 2**20
# Value of a metric. None is undefined; no value is infinite or NaN.
Number = float | int | None
# JSON values by the names in docs/metrics.md.
Metrics = dict[str, Number | Sequence[Number] | Sequence[Sequence[Number]]]


def slices(rows: int, width: int) -> Iterator[slice]:
    """Yield slices of all rows in order, with rows × width ≤ `CHUNK_ELEMENTS` (but at least one row)."""
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def tiles(rows: int, width: int) -> Iterator[slice]:
    """Yield slices as `slices` does, so short that all pairs of rows of two slices stay within the limit too."""
    return slices(rows, max(width, math.isqrt(CHUNK_ELEMENTS - 1) + 1))


def row_weights(weights_N: Tensor | None, like_N: Tensor) -> Tensor:
    """Return the weights, or ones without any, (N,) float64 on the device of `like_N`."""
    if weights_N is None:
        return torch.ones(like_N.shape[0], dtype=torch.float64, device=like_N.device)
    return weights_N.to(like_N.device, torch.float64)


def effective_rows(weights_N: Tensor) -> float:
    """Return (Σw)² / Σw², the number of rows of equal weight with the same information (Kish 1965, section 11.7)."""
    squares = float(weights_N.square().sum())
    return float(weights_N.sum()) ** 2 / squares if squares > 0 else 0.0


def number(value: Tensor | float) -> float | None:
    """Return a scalar as a float, or None if it is not finite (0/0, the log of 0)."""
    plain = float(value)
    return plain if math.isfinite(plain) else None


def numbers(values_K: Tensor) -> list[float | None]:
    """Return the values of a vector, each as `number` does."""
    return [number(value) for value in values_K.tolist()]
