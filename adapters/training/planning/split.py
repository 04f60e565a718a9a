"""Split of rows into a training side and a held-out side: at random, by group, by time, or by a column."""

# N rows · K rows of one side
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from adapters.errors import OutOfRange

# Rows below which a hash holds none out: a fifth of them says little, and the training misses them.
FEW_ROWS = 100
# Folds of the cross-validation that evaluates adapters of few rows.
FOLDS = 5
_KEYS = 2**63


class SplitBy(StrEnum):
    """What decides whether a row is trained on or held out."""

    ROWS = "rows"
    """Each row is drawn by itself."""
    GROUP = "group"
    """Whole groups are drawn."""
    TIME = "time"
    """The latest rows are held out."""
    COLUMN = "column"
    """A column names the held-out rows."""
    HASH = "hash"
    """A hash of the row, or of its group, decides, so that a row that is held out once is always held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How rows are held out."""

    by: SplitBy = SplitBy.ROWS
    fraction: float = 0.2
    """Share of the rows, rounded half up; a group is taken if that brings the number of held-out rows nearer to it."""
    stratify: bool = False
    """Whether each class is split in this fraction by itself."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> "Split | None":
        """Return the split that `dataclasses.asdict` made `values` of."""
        return None if values is None else cls(**{**values, "by": SplitBy(values["by"])})

    def held_out_rows(self, rows: int) -> int:
        """Return how many of `rows` rows the fraction holds out, or a hash about as many."""
        return math.floor(rows * self.fraction + 0.5)

    def holds_out(self, rows: int, key_N: Tensor | None = None) -> bool:
        """Return whether rows of one adapter are held out.

        Only a hash may hold none out: of fewer than `FEW_ROWS` rows, and if every key would be on one side.
        """
        if self.by is not SplitBy.HASH:
            return True
        assert key_N is not None
        return rows >= FEW_ROWS and 0 < int(self.held_by_hash(key_N).sum()) < rows

    def held_by_hash(self, key_N: Tensor) -> Tensor:
        """Return (N,) bool: whether the hash of a row, from `row_keys`, holds it out."""
        return key_N < int(self.fraction * _KEYS)

    def sides(
        self, rows: int, generator: torch.Generator, *, key_N: Tensor | None = None, classes_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the sorted row numbers of both sides, training first: int64, disjoint, together all rows.

        key_N: (N,) int64, by `by`: the row's group, its position in time, 1 for a held-out row, or its hash from
        `row_keys`. classes_N: (N,) int64, read with `stratify`. Raises `OutOfRange` if a side would be empty.
        """
        held_N = torch.zeros(rows, dtype=torch.bool)
        if self.by is SplitBy.ROWS:
            strata = _members(classes_N) if self.stratify and classes_N is not None else [torch.arange(rows)]
            for rows_K in strata:
                order_K = torch.randperm(len(rows_K), generator=generator)
                held_N[rows_K[order_K[: self.held_out_rows(len(rows_K))]]] = True
        else:
            assert key_N is not None
            held_N = self._by_key(key_N, generator)
        training_K, held_K = (~held_N).nonzero()[:, 0], held_N.nonzero()[:, 0]
        self.check_sides(len(training_K), len(held_K))
        return training_K, held_K

    def check_sides(self, training_rows: int, held_out_rows: int) -> None:
        """Raise `OutOfRange` if the split leaves a side empty."""
        if not training_rows or not held_out_rows:
            counts = f"{training_rows} rows to train on and {held_out_rows} to validate on"
            detail = f"the split of {training_rows + held_out_rows} rows leaves {counts}; neither may be empty"
            given, expected = f"{self.fraction:g} by {self.by}", "a split that leaves rows on both sides"
            raise OutOfRange(detail, field="split", given=given, expected=expected)

    def _by_key(self, key_N: Tensor, generator: torch.Generator) -> Tensor:
        rows = len(key_N)
        held_N = torch.zeros(rows, dtype=torch.bool)
        if self.by is SplitBy.COLUMN:
            return key_N == 1
        if self.by is SplitBy.HASH:
            return self.held_by_hash(key_N)
        if self.by is SplitBy.TIME:
            # Stable: of rows at the same time, those that come later in the data count as later.
            held_N[torch.argsort(key_N, stable=True)[rows - self.held_out_rows(rows) :]] = True
            return held_N
        members = list(_members(key_N))
        target, held = self.held_out_rows(rows), 0
        for group in torch.randperm(len(members), generator=generator).tolist():
            held_with_group = held + len(members[group])
            if abs(held_with_group - target) < abs(held - target):
                held_N[members[group]] = True
                held = held_with_group
        return held_N


def _members(codes_N: Tensor) -> list[Tensor]:
    """Return the row numbers of each distinct code, in the order of codes."""
    order_N = torch.argsort(codes_N, stable=True)
    counts = torch.unique(codes_N, return_counts=True)[1]
    return list(order_N.split(counts.tolist()))
