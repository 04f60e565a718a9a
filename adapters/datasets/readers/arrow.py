"""Readers of Parquet and of Arrow IPC streams, one batch at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from adapters.datasets.columns import (
    TEXT_BLOCK_BYTES,
    PlannedColumn,
    ReportUnreadable,
    Source,
    WidthCounter,
    check_names,
    element_type,
    is_list,
    rows_with_null_elements,
    scalar_type,
    set_rows_null,
    split_batch,
    storage_type,
)
from adapters.errors import InvalidDataset, shorten

_FILE_MAGIC = b"ARROW1"


def open_parquet(path: str) -> Source:
    """Open a Parquet file; raise `InvalidDataset`."""
    with _errors_as_invalid("Parquet"):
        file = pq.ParquetFile(pa.memory_map(path))
        schema = file.schema_arrow
        rows, names = file.metadata.num_rows, schema.names
    check_names(names)
    plan = _ColumnPlanner(schema)
    if plan.open_lists:
        lists = [names[position] for position in plan.open_lists]
        for batch in _parquet_batches(file, columns=lists):
            plan.survey({name: batch.column(name) for name in lists})
    return Source(columns=plan.columns(), chunks=partial(_chunks, partial(_parquet_batches, file)), rows=rows)


def open_arrow_stream(path: str) -> Source:
    """Open an Arrow IPC stream; raise `InvalidDataset`."""
    with open(path, "rb") as file:
        if file.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
            raise InvalidDataset(
                "this is an Arrow file (Feather), not an Arrow stream: write it with pyarrow.ipc.new_stream",
                field="body",
                expected="an Arrow IPC stream",
            )
    with _errors_as_invalid("an Arrow stream"):
        schema = ipc.open_stream(pa.memory_map(path)).schema
        names = schema.names  # read here, because they may not be text
    check_names(names)
    plan = _ColumnPlanner(schema)
    if plan.open_lists:
        for batch in _stream_batches(path):
            plan.survey({names[position]: batch.column(position) for position in plan.open_lists})
    return Source(columns=plan.columns(), chunks=partial(_chunks, partial(_stream_batches, path)))


class _ColumnPlanner:
    """Planner of the stored columns of a schema. The width of lists is known after a survey of all rows."""

    def __init__(self, schema: Any) -> None:
        self._columns: list[PlannedColumn | None] = []
        self._lists: dict[str, tuple[Any, WidthCounter]] = {}
        self._names = schema.names
        for field in schema:
            given = storage_type(field.type)
            if not is_list(given):
                self._columns.append(PlannedColumn(name=field.name, type=scalar_type(field.name, given)))
                continue
            inner = element_type(field.name, given)
            if pa.types.is_fixed_size_list(given) and given.list_size > 0 and not pa.types.is_string(inner):
                self._columns.append(PlannedColumn(name=field.name, type=pa.list_(inner, given.list_size)))
                continue
            self._lists[field.name] = (inner, WidthCounter())
            self._columns.append(None)

    @property
    def open_lists(self) -> list[int]:
        """Return the positions of the columns whose width is not known yet."""
        return [position for position, column in enumerate(self._columns) if column is None]

    def survey(self, arrays: dict[str, Any]) -> None:
        """Count the widths of the lists in these columns."""
        for name, array in arrays.items():
            array = _plain_lists(array)
            self._lists[name][1].add(set_rows_null(array, rows_with_null_elements(array)))

    def columns(self) -> list[PlannedColumn]:
        """Return the planned columns."""
        return [
            column or self._lists[name][1].plan(name, self._lists[name][0])
            for name, column in zip(self._names, self._columns, strict=True)
        ]


def _chunks(batches: Callable[[], Iterable[Any]], unreadable: ReportUnreadable) -> Iterator[Sequence[Any]]:
    row = 0
    for batch in batches():
        arrays = []
        for name, array in zip(batch.schema.names, batch.columns, strict=True):
            if is_list(storage_type(array.type)):
                array = _plain_lists(array)
                bad = rows_with_null_elements(array)
                for place in bad:
                    unreadable(row + int(place), name, "a null in the list")
                array = set_rows_null(array, bad)
            arrays.append(array)
        yield arrays
        row += batch.num_rows


def _plain_lists(array: Any) -> Any:
    """Return the list array in an extension or dictionary array."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if isinstance(array, pa.DictionaryArray) else array


def _parquet_batches(file: Any, columns: Sequence[str] | None = None) -> Iterator[Any]:
    with _errors_as_invalid("Parquet"):
        for batch in file.iter_batches(_chunk_rows(file.metadata), columns=columns, use_threads=False):
            # pyarrow does not validate text when it reads Parquet.
            batch.validate(full=True)
            yield from split_batch(batch)


def _chunk_rows(metadata: Any) -> int:
    """Return the rows of a batch that fits in memory, from the sizes in the file's metadata."""
    each: int = 8 * metadata.num_columns + sum(
        metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)
    ) // max(1, metadata.num_rows)
    return max(1, min(8192, TEXT_BLOCK_BYTES // max(1, each)))


def _stream_batches(path: str) -> Iterator[Any]:
    with _errors_as_invalid("an Arrow stream"):
        # Mapped, because a batch may be as large as the file, and is processed in slices.
        for batch in ipc.open_stream(pa.memory_map(path)):
            # A client's offsets and indices must not be followed before they are validated.
            batch.validate(full=True)
            yield from split_batch(batch)


@contextmanager
def _errors_as_invalid(what: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        raise InvalidDataset(
            f"the body cannot be read as {what}: {shorten(str(error))}", field="body", expected=f"{what} that is whole"
        ) from None
