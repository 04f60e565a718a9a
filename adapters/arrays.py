"""Conversion of lists of JSON numbers to float32 arrays. Errors give the field and row of the first faulty number.

Nothing is coerced: a string, a boolean or null in place of a number is an error, although numpy would accept it.
"""

# N rows · C columns
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
        raise OutOfRange(
            f"a list has {self.length} entries, more than any list may have here",
            given=f"{self.length} entries",
            expected="a shorter list",
        )


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
    if not isinstance(value, list):
        raise WrongType(f"{field} must be a list of rows", field=field, given=value, expected=expected)
    if not value:
        raise WrongShape(f"{field} has no rows", field=field, given="0 rows", expected=expected)
    if max_rows is not None and len(value) > max_rows:
        raise OutOfRange(
            f"{field} has {len(value)} rows; at most {max_rows} fit in one request",
            field=field,
            given=f"{len(value)} rows",
            expected=f"at most {max_rows} rows",
        )
    if rows is not None and len(value) != rows:
        raise WrongShape(
            f"{field} has {len(value)} rows, expected {rows}",
            field=field,
            given=f"{len(value)} rows",
            expected=expected,
        )
    if isinstance(value, TruncatedList):
        return _checked_table(value, field, columns, expected)
    _check_rows(value, field, columns, expected, begin=begin)
    if not set(map(type, chain.from_iterable(value))) <= _NUMBERS:
        raise _first_bad_number(value, field, begin)
    return _as_float32(value, field, begin)


def vector(value: object, *, field: str, length: int) -> Float32:
    """Return a list of `length` numbers as an array, (length,) float32; raise the errors of `matrix`."""
    if not isinstance(value, list):
        raise WrongType(f"{field} must be a list of numbers", field=field, given=value, expected=f"{length} numbers")
    if len(value) != length:
        raise WrongShape(
            f"{field} has {len(value)} numbers, expected {length}",
            field=field,
            given=f"{len(value)} numbers",
            expected=f"{length} numbers",
        )
    for position, number in enumerate(value):
        if type(number) not in _NUMBERS or not is_finite(number):
            raise _bad_number(number, field, f"{field}, position {position}", None)
    return np.array(value, dtype=np.float64).astype(np.float32)


def one_per_row(value: object, *, field: str, rows: int, expected: str) -> list[Any]:
    """Return a list that has one entry per row; raise `WrongType` or `WrongShape` for any other value."""
    if not isinstance(value, list):
        raise WrongType(f"{field} must be a list", field=field, given=value, expected=expected)
    if len(value) != rows:
        raise WrongShape(
            f"{field} has {len(value)} rows, inputs has {rows}",
            field=field,
            given=f"{len(value)} rows",
            expected=expected,
        )
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
        if not isinstance(numbers, list):
            raise WrongType(
                f"{field}, row {row}, is not a list of numbers", field=field, row=row, given=numbers, expected=expected
            )
        if width is None:
            width = len(numbers)
        if len(numbers) != width or not numbers:
            raise WrongShape(
                f"{field}, row {row}, has {len(numbers)} numbers, expected {width or 'at least 1'}",
                field=field,
                row=row,
                given=f"{len(numbers)} numbers",
                expected=expected,
            )


def _as_float32(value: list[list[float]], field: str, begin: int) -> Float32:
    try:
        wide = np.array(value, dtype=np.float64)
    except OverflowError:
        raise _first_bad_number(value, field, begin) from None
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise _first_bad_number(value, field, begin)
    return narrow


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


def _first_bad_number(value: list[list[Any]], field: str, begin: int) -> LoraplexError:
    row, column, number = find_bad_number(value)
    return _bad_number_at(begin + row, column, number, field)


def _bad_number_at(row: int, column: int, number: object, field: str) -> LoraplexError:
    return _bad_number(number, field, f"{field}, row {row}, column {column}", row)


def _bad_number(number: object, field: str, position: str, row: int | None) -> LoraplexError:
    expected = f"a number of at most {_MAX_FLOAT32:.6e} in magnitude"
    if type(number) in _NUMBERS:
        return NotFinite(
            f"{position}: not a finite float32 number", field=field, row=row, given=number, expected=expected
        )
    return WrongType(f"{position}: not a number", field=field, row=row, given=number, expected=expected)
