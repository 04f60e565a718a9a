"""Reader of JSON lines. It reads a file twice: first to find the type of each column, then for the rows.

A column has the kind of most of its values. Other values are reported and left out. A missing key is a null.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import orjson
import pyarrow as pa

from adapters import strict_json
from adapters.datasets.columns import (
    MAX_COLUMNS,
    MAX_ROW_BYTES,
    TEXT_BLOCK_BYTES,
    PlannedColumn,
    ReportUnreadable,
    Source,
    WidthCounter,
    check_names,
)
from adapters.errors import MAX_BAD_ROWS, BadRow, BadRows, DuplicateKey, InvalidDataset, NotJson, shorten

_NUMBERS = {int, float}
_CHUNK_ROWS = 4096
_CHUNK_CELLS = 2**20
_SCALARS = frozenset({float, str, bool, type(None)})


def open_json_lines(path: str) -> Source:
    """Open a file with one JSON object per line; raise `InvalidDataset`, or `BadRows` for other lines."""
    seen: dict[str, _ValueCounts] = {}
    rows, bad = 0, []
    for row, (line, text) in enumerate(_lines(path)):
        rows = row + 1
        try:
            members = _parse_line(text, line)
        except InvalidDataset as error:
            bad.append(BadRow(row, None, error.detail))
            if len(bad) == MAX_BAD_ROWS:
                break
            continue
        for name, value in members.items():
            if name not in seen:
                if len(seen) == MAX_COLUMNS:
                    check_names([*seen, name])
                seen[name] = _ValueCounts(name)
            kind = type(value)
            if kind in _SCALARS:
                seen[name].kinds[kind] += 1
            else:
                seen[name].add(value, row)
    if bad:
        raise BadRows(
            f"the file has lines that are not objects, the first of them row {bad[0].row}", rows=bad, field="body"
        )
    if rows:
        check_names(list(seen))
    columns = [column.plan() for column in seen.values()]
    return Source(columns=columns, chunks=partial(_chunks, path, columns), rows=rows)


class _ValueCounts:
    """Number of values of a column, by kind."""

    def __init__(self, name: str) -> None:
        self._name = name
        # Counts by Python type; lists are `numbers`, `texts` or `empty`.
        self.kinds: Counter[Any] = Counter()
        self._wide = self._fractional_lists = False
        self._widths = WidthCounter()

    def add(self, value: Any, row: int) -> None:
        """Count a value that is not one of `_SCALARS`."""
        if type(value) is list:
            self._add_list(value, row)
        elif type(value) is int:
            self.kinds[int] += 1
            self._wide = self._wide or not _fits_int64(value)
        else:
            raise self._nested("an object", row)

    def plan(self) -> PlannedColumn:
        """Return the planned column."""
        numbers = self.kinds[int] + self.kinds[float]
        counts = {
            "number": numbers,
            "text": self.kinds[str],
            "truth": self.kinds[bool],
            "numbers": self.kinds["numbers"],
            "texts": self.kinds["texts"],
        }
        # Of equal counts, `max` returns the first one here.
        kind = max(counts, key=lambda kind: counts[kind])
        if counts[kind] == 0 and self.kinds["empty"]:
            kind = "texts"
        if kind == "numbers":
            return self._widths.plan(self._name, pa.float64() if self._fractional_lists else pa.int64())
        whole = numbers and not self.kinds[float] and not self._wide
        types = {"number": pa.int64() if whole else pa.float64(), "text": pa.string(), "truth": pa.bool_()}
        return PlannedColumn(name=self._name, type=types.get(kind, pa.list_(pa.string())))

    def _add_list(self, value: list[Any], row: int) -> None:
        kinds = set(map(type, value))
        if kinds & {list, dict}:
            raise self._nested("a list in a list" if list in kinds else "an object in a list", row)
        if kinds <= _NUMBERS:
            self.kinds["numbers" if value else "empty"] += 1
            self._widths.count(len(value))
            self._fractional_lists |= float in kinds or (
                bool(value) and not (_fits_int64(max(value)) and _fits_int64(min(value)))
            )
        elif kinds == {str}:
            self.kinds["texts"] += 1

    def _nested(self, what: str, row: int) -> InvalidDataset:
        return InvalidDataset(
            f"row {row}, column {shorten(self._name)!r}, is {what}",
            field=self._name,
            row=row,
            expected="numbers, text, booleans, null, and lists of numbers or of text",
        )


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers, which count from 1."""
    number, rest = 0, b""
    with open(path, "rb") as file:
        while block := file.read(TEXT_BLOCK_BYTES):
            if not number and not rest:
                block = block.removeprefix(b"\xef\xbb\xbf")
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                number += 1
                if line and not line.isspace():
                    yield number, line
            if len(rest) > MAX_ROW_BYTES:
                raise InvalidDataset(
                    f"line {number + 1} has more than {MAX_ROW_BYTES} bytes", field="body", expected="one object a line"
                )
    if rest and not rest.isspace():
        yield number + 1, rest


def _parse_line(text: bytes, line: int) -> dict[str, Any]:
    """Parse one line; raise `InvalidDataset` with the reason."""
    try:
        value = orjson.loads(text)
        # With as many colons as keys, no key is duplicate. More colons are usually in text.
        if type(value) is dict and text.count(b":") == len(value):
            return value
    except orjson.JSONDecodeError:
        pass
    try:
        value = strict_json.parse(text, what="it")
        orjson.dumps(value if isinstance(value, dict) else None)
    except (NotJson, DuplicateKey) as error:
        raise InvalidDataset(f"line {line}: {error.detail}") from None
    except orjson.JSONEncodeError as error:
        if "surrogates" in str(error):
            raise InvalidDataset(f"line {line}: half a surrogate pair is not text") from None
    if not isinstance(value, dict):
        raise InvalidDataset(f"line {line} is not an object")
    return value


def _chunks(path: str, columns: Sequence[PlannedColumn], unreadable: ReportUnreadable) -> Iterator[Sequence[Any]]:
    chunk_rows = max(1, min(_CHUNK_ROWS, _CHUNK_CELLS // max(1, len(columns))))
    rows: list[dict[str, Any]] = []
    begin = size = 0
    for line, text in _lines(path):
        rows.append(_parse_line(text, line))
        size += len(text)
        if len(rows) == chunk_rows or size > TEXT_BLOCK_BYTES:
            yield _to_arrays(rows, columns, begin, unreadable)
            begin, size, rows = begin + len(rows), 0, []
    if rows:
        yield _to_arrays(rows, columns, begin, unreadable)


def _to_arrays(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[PlannedColumn], begin: int, unreadable: ReportUnreadable
) -> list[Any]:
    arrays = []
    for column in columns:
        values = [row.get(column.name) for row in rows]
        if not _need_no_conversion(values, column.type):
            values = [_convert_value(value, column, begin + index, unreadable) for index, value in enumerate(values)]
        arrays.append(pa.array(values, column.type))
    return arrays


def _need_no_conversion(values: Sequence[Any], target: Any) -> bool:
    """Return whether Arrow accepts all values without a conversion."""
    kinds = set(map(type, values)) - {type(None)}
    if pa.types.is_list(target) or pa.types.is_fixed_size_list(target):
        if kinds - {list}:
            return False
        kinds = set(map(type, chain.from_iterable(value for value in values if value is not None)))
        target = target.value_type
    if pa.types.is_floating(target):
        return kinds <= {float}
    return kinds <= {int if pa.types.is_integer(target) else bool if pa.types.is_boolean(target) else str}


def _convert_value(value: Any, column: PlannedColumn, row: int, unreadable: ReportUnreadable) -> Any:
    """Return a value converted to the type of its column, or None (reported) if that is not possible."""
    if value is None:
        return None
    target, kind = column.type, type(value)
    if pa.types.is_list(target) or pa.types.is_fixed_size_list(target):
        expected = "a list of text" if pa.types.is_string(target.value_type) else "a list of numbers"
        if kind is list:
            allowed = {str} if pa.types.is_string(target.value_type) else _NUMBERS
            invalid = next((part for part in value if type(part) not in allowed), _NUMBERS)
            if invalid is _NUMBERS:
                return [_to_float(part) for part in value] if pa.types.is_floating(target.value_type) else value
            unreadable(row, column.name, f"not {expected}: there is {shorten(invalid)} in it")
            return None
    elif kind in _NUMBERS and not pa.types.is_string(target) and not pa.types.is_boolean(target):
        return _to_float(value) if pa.types.is_floating(target) else value
    elif (pa.types.is_string(target) and kind is str) or (pa.types.is_boolean(target) and kind is bool):
        return value
    else:
        expected = "text" if pa.types.is_string(target) else "a boolean" if pa.types.is_boolean(target) else "a number"
    unreadable(row, column.name, f"not {expected}: {shorten(value)}")
    return None


def _to_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _fits_int64(value: float) -> bool:
    """Return whether an integer fits in 64 bits."""
    return -(2**63) <= value < 2**63
