"""Rows of a fleet that several machines sort by group, and the part of them that one share of the fleet is fitted from.

What sorts them gets a table of rows, `read`, and the place of each row in the order of `group_order`. A share gets the
rows of its places back, and writes them to a file like that of `Scratch.sort_by_group`, with holes for all other rows.
"""

# N rows · G groups · B bytes of a row · I in_features
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import pairwise
from math import isqrt
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adapters.errors import BlobCorrupt, FitFailed
from adapters.storage.blobs import Blobs
from adapters.training.data_file import ROW_TENSORS, Entry, read_entries
from adapters.training.limits import STACK_NUMBERS
from adapters.training.scratch import group_order, storage_full, write

# Bytes of a block of rows at least. Their number is bounded too, because a sort moves parts of each to each other.
_BLOCK_BYTES, _PART_BYTES = 2**24, 2**16


class RowTable:
    """Rows of a fleet's data file, which are read part by part from the blobs."""

    def __init__(self, blobs: Blobs, name: str) -> None:
        """Read the header. Raises `FitFailed` if the file is missing, as all methods do."""
        self._blobs, self._name = blobs, name
        self._begin = 8 + int.from_bytes(self._read(0, 8), "little")
        header = np.frombuffer(self._read(0, self._begin), np.uint8)
        self._entries = read_entries(header)
        tensors = {name: entry for name, entry in self._entries.items() if name in ROW_TENSORS and name != "groups_N"}
        self.rows: int = self._entries["groups_N"].shape[0]
        self.widths: Mapping[str, int] = {
            name: (entry.end - entry.begin) // self.rows for name, entry in tensors.items()
        }
        """Bytes of a row of each tensor that is sorted."""

    @cached_property
    def groups_N(self) -> NDArray[np.int64]:  # noqa: N802 - the letter is the shape
        """Group of each row, in the order of the file, (N,) int64."""
        return np.frombuffer(self._read_entry(self._entries["groups_N"]), np.int64)

    def places(self) -> NDArray[np.int64]:
        """Return the place of each row in the order of the groups, (N,) int64."""
        places_N = np.empty(self.rows, np.int64)
        places_N[group_order(self.groups_N)] = np.arange(self.rows)
        return places_N

    @property
    def block_rows(self) -> int:
        """Rows that are read, and sorted, together."""
        width = sum(self.widths.values())
        return max(1, max(_BLOCK_BYTES, isqrt(self.rows * width * _PART_BYTES)) // width)

    def read(self, begin: int, end: int) -> pa.Table:
        """Return rows, each tensor as a column of bytes."""
        columns = {}
        for name, width in self.widths.items():
            content = self._read(self._entries[name].begin + begin * width, (end - begin) * width)
            buffers = [None, pa.py_buffer(content)]
            columns[name] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), end - begin, buffers)
        return pa.table(columns)

    def shares(self, count: int) -> list[tuple[int, int]]:
        """Return the places where the stacks of each share begin and end. Shares have about as many rows each."""
        ends_G = np.cumsum(np.sort(np.bincount(self.groups_N)))
        bounds = [int(ends_G[np.searchsorted(ends_G, number * self.rows / count)]) for number in range(1, count)]
        return [*pairwise([0, *bounds, self.rows])]

    def last_row(self, end: int) -> int:
        """Return the place after the last row of the stacks that begin before `end`, where a group ends.

        A stack of several groups has a bounded number of rows.
        """
        in_features = self._entries["inputs_NI"].shape[1]
        return min(self.rows, end + STACK_NUMBERS // in_features)

    def write_share(self, path: Path, parts: Iterable[tuple[int, pa.Table]]) -> None:
        """Write the sorted data file with holes for the rows that are not in `parts`; raise `StorageFull`.

        parts: place of the first row, and the rows from there on, as `read` returns them.
        """
        with storage_full(), path.open("wb", buffering=0) as file:
            fd = file.fileno()
            write(fd, np.frombuffer(self._read(0, self._begin), np.uint8), 0)
            file.truncate(max(entry.end for entry in self._entries.values()))
            for name, entry in self._entries.items():
                if name not in ROW_TENSORS:
                    write(fd, np.frombuffer(self._read_entry(entry), np.uint8), entry.begin)
            groups_N = self.groups_N[group_order(self.groups_N)]
            write(fd, groups_N.view(np.uint8), self._entries["groups_N"].begin)
            for place, part in parts:
                for name, width in self.widths.items():
                    offset = self._entries[name].begin + place * width
                    for chunk in part[name].chunks:
                        begin, size = chunk.offset * width, len(chunk) * width
                        write(fd, np.frombuffer(chunk.buffers()[1], np.uint8)[begin : begin + size], offset)
                        offset += size

    def _read_entry(self, entry: Entry) -> bytes:
        return self._read(entry.begin, entry.end - entry.begin)

    def _read(self, offset: int, length: int) -> bytes:
        try:
            return self._blobs.read(self._name, offset=offset, length=length)
        except BlobCorrupt as error:
            raise FitFailed(error.detail) from None
