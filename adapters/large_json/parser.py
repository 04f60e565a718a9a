"""Reader for a large JSON text that keeps memory near the size of the text.

A table, which is a list whose first entry is a list, is converted to float32 in batches of rows. Its rows, and all
other values, are parsed by the standard library's scanner, as in `strict_json`.
"""

# N rows · C columns
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed leaves it out; the stdlib's own parser
from typing import Any

import numpy as np

from adapters.arrays import NumberTable, TruncatedList, find_bad_number, matrix
from adapters.errors import InvalidInput, LoraplexError, NotJson, OutOfRange, WrongShape
from adapters.strict_json import DECODER, nested_too_deeply, parse_text, repeated_key

# Most keys of one object. A valid object has a few dozen, apart from free parameters.
MAX_KEYS = 10_000
# Most entries of a list whose first entry is an object. A valid list has one or two tensors.
_MAX_OBJECTS = 1000
# Levels of nesting at which tables are converted. The scanner reads a deeper value as a whole.
_MAX_TABLE_DEPTH = 5
# Numbers and rows that are collected before they are converted to float32.
_BATCH_NUMBERS = 2**16
# Characters of rows that are collected before they are converted: rows of nested lists may have few entries.
_BATCH_CHARACTERS = 2**21
# Most rows of a table whose rows have no known length, unless the caller allows longer lists.
_MAX_ROWS = 2**20
# Name of the field with one row for each row of the field `_LABELS_FIELD` of the same object.
_INPUTS_FIELD = "inputs"
# Name of a field whose rows may be lists of labels. If they are not numbers, the list is read as a whole.
_LABELS_FIELD = "targets"
_SPACE = re.compile(r"[ \t\n\r]*")
_EXACT_SCAN: Any = DECODER.scan_once  # type: ignore[attr-defined]  # typeshed leaves it out
# Scanner like `_EXACT_SCAN`, but faster: it makes no Python call for each integer.
# It raises `ValueError` for an integer with thousands of digits, which `_EXACT_SCAN` reads.
_QUICK_SCAN: Any = json.JSONDecoder(object_pairs_hook=DECODER.object_pairs_hook).scan_once  # type: ignore[attr-defined]


class _MalformedError(Exception):
    """Malformed JSON at a position in the text."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


def read_large(
    text: str, *, columns: Mapping[str, int] | None = None, longest: int = 0, what: str = "the body"
) -> object:
    """Return the value that `strict_json.parse_text` returns, but with each table as a `TruncatedList`.

    `columns` maps the path of a table, such as `data.inputs`, to the length of its rows. A table in `columns` is
    checked while it is read, and its first fault raises the error of `matrix`. Faults in other tables are recorded in
    the `TruncatedList`. `longest` is the length of the longest list that is valid, apart from tables in `columns` and
    their targets. `what` names the text in errors.

    Raises the errors of `matrix` and `parse_text`; `OutOfRange` for an object with more than `MAX_KEYS` keys, a list
    with more than `_MAX_OBJECTS` objects, or a table with too many rows; and `WrongShape` for targets with many more
    rows than their inputs have.
    """
    try:
        return _Parser(text, columns or {}, longest).read()
    except RecursionError:
        raise nested_too_deeply(what) from None
    except (_MalformedError, json.JSONDecodeError, StopIteration) as error:
        position = _position(error)
    # Parse the text again with `parse_text`, so that the error is the same as for a small body. That takes more memory.
    with suppress(MemoryError):
        parse_text(text, what=what)
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    raise NotJson(f"{what} is not JSON at line {line}, column {column}", expected="JSON")


def _position(error: _MalformedError | json.JSONDecodeError | StopIteration) -> int:
    """Return the position in the text at which it is malformed."""
    if isinstance(error, _MalformedError):
        return error.position
    return error.pos if isinstance(error, json.JSONDecodeError) else int(error.value)


def _scan(text: str, at: int) -> tuple[Any, int]:
    """Parse the value at a position; return it and the position after it."""
    try:
        value, at = _QUICK_SCAN(text, at)
    except json.JSONDecodeError:
        raise
    except ValueError:
        value, at = _EXACT_SCAN(text, at)
    return value, at


class _Parser:
    """Recursive-descent parser. Its methods take a position and return a value and the position after it."""

    def __init__(self, text: str, columns: Mapping[str, int], longest: int) -> None:
        self._text = text
        self._columns = columns
        self._longest = longest
        # Rows of the tables in `columns` that have been read.
        self._row_counts: dict[str, int] = {}

    def read(self) -> object:
        """Return the value of the whole text."""
        value, at = self._value(self._skip(0), 0, "")
        if self._skip(at) != len(self._text):
            raise _MalformedError(at)
        return value

    def _skip(self, at: int) -> int:
        """Return the position after any white space."""
        match = _SPACE.match(self._text, at)
        assert match is not None
        return match.end()

    def _value(self, at: int, depth: int, field: str) -> tuple[Any, int]:
        char = self._text[at : at + 1]
        if depth < _MAX_TABLE_DEPTH and char == "{":
            return self._object(at + 1, depth, field)
        if depth < _MAX_TABLE_DEPTH and char == "[":
            return self._list(at, depth, field)
        return _scan(self._text, at)

    def _object(self, at: int, depth: int, field: str) -> tuple[dict[str, Any], int]:
        text = self._text
        result: dict[str, Any] = {}
        at = self._skip(at)
        if text[at : at + 1] == "}":
            return result, at + 1
        while True:
            if text[at : at + 1] != '"':
                raise _MalformedError(at)
            key, at = scanstring(text, at + 1, True)
            at = self._skip(at)
            if text[at : at + 1] != ":":
                raise _MalformedError(at)
            # Check each key as it is read, because an object may have millions of them.
            if key in result:
                raise repeated_key(key)
            if len(result) == MAX_KEYS:
                raise OutOfRange(
                    f"an object has more than {MAX_KEYS} keys", field=key, expected=f"at most {MAX_KEYS} keys"
                )
            path = f"{field}.{key}" if field else key
            result[key], at = self._value(self._skip(at + 1), depth + 1, path)
            is_end, at = self._read_separator(at, "}")
            if is_end:
                return result, at

    def _read_separator(self, at: int, bracket: str) -> tuple[bool, int]:
        """Read the bracket or the comma after an entry; return whether it is the bracket, and the next position."""
        at = self._skip(at)
        char = self._text[at : at + 1]
        if char == bracket:
            return True, at + 1
        if char != ",":
            raise _MalformedError(at)
        return False, self._skip(at + 1)

    def _list(self, begin: int, depth: int, field: str) -> tuple[Any, int]:
        at = self._skip(begin + 1)
        char = self._text[at : at + 1]
        if char == "[":
            rows, end = self._table(at, field)
            has_numbers = rows.table is not None and rows.table.numbers_NC is not None
            if has_numbers or field.rpartition(".")[2] != _LABELS_FIELD:
                return rows, end
        if char == "{":
            return self._objects(at, depth, field)
        return _scan(self._text, begin)

    def _objects(self, at: int, depth: int, field: str) -> tuple[list[Any], int]:
        values: list[Any] = []
        while True:
            value, at = self._value(at, depth + 1, field)
            if len(values) == _MAX_OBJECTS:
                raise OutOfRange(
                    f"a list has more than {_MAX_OBJECTS} entries, the first of them an object",
                    field=field or None,
                    expected=f"at most {_MAX_OBJECTS} objects",
                )
            values.append(value)
            is_end, at = self._read_separator(at, "]")
            if is_end:
                return values, at

    def _table(self, at: int, field: str) -> tuple[TruncatedList, int]:
        rows, text = _TableBuilder(field, self._columns.get(field)), self._text
        if field not in self._columns:
            rows.limit = self._limit(field)
        while True:
            begin = at
            row, at = _scan(text, at)
            rows.add(row, at - begin)
            if text[at : at + 2] == ",[":
                at += 1
                continue
            is_end, at = self._read_separator(at, "]")
            if is_end:
                table = rows.finish()
                self._row_counts[field] = len(table)
                return table, at

    def _limit(self, field: str) -> tuple[int, LoraplexError]:
        """Return the most rows of a table whose rows have no known length, and the error for a table with more."""
        parent, _, name = field.rpartition(".")
        inputs = f"{parent}.{_INPUTS_FIELD}"
        if name != _LABELS_FIELD or inputs not in self._columns:
            most = max(self._longest, _MAX_ROWS)
            return most, OutOfRange(
                f"{field or 'the body'} has more than {most} rows", field=field or None, expected=f"at most {most} rows"
            )
        expected = f"one row for each row of {inputs}"
        if inputs in self._row_counts:
            most = self._row_counts[inputs]
            return most, WrongShape(
                f"{field} has more than {most} rows, {inputs} has {most}",
                field=field,
                given=f"more than {most} rows",
                expected=expected,
            )
        # The shortest row is `[1,1]` and a comma.
        most = len(self._text) // (2 * self._columns[inputs] + 2) + 1
        return most, WrongShape(
            f"{field} has more than {most} rows, more than {inputs} can have in a body of this length",
            field=field,
            given=f"more than {most} rows",
            expected=expected,
        )


class _TableBuilder:
    """Builder of one table: it collects rows and converts them to float32 in batches.

    `NumberTable.odd` is the first row that is empty, is not a list or differs in length from the first row.
    `NumberTable.bad` is the first number that `matrix` does not accept. After a fault, the numbers are dropped. After
    an odd row, the remaining rows are only counted. `limit` is the most rows of the table, and the error for more of
    them, which is raised before the table is complete.
    """

    def __init__(self, field: str, columns: int | None) -> None:
        self._field = field
        self._columns = columns
        self._batch: list[Any] = []
        self._batch_numbers = 0
        self._batch_characters = 0
        # Float32 numbers of the rows so far. It grows in place: parts that are joined are in memory twice.
        self._numbers = bytearray()
        self._count = 0
        self._first: Any = None
        self._table = NumberTable()
        self.limit: tuple[int, LoraplexError] | None = None

    def add(self, row: Any, characters: int) -> None:
        """Add the next row, which has this many characters in the text."""
        if not self._count and not self._batch:
            self._first = row
        self._batch.append(row)
        self._batch_numbers += 1 + len(row) if type(row) is list else 1
        self._batch_characters += characters
        if self._batch_numbers >= _BATCH_NUMBERS or self._batch_characters >= _BATCH_CHARACTERS:
            self._flush()
            if self.limit is not None and self._count > self.limit[0]:
                raise self.limit[1]

    def finish(self) -> TruncatedList:
        """Return the table after the last row was added."""
        self._flush()
        if self._numbers:
            self._table.numbers_NC = np.frombuffer(self._numbers, np.float32).reshape(self._count, -1)
        return TruncatedList([self._first], self._count, self._table)

    def _flush(self) -> None:
        """Convert the batch and empty it."""
        table, batch, begin = self._table, self._batch, self._count
        self._batch, self._batch_numbers, self._batch_characters = [], 0, 0
        self._count += len(batch)
        if table.odd is not None or not batch:
            return
        if self._columns is not None:
            self._numbers += matrix(batch, field=self._field, columns=self._columns, begin=begin).data
            return
        width = len(self._first)
        for index, row in enumerate(batch):
            if type(row) is not list or len(row) != width or not row:
                table.odd = (begin + index, row)
                self._numbers = bytearray()
                return
        if table.bad is not None:
            return
        try:
            self._numbers += matrix(batch, field="", columns=width).data
        except InvalidInput:
            row, column, number = find_bad_number(batch)
            table.bad, self._numbers = (begin + row, column, number), bytearray()
