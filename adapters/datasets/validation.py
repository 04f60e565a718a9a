"""Checks of a data set's rows: nulls, numbers that are not finite, lists of the wrong width.

`ColumnReport` counts them while a file is ingested, and `IngestReport` is the result. `find_bad_rows` finds them again
when a table is read as numbers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adapters.datasets.columns import PlannedColumn, is_list
from adapters.errors import MAX_BAD_ROWS, BadRow


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
        return asdict(self) | findings_to_json(self.columns, self.bad_rows)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "IngestReport":
        """Return the report from the JSON of `to_json`."""
        return cls(**{**value, **findings_from_json(value)})


def findings_to_json(columns: Sequence[Column], bad_rows: Sequence[BadRow]) -> dict[str, Any]:
    """Return columns and bad rows as JSON, as the catalogue stores them."""
    return {"columns": [asdict(column) for column in columns], "bad_rows": [bad._asdict() for bad in bad_rows]}


def findings_from_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return `columns` and `bad_rows` from the JSON of `findings_to_json`."""
    columns = tuple(Column(**column) for column in value["columns"])
    return {"columns": columns, "bad_rows": tuple(BadRow(**bad) for bad in value["bad_rows"])}


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
        bad_cells, is_full = self._bad_cells, len(self._bad_cells) >= MAX_BAD_ROWS
        for position, (column, array) in enumerate(zip(self._columns, batch.columns, strict=True)):
            self._nulls[position] += array.null_count
            not_finite = not_finite_rows(array)
            self._not_finite[position] += len(not_finite)
            if not is_full:
                reasons = find_bad_rows(array, column.usual_width, not_finite)
                bad_cells += [(begin + row, position, reason) for row, reason in reasons]
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
        first = sorted(reasons.items())[:MAX_BAD_ROWS]
        return tuple(BadRow(row, self._columns[position].name, reason) for (row, position), reason in first)


def type_name(arrow_type: Any) -> str:
    """Return the name of a stored type in the API."""
    if is_list(arrow_type):
        return f"list<{type_name(arrow_type.value_type)}>"
    return "float32" if pa.types.is_float32(arrow_type) else {"double": "float64"}.get(str(arrow_type), str(arrow_type))


def not_finite_rows(array: Any) -> NDArray[np.int64]:
    """Return the rows, without nulls, with a number that is not finite as float32, (K,) int64."""
    numbers = array.flatten() if is_list(array.type) else array
    if not pa.types.is_floating(numbers.type):
        return np.empty(0, np.int64)
    rows = np.flatnonzero(~np.isfinite(to_float32(numbers)))
    return np.unique(pc.list_parent_indices(array).to_numpy()[rows]) if is_list(array.type) and len(rows) else rows


def to_float32(numbers: Any) -> NDArray[np.float32]:
    """Return numbers as float32, with zero for null, one for true, and infinity for what is too large."""
    if pa.types.is_boolean(numbers.type):
        numbers = numbers.cast(pa.float32())
    if numbers.null_count:
        numbers = numbers.fill_null(0)
    with np.errstate(over="ignore"):
        narrow: NDArray[np.float32] = numbers.to_numpy().astype(np.float32, copy=False)
    return narrow


def find_bad_rows(array: Any, width: int | None, not_finite: NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    """Yield the first rows of an array that cannot be read as numbers, of each kind, with the reason.

    width: the length of the lists, or None if it may differ. not_finite: the result of `not_finite_rows`.
    """
    for row in rows_where(array.is_null())[:MAX_BAD_ROWS] if array.null_count else ():
        yield int(row), "null"
    if width is not None and is_list(array.type):
        for row in rows_where(pc.not_equal(pc.list_value_length(array), width))[:MAX_BAD_ROWS]:
            yield int(row), f"{len(array[int(row)])} numbers, where most rows have {width}"
    for row in not_finite[:MAX_BAD_ROWS]:
        yield int(row), _describe_not_finite(array[int(row)].as_py())


def _describe_not_finite(value: float | list[float]) -> str:
    """Return the number that is not finite as float32, in a list the first one, as text."""
    if isinstance(value, list):
        element = int(np.flatnonzero(~np.isfinite(to_float32(pa.array(value))))[0])
        return f"element {element} is {_describe_not_finite(value[element])}"
    if math.isnan(value):
        return "NaN"
    return f"{'-' if value < 0 else ''}Infinity" if math.isinf(value) else f"not finite as float32: {value!r}"


def rows_where(mask: Any) -> NDArray[np.int64]:
    """Return the rows of an array of booleans that are true, (K,) int64."""
    return np.flatnonzero(mask.fill_null(False).to_numpy(zero_copy_only=False))
