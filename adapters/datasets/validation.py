"""Checks of a data set's rows: nulls, numbers that are not finite, lists of the wrong width.

`ColumnReport` counts them while a file is ingested. `IngestReport` is the result. `add_bad_column_rows` and
`raise_bad_rows` find them again when a table is read as numbers.
"""

# N rows · C columns
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adapters.arrays import Float32
from adapters.datasets.columns import PlannedColumn, is_list
from adapters.errors import MAX_BAD_ROWS, BadRow, BadRows, shorten

_MAX_EXACT_FLOAT = 2.0**53


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Column of a stored data set."""

    name: str
    type: str
    """`int64`, `float32`, `float64`, `bool`, `string`, or `list<…>` of the first three or of `string`."""
    width: int | None
    """Length of the lists; for lists of floats of several lengths, the most common one."""
    nulls: int
    not_finite: int
    """Rows with a number that is not finite as float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestReport:
    """Result of an ingestion: the size, columns and first bad rows of the stored file."""

    rows: int
    columns: tuple[Column, ...]
    bad_rows: tuple[BadRow, ...]
    digest: str
    """`sha256:` + hex of the stored form. It depends on names, types and values, and on their order."""
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return asdict(self) | {"columns": columns_to_json(self.columns), "bad_rows": bad_rows_to_json(self.bad_rows)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "IngestReport":
        """Return the report from the JSON of `to_json`."""
        lists = {"columns": columns_from_json(value["columns"]), "bad_rows": bad_rows_from_json(value["bad_rows"])}
        return cls(**{**value, **lists})


def columns_to_json(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Return columns as JSON, as the catalogue stores them."""
    return [asdict(column) for column in columns]


def columns_from_json(value: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """Return columns from the JSON of `columns_to_json`."""
    return tuple(Column(**column) for column in value)


def bad_rows_to_json(bad_rows: Sequence[BadRow]) -> list[dict[str, Any]]:
    """Return bad rows as JSON, as the catalogue stores them."""
    return [bad._asdict() for bad in bad_rows]


def bad_rows_from_json(value: Sequence[Mapping[str, Any]]) -> tuple[BadRow, ...]:
    """Return bad rows from the JSON of `bad_rows_to_json`."""
    return tuple(BadRow(**bad) for bad in value)


class ColumnReport:
    """Counter of nulls and of numbers that are not finite, per column, with the first bad rows."""

    def __init__(self, columns: Sequence[PlannedColumn]) -> None:
        self._columns = columns
        self._position = {column.name: position for position, column in enumerate(columns)}
        self._nulls = [0] * len(columns)
        self._not_finite = [0] * len(columns)
        self._unreadable: list[tuple[int, int, str]] = []
        self._bad_cells: list[tuple[int, int, str]] = []

    def add_unreadable(self, row: int, column: str, reason: str) -> None:
        """Note a cell that the reader replaced by null. Calls are in the order of rows."""
        self._unreadable.append((row, self._position[column], reason))
        # The cells of one chunk arrive column by column, so the first rows are known only after many more cells.
        if len(self._unreadable) > 1000 * MAX_BAD_ROWS:
            self._unreadable = sorted(self._unreadable)[:MAX_BAD_ROWS]

    def add_batch(self, batch: Any, begin: int) -> None:
        """Count the cells of a stored batch whose first row is row `begin`."""
        bad_cells = self._bad_cells if len(self._bad_cells) < MAX_BAD_ROWS else None
        for position, (column, array) in enumerate(zip(self._columns, batch.columns, strict=True)):
            self._nulls[position] += array.null_count
            not_finite = not_finite_rows(array)
            self._not_finite[position] += len(not_finite)
            if bad_cells is not None:
                wrong_width = rows_of_other_width(array, column.usual_width)
                reasons = _reasons(array, not_finite, wrong_width, column.usual_width)
                bad_cells.extend((begin + row, position, reason) for row, reason in reasons)
        if bad_cells is not None:
            self._bad_cells = sorted(bad_cells)[:MAX_BAD_ROWS]

    def columns(self) -> tuple[Column, ...]:
        """Return the columns with their counts."""
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
        """Return the first bad rows, in order of row, then of column."""
        reasons = {(row, position): reason for row, position, reason in self._bad_cells}
        reasons |= {(row, position): reason for row, position, reason in self._unreadable}
        return tuple(
            BadRow(row, self._columns[position].name, reason)
            for (row, position), reason in sorted(reasons.items())[:MAX_BAD_ROWS]
        )


def type_name(arrow_type: Any) -> str:
    """Return the name of a stored type in the API."""
    if is_list(arrow_type):
        return f"list<{type_name(arrow_type.value_type)}>"
    return "float32" if pa.types.is_float32(arrow_type) else {"double": "float64"}.get(str(arrow_type), str(arrow_type))


def not_finite_rows(array: Any) -> NDArray[np.int64]:
    """Return the rows, without nulls, with a number that is not finite as float32, (K,) int64."""
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


def rows_of_other_width(array: Any, width: int | None) -> NDArray[np.int64]:
    """Return the rows, without nulls, whose list has another width, (K,) int64."""
    if width is None:
        return np.empty(0, np.int64)
    return np.flatnonzero(pc.list_value_length(array).fill_null(width).to_numpy() != width)


def as_float32(values: Any) -> NDArray[np.float32]:
    """Return stored numbers as float32, with zero for null."""
    data = values.buffers()[1]
    if data is None:
        return np.empty(0, np.float32)
    numbers = np.frombuffer(
        data, values.type.to_pandas_dtype(), len(values), values.offset * values.type.bit_width // 8
    )
    with np.errstate(over="ignore"):
        narrow: NDArray[np.float32] = numbers.astype(np.float32, copy=False)
    return narrow


def describe_not_finite(value: float) -> str:
    """Return why a number is not finite as float32."""
    if np.isnan(value):
        return "NaN"
    return f"{'-' if value < 0 else ''}Infinity" if np.isinf(value) else f"not finite as float32: {value!r}"


def describe_row_not_finite(array: Any, row: int) -> str:
    """Return the first number of a row that is not finite as float32, as text."""
    value = array[row].as_py()
    if not isinstance(value, list):
        return describe_not_finite(value)
    with np.errstate(over="ignore"):
        element = int(np.flatnonzero(~np.isfinite(np.array(value).astype(np.float32)))[0])
    return f"element {element} is {describe_not_finite(value[element])}"


def _reasons(
    array: Any, not_finite: NDArray[np.int64], wrong_width: NDArray[np.int64], width: int | None
) -> Iterator[tuple[int, str]]:
    if array.null_count:
        nulls = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))
        yield from ((int(row), "null") for row in nulls[:MAX_BAD_ROWS])
    yield from ((int(row), describe_row_not_finite(array, int(row))) for row in not_finite[:MAX_BAD_ROWS])
    for row in wrong_width[:MAX_BAD_ROWS]:
        yield int(row), f"{len(array[int(row)])} numbers, where most rows have {width}"


def add_bad_column_rows(array: Any, name: str, width: int, start: int, bad: list[BadRow]) -> None:
    """Append the bad rows of one column of a batch whose first row is `start`."""
    if array.null_count:
        add_bad_rows(bad, start, name, np.flatnonzero(null_mask(array)), lambda _row: "null")
    if pa.types.is_list(array.type):
        odd = rows_of_other_width(array, width)
        add_bad_rows(bad, start, name, odd, lambda row: f"{len(array[row])} numbers, where most rows have {width}")
    add_bad_rows(bad, start, name, not_finite_rows(array), lambda row: describe_row_not_finite(array, row))


def add_bad_rows(
    bad: list[BadRow], start: int, name: str, rows: NDArray[np.int64], reason: Callable[[int], str]
) -> None:
    """Append the first of these rows of a batch whose first row is `start`."""
    bad.extend(BadRow(start + int(row), name, reason(int(row))) for row in rows[:MAX_BAD_ROWS])


def raise_bad_rows(bad: list[BadRow], field: str) -> None:
    """Raise `BadRows` if there are any."""
    if bad:
        first = bad[0]
        raise BadRows(
            f"{field}: row {first.row}, column {shorten(first.column)!r}: {first.reason}",
            rows=bad[:MAX_BAD_ROWS],
            field=field,
        )


def to_matrix(arrays: Sequence[Any], width: int) -> Float32:
    """Return columns without bad rows as one array, (N, C) float32."""
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


def to_int64(array: Any, column: str, start: int, bad: list[BadRow]) -> Any:
    """Return whole floats as int64; append the rows of all others to `bad`."""
    values = array.fill_null(0).to_numpy()
    with np.errstate(invalid="ignore"):
        wrong = ~((np.floor(values) == values) & (np.abs(values) <= _MAX_EXACT_FLOAT))
    add_bad_rows(bad, start, column, np.flatnonzero(wrong), lambda row: f"not a whole number: {values[row]}")
    return pa.array(np.where(wrong, 0, values).astype(np.int64))


def null_mask(array: Any) -> NDArray[np.bool_]:
    """Return whether each row is null, (N,) bool."""
    missing: NDArray[np.bool_] = array.is_null().to_numpy(zero_copy_only=False)
    return missing
