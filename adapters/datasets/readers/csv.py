"""Reader of CSV. It reads a file twice: first to find the type of each column, then for the rows.

A column has numbers if more than half of its cells that are not empty are numbers. Other cells are reported and left
out. An empty cell is a null.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv

from adapters.datasets.columns import MAX_HEADER_BYTES, PlannedColumn, ReportUnreadable, Source, check_names
from adapters.errors import MAX_BAD_ROWS, BadRow, BadRows, InvalidDataset, shorten

# Bytes that Arrow reads at once. It allocates as much for each column in turn, and refuses a longer row.
_BLOCK_BYTES = 2**21
_BLANKS = " \t"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$|^(?i)[+-]?(nan|inf|infinity)$"
_WHOLE = r"^-?\d{1,19}$"
_TRUTH = r"^(?i)(true|false)$"


def open_csv(path: str) -> Source:
    """Open a CSV file with a header line; raise `InvalidDataset`, or `BadRows` for rows of a wrong length."""
    names = _header(path)
    if not names:
        raise InvalidDataset("the first line is empty; it must have the names of the columns")
    check_names(names)
    seen: list[Counter[str]] = [Counter() for _ in names]
    rows = 0
    for batch in _batches(path, names):
        rows += batch.num_rows
        for column, cells in zip(seen, batch.columns, strict=True):
            column.update(_count(cells))
    columns = [PlannedColumn(name, _type(column)) for name, column in zip(names, seen, strict=True)]
    return Source(columns=columns, chunks=partial(_chunks, path, columns), rows=rows)


def _header(path: str) -> list[str]:
    with open(path, "rb") as file:
        start = file.read(MAX_HEADER_BYTES)
    if b"\0" in start:
        raise InvalidDataset("the file has NUL bytes: it is not CSV in UTF-8", expected="CSV in UTF-8")
    try:
        # The last character may be incomplete.
        text = start.decode("utf-8-sig", "ignore" if len(start) == MAX_HEADER_BYTES else "strict")
        return next(csv.reader(io.StringIO(text, newline="")), [])
    except (UnicodeDecodeError, csv.Error) as error:
        row = max(0, start[: error.start].count(b"\n") - 1) if isinstance(error, UnicodeDecodeError) else None
        detail = f"the file is not CSV in UTF-8: {error}"
        raise InvalidDataset(detail, row=row, expected="CSV in UTF-8 with a header line") from None


def _batches(path: str, names: Sequence[str]) -> Iterator[Any]:
    """Yield batches of cells as UTF-8 text, with null for empty cells."""
    bad: list[BadRow] = []

    def invalid(row: Any) -> str:
        # Arrow counts from 1, including the header line.
        reason = f"{row.actual_columns} cells, where there are {row.expected_columns} names"
        bad.append(BadRow(row.number - 2, None, reason))
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
            reason = str(error)
            if "straddling" in reason:
                reason = f"a row has more than {_BLOCK_BYTES} bytes, or a quote is not closed"
            detail = f"the body cannot be read as CSV: {shorten(reason)}"
            raise InvalidDataset(detail, expected="CSV with a header line and rows") from None
    if bad:
        detail = f"the file has rows of other lengths than the header line, the first of them row {bad[0].row}"
        raise BadRows(detail, rows=bad, field="body")


def _decode_cells(name: str, cells: Any, row: int) -> Any:
    try:
        return cells.cast(pa.string())
    except pa.ArrowInvalid:
        for index, cell in enumerate(cells.to_pylist()):
            try:
                (cell or b"").decode()
            except UnicodeDecodeError:
                detail = f"row {row + index}, column {shorten(name)!r}, is not UTF-8 text"
                raise InvalidDataset(detail, field=name, row=row + index, expected="CSV in UTF-8") from None
        raise


def _count(cells: Any) -> dict[str, int]:
    """Return the number of cells of each kind: `whole` and `fractional` numbers, `truths` and `texts`."""
    filled = len(cells) - cells.null_count
    if _cast_or_none(cells, pa.int64()) is not None:
        return {"whole": filled}
    if _cast_or_none(cells, pa.float64()) is not None:
        return {"fractional": filled}
    texts = _trim(cells)
    numbers = texts.filter(_matches(texts, _NUMBER))
    whole = numbers.filter(_matches(numbers, _WHOLE))
    count = len(whole) if _cast_or_none(whole, pa.int64()) is not None else 0
    truths = pc.sum(_matches(texts, _TRUTH)).as_py() or 0
    others = len(texts) - texts.null_count - len(numbers) - truths
    return {"whole": count, "fractional": len(numbers) - count, "truths": truths, "texts": others}


def _type(counts: Counter[str]) -> Any:
    """Return the stored type of a column with these numbers of cells."""
    numbers, others = counts["whole"] + counts["fractional"], counts["truths"] + counts["texts"]
    if numbers > others or numbers + others == 0:
        return pa.float64() if counts["fractional"] or not numbers else pa.int64()
    return pa.bool_() if numbers + counts["texts"] == 0 else pa.string()


def _chunks(path: str, columns: Sequence[PlannedColumn], unreadable: ReportUnreadable) -> Iterator[Sequence[Any]]:
    row = 0
    for batch in _batches(path, [column.name for column in columns]):
        columns_and_cells = zip(columns, batch.columns, strict=True)
        yield [_convert_cells(cells, column, row, unreadable) for column, cells in columns_and_cells]
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
    for index in map(int, wrong[:MAX_BAD_ROWS]):
        unreadable(row + index, column.name, f"not a number: {shorten(texts[index].as_py())}")
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
