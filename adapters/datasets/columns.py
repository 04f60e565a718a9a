"""Columns: their types in an upload and as stored, the plan of a file's columns, and the selectors of a training.

Stored types are int64, float32, float64, bool and string, and lists of numbers or strings. float16 widens to float32,
other integers to int64, and decimals to float64. Dictionaries are decoded. Dates and times become text (ISO 8601).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adapters.errors import InvalidCombination, InvalidDataset, MissingField, OutOfRange, UnknownField, WrongType

MAX_COLUMNS = 16_384
# Most characters of a column's name.
MAX_NAME_CHARACTERS = 200
# Most bytes of a CSV header.
MAX_HEADER_BYTES = MAX_COLUMNS * (MAX_NAME_CHARACTERS + 4)
# Bytes of text that are read at once.
TEXT_BLOCK_BYTES = 2**23
# Most bytes of one row, as text and as stored. At most a few such rows are in memory.
MAX_ROW_BYTES = 2**24

_EXPECTED = '{"column": name}, {"columns": [names]} or {"prefix": text}'

# Callback for each cell that was left out: its row, counted from the start of the file, its column, and the reason.
ReportUnreadable: TypeAlias = Callable[[int, str, str], None]


@dataclass(frozen=True, slots=True)
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
            detail = f"the name of column {position} is not one: {name[:MAX_NAME_CHARACTERS]!r}"
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
            return PlannedColumn(name, pa.list_(element_type, *self._counts))
        # Integers in lists of several lengths are labels, so no length is wrong.
        usual = self.usual() if pa.types.is_floating(element_type) else None
        return PlannedColumn(name, pa.list_(element_type), usual_width=usual)

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


def stored_type(name: str, arrow_type: Any) -> Any:
    """Return the type in which a column is stored; raise `InvalidDataset` if its type is not supported.

    Lists of a fixed size keep it, except for lists of text.
    """
    kinds, plain = pa.types, storage_type(arrow_type)
    if is_list(plain):
        element = storage_type(plain.value_type)
        if is_list(element) or kinds.is_boolean(element):
            raise _unsupported_type(name, arrow_type)
        stored = stored_type(name, element)
        keeps_size = kinds.is_fixed_size_list(plain) and plain.list_size > 0 and not kinds.is_string(stored)
        return pa.list_(stored, plain.list_size if keeps_size else -1)
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


def _unsupported_type(name: str, arrow_type: object) -> InvalidDataset:
    detail = f"the column {name!r} is of the type {arrow_type}, which is not taken"
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
    # Neither copy has anything before or after its values, and the second has zeros or no text behind nulls.
    if not array.null_count and not pa.types.is_string(target):
        return pa.array(array.to_numpy(zero_copy_only=False), type=target)
    return array.take(pa.array(np.arange(len(array))))


def without_null_elements(array: Any) -> tuple[Any, NDArray[np.int64]]:
    """Return an array with null for each list that has a null element, and the rows of those lists, (K,) int64."""
    if not is_list(storage_type(array.type)):
        return array, np.empty(0, np.int64)
    lists = storage_array(array)
    elements = lists.flatten()
    if not elements.null_count:
        return lists, np.empty(0, np.int64)
    rows = np.unique(pc.list_parent_indices(lists).filter(elements.is_null()).to_numpy())
    mask = np.zeros(len(lists), bool)
    mask[rows] = True
    return pc.if_else(pa.array(mask), pa.scalar(None, lists.type), lists), rows


def _to_stored_list(array: Any, target: Any) -> Any:
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    mask = pa.array(~valid) if array.null_count else None
    values = to_stored_array(array.flatten(), target.value_type)  # of the lists that are not null
    if pa.types.is_fixed_size_list(target):
        rows = np.zeros((len(array), target.list_size), target.value_type.to_pandas_dtype())
        rows[valid] = values.to_numpy().reshape(-1, target.list_size)
        return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), target.list_size, mask=mask)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSelector:
    """One column of lists or numbers, several columns of numbers, or all columns with a prefix.

    Exactly one of the three fields is not None.
    """

    column: str | None = None
    columns: tuple[str, ...] | None = None
    prefix: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON that `parse_selector` parses."""
        if self.columns is not None:
            return {"columns": list(self.columns)}
        return {"column": self.column} if self.column is not None else {"prefix": self.prefix}


def parse_selector(value: object, *, field: str) -> ColumnSelector:
    """Parse `{"column": name}`, `{"columns": [names]}` or `{"prefix": text}`.

    Raises `WrongType`, `UnknownField`, `MissingField`, `InvalidCombination` (two keys) or `OutOfRange` (an empty list,
    or a duplicate name), with the field.
    """
    if not isinstance(value, Mapping):
        raise WrongType(f"{field} must be an object", field=field, given=value, expected=_EXPECTED)
    if unknown := [key for key in value if key not in ColumnSelector.__dataclass_fields__]:
        field = f"{field}.{unknown[0]}"
        raise UnknownField(f"{field} is not a field here", field=field, given=unknown[0], expected=_EXPECTED)
    if not value:
        raise MissingField(f"{field} must name a column", field=field, expected=_EXPECTED)
    if len(value) > 1:
        detail = f"{field} says {' and '.join(value)}; one of them is enough"
        raise InvalidCombination(detail, field=field, expected=_EXPECTED)
    ((key, argument),) = value.items()
    field, names = f"{field}.{key}", argument if key == "columns" else [argument]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        what = "a list of names" if key == "columns" else "a string"
        raise WrongType(f"{field} must be {what}", field=field, given=argument, expected=_EXPECTED)
    if not argument and key != "column":
        raise OutOfRange(
            f"{field} must not be empty", field=field, given=argument, expected="one or more names or characters"
        )
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        detail = f"{field} names {repeated[0]!r} twice"
        raise OutOfRange(detail, field=field, given=repeated[0], expected="each name once")
    selected: dict[str, Any] = {key: tuple(names) if key == "columns" else argument}
    return ColumnSelector(**selected)
