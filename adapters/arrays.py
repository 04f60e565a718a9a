"""Conversion of lists of JSON numbers to float32 arrays. Errors give the field and row of the first faulty number.

Nothing is coerced: a string, a boolean or null in place of a number is an error, although numpy would accept it.
"""

# N rows · C columns
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.errors import LoraplexError, NotFinite, OutOfRange, WrongShape, WrongType

Float32 = NDArray[np.float32]
_NUMBERS = {int, float}
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
# `sum_of_squares` overflows if a number is huge, and says so by its result.
warnings.filterwarnings("ignore", "(overflow|invalid value) encountered in dot", RuntimeWarning)


def sum_of_squares(x: NDArray[Any]) -> float:
    """Return the sum of squares of a flat array: infinite or NaN if a number is, and perhaps if one is huge.

    It takes a quarter of the time of the largest absolute value, which need not be found if the sum is small.
    """
    return x.dot(x)  # type: ignore[no-any-return]


class TruncatedList(list[Any]):
    """First entries of a list that stays outside Python, with the length of the whole list.

    `adapters.large_json.parser` returns it for a list of lists, and for a list that is longer than any valid one.
    """

    def __init__(self, first: list[Any], length: int, table: "NumberTable | None" = None) -> None:
        super().__init__(first)
        self.length = length
        # The numbers or the first faults of a list of lists, as `matrix` needs them.
        self.table = table

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        # A caller that iterates would take the first entries for the whole list.
        count = f"{self.length} entries"
        detail = f"a list has {count}, more than any list may have here"
        raise OutOfRange(detail, given=count, expected="a shorter list")


@dataclass(slots=True)
class NumberTable:
    """Numbers of a list of lists, or the first faults among them."""

    numbers_NC: Float32 | None = None
    """(N, C); None if there is a fault."""
    odd: tuple[int, Any] | None = None
    """Index and value of the first row that is not a list, is empty, or differs in length from the first row."""
    bad: tuple[int, int, Any] | None = None
    """Row, column and value of the first entry that is not a finite number."""


def matrix(
    value: object,
    *,
    field: str,
    rows: int | None = None,
    columns: int | None = None,
    max_rows: int | None = None,
    begin: int = 0,
) -> Float32:
    """Return a list of equally long lists of numbers as an array, (N, C) float32.

    `begin` is the row number of the first row, for errors. Raises `WrongType`, `WrongShape`, `OutOfRange` (more than
    `max_rows`) and `NotFinite`, with the field and row.
    """
    expected = f"{rows or 'one or more'} rows of {columns or 'equally many'} numbers"
    lists = _check_list(value, rows, of="rows", field=field, expected=expected)
    if max_rows is not None and len(lists) > max_rows:
        count, expected = f"{len(lists)} rows", f"at most {max_rows} rows"
        detail = f"{field} has {count}; at most {max_rows} fit in one request"
        raise OutOfRange(detail, field=field, given=count, expected=expected)
    if isinstance(lists, TruncatedList):
        return _checked_table(lists, field, columns, expected)
    _check_rows(lists, field, columns, expected, begin=begin)
    numbers_NC = _as_float32(lists)
    if numbers_NC is None:
        row, column, number = find_bad_number(lists)
        raise _bad_number_at(begin + row, column, number, field)
    return numbers_NC


def vector(value: object, *, field: str, length: int) -> Float32:
    """Return a list of `length` numbers as an array, (length,) float32; raise the errors of `matrix`."""
    numbers = _check_list(value, length, of="numbers", field=field, expected=f"{length} numbers")
    numbers_1C = _as_float32([numbers])
    if numbers_1C is None:
        _, position, number = find_bad_number([numbers])
        raise _bad_number(number).explain(before=f"{field}, position {position}: ").at(field=field)
    row_C: Float32 = numbers_1C[0]
    return row_C


def one_per_row(value: object, *, field: str, rows: int, expected: str) -> list[Any]:
    """Return a list that has one entry per row; raise `WrongType` or `WrongShape` for any other value."""
    return _check_list(value, rows, of="rows", field=field, expected=expected)


def _check_list(
    value: object, length: int | None, *, of: str, field: str, expected: str, row: int | None = None
) -> list[Any]:
    """Return a list that is not empty, and has `length` entries if that is not None."""
    name = field if row is None else f"{field}, row {row},"
    if not isinstance(value, list):
        raise WrongType(f"{name} must be a list of {of}", field=field, row=row, given=value, expected=expected)
    if not len(value) or len(value) != (length or len(value)):
        count = f"{len(value)} {of}"
        detail = f"{name} has {count}, expected {length or 'at least 1'}"
        raise WrongShape(detail, field=field, row=row, given=count, expected=expected)
    return value


def _checked_table(value: TruncatedList, field: str, columns: int | None, expected: str) -> Float32:
    first, table = value[0], value.table
    _check_rows([first], field, columns, expected)
    assert table is not None
    if table.odd is not None:
        row, numbers = table.odd
        _check_rows([numbers], field, len(first), expected, begin=row)
    if table.bad is not None:
        raise _bad_number_at(*table.bad, field)
    assert table.numbers_NC is not None
    return table.numbers_NC


def _check_rows(value: list[Any], field: str, columns: int | None, expected: str, *, begin: int = 0) -> None:
    width = columns
    for row, numbers in enumerate(value, begin):
        # Also true of the first row if `columns` is None.
        if not isinstance(numbers, list) or len(numbers) != width:
            width = len(_check_list(numbers, width, of="numbers", field=field, row=row, expected=expected))


def _as_float32(value: list[list[Any]]) -> Float32 | None:
    """Return equally long lists as an array, (N, C) float32, or None if an entry is not a finite number."""
    if not set(map(type, chain.from_iterable(value))) <= _NUMBERS:
        return None
    try:
        wide = np.array(value, dtype=np.float64)
    except OverflowError:
        return None
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    return narrow if np.isfinite(narrow).all() else None


def is_finite(number: float) -> bool:
    """Return whether a number is finite as float32; an int may exceed float64."""
    if isinstance(number, int) and abs(number) > 2**128:
        return False
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.float32(number)))


def find_bad_number(value: list[list[Any]]) -> tuple[int, int, Any]:
    """Return row, column and value of the first entry that is not a finite number; there must be one."""
    for row, numbers in enumerate(value):
        for column, number in enumerate(numbers):
            if type(number) not in _NUMBERS or not is_finite(number):
                return row, column, number
    raise AssertionError("called although every number is finite")


def _bad_number_at(row: int, column: int, number: object, field: str) -> LoraplexError:
    return _bad_number(number).explain(before=f"{field}, row {row}, column {column}: ").at(field=field, row=row)


def _bad_number(number: object) -> LoraplexError:
    expected = f"a number of at most {_MAX_FLOAT32:.6e} in magnitude"
    if type(number) in _NUMBERS:
        return NotFinite("not a finite float32 number", given=number, expected=expected)
    return WrongType("not a number", given=number, expected=expected)
