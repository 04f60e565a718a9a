"""A large JSON text → its values, in memory that stays near the size of the text.

Strings, numbers and the rows of tables are read by the standard library's scanner, as `strict_json` reads them. What
differs is what stays in memory: a list of lists of numbers becomes float32 batch by batch.
"""

# N rows · C columns
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed leaves it out; the stdlib's own parser
from typing import Any

import numpy as np

from adapters.errors import InvalidInput, NotJson, OutOfRange
from adapters.matrices import Float32, LongList, Table, find_bad_number, matrix
from adapters.strict_json import DECODER, parse_text, repeated_key

MOST_KEYS = 10_000
"""Keys that one object may have: a valid one has a few dozen, apart from free parameters."""
_MOST_OBJECTS = 1000
"""Objects that one list may have: a valid one has a tensor or two."""
_DEEPEST = 5
"""Levels that are walked here, which is where tables may be; deeper values are read whole."""
_BATCH_NUMBERS = 2**16
_MAYBE_LABELS = "targets"
"""A field whose rows may list labels: such rows are kept as they are."""
_SPACE = re.compile(r"[ \t\n\r]*")
_EXACT_SCAN: Any = DECODER.scan_once  # type: ignore[attr-defined]  # typeshed leaves it out
_QUICK_SCAN: Any = json.JSONDecoder(object_pairs_hook=DECODER.object_pairs_hook).scan_once  # type: ignore[attr-defined]
"""As `DECODER` scans, without a call for each whole number; raises `ValueError` for one with thousands of digits."""


class _MalformedError(Exception):
    """The text is not JSON at the position that is the argument."""


def read_large(text: str, *, columns: Mapping[str, int] | None = None, what: str = "the body") -> object:
    """Return what `strict_json.parse_text` would return, with each table as a `LongList`.

    `columns`: how many numbers a row of a table has, by the table's field, such as `data.inputs`; a fault in such a
    table ends the reading with the error of `matrix`. Raises that, what `parse_text` raises, and `OutOfRange` for an
    object with more than `MOST_KEYS` keys.
    """
    try:
        return _Reader(text, columns or {}).read()
    except (_MalformedError, json.JSONDecodeError, RecursionError, StopIteration) as error:
        # The exact reading decides what is wrong.
        with suppress(MemoryError):
            parse_text(text, what=what)
        raise NotJson(f"{what} is not JSON: {error}", expected="JSON") from None


def _scan(text: str, at: int) -> tuple[Any, int]:
    try:
        value, at = _QUICK_SCAN(text, at)
    except json.JSONDecodeError:
        raise
    except ValueError:
        value, at = _EXACT_SCAN(text, at)
    return value, at


class _Reader:
    def __init__(self, text: str, columns: Mapping[str, int]) -> None:
        self._text = text
        self._columns = columns

    def read(self) -> object:
        value, at = self._value(self._skip(0), 0, "")
        if self._skip(at) != len(self._text):
            raise _MalformedError(at)
        return value

    def _skip(self, at: int) -> int:
        """Return the position of what follows white space."""
        match = _SPACE.match(self._text, at)
        assert match is not None
        return match.end()

    def _value(self, at: int, depth: int, field: str) -> tuple[Any, int]:
        char = self._text[at : at + 1]
        if depth < _DEEPEST and char == "{":
            return self._object(at + 1, depth, field)
        if depth < _DEEPEST and char == "[":
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
            # Raised here and now: nobody waits until millions of keys are read.
            if key in result:
                raise repeated_key(key)
            if len(result) == MOST_KEYS:
                raise OutOfRange(
                    f"an object has more than {MOST_KEYS} keys", field=key, expected=f"at most {MOST_KEYS} keys"
                )
            within = f"{field}.{key}" if field else key
            result[key], at = self._value(self._skip(at + 1), depth + 1, within)
            ends, at = self._ends(at, "}")
            if ends:
                return result, at

    def _ends(self, at: int, bracket: str) -> tuple[bool, int]:
        """Return whether a list or object ends here, and the position after that or after the comma."""
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
            rows = self._table(at, field)
            table = rows[0].table
            if field.rpartition(".")[2] != _MAYBE_LABELS or (table is not None and table.numbers_NC is not None):
                return rows
        if char == "{":
            return self._objects(at, depth, field)
        return _scan(self._text, begin)

    def _objects(self, at: int, depth: int, field: str) -> tuple[list[Any], int]:
        values: list[Any] = []
        while True:
            value, at = self._value(at, depth + 1, field)
            if len(values) == _MOST_OBJECTS:
                raise OutOfRange(
                    f"a list has more than {_MOST_OBJECTS} entries, the first of them an object",
                    field=field or None,
                    expected=f"at most {_MOST_OBJECTS} objects",
                )
            values.append(value)
            ends, at = self._ends(at, "]")
            if ends:
                return values, at

    def _table(self, at: int, field: str) -> tuple[LongList, int]:
        rows, text = _Rows(field, self._columns.get(field)), self._text
        while True:
            row, at = _scan(text, at)
            rows.add(row)
            if text[at : at + 2] == ",[":
                at += 1
                continue
            ends, at = self._ends(at, "]")
            if ends:
                return rows.finish(), at


class _Rows:
    """Rows of one table on their way into an array, a batch at a time."""

    def __init__(self, field: str, columns: int | None) -> None:
        self._field = field
        self._columns = columns
        self._batch: list[Any] = []
        self._batch_numbers = 0
        self._parts: list[Float32] = []
        self._count = 0
        self._first: Any = None
        self._table = Table()

    def add(self, row: Any) -> None:
        """Take the next row."""
        if not self._count and not self._batch:
            self._first = row
        self._batch.append(row)
        self._batch_numbers += 1 + len(row) if type(row) is list else 1
        if self._batch_numbers >= _BATCH_NUMBERS:
            self._flush()

    def finish(self) -> LongList:
        """Return the table, once all rows are there."""
        self._flush()
        if self._parts:
            numbers_NC = np.empty((self._count, len(self._first)), np.float32)
            begin = 0
            for place, part in enumerate(self._parts):
                numbers_NC[begin : begin + len(part)] = part
                begin += len(part)
                self._parts[place] = part[:0]
            self._table.numbers_NC = numbers_NC
        return LongList([self._first], self._count, self._table)

    def _flush(self) -> None:
        table, batch, begin = self._table, self._batch, self._count
        self._batch, self._batch_numbers = [], 0
        self._count += len(batch)
        if table.odd is not None or not batch:
            return
        if self._columns is not None:
            self._parts.append(matrix(batch, field=self._field, columns=self._columns, begin=begin))
            return
        width = len(self._first)
        for place, row in enumerate(batch):
            if type(row) is not list or len(row) != width or not row:
                table.odd = (begin + place, row)
                self._parts = []
                return
        if table.bad is not None:
            return
        try:
            self._parts.append(matrix(batch, field="", columns=width))
        except InvalidInput:
            row, column, number = find_bad_number(batch)
            table.bad, self._parts = (begin + row, column, number), []
