"""Which rows are held out: drawn at random, by groups, by time, or as a column says."""

# N rows · K rows of one side
import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from adapters.errors import OutOfRange


class By(StrEnum):
    """What decides on which side a row is."""

    ROWS = "rows"
    """Chance, each row by itself."""
    GROUP = "group"
    """Chance, all rows of a group together."""
    TIME = "time"
    """The latest rows are held out."""
    COLUMN = "column"
    """The rows of which a column says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How rows are held out."""

    by: By = By.ROWS
    fraction: float = 0.2
    """Of the rows, rounded half up; a group is taken where that brings the part nearer to as many."""
    stratify: bool = False
    """Whether each class, by itself, is split in this fraction."""

    def held_out_rows(self, rows: int) -> int:
        """How many of `rows` rows are to be held out."""
        return math.floor(rows * self.fraction + 0.5)

    def sides(
        self, rows: int, generator: torch.Generator, *, key_N: Tensor | None = None, classes_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Row numbers, sorted, to train on and held out: int64, disjoint, together all rows.

        key_N: (N,) int64: the row's group, its place in time, or 1 for a held-out row, as `by` has it.
        classes_N: (N,) int64, read with `stratify`. Raises `OutOfRange` where a side would be empty.
        """
        held_N = torch.zeros(rows, dtype=torch.bool)
        if self.by is By.ROWS and not (self.stratify and classes_N is not None):
            held_N[torch.randperm(rows, generator=generator)[: self.held_out_rows(rows)]] = True
        elif self.by is By.ROWS:
            assert classes_N is not None
            for rows_K in _members(classes_N):
                order_K = torch.randperm(len(rows_K), generator=generator)
                held_N[rows_K[order_K[: self.held_out_rows(len(rows_K))]]] = True
        else:
            assert key_N is not None
            held_N = self._by_key(key_N, generator)
        training_K, held_K = (~held_N).nonzero()[:, 0], held_N.nonzero()[:, 0]
        if len(training_K) == 0 or len(held_K) == 0:
            raise OutOfRange(
                f"the split of {rows} rows leaves {len(training_K)} rows to train on and {len(held_K)} to validate "
                "on; neither may be empty",
                field="split",
                given=f"{self.fraction:g} by {self.by}",
                expected="a split that leaves rows on both sides",
            )
        return training_K, held_K

    def _by_key(self, key_N: Tensor, generator: torch.Generator) -> Tensor:
        rows = len(key_N)
        held_N = torch.zeros(rows, dtype=torch.bool)
        if self.by is By.COLUMN:
            return key_N == 1
        if self.by is By.TIME:
            # Stable: of rows at the same time the later ones in the data are later.
            held_N[torch.argsort(key_N, stable=True)[rows - self.held_out_rows(rows) :]] = True
            return held_N
        members = list(_members(key_N))
        wanted, held = self.held_out_rows(rows), 0
        for group in torch.randperm(len(members), generator=generator).tolist():
            with_it = held + len(members[group])
            if abs(with_it - wanted) < abs(held - wanted):
                held_N[members[group]] = True
                held = with_it
        return held_N


def _members(codes_N: Tensor) -> list[Tensor]:
    """The row numbers of each distinct code, in order of code."""
    order_N = torch.argsort(codes_N, stable=True)
    counts = torch.unique(codes_N, return_counts=True)[1]
    return list(order_N.split(counts.tolist()))
