"""Parser for a large JSON text that keeps memory near the size of the text.

A table, which is a list whose first entry is a list, is converted to float32 in batches of rows. Its rows, and all
other values, are parsed by the standard library's scanner, as in `strict_json`.
"""

# N rows · C columns
import json
import re
from collections.abc import Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed leaves it out; the stdlib's own parser
from typing import Any

import numpy as np

from adapters.arrays import NumberTable, TruncatedList, find_bad_number, matrix
from adapters.errors import InvalidInput, OutOfRange, WrongShape
from adapters.strict_json import DECODER, json_errors, repeated_key

# Most keys of one object. A valid object has a few dozen, apart from free parameters.
MAX_KEYS = 10_000
# Most entries of a list whose first entry is an object. A valid list has one or two tensors.
_MAX_OBJECTS = 1000
# Levels of nesting at which tables are converted. The scanner reads a deeper value as a whole.
_MAX_TABLE_DEPTH = 5
# Characters of rows that are collected before they are converted to float32. Python's form of them takes a few MiB.
_BATCH_CHARACTERS = 2**19
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


def read_large(
    text: str, *, columns: Mapping[str, int] | None = None, longest: int = 0, what: str = "the body"
) -> object:
    """Return the value that `strict_json.parse` returns, but with each table as a `TruncatedList`.

    `columns` maps the path of a table, such as `data.inputs`, to the length of its rows. A table in `columns` is
    checked while it is read, and its first fault raises the error of `matrix`. Faults in other tables are recorded in
    the `TruncatedList`. `longest` is the length of the longest list that is valid, apart from tables in `columns` and
    their targets. `what` names the text in errors.

    Raises the errors of `matrix` and `parse`; `OutOfRange` for an object with more than `MAX_KEYS` keys, a list with
    more than `_MAX_OBJECTS` objects, or a table with too many rows; and `WrongShape` for targets with more rows than
    their inputs have.
    """
    with json_errors(what):
        return _Parser(text, columns or {}, longest).read()


def _scan(text: str, at: int) -> tuple[Any, int]:
    """Parse the value at a position; return it and the position after it."""
    try:
        try:
            value, at = _QUICK_SCAN(text, at)
        except json.JSONDecodeError:
            raise
        except ValueError:
            value, at = _EXACT_SCAN(text, at)
    except StopIteration as error:
        raise json.JSONDecodeError("Expecting value", text, error.value) from None
    return value, at


class _Parser:
    """Recursive-descent parser. Its methods take a position and return a value and the position after it.

    Its errors are those of the standard library's decoder.
    """

    def __init__(self, text: str, columns: Mapping[str, int], longest: int) -> None:
        self._text = text
        self._columns = columns
        self._longest = longest
        # Rows of the tables that have been read.
        self._row_counts: dict[str, int] = {}

    def read(self) -> object:
        """Return the value of the whole text."""
        value, at = self._value(self._skip(0), 0, "")
        at = self._skip(at)
        if at != len(self._text):
            raise json.JSONDecodeError("Extra data", self._text, at)
        return value

    def _skip(self, at: int) -> int:
        """Return the position after any white space."""
        match = _SPACE.match(self._text, at)
        assert match is not None
        return match.end()

    def _value(self, at: int, depth: int, field: str) -> tuple[Any, int]:
        text, char = self._text, self._text[at : at + 1]
        if depth == _MAX_TABLE_DEPTH or char not in ("{", "["):
            return _scan(text, at)
        inner = self._skip(at + 1)
        first = text[inner : inner + 1]
        if char == "{":
            return ({}, inner + 1) if first == "}" else self._object(inner, depth, field)
        if first == "[":
            rows, end = self._table(inner, field)
            has_numbers = rows.table is not None and rows.table.numbers_NC is not None
            if has_numbers or field.rpartition(".")[2] != _LABELS_FIELD:
                return rows, end
        return self._objects(inner, depth, field) if first == "{" else _scan(text, at)

    def _object(self, at: int, depth: int, field: str) -> tuple[dict[str, Any], int]:
        text, is_end = self._text, False
        members: dict[str, Any] = {}
        while not is_end:
            if text[at : at + 1] != '"':
                raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
            key, at = scanstring(text, at + 1, True)
            at = self._skip(at)
            if text[at : at + 1] != ":":
                raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
            # Check each key as it is read, because an object may have millions of them.
            if key in members:
                raise repeated_key(key)
            if len(members) == MAX_KEYS:
                detail = f"an object has more than {MAX_KEYS} keys"
                raise OutOfRange(detail, field=key, expected=f"at most {MAX_KEYS} keys")
            members[key], at = self._value(self._skip(at + 1), depth + 1, f"{field}.{key}" if field else key)
            is_end, at = self._read_separator(at, "}")
        return members, at

    def _objects(self, at: int, depth: int, field: str) -> tuple[list[Any], int]:
        values: list[Any] = []
        is_end = False
        while not is_end:
            if len(values) == _MAX_OBJECTS:
                detail = f"a list has more than {_MAX_OBJECTS} objects"
                raise OutOfRange(detail, field=field or None, expected=f"at most {_MAX_OBJECTS} objects")
            value, at = self._value(at, depth + 1, field)
            values.append(value)
            is_end, at = self._read_separator(at, "]")
        return values, at

    def _read_separator(self, at: int, bracket: str) -> tuple[bool, int]:
        """Read the bracket or the comma after an entry; return whether it is the bracket, and the next position."""
        at = self._skip(at)
        char = self._text[at : at + 1]
        if char == bracket:
            return True, at + 1
        if char != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", self._text, at)
        return False, self._skip(at + 1)

    def _table(self, at: int, field: str) -> tuple[TruncatedList, int]:
        text, is_end = self._text, False
        builder = _TableBuilder(field, self._columns.get(field), self._limit(field))
        while not is_end:
            begin = at
            row, at = _scan(text, at)
            builder.add(row, at - begin)
            if text[at : at + 2] == ",[":
                at += 1
            else:
                is_end, at = self._read_separator(at, "]")
        table = builder.finish()
        self._row_counts[field] = len(table)
        return table, at

    def _limit(self, field: str) -> tuple[int, InvalidInput]:
        """Return the most rows of a table, and the error for a table with more."""
        parent, _, name = field.rpartition(".")
        inputs = f"{parent}.{_INPUTS_FIELD}"
        if name == _LABELS_FIELD and inputs in self._columns:
            # The shortest row is `[1,1]` and a comma.
            most = self._row_counts.get(inputs, len(self._text) // (2 * self._columns[inputs] + 2) + 1)
            detail = f"{field} has more than {most} rows, more than {inputs} has, or can have in a body of this length"
            return most, WrongShape(detail, field=field, expected=f"one row for each row of {inputs}")
        # The length of its rows bounds a table in `columns`.
        most = len(self._text) if field in self._columns else max(self._longest, _MAX_ROWS)
        detail, expected = f"{field or 'the body'} has more than {most} rows", f"at most {most} rows"
        return most, OutOfRange(detail, field=field or None, expected=expected)


class _TableBuilder:
    """Builder of one table: it collects rows and converts them to float32 in batches.

    `NumberTable.odd` is the first row that is empty, is not a list or differs in length from the first row.
    `NumberTable.bad` is the first number that `matrix` does not accept. After a fault, the numbers are dropped. After
    an odd row, the remaining rows are only counted. `limit` is the most rows of the table, and the error for more of
    them, which is raised before the table is complete.
    """

    def __init__(self, field: str, columns: int | None, limit: tuple[int, InvalidInput]) -> None:
        self._field = field
        self._columns = columns
        self._limit = limit
        self._batch: list[Any] = []
        self._batch_characters = 0
        # Float32 numbers of the rows so far. It grows in place: parts that are joined are in memory twice.
        self._numbers = bytearray()
        self._count = 0
        self._first: Any = None
        self._table = NumberTable()

    def add(self, row: Any, characters: int) -> None:
        """Add the next row, which has this many characters in the text."""
        self._batch.append(row)
        self._batch_characters += characters
        if self._batch_characters >= _BATCH_CHARACTERS:
            self._flush()

    def finish(self) -> TruncatedList:
        """Return the table after the last row was added."""
        self._flush()
        if self._numbers:
            self._table.numbers_NC = np.frombuffer(self._numbers, np.float32).reshape(self._count, -1)
        return TruncatedList([self._first], self._count, self._table)

    def _flush(self) -> None:
        """Convert the batch and empty it."""
        table, batch, begin = self._table, self._batch, self._count
        self._batch, self._batch_characters = [], 0
        self._count += len(batch)
        most, error = self._limit
        if self._count > most:
            raise error
        if not begin:
            self._first = batch[0]
        if table.odd is not None or not batch:
            return
        if self._columns is not None:
            self._numbers += matrix(batch, field=self._field, columns=self._columns, begin=begin).data
            return
        width = len(self._first)
        for index, row in enumerate(batch):
            if type(row) is not list or len(row) != width or not row:
                table.odd, self._numbers = (begin + index, row), bytearray()
                return
        if table.bad is not None:
            return
        try:
            self._numbers += matrix(batch, field="", columns=width).data
        except InvalidInput:
            row, column, number = find_bad_number(batch)
            table.bad, self._numbers = (begin + row, column, number), bytearray()
