"""Column types: from the types in an upload to the stored types, and the plan of a file's columns.

Stored types are int64, float32, float64, bool and string, and lists of numbers or strings. float16 widens to float32,
other integers to int64, and decimals to float64. Dictionaries are decoded. Dates and times become text (ISO 8601).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adapters.errors import InvalidDataset, shorten

MAX_COLUMNS = 16_384
# Most characters of a column's name.
MAX_NAME_CHARACTERS = 200
# Most bytes of a CSV header.
MAX_HEADER_BYTES = MAX_COLUMNS * (MAX_NAME_CHARACTERS + 4)
# Bytes of text that are read at once.
TEXT_BLOCK_BYTES = 2**23
# Most bytes of one row, as text and as stored. At most a few such rows are in memory.
MAX_ROW_BYTES = 2**24

# Callback for each cell that was left out: its row, counted from the start of the file, its column, and the reason.
ReportUnreadable: TypeAlias = Callable[[int, str, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedColumn:
    """Column with the type in which it will be stored."""

    name: str
    type: Any
    """A pyarrow type."""
    usual_width: int | None = None
    """The most common width of lists of floats of several lengths. Rows of another width are bad rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Uploaded file whose columns are planned and whose rows can be read."""

    columns: Sequence[PlannedColumn]
    chunks: Callable[[ReportUnreadable], Iterable[Sequence[Any]]]
    """Chunks of rows: one array per column, which `to_stored_array` converts to the planned types."""
    rows: int | None = None
    """Number of rows, if it is known."""


def check_names(names: Sequence[str]) -> None:
    """Raise `InvalidDataset` for no columns, too many columns, a duplicate name or an invalid name."""
    if not 0 < len(names) <= MAX_COLUMNS:
        raise InvalidDataset(
            f"the data set has {len(names) or 'no'} columns; send wide rows as a column of lists",
            given=f"{len(names)} columns",
            expected=f"1 to {MAX_COLUMNS} columns",
        )
    earlier: set[str] = set()
    for position, name in enumerate(names):
        if not name.strip() or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
            detail = f"the name of column {position} is not one: {shorten(name)!r}"
            raise InvalidDataset(detail, given=name, expected=f"1 to {MAX_NAME_CHARACTERS} printable characters")
        if name in earlier:
            raise InvalidDataset(f"two columns are called {name!r}", given=name, expected="a name of its own")
        earlier.add(name)


class WidthCounter:
    """Counter of the lengths of the lists in one column."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, lists: Any) -> None:
        """Count the lists of an array, without nulls."""
        lengths, counts = np.unique(pc.list_value_length(lists).drop_null().to_numpy(), return_counts=True)
        self._counts.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))

    def count(self, length: int) -> None:
        """Count one list."""
        self._counts[length] += 1

    def plan(self, name: str, element_type: Any) -> PlannedColumn:
        """Return the planned column: lists of a fixed size if all have the same length, else of any size."""
        if len(self._counts) == 1 and 0 not in self._counts and not pa.types.is_string(element_type):
            return PlannedColumn(name=name, type=pa.list_(element_type, *self._counts))
        # Integers in lists of several lengths are labels, so no length is wrong.
        usual = self.usual() if pa.types.is_floating(element_type) else None
        return PlannedColumn(name=name, type=pa.list_(element_type), usual_width=usual)

    def usual(self) -> int | None:
        """Return the most common width (of several, the smallest), or None without any list."""
        return min(self._counts, key=lambda width: (-self._counts[width], width), default=None)


def rows_per_chunk(row_bytes: int) -> int:
    """Return how many rows of this size are few enough to be copied a few times."""
    return max(1, min(8192, TEXT_BLOCK_BYTES // max(1, row_bytes)))


def split_batch(batch: Any) -> Iterator[Any]:
    """Yield a record batch in slices that are small enough to be copied a few times."""
    rows = rows_per_chunk(batch.nbytes // max(1, batch.num_rows))
    for begin in range(0, batch.num_rows, rows):
        yield batch.slice(begin, rows)


def storage_type(arrow_type: Any) -> Any:
    """Return the type of the values in a dictionary or extension type; other types as they are."""
    if isinstance(arrow_type, pa.BaseExtensionType):
        return storage_type(arrow_type.storage_type)
    return storage_type(arrow_type.value_type) if pa.types.is_dictionary(arrow_type) else arrow_type


def storage_array(array: Any) -> Any:
    """Return the values in a dictionary or extension array; other arrays as they are."""
    if isinstance(array, pa.ExtensionArray):
        return storage_array(array.storage)
    return storage_array(array.dictionary_decode()) if isinstance(array, pa.DictionaryArray) else array


def is_list(arrow_type: Any) -> bool:
    """Return whether a type is one of Arrow's list types."""
    kinds = pa.types
    return bool(kinds.is_list(arrow_type) or kinds.is_large_list(arrow_type) or kinds.is_fixed_size_list(arrow_type))


def scalar_type(name: str, arrow_type: Any) -> Any:
    """Return the stored type of a type that is not a list; raise `InvalidDataset` if it is not supported."""
    kinds, plain = pa.types, storage_type(arrow_type)
    if kinds.is_boolean(plain):
        return pa.bool_()
    if kinds.is_integer(plain):
        return pa.int64()
    if kinds.is_float16(plain) or kinds.is_float32(plain):
        return pa.float32()
    if kinds.is_float64(plain) or kinds.is_decimal(plain) or kinds.is_null(plain):
        return pa.float64()
    text = kinds.is_string(plain) or kinds.is_large_string(plain) or kinds.is_string_view(plain)
    if text or kinds.is_date(plain) or kinds.is_timestamp(plain):
        return pa.string()
    raise _unsupported_type(name, arrow_type)


def element_type(name: str, arrow_type: Any) -> Any:
    """Return the stored type of the elements of a list type; raise `InvalidDataset` if it is not supported."""
    plain = storage_type(storage_type(arrow_type).value_type)
    if is_list(plain) or pa.types.is_boolean(plain):
        raise _unsupported_type(name, arrow_type)
    return scalar_type(name, plain)


def _unsupported_type(name: str, arrow_type: object) -> InvalidDataset:
    detail = f"the column {shorten(name)!r} is of the type {shorten(str(arrow_type))}, which is not taken"
    expected = "numbers, booleans, text, dates, and lists of numbers or of text"
    return InvalidDataset(detail, field=name, given=str(arrow_type), expected=expected)


def to_stored_array(array: Any, target: Any) -> Any:
    """Return a copy of an array with the stored type `target`.

    The values behind nulls become zero, so that equal columns have equal bytes, whatever the upload's format. Raises
    `pyarrow.ArrowInvalid` for a value that the type cannot hold.
    """
    array = storage_array(array)
    if is_list(target):
        return _to_stored_list(array, target)
    array = _to_text(array) if pa.types.is_string(target) else array.cast(target)
    # The copy has nothing before or after its values, and zeros or no text behind nulls.
    return array.take(pa.array(np.arange(len(array))))


def rows_with_null_elements(array: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the rows of an array of lists whose list contains a null, (K,) int64."""
    elements = array.flatten()
    if elements.null_count == 0:
        return np.empty(0, np.int64)
    rows = pc.list_parent_indices(array).filter(elements.is_null())
    return np.unique(rows.to_numpy()).astype(np.int64)


def set_rows_null(array: Any, rows: "np.ndarray[Any, np.dtype[np.int64]]") -> Any:
    """Return the array with these rows set to null."""
    if len(rows) == 0:
        return array
    mask = np.zeros(len(array), bool)
    mask[rows] = True
    return pc.if_else(pa.array(mask), pa.scalar(None, array.type), array)


def _to_stored_list(array: Any, target: Any) -> Any:
    nulls = _null_mask(array)
    mask = None if nulls is None else pa.array(nulls)
    values = to_stored_array(array.flatten(), target.value_type)  # of the lists that are not null
    if pa.types.is_fixed_size_list(target):
        width = target.list_size
        if nulls is None:
            return pa.FixedSizeListArray.from_arrays(values, width)
        whole = np.zeros((len(array), width), target.value_type.to_pandas_dtype())
        whole[~nulls] = values.to_numpy().reshape(-1, width)
        return pa.FixedSizeListArray.from_arrays(pa.array(whole.reshape(-1)), width, mask=mask)
    lengths = pc.list_value_length(array).fill_null(0).to_numpy()
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=mask)


def _to_text(array: Any) -> Any:
    kinds, arrow_type = pa.types, array.type
    if not (kinds.is_timestamp(arrow_type) or kinds.is_date(arrow_type)):
        return array.cast(pa.string())
    if kinds.is_timestamp(arrow_type) and arrow_type.tz is not None:
        array = array.cast(pa.timestamp(arrow_type.unit, "UTC"))
    return pc.replace_substring(array.cast(pa.string()), " ", "T")


def _null_mask(array: Any) -> "np.ndarray[Any, np.dtype[np.bool_]] | None":
    return array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
