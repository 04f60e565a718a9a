"""Rows of a fleet's data file, sorted by group on several machines.

`RowTable` reads blocks of unsorted rows and computes the sorted index of each. A task of the fleet writes the sorted
rows of its share with `write_share`. The file has the layout of `Scratch.sort_by_group`, with holes for the rows of
other shares.
"""

# N rows · G groups
import os
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from math import isqrt
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adapters.errors import BlobCorrupt, FitFailed, StorageFailed
from adapters.storage.blobs import Blobs
from adapters.training.data_file import ROW_TENSORS, Entry, read_entries
from adapters.training.limits import STACK_NUMBERS
from adapters.training.scratch import group_order, storage_full, write

# Bytes of a block of rows at least. Their number is bounded too, because a sort moves parts of each to each other.
_BLOCK_BYTES, _PART_BYTES = 2**24, 2**16


class RowTable:
    """Rows of a fleet's data file, which are read part by part from the local file of its blob."""

    def __init__(self, blobs: Blobs, name: str) -> None:
        """Read the header. A file in a bucket is fetched first, once for all processes of this machine.

        Raises `FitFailed` if the file is missing or incomplete, as methods that read it do, `StorageFull` if there is
        no space to fetch it, and `StorageFailed` if the bucket does not answer, or a cache evicts the file again.
        """
        try:
            self._fd = _open(blobs, name)
        except BlobCorrupt as error:
            raise FitFailed(error.detail) from None
        weakref.finalize(self, os.close, self._fd)
        self._header_bytes = 8 + int.from_bytes(self._read(0, 8).tobytes(), "little")
        self._entries = read_entries(self._read(0, self._header_bytes))
        tensors = {name: entry for name, entry in self._entries.items() if name in ROW_TENSORS and name != "groups_N"}
        self.rows: int = self._entries["groups_N"].shape[0]
        self.widths: Mapping[str, int] = {
            name: (entry.end - entry.begin) // self.rows for name, entry in tensors.items()
        }
        """Bytes of a row of each tensor that is sorted."""

    @cached_property
    def groups_N(self) -> NDArray[np.int64]:  # noqa: N802 - the letter is the shape
        """Group of each row, in the order of the file, (N,) int64."""
        return self._read_entry(self._entries["groups_N"]).view(np.int64)

    def sorted_index(self) -> NDArray[np.int64]:
        """Return the index of each row in the order of `group_order`, (N,) int64."""
        sorted_index_N = np.empty(self.rows, np.int64)
        sorted_index_N[group_order(self.groups_N)] = np.arange(self.rows)
        return sorted_index_N

    @property
    def block_rows(self) -> int:
        """Rows that are read, and sorted, together."""
        width = sum(self.widths.values())
        return max(1, max(_BLOCK_BYTES, isqrt(self.rows * width * _PART_BYTES)) // width)

    def read(self, begin: int, end: int) -> pa.Table:
        """Return rows `begin` to `end` (exclusive, in file order): one fixed-size binary column for each tensor."""
        columns = {}
        for name, width in self.widths.items():
            content = self._read(self._entries[name].begin + begin * width, (end - begin) * width)
            buffers = [None, pa.py_buffer(content)]
            columns[name] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), end - begin, buffers)
        return pa.table(columns)

    def shares(self, count: int) -> list[tuple[int, int]]:
        """Return the range of sorted rows in which the stacks of each share begin; `end` is exclusive.

        Shares have about as many rows each. A share is empty if a large group begins before it and ends after it.
        """
        ends_G = np.cumsum(np.sort(np.bincount(self.groups_N)))
        bounds = [int(ends_G[np.searchsorted(ends_G, number * self.rows / count)]) for number in range(1, count)]
        return [*pairwise([0, *bounds, self.rows])]

    def rows_end(self, end: int) -> int:
        """Return an upper bound, exclusive, of the sorted rows that the stacks beginning before `end` contain.

        `end` is the end of a group. A stack of several groups has a bounded number of rows.
        """
        in_features = self._entries["inputs_NI"].shape[1]
        return min(self.rows, end + STACK_NUMBERS // in_features)

    def share_blocks(self, begin: int, end: int) -> slice:
        """Return which blocks of sorted rows contain the rows of a share; none for an empty share."""
        if begin == end:
            return slice(0)
        return slice(begin // self.block_rows, -(-self.rows_end(end) // self.block_rows))

    def write_share(self, path: Path, parts: Iterable[tuple[int, pa.Table]]) -> None:
        """Write the sorted data file with holes for the rows that are not in `parts`.

        parts: sorted index of the first row, and the rows from there on, as `read` returns them. Raises `StorageFull`
        and `FitFailed`, and what iterating over `parts` raises.
        """
        with storage_full(), path.open("wb", buffering=0) as file:
            fd = file.fileno()
            write(fd, self._read(0, self._header_bytes), 0)
            file.truncate(max(entry.end for entry in self._entries.values()))
            for name, entry in self._entries.items():
                if name not in ROW_TENSORS:
                    write(fd, self._read_entry(entry), entry.begin)
            groups_N = self.groups_N[group_order(self.groups_N)]
            write(fd, groups_N.view(np.uint8), self._entries["groups_N"].begin)
            for first, part in parts:
                for name, width in self.widths.items():
                    offset = self._entries[name].begin + first * width
                    for chunk in part[name].chunks:
                        begin, size = chunk.offset * width, len(chunk) * width
                        write(fd, np.frombuffer(chunk.buffers()[1], np.uint8)[begin : begin + size], offset)
                        offset += size

    def _read_entry(self, entry: Entry) -> NDArray[np.uint8]:
        return self._read(entry.begin, entry.end - entry.begin)

    def _read(self, offset: int, length: int) -> NDArray[np.uint8]:
        """Return bytes of the file, which may be larger than memory: no more of it is read."""
        content = np.empty(length, np.uint8)
        view = content.data
        while len(view):
            count = os.preadv(self._fd, [view], offset)
            if not count:
                raise FitFailed(f"the data file of the job ends before byte {offset + len(view)}")
            view, offset = view[count:], offset + count
        return content


def _open(blobs: Blobs, name: str) -> int:
    """Open the local file of a blob; once more if a cache has evicted it between its fetch and the first time."""
    for _ in range(2):
        with suppress(FileNotFoundError):
            return os.open(blobs.local(name), os.O_RDONLY)
    raise StorageFailed("the cache of blobs is too small: the data file was evicted before it was opened")
