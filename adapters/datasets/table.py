"""Reader of a stored data set, memory-mapped: columns as float32 rows, as class codes, or as lists of labels."""

# N rows · C columns
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc
from numpy.typing import NDArray

from adapters.arrays import Float32
from adapters.datasets.arrow_file import row_bytes
from adapters.datasets.columns import ColumnSelector, WidthCounter, is_list
from adapters.datasets.validation import find_bad_rows, not_finite_rows, rows_where, to_float32, type_name
from adapters.errors import MAX_BAD_ROWS, BadRow, BadRows, BlobCorrupt, InvalidInput, OutOfRange, WrongType, shorten
from adapters.storage.blobs import NO_DESCRIPTORS
from adapters.strict_json import replace_nan

_MAX_NAMES_LISTED = 20
_PREVIEW_BYTES = 2**23
_MAX_READERS = 8
_MAX_EXACT_FLOAT = 2.0**53
# Most bytes of text in a column of names: they are encoded in memory, and Arrow's text arrays end at 2 GiB.
_MAX_TEXT_BYTES = 2**29
# Bad rows of one array: the index of each in the array, and the reason.
_Reasons = list[tuple[int, str]]

# Arrow's default allocator keeps freed memory, and this process goes on to answer requests.
pa.set_memory_pool(pa.system_memory_pool())


class Table:
    """Stored data set. Create it with `open`, and use it from one thread."""

    def __init__(self, path: Path) -> None:
        self._reader = lru_cache(_MAX_READERS)(partial(_open_columns, pa.memory_map(str(path))))
        self._widths: dict[str, int] = {}
        schema = self._reader(None).schema
        self._types: dict[str, Any] = {column.name: column.type for column in schema}
        self._position = {name: position for position, name in enumerate(self._types)}
        # Only one column, because reading a batch takes time for each column.
        reader = self._reader((0,))
        counts = [reader.get_batch(batch).num_rows for batch in range(reader.num_record_batches)]
        # First row of each batch and, last, the number of rows.
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        self.rows = int(self._starts[-1])

    @classmethod
    def open(cls, path: Path) -> "Table":
        """Open the file at `path`; raise `BlobCorrupt` if it is missing or damaged."""
        try:
            return cls(path)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno in NO_DESCRIPTORS:
                raise  # not a fault of the file
            raise BlobCorrupt(f"the file of a stored data set is missing or damaged: {path.name}: {error}") from None

    def type_of(self, column: str, *, field: str) -> str:
        """Return the type of a column in the API; raise `InvalidInput` if there is no such column."""
        return type_name(self._type(column, field))

    def width(self, selection: ColumnSelector, *, field: str) -> int:
        """Return C, the numbers per row in these columns; for lists of several lengths, the most common one.

        Raises `InvalidInput` for a missing column, and `WrongType` for one without numbers.
        """
        names = self._names(selection, field)
        column_type = self._types[names[0]]
        if selection.column is None or not is_list(column_type):
            return len(names)
        if pa.types.is_fixed_size_list(column_type):
            return int(column_type.list_size)
        if names[0] not in self._widths:
            widths = WidthCounter()
            for _, batch in self._batches(names, 0, self.rows):
                widths.add(batch.column(0))
            # If most lists are empty, rows of one number: the others are reported as bad rows.
            self._widths[names[0]] = widths.usual() or 1
        return self._widths[names[0]]

    def numbers(self, selection: ColumnSelector, *, field: str, begin: int = 0, end: int | None = None) -> Float32:
        """Return the rows from `begin` to `end` (None: the last), (N, C) float32, C-contiguous; true is 1.

        Raises the errors of `width`, and `BadRows` for nulls, numbers that are not finite as float32, and lists of
        another width, with up to 20 rows by their index in the table.
        """
        end = self.rows if end is None else min(end, self.rows)
        out_NC = np.empty((max(0, end - begin), self.width(selection, field=field)), np.float32)
        for start, block_NC in self._blocks(selection, field, begin, end):
            out_NC[start - begin : start - begin + len(block_NC)] = block_NC
        return out_NC

    def check_numbers(self, selection: ColumnSelector, *, field: str) -> None:
        """Check every row as `numbers` does, in constant memory; raise its errors."""
        for _ in self._blocks(selection, field, 0, self.rows):
            pass

    def codes(self, column: str, *, field: str) -> tuple[NDArray[np.int64], list[str | int]]:
        """Return a column of text or integers as codes, (N,) int64, and the sorted distinct values that they index.

        true and false are 1 and 0; whole floats are integers. Raises `InvalidInput` for a missing column, `WrongType`
        for one of another type, and `BadRows` for nulls and for floats that are not whole.
        """
        column_type = self._type(column, field)
        if is_list(column_type):
            raise _wrong_type(column, column_type, field, "a column of text or of whole numbers")
        arrays = self._converted(column, field, _to_int64 if pa.types.is_floating(column_type) else _unchanged)
        if pa.types.is_boolean(column_type):
            arrays = [array.cast(pa.int64()) for array in arrays]
        return _encode(arrays)

    def order(self, column: str, *, field: str) -> NDArray[np.int64]:
        """Return the rank of each row's float among the distinct values, (N,) int64.

        Raises the errors of `codes`, and `BadRows` for NaN.
        """
        values_N = np.concatenate(self._converted(column, field, _to_float64))
        ranks: NDArray[np.int64] = np.unique(values_N, return_inverse=True)[1]
        return ranks.astype(np.int64)

    def lists_labels(self, column: str, *, numbers: bool, field: str) -> bool:
        """Return whether a column has lists of labels.

        These are lists of text, and lists of integers if integers are labels (`numbers`) or the lengths differ.
        """
        column_type = self._type(column, field)
        if not is_list(column_type):
            return False
        if pa.types.is_string(column_type.value_type):
            return True
        return pa.types.is_integer(column_type.value_type) and (numbers or not pa.types.is_fixed_size_list(column_type))

    def listed(self, column: str, *, field: str) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str | int]]:
        """Return the K labels in a column of lists: rows (K,) int64, codes (K,) int64, and the sorted distinct values.

        Raises `InvalidInput` for a missing column, `WrongType` for one of another type, and `BadRows` for nulls.
        """
        column_type = self._type(column, field)
        if not is_list(column_type) or not (
            pa.types.is_string(column_type.value_type) or pa.types.is_integer(column_type.value_type)
        ):
            raise _wrong_type(column, column_type, field, "a column of lists of text or of whole numbers")
        arrays = self._converted(column, field, _unchanged)
        starts = accumulate(map(len, arrays), initial=0)
        # The parent of a label is the index of its row in the array.
        rows = [start + pc.list_parent_indices(array).to_numpy() for start, array in zip(starts, arrays, strict=False)]
        codes, values = _encode([array.flatten() for array in arrays])
        return np.concatenate(rows), codes, values

    def preview(self, offset: int, limit: int) -> list[dict[str, Any]]:
        """Return up to `limit` rows from `offset` on as JSON, with None for numbers that are not finite.

        There are fewer rows if they are large, but at least one if there is one.
        """
        rows: list[dict[str, Any]] = []
        remaining_bytes = _PREVIEW_BYTES
        for _, rows_of_batch in self._batches(tuple(self._types), offset, min(self.rows, offset + limit)):
            taken = np.cumsum(row_bytes(rows_of_batch))
            fit = int(np.searchsorted(taken, remaining_bytes, side="right"))
            fit = max(fit, 0 if rows else 1)
            rows += replace_nan(rows_of_batch.slice(0, fit).to_pylist())
            if fit < rows_of_batch.num_rows:
                break
            remaining_bytes -= int(taken[-1])
        return rows

    def _blocks(self, selection: ColumnSelector, field: str, begin: int, end: int) -> Iterator[tuple[int, Float32]]:
        """Yield the rows from `begin` to `end` in blocks of numbers, each with the index of its first row.

        From the first bad row on, nothing is yielded, and the rest is read for more bad rows. Raises `BadRows` after
        the last batch, or as soon as there are enough.
        """
        names, width = self._names(selection, field), self.width(selection, field=field)
        bad: list[BadRow] = []
        for start, batch in self._batches(names, begin, end):
            cells = []
            for name in names:
                array = batch.column(name)
                reasons = find_bad_rows(array, width, not_finite_rows(array))
                cells += [BadRow(start + row, name, reason) for row, reason in reasons]
            bad += sorted(cells, key=attrgetter("row"))
            if len(bad) >= MAX_BAD_ROWS:
                break
            if not bad:
                yield start, _to_matrix([batch.column(name) for name in names], width)
        _raise_bad_rows(bad, field)

    def _converted(self, column: str, field: str, convert: Callable[[Any], tuple[Any, _Reasons]]) -> list[Any]:
        """Return one column as a list of converted arrays, one for each batch.

        `convert` returns the converted array and its bad rows, apart from nulls. Raises `BadRows` for these and for
        nulls after the last batch, or as soon as there are enough, and `OutOfRange` for too much text.
        """
        self._type(column, field)
        arrays: list[Any] = []
        bad: list[BadRow] = []
        text_bytes = 0
        for start, batch in self._batches((column,), 0, self.rows):
            array = batch.column(0)
            values = array.flatten() if is_list(array.type) else array
            text_bytes += values.nbytes if pa.types.is_string(values.type) else 0
            if text_bytes > _MAX_TEXT_BYTES:
                detail = f"{field}: the texts of the column {shorten(column)!r} take more than {_MAX_TEXT_BYTES} bytes"
                expected = f"names: at most {_MAX_TEXT_BYTES} bytes in all rows"
                raise OutOfRange(detail, field=field, given=column, expected=expected)
            converted, reasons = convert(array)
            arrays.append(converted)
            nulls = [(int(row), "null") for row in rows_where(array.is_null())]
            bad += [BadRow(start + row, column, reason) for row, reason in sorted(nulls + reasons)[:MAX_BAD_ROWS]]
            if len(bad) >= MAX_BAD_ROWS:
                break
        _raise_bad_rows(bad, field)
        return arrays

    def _names(self, selection: ColumnSelector, field: str) -> tuple[str, ...]:
        """Return the selected columns; raise `InvalidInput` for a missing one, and `WrongType` for one without numbers.

        Only a selection of one `column` may be a column of lists.
        """
        if selection.prefix is not None:
            names = tuple(name for name in self._types if name.startswith(selection.prefix))
            if not names:
                raise self._missing(f"begins with {shorten(selection.prefix)!r}", selection.prefix, field)
        else:
            names = selection.columns or (str(selection.column),)
        for name in names:
            column_type = self._type(name, field)
            listed = is_list(column_type) and selection.column is not None
            inner = column_type.value_type if listed else column_type
            if is_list(inner) or pa.types.is_string(inner):
                expected = "numbers" if selection.column else "one number a row in each column"
                raise _wrong_type(name, column_type, field, expected)
        return names

    def _type(self, column: str, field: str) -> Any:
        if column not in self._types:
            raise self._missing(f"is called {shorten(column)!r}", column, field)
        return self._types[column]

    def _missing(self, what: str, name: str, field: str) -> InvalidInput:
        existing = ", ".join(shorten(name) for name in islice(self._types, _MAX_NAMES_LISTED))
        more = ", …" if len(self._types) > _MAX_NAMES_LISTED else ""
        detail = f"{field}: no column of the data set {what}; there are: {existing}{more}"
        return InvalidInput(detail, field=field, given=name, expected="a column of the data set")

    def _batches(self, names: tuple[str, ...], begin: int, end: int) -> Iterator[tuple[int, Any]]:
        """Yield the rows from `begin` to `end` of some columns in batches, each with the index of its first row."""
        if begin >= end:
            return
        reader = self._reader(tuple(sorted(self._position[name] for name in names)))
        first, last = np.searchsorted(self._starts, [begin, end - 1], side="right") - 1
        for number in range(first, last + 1):
            start = max(begin, int(self._starts[number]))
            yield start, reader.get_batch(number).slice(start - int(self._starts[number]), end - start)


def _open_columns(file: Any, positions: tuple[int, ...] | None) -> Any:
    """Return a reader of the columns at these positions; of all columns if it is None."""
    return ipc.open_file(file, options=ipc.IpcReadOptions(included_fields=positions and list(positions)))


def _to_matrix(arrays: Sequence[Any], width: int) -> Float32:
    """Return columns without bad rows as one array, (N, C) float32."""
    if is_list(arrays[0].type):
        return to_float32(arrays[0].flatten()).reshape(-1, width)
    out_NC = np.empty((len(arrays[0]), len(arrays)), np.float32)
    for position, array in enumerate(arrays):
        out_NC[:, position] = to_float32(array)
    return out_NC


def _unchanged(array: Any) -> tuple[Any, _Reasons]:
    """Return the array, and no bad rows."""
    return array, []


def _to_int64(array: Any) -> tuple[Any, _Reasons]:
    """Return whole floats as int64, with 0 for the others, and the rows of those with the reason."""
    values = array.fill_null(0).to_numpy()
    is_whole = (np.floor(values) == values) & (np.abs(values) <= _MAX_EXACT_FLOAT)
    bad = [(int(row), f"not a whole number: {values[row]}") for row in np.flatnonzero(~is_whole)[:MAX_BAD_ROWS]]
    return pa.array(np.where(is_whole, values, 0).astype(np.int64)), bad


def _to_float64(array: Any) -> tuple[NDArray[np.float64], _Reasons]:
    """Return floats as float64, and the rows with NaN."""
    bad = [(int(row), "not a number") for row in rows_where(pc.is_nan(array))]
    return array.to_numpy(zero_copy_only=False).astype(np.float64), bad


def _encode(arrays: Sequence[Any]) -> tuple[NDArray[np.int64], list[str | int]]:
    """Return the codes of all entries, and the sorted distinct values that they index."""
    encoded = pa.chunked_array(arrays).dictionary_encode().combine_chunks()
    order = pc.array_sort_indices(encoded.dictionary).to_numpy()
    codes: NDArray[np.int64] = np.argsort(order)[encoded.indices.to_numpy()]
    return codes, encoded.dictionary.take(order).to_pylist()


def _wrong_type(column: str, column_type: Any, field: str, expected: str) -> WrongType:
    given = type_name(column_type)
    detail = f"{field}: the column {shorten(column)!r} is of the type {given}"
    return WrongType(detail, field=field, given=given, expected=expected)


def _raise_bad_rows(bad: Sequence[BadRow], field: str) -> None:
    """Raise `BadRows` if there are any; it has the first `MAX_BAD_ROWS` of them."""
    if bad:
        row, column, reason = bad[0]
        detail = f"{field}: row {row}, column {shorten(column)!r}: {reason}"
        raise BadRows(detail, rows=bad[:MAX_BAD_ROWS], field=field)
