"""Metrics as JSON has them: floats, integers, lists, and null for what is undefined."""

import math
from collections.abc import Sequence

from torch import Tensor

Number = float | int | None
"""None is a value that is undefined; nothing here is ever infinite or not a number."""
Metrics = dict[str, Number | Sequence[Number] | Sequence[Sequence[Number]]]
"""Ready for JSON, by the names of docs/metrics.md."""


def number(value: Tensor | float) -> float | None:
    """A scalar as a float; None where it is not finite (0/0, the log of 0)."""
    plain = float(value)
    return plain if math.isfinite(plain) else None


def numbers(values_K: Tensor) -> list[float | None]:
    """A vector, each value as `number` has it."""
    return [number(value) for value in values_K.tolist()]
