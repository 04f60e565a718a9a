"""Writer of the stored form of a data set: an uncompressed Arrow IPC file.

Its bytes depend only on the content. Record batches are split by stored rows and bytes, not by the uploaded chunks.
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc
from numpy.typing import NDArray

from adapters.datasets.columns import MAX_ROW_BYTES, PlannedColumn, is_list, to_stored_array
from adapters.datasets.validation import ColumnReport
from adapters.errors import InvalidDataset

BATCH_ROWS = 8192
BATCH_BYTES = 2**22


class ArrowFileWriter:
    """Writer that appends chunks of rows. It adds each stored batch to a report."""

    def __init__(self, path: Path, columns: Sequence[PlannedColumn], report: ColumnReport, *, max_bytes: int) -> None:
        self._schema = pa.schema([(column.name, column.type) for column in columns])
        self._sink = _BoundedFile(path, max_bytes)
        self._writer = ipc.new_file(self._sink, self._schema)
        self._report = report
        self._pending: list[Any] = []
        self._pending_rows = self._pending_bytes = 0
        self.rows = 0

    def add(self, arrays: Sequence[Any]) -> None:
        """Append rows, as arrays of the stored types; raise `InvalidDataset` if a row or the file is too large."""
        batch = pa.record_batch(list(arrays), schema=self._schema)
        sizes = row_bytes(batch)
        too_large = np.flatnonzero(sizes > MAX_ROW_BYTES)
        if len(too_large):
            row, size = self.rows + self._pending_rows + int(too_large[0]), f"{sizes[too_large[0]]} bytes"
            detail = f"row {row} would be stored in {size}, and a row may have {MAX_ROW_BYTES}"
            raise InvalidDataset(detail, row=row, given=size, expected=f"at most {MAX_ROW_BYTES} bytes")
        ends, begin = np.cumsum(sizes), 0
        while begin < batch.num_rows:
            before = int(ends[begin - 1]) if begin else 0
            fit = int(np.searchsorted(ends, before + BATCH_BYTES - self._pending_bytes, side="right"))
            end = min(fit, begin + BATCH_ROWS - self._pending_rows)
            if end <= begin:
                if self._pending:
                    self._flush()
                    continue
                end = begin + 1  # a row that is larger than a batch gets a batch of its own
            self._pending.append(batch.slice(begin, end - begin))
            self._pending_rows += end - begin
            self._pending_bytes += int(ends[end - 1]) - before
            begin = end

    def close(self) -> None:
        """Close the file."""
        self._sink.close()

    def finish(self) -> tuple[str, int]:
        """Finish the file; return its digest and its size in bytes."""
        self._flush()
        self._writer.close()
        self._sink.flush()
        return f"sha256:{self._sink.digest.hexdigest()}", self._sink.bytes

    def _flush(self) -> None:
        if not self._pending:
            return
        whole = self._pending[0] if len(self._pending) == 1 else pa.concat_batches(self._pending)
        arrays = list(map(to_stored_array, whole.columns, self._schema.types))
        batch = pa.record_batch(arrays, schema=self._schema)
        self._report.add_batch(batch, self.rows)
        self._writer.write_batch(batch)
        self.rows += batch.num_rows
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0


def min_row_bytes(columns: Sequence[PlannedColumn]) -> float:
    """Return the bytes that a row has at least."""
    return sum(_fixed_bytes(column.type) for column in columns)


def row_bytes(batch: Any) -> NDArray[np.int64]:
    """Return the approximate bytes of each stored row, (N,) int64, by which batches are split."""
    fixed = sum(_fixed_bytes(array.type) for array in batch.columns)
    sizes = np.full(batch.num_rows, int(fixed) + 1, np.int64)
    for array in batch.columns:
        if pa.types.is_string(array.type):
            sizes += pc.binary_length(array).fill_null(0).to_numpy()
        elif pa.types.is_list(array.type):
            sizes += _list_bytes(array)
    return sizes


def _list_bytes(array: Any) -> NDArray[np.int64]:
    lengths: NDArray[np.int64] = pc.list_value_length(array).fill_null(0).to_numpy().astype(np.int64)
    if not pa.types.is_string(array.type.value_type):
        return lengths * int(_fixed_bytes(array.type.value_type))
    text_bytes = pc.binary_length(array.flatten()).fill_null(0).to_numpy() + 4
    return np.bincount(pc.list_parent_indices(array).to_numpy(), text_bytes, len(array)).astype(np.int64)


def _fixed_bytes(arrow_type: Any) -> float:
    if pa.types.is_fixed_size_list(arrow_type):
        return float(arrow_type.list_size * _fixed_bytes(arrow_type.value_type))
    if pa.types.is_string(arrow_type) or is_list(arrow_type):
        return 4
    return float(arrow_type.bit_width / 8)


class _BoundedFile(io.RawIOBase):
    """File with a digest and a maximum size, as pyarrow writes to it."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._file = path.open("wb")
        self._max_bytes = max_bytes
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, content: Any) -> int:
        """Append bytes."""
        view = memoryview(content)
        if self.bytes + view.nbytes > self._max_bytes:
            raise too_large_error(self._max_bytes)
        self.digest.update(view)
        self._file.write(view)
        self.bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Return the position of the next byte."""
        return self.bytes

    def close(self) -> None:
        """Flush the buffer and close the file."""
        self._file.close()
        super().close()

    def writable(self) -> bool:
        """Return True."""
        return True


def too_large_error(max_bytes: int) -> InvalidDataset:
    """Return the error for a data set whose stored form is too large."""
    detail = f"the data set would be stored in more than {max_bytes} bytes"
    return InvalidDataset(detail, expected=f"at most {max_bytes} bytes, uncompressed")
