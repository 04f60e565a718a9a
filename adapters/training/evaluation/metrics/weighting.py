"""Row weights, chunks of rows, and conversion of results to JSON values, for all metrics."""

# N rows
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**20
"""The largest temporary: 8 MiB of float64."""
Number = float | int | None
"""None is a value that is undefined; nothing here is ever infinite or not a number."""
Metrics = dict[str, Number | Sequence[Number] | Sequence[Sequence[Number]]]
"""Ready for JSON, by the names of docs/metrics.md."""


def slices(rows: int, width: int) -> Iterator[slice]:
    """All rows in order, as many at a time as keep rows × width within `CHUNK_ELEMENTS` (at least one)."""
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def tiles(rows: int, width: int) -> Iterator[slice]:
    """As `slices`, and so few that every pair from two of them keeps within it too."""
    return slices(rows, max(width, math.isqrt(CHUNK_ELEMENTS - 1) + 1))


def row_weights(weights_N: Tensor | None, like_N: Tensor) -> Tensor:
    """(N,) float64 on the device of `like_N`: the weights, or ones where there are none."""
    if weights_N is None:
        return torch.ones(like_N.shape[0], dtype=torch.float64, device=like_N.device)
    return weights_N.to(like_N.device, torch.float64)


def effective_rows(weights_N: Tensor) -> float:
    """(Σw)² / Σw², Kish 1965, section 11.7: how many rows of equal weight tell as much. N where all weigh the same."""
    squares = float(weights_N.square().sum())
    return float(weights_N.sum()) ** 2 / squares if squares > 0 else 0.0


def number(value: Tensor | float) -> float | None:
    """A scalar as a float; None where it is not finite (0/0, the log of 0)."""
    plain = float(value)
    return plain if math.isfinite(plain) else None


def numbers(values_K: Tensor) -> list[float | None]:
    """A vector, each value as `number` has it."""
    return [number(value) for value in values_K.tolist()]
