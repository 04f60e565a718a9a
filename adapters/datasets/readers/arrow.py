"""Readers of Parquet and of Arrow IPC streams, one batch at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from adapters.datasets.columns import (
    PlannedColumn,
    ReportUnreadable,
    Source,
    WidthCounter,
    check_names,
    rows_per_chunk,
    split_batch,
    stored_type,
    without_null_elements,
)
from adapters.errors import InvalidDataset, shorten

_FILE_MAGIC = b"ARROW1"


def open_parquet(path: str) -> Source:
    """Open a Parquet file; raise `InvalidDataset`."""
    with _errors_as_invalid("Parquet"):
        file = pq.ParquetFile(pa.memory_map(path))
        schema, metadata = file.schema_arrow, file.metadata
        check_names(schema.names)

    def batches(columns: Sequence[str] | None = None) -> Any:
        return file.iter_batches(_chunk_rows(metadata), columns=columns, use_threads=False)

    return _source(schema, partial(_checked, "Parquet", batches), rows=metadata.num_rows)


def open_arrow_stream(path: str) -> Source:
    """Open an Arrow IPC stream; raise `InvalidDataset`."""
    with open(path, "rb") as file:
        if file.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
            detail = "this is an Arrow file (Feather), not an Arrow stream: write it with pyarrow.ipc.new_stream"
            raise InvalidDataset(detail, expected="an Arrow IPC stream")
    with _errors_as_invalid("an Arrow stream"):
        schema = ipc.open_stream(pa.memory_map(path)).schema
        check_names(schema.names)  # here, because they may not be text

    def batches(_columns: Sequence[str] | None = None) -> Any:
        # Mapped, because a batch may be as large as the file, and is processed in slices.
        return ipc.open_stream(pa.memory_map(path))

    return _source(schema, partial(_checked, "an Arrow stream", batches), rows=None)


def _source(schema: Any, batches: Callable[..., Iterator[Any]], *, rows: int | None) -> Source:
    """Return the source of batches with this schema. The widths of some lists are known only after a pass over all."""
    types = {field.name: stored_type(field.name, field.type) for field in schema}
    widths = {name: WidthCounter() for name, column_type in types.items() if pa.types.is_list(column_type)}
    for batch in batches(list(widths)) if widths else ():
        for name, counter in widths.items():
            counter.add(without_null_elements(batch.column(name))[0])
    planned = {name: PlannedColumn(name, column_type) for name, column_type in types.items()}
    planned |= {name: counter.plan(name, types[name].value_type) for name, counter in widths.items()}
    return Source(columns=list(planned.values()), chunks=partial(_chunks, batches), rows=rows)


def _chunks(batches: Callable[[], Iterator[Any]], unreadable: ReportUnreadable) -> Iterator[Sequence[Any]]:
    begin = 0
    for batch in batches():
        arrays = []
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            array, rows = without_null_elements(column)
            for row in rows:
                unreadable(begin + int(row), name, "a null in the list")
            arrays.append(array)
        yield arrays
        begin += batch.num_rows


def _checked(what: str, batches: Callable[..., Any], columns: Sequence[str] | None = None) -> Iterator[Any]:
    """Yield small batches, validated: pyarrow checks neither the text of Parquet nor the offsets in a stream."""
    with _errors_as_invalid(what):
        for batch in batches(columns):
            batch.validate(full=True)
            yield from split_batch(batch)


def _chunk_rows(metadata: Any) -> int:
    """Return the rows of a batch that fits in memory, from the sizes in the file's metadata."""
    total_bytes = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    row_bytes: int = 8 * metadata.num_columns + total_bytes // max(1, metadata.num_rows)
    return rows_per_chunk(row_bytes)


@contextmanager
def _errors_as_invalid(what: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        detail = f"the body cannot be read as {what}: {shorten(str(error))}"
        raise InvalidDataset(detail, expected=f"{what} that is whole") from None
