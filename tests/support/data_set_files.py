"""Files as clients would upload them, and what becomes of them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from adapters.datasets.ingest import Format, convert
from adapters.datasets.table import Table
from adapters.datasets.validation import IngestReport

MAX_BYTES = 2**24


def read(
    folder: Path, content: bytes, kind: Format, *, max_bytes: int = MAX_BYTES
) -> tuple[IngestReport, dict[str, Any]]:
    """The report on a file, and the values of each column as they are stored."""
    raw, out = folder / "raw", folder / "stored"
    raw.write_bytes(content)
    report = convert(str(raw), kind, out, max_bytes=max_bytes)
    return report, ipc.open_file(str(out)).read_all().to_pydict()


def table_of(folder: Path, table: Any) -> Table:
    """What training reads of an Arrow table that was uploaded."""
    read(folder, arrow_stream(table), Format.ARROW, max_bytes=2**30)
    return Table.open(folder / "stored")


def types(report: IngestReport) -> dict[str, tuple[str, int | None]]:
    """Type and width of each column."""
    return {column.name: (column.type, column.width) for column in report.columns}


def bad(report: IngestReport) -> list[tuple[int, str | None, str]]:
    """The bad rows as plain tuples."""
    return [(row.row, row.column, row.reason) for row in report.bad_rows]


def arrow_stream(table: Any, *, rows_a_batch: int | None = None, **options: Any) -> bytes:
    """An Arrow IPC stream."""
    buffer = io.BytesIO()
    with ipc.new_stream(buffer, table.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, rows_a_batch)
    return buffer.getvalue()


def parquet(table: Any, **options: Any) -> bytes:
    """A Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    """A compressed NPZ file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def lists(rows: Sequence[Sequence[float] | None], value_type: Any) -> Any:
    """An Arrow array of lists of any length."""
    return pa.array(rows, pa.list_(value_type))
