"""The adapters that everybody serves: number n of a shape is the same numbers wherever it is asked for."""

# I in_features · O out_features · R rank
from dataclasses import dataclass
from typing import Any

import numpy as np

MIXED_RANKS = (1, 2, 4, 8, 16, 32, 64)
_SPREAD = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One tenant's A (O, R) and B (R, I), float32; alpha is the rank, so that s = 1."""

    name: str
    a_OR: Any
    b_RI: Any

    @property
    def rank(self) -> int:
        """R."""
        return int(self.b_RI.shape[0])


def name_of(number: int) -> str:
    """Return the name of the tenant."""
    return f"tenant-{number:05d}"


def factors(number: int, in_features: int, out_features: int, rank: int) -> Factors:
    """Another tenant for each number."""
    generator = np.random.default_rng([number, in_features, out_features, rank])
    flat = _SPREAD * generator.standard_normal(rank * (in_features + out_features), dtype=np.float32)
    a_OR = flat[: rank * out_features].reshape(out_features, rank)
    return Factors(name_of(number), a_OR, flat[rank * out_features :].reshape(rank, in_features))
