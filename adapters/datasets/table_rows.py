"""Batches of a stored data set as numbers, and the rows among them that cannot be used."""

# N rows · C columns
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adapters.arrays import Float32
from adapters.datasets.cells import is_list
from adapters.datasets.census import as_float32, not_finite_rows, odd_rows, why_row_not_finite
from adapters.errors import MOST_BAD_ROWS, BadRow, BadRows, shown

_LARGEST_EXACT = 2.0**53


def find_bad(array: Any, name: str, width: int, start: int, bad: list[BadRow]) -> None:
    """Add the bad rows of one column of a batch whose first row is `start`."""
    if array.null_count:
        add_bad(bad, start, name, np.flatnonzero(nulls(array)), lambda _row: "null")
    if pa.types.is_list(array.type):
        odd = odd_rows(array, width)
        add_bad(bad, start, name, odd, lambda row: f"{len(array[row])} numbers, where most rows have {width}")
    add_bad(bad, start, name, not_finite_rows(array), lambda row: why_row_not_finite(array, row))


def add_bad(bad: list[BadRow], start: int, name: str, rows: NDArray[np.int64], reason: Callable[[int], str]) -> None:
    """Add the first of these rows of a batch whose first row is `start`."""
    bad.extend(BadRow(start + int(row), name, reason(int(row))) for row in rows[:MOST_BAD_ROWS])


def refuse(bad: list[BadRow], field: str) -> None:
    """Raises `BadRows` where there are some."""
    if bad:
        first = bad[0]
        raise BadRows(
            f"{field}: row {first.row}, column {shown(first.column)!r}: {first.reason}",
            rows=bad[:MOST_BAD_ROWS],
            field=field,
        )


def block(arrays: Sequence[Any], width: int) -> Float32:
    """Columns without bad rows → (N, C) float32."""
    if is_list(arrays[0].type):
        return _narrow(arrays[0].flatten()).reshape(-1, width)
    if len(arrays) == 1:
        return _narrow(arrays[0]).reshape(-1, 1)
    out_NC = np.empty((len(arrays[0]), len(arrays)), np.float32)
    for position, array in enumerate(arrays):
        out_NC[:, position] = _narrow(array)
    return out_NC


def _narrow(values: Any) -> NDArray[np.float32]:
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.float32())
    return as_float32(values)


def whole_numbers(array: Any, column: str, start: int, bad: list[BadRow]) -> Any:
    """Floats that are whole as int64; where they are not, bad rows."""
    values = array.fill_null(0).to_numpy()
    with np.errstate(invalid="ignore"):
        wrong = ~((np.floor(values) == values) & (np.abs(values) <= _LARGEST_EXACT))
    add_bad(bad, start, column, np.flatnonzero(wrong), lambda row: f"not a whole number: {values[row]}")
    return pa.array(np.where(wrong, 0, values).astype(np.int64))


def nulls(array: Any) -> NDArray[np.bool_]:
    """Whether each row is null."""
    missing: NDArray[np.bool_] = array.is_null().to_numpy(zero_copy_only=False)
    return missing
