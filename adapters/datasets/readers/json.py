"""Reader of JSON lines. It reads a file twice: first to find the type of each column, then for the rows.

A column has the kind of most of its values. Other values are reported and left out. A missing key is a null.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
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
    is_list,
)
from adapters.errors import MAX_BAD_ROWS, BadRow, BadRows, DuplicateKey, InvalidDataset, NotJson, shorten

_NUMBERS = {int, float}
# Python types that Arrow takes as they are for a stored type.
_KINDS: Mapping[Any, set[type]] = {pa.int64(): {int}, pa.float64(): {float}, pa.bool_(): {bool}, pa.string(): {str}}
_NOUNS = {pa.bool_(): "a boolean", pa.string(): "text"}
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
        detail = f"the file has lines that are not objects, the first of them row {bad[0].row}"
        raise BadRows(detail, rows=bad, field="body")
    if rows:
        check_names(list(seen))
    columns = [column.plan() for column in seen.values()]
    return Source(columns=columns, chunks=partial(_chunks, path, columns), rows=rows)


class _ValueCounts:
    """Number of values of a column, by kind."""

    def __init__(self, name: str) -> None:
        self._name = name
        # Counts by Python type, and of lists by the kind of their elements.
        self.kinds: Counter[type | str] = Counter()
        self._wide = self._fractional_lists = False
        self._widths = WidthCounter()

    def add(self, value: Any, row: int) -> None:
        """Count a value that is not one of `_SCALARS`; raise `InvalidDataset` for an object or a nested list."""
        if type(value) is int:
            self.kinds[int] += 1
            self._wide |= not _fit_int64(value, value)
            return
        kinds = set(map(type, value)) if type(value) is list else {dict}
        if kinds & {list, dict}:
            what, where = "an object" if dict in kinds else "a list", " in a list" if type(value) is list else ""
            raise InvalidDataset(
                f"row {row}, column {shorten(self._name)!r}, is {what}{where}",
                field=self._name,
                row=row,
                expected="numbers, text, booleans, null, and lists of numbers or of text",
            )
        if kinds <= _NUMBERS:
            self.kinds["numbers" if value else "empty"] += 1
            self._widths.count(len(value))
            self._fractional_lists |= float in kinds or not _fit_int64(min(value, default=0), max(value, default=0))
        elif kinds == {str}:
            self.kinds["texts"] += 1

    def plan(self) -> PlannedColumn:
        """Return the planned column."""
        counts, texts = self.kinds, pa.list_(pa.string())
        number = pa.float64() if counts[float] or self._wide else pa.int64()
        # Of equal counts, `max` returns the first one here.
        count, column_type = max(
            (counts[int] + counts[float], number),
            (counts[str], pa.string()),
            (counts[bool], pa.bool_()),
            (counts["numbers"], None),
            (counts["texts"], texts),
            key=itemgetter(0),
        )
        if not count:
            column_type = texts if counts["empty"] else pa.float64()
        if column_type is None:
            return self._widths.plan(self._name, pa.float64() if self._fractional_lists else pa.int64())
        return PlannedColumn(self._name, column_type)


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers, which count from 1."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_ROW_BYTES + 2), b""), 1):
            if len(line.removesuffix(b"\n")) > MAX_ROW_BYTES:
                detail = f"line {number} has more than {MAX_ROW_BYTES} bytes"
                raise InvalidDataset(detail, expected="one object a line")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line and not line.isspace():
                yield number, line


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
    rows: list[Any], columns: Sequence[PlannedColumn], begin: int, unreadable: ReportUnreadable
) -> list[Any]:
    arrays = []
    for column in columns:
        values = [row.get(column.name) for row in rows]
        if not _need_no_conversion(values, column.type):
            values = _convert(values, column, begin, unreadable)
        arrays.append(pa.array(values, column.type))
    return arrays


def _need_no_conversion(values: Sequence[Any], target: Any) -> bool:
    """Return whether Arrow accepts all values without a conversion."""
    kinds = set(map(type, values)) - {type(None)}
    if is_list(target):
        if kinds - {list}:
            return False
        kinds = set(map(type, chain.from_iterable(value for value in values if value is not None)))
        target = target.value_type
    return kinds <= _KINDS[target]


def _convert(values: Sequence[Any], column: PlannedColumn, begin: int, unreadable: ReportUnreadable) -> list[Any]:
    """Return values converted to the type of their column, with None (reported) for those of another kind."""
    in_lists = is_list(column.type)
    element = column.type.value_type if in_lists else column.type
    is_number = _KINDS[element] <= _NUMBERS
    allowed, noun = (_NUMBERS, "a number") if is_number else (_KINDS[element], _NOUNS[element])
    expected = f"a list of {'numbers' if is_number else 'text'}" if in_lists else noun
    is_float = pa.types.is_floating(element)
    converted: list[Any] = []
    for row, value in enumerate(values, begin):
        reason = None
        if in_lists and type(value) is list:
            if others := [part for part in value if type(part) not in allowed]:
                reason = f"there is {shorten(others[0])} in it"
            elif is_float:
                value = [_to_float(part) for part in value]
        elif in_lists or type(value) not in allowed:
            reason = shorten(value)
        elif is_float:
            value = _to_float(value)
        if reason is not None and value is not None:
            unreadable(row, column.name, f"not {expected}: {reason}")
            value = None
        converted.append(value)
    return converted


def _to_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _fit_int64(lowest: int, highest: int) -> bool:
    """Return whether integers between two bounds fit in 64 bits."""
    return lowest >= -(2**63) and highest < 2**63
