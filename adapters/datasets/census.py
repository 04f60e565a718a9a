"""Counts what is missing or not finite while a data set is written, and remembers the first bad rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adapters.datasets.cells import is_list
from adapters.datasets.readers.source import Planned
from adapters.datasets.report import Column
from adapters.errors import MOST_BAD_ROWS, BadRow


class Census:
    """One data set's."""

    def __init__(self, columns: Sequence[Planned]) -> None:
        self._columns = columns
        self._position = {column.name: position for position, column in enumerate(columns)}
        self._nulls = [0] * len(columns)
        self._not_finite = [0] * len(columns)
        self._unreadable: list[tuple[int, int, str]] = []
        self._found: list[tuple[int, int, str]] = []

    def unreadable(self, row: int, column: str, reason: str) -> None:
        """A cell was left out by the reader: it will come by again, as a null. Call it in the order of rows."""
        self._unreadable.append((row, self._position[column], reason))
        # Cells of one chunk come column by column: keep far more than are needed, and the first ones among them.
        if len(self._unreadable) > 1000 * MOST_BAD_ROWS:
            self._unreadable = sorted(self._unreadable)[:MOST_BAD_ROWS]

    def note(self, batch: Any, begin: int) -> None:
        """Look at a batch of the stored form; its first row is the row `begin`."""
        found = self._found if len(self._found) < MOST_BAD_ROWS else None
        for position, (column, array) in enumerate(zip(self._columns, batch.columns, strict=True)):
            self._nulls[position] += array.null_count
            bad = not_finite_rows(array)
            self._not_finite[position] += len(bad)
            if found is not None:
                odd = odd_rows(array, column.usual_width)
                found.extend((begin + row, position, why) for row, why in _reasons(array, bad, odd, column.usual_width))
        if found is not None:
            self._found = sorted(found)[:MOST_BAD_ROWS]

    def columns(self) -> tuple[Column, ...]:
        """What was counted."""
        return tuple(
            Column(
                name=column.name,
                type=type_name(column.type),
                width=column.type.list_size if pa.types.is_fixed_size_list(column.type) else column.usual_width,
                nulls=nulls,
                not_finite=not_finite,
            )
            for column, nulls, not_finite in zip(self._columns, self._nulls, self._not_finite, strict=True)
        )

    def bad_rows(self) -> tuple[BadRow, ...]:
        """The first ones, by row and then in the order of the columns."""
        reasons = {(row, position): reason for row, position, reason in self._found}
        reasons |= {(row, position): reason for row, position, reason in self._unreadable}
        return tuple(
            BadRow(row, self._columns[position].name, reason)
            for (row, position), reason in sorted(reasons.items())[:MOST_BAD_ROWS]
        )


def type_name(arrow_type: Any) -> str:
    """A stored type as clients see it."""
    if is_list(arrow_type):
        return f"list<{type_name(arrow_type.value_type)}>"
    return "float32" if pa.types.is_float32(arrow_type) else {"double": "float64"}.get(str(arrow_type), str(arrow_type))


def not_finite_rows(array: Any) -> NDArray[np.int64]:
    """The rows of a stored array with a number that is not finite as float32; nulls are not among them."""
    if not is_list(array.type):
        return _not_finite(array)
    if pa.types.is_fixed_size_list(array.type):
        width = array.type.list_size
        return np.unique(_not_finite(array.values.slice(array.offset * width, len(array) * width)) // width)
    offsets = array.offsets.to_numpy()
    bad = _not_finite(array.values.slice(offsets[0], offsets[-1] - offsets[0]))
    return np.unique(np.searchsorted(offsets - offsets[0], bad, side="right") - 1)


def _not_finite(values: Any) -> NDArray[np.int64]:
    if not pa.types.is_floating(values.type):
        return np.empty(0, np.int64)
    return np.flatnonzero(~np.isfinite(as_float32(values)))


def odd_rows(array: Any, width: int | None) -> NDArray[np.int64]:
    """The rows whose list has another width; nulls are not among them."""
    if width is None:
        return np.empty(0, np.int64)
    return np.flatnonzero(pc.list_value_length(array).fill_null(width).to_numpy() != width)


def as_float32(values: Any) -> NDArray[np.float32]:
    """Stored numbers, zero where they are null, as float32."""
    data = values.buffers()[1]
    if data is None:
        return np.empty(0, np.float32)
    numbers = np.frombuffer(
        data, values.type.to_pandas_dtype(), len(values), values.offset * values.type.bit_width // 8
    )
    with np.errstate(over="ignore"):
        narrow: NDArray[np.float32] = numbers.astype(np.float32, copy=False)
    return narrow


def why_not_finite(value: float) -> str:
    """Names a number that is not finite as float32."""
    if np.isnan(value):
        return "NaN"
    return f"{'-' if value < 0 else ''}Infinity" if np.isinf(value) else f"not finite as float32: {value!r}"


def why_row_not_finite(array: Any, row: int) -> str:
    """Names the first number of a row that is not finite as float32."""
    value = array[row].as_py()
    if not isinstance(value, list):
        return why_not_finite(value)
    with np.errstate(over="ignore"):
        element = int(np.flatnonzero(~np.isfinite(np.array(value).astype(np.float32)))[0])
    return f"element {element} is {why_not_finite(value[element])}"


def _reasons(
    array: Any, bad: NDArray[np.int64], odd: NDArray[np.int64], width: int | None
) -> Iterator[tuple[int, str]]:
    if array.null_count:
        nulls = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))
        yield from ((int(row), "null") for row in nulls[:MOST_BAD_ROWS])
    yield from ((int(row), why_row_not_finite(array, int(row))) for row in bad[:MOST_BAD_ROWS])
    for row in odd[:MOST_BAD_ROWS]:
        yield int(row), f"{len(array[int(row)])} numbers, where most rows have {width}"
