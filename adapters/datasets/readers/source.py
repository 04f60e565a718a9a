"""What a reader of one format hands over: the columns that will be stored, and the rows a chunk at a time."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adapters.errors import InvalidDataset, shown

MAX_COLUMNS = 16_384
LONGEST_NAME = 200
"""Characters of a column's name."""
TEXT_BLOCK_BYTES = 2**23
"""Text is read in blocks of so many bytes."""
MAX_ROW_BYTES = 2**24
"""Of one row, as text and as stored: what is held in memory is a few such rows at most."""

Unreadable: TypeAlias = Callable[[int, str, str], None]
"""Told the row, the column and the reason for each cell that was left out, row numbers from the file's start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A column as it will be stored."""

    name: str
    type: Any
    """pyarrow's."""
    usual_width: int | None = None
    """Of lists of floats of several lengths: rows of another width are bad rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file, looked through far enough to know how its columns will be stored."""

    columns: Sequence[Planned]
    chunks: Callable[[Unreadable], Iterable[Sequence[Any]]]
    """Arrays, one a column and equally long, which `adapters.datasets.cells.stored` takes to the planned types."""
    rows: int | None = None
    """How many rows there will be, where that is known."""


def check_names(names: Sequence[str]) -> None:
    """Raises `InvalidDataset` for too many columns, for a name twice and for one that is not a name."""
    if not names:
        raise InvalidDataset("the data set has no columns", field="body", expected="one or more columns")
    if len(names) > MAX_COLUMNS:
        raise InvalidDataset(
            f"the data set has {len(names)} columns, and at most {MAX_COLUMNS} are taken; send wide rows as a column"
            " of lists",
            field="body",
            given=f"{len(names)} columns",
            expected=f"at most {MAX_COLUMNS} columns",
        )
    seen: set[str] = set()
    for position, name in enumerate(names):
        if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
            raise InvalidDataset(
                f"the name of column {position} is not one: {shown(name)!r}",
                field="body",
                given=name,
                expected=f"1 to {LONGEST_NAME} printable characters",
            )
        if name in seen:
            raise InvalidDataset(
                f"two columns are called {shown(name)!r}", field="body", given=name, expected="a name of its own"
            )
        seen.add(name)


class Widths:
    """How long the lists of one column are, counted."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, lists: Any) -> None:
        """Count the lists of an array that are not null."""
        lengths, counts = np.unique(pc.list_value_length(lists).drop_null().to_numpy(), return_counts=True)
        self._counts.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))

    def count(self, length: int) -> None:
        """Count one list."""
        self._counts[length] += 1

    def plan(self, name: str, value_type: Any) -> Planned:
        """The column: of lists of one size where all have it, of any size otherwise."""
        if len(self._counts) == 1 and 0 not in self._counts and not pa.types.is_string(value_type):
            return Planned(name=name, type=pa.list_(value_type, *self._counts))
        # Whole numbers in lists of several lengths are labels: nothing is odd about them.
        usual = self.usual() if pa.types.is_floating(value_type) else None
        return Planned(name=name, type=pa.list_(value_type), usual_width=usual)

    def usual(self) -> int | None:
        """The most common width, of several the smallest; None where there is no list at all."""
        return min(self._counts, key=lambda width: (-self._counts[width], width), default=None)


def pieces(batch: Any) -> Iterator[Any]:
    """A record batch in slices that are small enough to be copied a few times."""
    each = max(1, batch.nbytes // max(1, batch.num_rows))
    rows = max(1, min(8192, TEXT_BLOCK_BYTES // each))
    for begin in range(0, batch.num_rows, rows):
        yield batch.slice(begin, rows)
