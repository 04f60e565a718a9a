"""Reader of CSV. It reads a file twice: first to find the type of each column, then for the rows.

A column has numbers if more than half of its cells that are not empty are numbers. Other cells are reported and left
out. An empty cell is a null.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv

from adapters.datasets.columns import (
    MAX_COLUMNS,
    MAX_NAME_CHARACTERS,
    PlannedColumn,
    ReportUnreadable,
    Source,
    check_names,
)
from adapters.errors import MAX_BAD_ROWS, BadRow, BadRows, InvalidDataset, shorten

_MAX_HEADER_BYTES = MAX_COLUMNS * (MAX_NAME_CHARACTERS + 4)
# Bytes that Arrow reads at once. It allocates as much for each column in turn, and refuses a longer row.
_BLOCK_BYTES = 2**21
_BLANKS = " \t"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$|^(?i)[+-]?(nan|inf|infinity)$"
_WHOLE = r"^-?\d{1,19}$"
_TRUTH = r"^(?i)(true|false)$"


@dataclass(slots=True)
class _CellCounts:
    """Number of cells of a column, by kind."""

    whole: int = 0
    fractional: int = 0
    truths: int = 0
    texts: int = 0

    def type(self) -> Any:
        """Return the stored type of the column."""
        numbers, others = self.whole + self.fractional, self.truths + self.texts
        if numbers > others or numbers + others == 0:
            return pa.float64() if self.fractional or not numbers else pa.int64()
        return pa.bool_() if numbers + self.texts == 0 else pa.string()


def open_csv(path: str) -> Source:
    """Open a CSV file with a header line; raise `InvalidDataset`, or `BadRows` for rows of a wrong length."""
    names = _header(path)
    if not names:
        raise InvalidDataset("the first line is empty; the names of the columns stand there", field="body")
    check_names(names)
    seen = [_CellCounts() for _ in names]
    rows = 0
    for batch in _batches(path, names):
        rows += batch.num_rows
        for column, cells in zip(seen, batch.columns, strict=True):
            _count(column, cells)
    columns = [PlannedColumn(name=name, type=column.type()) for name, column in zip(names, seen, strict=True)]
    return Source(columns=columns, chunks=partial(_chunks, path, columns), rows=rows)


def _header(path: str) -> list[str]:
    with open(path, "rb") as file:
        start = file.read(_MAX_HEADER_BYTES)
    if b"\0" in start:
        raise InvalidDataset("the file has NUL bytes: it is not CSV in UTF-8", field="body", expected="CSV in UTF-8")
    try:
        # The last character may be incomplete.
        text = start.decode("utf-8-sig", "ignore" if len(start) == _MAX_HEADER_BYTES else "strict")
    except UnicodeDecodeError as error:
        row = start[: error.start].count(b"\n") - 1
        raise InvalidDataset(
            f"the file is not UTF-8 text at byte {error.start}", field="body", row=max(row, 0), expected="CSV in UTF-8"
        ) from None
    try:
        return next(csv.reader(io.StringIO(text, newline="")), [])
    except csv.Error as error:
        raise InvalidDataset(
            f"the header line cannot be read: {error}", field="body", expected="names with commas between them"
        ) from None


def _batches(path: str, names: Sequence[str]) -> Iterator[Any]:
    """Yield batches of cells as UTF-8 text, with null for empty cells."""
    bad: list[BadRow] = []

    def invalid(row: Any) -> str:
        # Arrow counts from 1, including the header line.
        bad.append(
            BadRow(row.number - 2, None, f"{row.actual_columns} cells, where there are {row.expected_columns} names")
        )
        return "skip" if len(bad) < MAX_BAD_ROWS else "error"

    row = 0
    try:
        reader = arrow_csv.open_csv(
            path,
            read_options=arrow_csv.ReadOptions(
                use_threads=False, block_size=_BLOCK_BYTES, column_names=list(names), skip_rows_after_names=1
            ),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=invalid),
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.binary()),
                strings_can_be_null=True,
                null_values=[""],
                quoted_strings_can_be_null=False,
            ),
        )
        for batch in reader:
            cells = [_decode_cells(name, cells, row) for name, cells in zip(names, batch.columns, strict=True)]
            yield pa.record_batch(cells, names=list(names))
            row += batch.num_rows
    except pa.ArrowMemoryError:
        raise
    except pa.ArrowException as error:
        if not bad:
            raise _not_csv(str(error)) from None
    if bad:
        raise BadRows(
            f"the file has rows with more or fewer cells than the {len(names)} of the header line, the first of them"
            f" row {bad[0].row}",
            rows=bad,
            field="body",
        )


def _not_csv(why: str) -> InvalidDataset:
    if "straddling" in why:
        why = f"a row has more than {_BLOCK_BYTES} bytes, or a quote is not closed"
    if "Empty CSV file" in why:
        why = "there is a header line, and no row"
    return InvalidDataset(
        f"the body cannot be read as CSV: {shorten(why)}", field="body", expected="CSV with a header line"
    )


def _decode_cells(name: str, cells: Any, row: int) -> Any:
    try:
        return cells.cast(pa.string())
    except pa.ArrowInvalid:
        place = next(place for place, cell in enumerate(cells.to_pylist()) if cell is not None and not _is_utf8(cell))
        raise InvalidDataset(
            f"row {row + place}, column {shorten(name)!r}, is not UTF-8 text",
            field=name,
            row=row + place,
            expected="CSV in UTF-8",
        ) from None


def _is_utf8(cell: bytes) -> bool:
    try:
        cell.decode()
    except UnicodeDecodeError:
        return False
    return True


def _count(seen: _CellCounts, cells: Any) -> None:
    filled = len(cells) - cells.null_count
    if _cast_or_none(cells, pa.int64()) is not None:
        seen.whole += filled
    elif _cast_or_none(cells, pa.float64()) is not None:
        seen.fractional += filled
    else:
        texts = _trim(cells)
        numbers = texts.filter(_matches(texts, _NUMBER))
        whole = numbers.filter(_matches(numbers, _WHOLE))
        if _cast_or_none(whole, pa.int64()) is None:
            whole = whole.slice(0, 0)
        truths = pc.sum(_matches(texts, _TRUTH)).as_py() or 0
        seen.whole += len(whole)
        seen.fractional += len(numbers) - len(whole)
        seen.truths += truths
        seen.texts += len(texts) - texts.null_count - len(numbers) - truths


def _chunks(path: str, columns: Sequence[PlannedColumn], unreadable: ReportUnreadable) -> Iterator[Sequence[Any]]:
    row = 0
    for batch in _batches(path, [column.name for column in columns]):
        arrays = []
        for column, cells in zip(columns, batch.columns, strict=True):
            arrays.append(_convert_cells(cells, column, row, unreadable))
        yield arrays
        row += batch.num_rows


def _convert_cells(cells: Any, column: PlannedColumn, row: int, unreadable: ReportUnreadable) -> Any:
    if pa.types.is_string(column.type):
        return cells
    if pa.types.is_boolean(column.type):
        return pc.equal(pc.utf8_lower(_trim(cells)), "true")
    fast = _cast_or_none(cells, column.type)
    if fast is not None:
        return fast
    texts = _trim(cells)
    numbers = _matches(texts, _NUMBER)
    wrong = np.flatnonzero(pc.and_(texts.is_valid(), pc.invert(numbers)).to_numpy(zero_copy_only=False))
    for place in wrong[:MAX_BAD_ROWS]:
        unreadable(row + int(place), column.name, f"not a number: {shorten(texts[int(place)].as_py())}")
    return pc.if_else(numbers, texts, pa.scalar(None, pa.string())).cast(column.type)


def _cast_or_none(cells: Any, target: Any) -> Any:
    """Return the cells as numbers, or None if one of them is not a number."""
    try:
        numbers = cells.cast(target)
    except pa.ArrowInvalid:
        return None
    # Arrow reads 0x10 as 16.
    if pa.types.is_integer(target) and pc.any(pc.match_substring(cells, "x", ignore_case=True)).as_py():
        return None
    return numbers


def _trim(cells: Any) -> Any:
    """Return text without surrounding blanks; blank text is null."""
    texts = pc.utf8_trim(cells, characters=_BLANKS)
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _matches(texts: Any, pattern: str) -> Any:
    return pc.match_substring_regex(texts, pattern).fill_null(False)
