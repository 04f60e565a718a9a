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
    element_type,
    is_list,
    rows_per_chunk,
    rows_with_null_elements,
    scalar_type,
    set_rows_null,
    split_batch,
    storage_array,
    storage_type,
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
    planned: dict[str, PlannedColumn] = {}
    lists: dict[str, tuple[Any, WidthCounter]] = {}
    for field in schema:
        column_type = storage_type(field.type)
        if not is_list(column_type):
            planned[field.name] = PlannedColumn(name=field.name, type=scalar_type(field.name, column_type))
            continue
        element = element_type(field.name, column_type)
        if pa.types.is_fixed_size_list(column_type) and column_type.list_size > 0 and not pa.types.is_string(element):
            planned[field.name] = PlannedColumn(name=field.name, type=pa.list_(element, column_type.list_size))
        else:
            lists[field.name] = (element, WidthCounter())
    for batch in batches(list(lists)) if lists else ():
        for name, (_, widths) in lists.items():
            array = storage_array(batch.column(name))
            widths.add(set_rows_null(array, rows_with_null_elements(array)))
    planned |= {name: widths.plan(name, element) for name, (element, widths) in lists.items()}
    return Source(columns=[planned[name] for name in schema.names], chunks=partial(_chunks, batches), rows=rows)


def _chunks(batches: Callable[[], Iterator[Any]], unreadable: ReportUnreadable) -> Iterator[Sequence[Any]]:
    begin = 0
    for batch in batches():
        arrays = []
        for name, array in zip(batch.schema.names, batch.columns, strict=True):
            if is_list(storage_type(array.type)):
                array = storage_array(array)
                rows = rows_with_null_elements(array)
                for row in rows:
                    unreadable(begin + int(row), name, "a null in the list")
                array = set_rows_null(array, rows)
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
