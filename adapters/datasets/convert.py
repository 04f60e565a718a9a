"""From an uploaded file to the stored form, in memory that does not grow with the file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from adapters.datasets.arrow_file import StoredFile, least_row_bytes, too_large
from adapters.datasets.cells import stored
from adapters.datasets.census import Census
from adapters.datasets.readers.arrow import open_arrow_stream, open_parquet
from adapters.datasets.readers.csv import open_csv
from adapters.datasets.readers.formats import Format
from adapters.datasets.readers.json import open_json_lines
from adapters.datasets.readers.npz import open_npz
from adapters.datasets.readers.source import Planned, Source
from adapters.datasets.report import Report
from adapters.errors import InvalidDataset, shown

READERS: Mapping[Format, Callable[[str], Source]] = {
    Format.CSV: open_csv,
    Format.JSON_LINES: open_json_lines,
    Format.PARQUET: open_parquet,
    Format.ARROW: open_arrow_stream,
    Format.NPZ: open_npz,
}


def convert(raw: str, kind: Format, out: Path, *, max_bytes: int) -> Report:
    """Read the file at `raw`, write its stored form to `out`.

    Raises `InvalidDataset` where it cannot be read, has no rows or would be stored in more than `max_bytes` bytes;
    `BadRows` for rows that are not rows of a table; `MemoryError`; `OSError` where the disk is full.
    """
    source = READERS[kind](raw)
    if source.rows == 0:
        raise _empty()
    if source.rows is not None and source.rows * least_row_bytes(source.columns) > max_bytes:
        raise too_large(max_bytes)
    census = Census(source.columns)
    with StoredFile(out, source.columns, max_bytes=max_bytes, seen=census.note) as file:
        for arrays in source.chunks(census.unreadable):
            file.add([_stored(array, column) for array, column in zip(arrays, source.columns, strict=True)])
        digest, size = file.finish()
    if file.rows == 0:
        raise _empty()
    if source.rows is not None and file.rows != source.rows:
        raise InvalidDataset(
            f"the file says that it has {source.rows} rows, and has {file.rows}", field="body", expected="a whole file"
        )
    return Report(rows=file.rows, columns=census.columns(), bad_rows=census.bad_rows(), digest=digest, bytes=size)


def _stored(array: Any, column: Planned) -> Any:
    try:
        return stored(array, column.type)
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, ValueError) as error:
        raise InvalidDataset(
            f"the column {shown(column.name)!r} has a value that {column.type} cannot hold: {shown(str(error))}",
            field=column.name,
            expected=str(column.type),
        ) from None


def _empty() -> InvalidDataset:
    return InvalidDataset("the data set has no rows", field="body", expected="one or more rows")
