"""Scratch space of a fit on disk, for the rows of a fleet and the values computed from them that exceed the memory.

The files have no name, so they disappear with the process, however it ends. They are read through shared mappings,
which do not count towards the memory limit of the process.
"""

# N rows · B bytes of a row · K rows of a bucket · G groups
import mmap
import os
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.errors import StorageFull
from adapters.storage.blobs import DISK_FULL
from adapters.training.data_file import ROW_TENSORS, TrainingData, map_file, read_entries

# Folder, in the data folder, of the scratch files of a fit.
SCRATCH = "scratch"
# Bounds of the size of a bucket. Larger ones are written in longer pieces, and sorting one takes three times its size.
_MIN_BUCKET_BYTES, _MAX_BUCKET_BYTES = 2**20, 2**26
# Each tensor begins at a multiple of this, as in memory: the alignment decides how some sums are rounded.
_ALIGNMENT = 64

T = TypeVar("T")
Bytes = NDArray[np.uint8]


class Scratch:
    """Scratch space in a folder, bounded by the free space of its disk."""

    def __init__(self, folder: Path, *, size: int, memory_bytes: int) -> None:
        """Check that `size` bytes are free; raise `StorageFull` if they are not.

        size: the `scratch_bytes` of the job's estimate.
        memory_bytes: memory that sorting may use, beside about 40 bytes for each row.
        """
        with storage_full():
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._bucket_bytes = min(_MAX_BUCKET_BYTES, max(_MIN_BUCKET_BYTES, memory_bytes // 4))
        free = shutil.disk_usage(folder).free
        if free < size:
            detail = (
                f"the fit needs about {size} bytes of disk for its rows in the order of their groups; {free} are free"
            )
            raise StorageFull(detail, given=free, expected=f"about {size} free bytes")
        self._kept: ScratchList[Any] = self.list_of(())

    def sort_by_group(self, path: Path) -> tuple[TrainingData, int]:
        """Return a copy of a fleet's data file with the rows of each group together, and the most buckets of a tensor.

        Groups are ordered by size and then by code, so that stacks are read from the beginning to the end. The rows of
        a group keep their order. Raises `StorageFull`.
        """
        with path.open("rb") as file:
            mapping, content = map_file(file)
        entries, buckets = read_entries(content), 0
        groups_N = content[entries["groups_N"].begin : entries["groups_N"].end].view(np.int64)
        order_N = group_order(groups_N)
        place_N = np.empty_like(order_N)
        place_N[order_N] = np.arange(len(order_N))
        with self._file() as sorted_file:
            fd = sorted_file.fileno()
            _reserve(fd, len(content))
            write(fd, content[: min(entry.begin for entry in entries.values())], 0)
            for name, entry in entries.items():
                of_tensor = content[entry.begin : entry.end]
                if name not in ROW_TENSORS:
                    write(fd, of_tensor, entry.begin)
                    continue
                source_NB = of_tensor.reshape(len(order_N), -1)
                parts = self._parts_of(source_NB, mapping)
                buckets = max(buckets, self._permute(parts, order_N, place_N, _At(fd, entry.begin)))
            return TrainingData.of_file(sorted_file, releases=True), buckets

    def list_of(self, items: Iterable[T]) -> "ScratchList[T]":
        """Write records with tensors one after the other; return the list that reads each when it is used."""
        with self._file() as file:
            return ScratchList(os.dup(file.fileno()), items)

    def keep(self, item: T) -> Callable[[], T]:
        """Write one record with tensors; return its reader."""
        number = len(self._kept)
        self._kept.append(item)
        return partial(self._kept.__getitem__, number)

    def _file(self) -> Any:
        with storage_full():
            return tempfile.TemporaryFile(dir=self._folder, buffering=0)

    def _permute(
        self, parts: Iterator[Bytes], order_N: NDArray[np.int64], place_N: NDArray[np.int64], target: "_At"
    ) -> int:
        """Write the rows of a source in an order, by an external bucket sort; return the number of buckets.

        A bucket is K rows of the target. First each row of the source is appended to its bucket, then each bucket is
        sorted in memory.
        parts: the rows of the source, (K, B) each, the last with fewer rows.
        order_N: row of the source for each row of the target.
        place_N: its inverse, the row of the target for each row of the source.
        """
        N, begin, filled = len(order_N), 0, np.zeros(0, np.int64)
        for part_KB in parts:
            if not begin:
                K, B = part_KB.shape
                filled = np.zeros(-(-N // K), np.int64)
            bucket_of_K = place_N[begin : begin + K] // K
            moved_KB, first = part_KB[np.argsort(bucket_of_K, kind="stable")], 0
            for bucket, count in zip(*np.unique(bucket_of_K, return_counts=True), strict=True):
                write(target.fd, moved_KB[first : first + count], target.begin + int(bucket * K + filled[bucket]) * B)
                filled[bucket] += count
                first += count
            begin += K
        for begin in range(0, N, K):
            order_K, offset = order_N[begin : begin + K], target.begin + begin * B
            # In the order of the source: the rank of a row's number there is its position in the bucket.
            gathered_KB = _read(target.fd, len(order_K) * B, offset).reshape(-1, B)
            write(target.fd, gathered_KB[np.argsort(np.argsort(order_K))], offset)
        return len(filled)

    def _parts_of(self, source_NB: Bytes, mapping: mmap.mmap) -> Iterator[Bytes]:
        """Yield rows of the size of a bucket, and release their pages."""
        rows = max(1, self._bucket_bytes // source_NB.shape[1])
        for begin in range(0, len(source_NB), rows):
            yield source_NB[begin : begin + rows]
            mapping.madvise(mmap.MADV_DONTNEED)


class _At(NamedTuple):
    """Offset in an open file, in bytes."""

    fd: int
    begin: int


class _Record(NamedTuple):
    """Record of a list: its tensors in the file, and its other values."""

    kind: Callable[..., Any]
    tensors: dict[str, tuple[torch.dtype, torch.Size, int]]
    """Type, shape, and offset in the record."""
    others: dict[str, Any]
    begin: int
    size: int


class ScratchList(Sequence[T], Generic[T]):
    """List of named tuples or dataclasses whose tensors are on disk.

    The tensors of an item are mappings of the file, which must not be written to. A mapping lasts as long as any
    reference to one of them.
    """

    def __init__(self, fd: int, items: Iterable[T]) -> None:
        """Fill a file, and close it with the list."""
        weakref.finalize(self, os.close, fd)
        self._fd, self._end = fd, 0
        self._records: list[_Record] = []
        for item in items:
            self.append(item)

    def append(self, item: Any) -> None:
        """Write an item; raise `StorageFull`."""
        names = getattr(item, "_fields", None) or [member.name for member in fields(item)]
        begin, tensors, others = self._end, {}, {}
        for name in names:
            value = getattr(item, name)
            if not isinstance(value, Tensor):
                others[name] = value
                continue
            tensors[name] = (value.dtype, value.shape, self._end - begin)
            content = np.ascontiguousarray(value.numpy()).reshape(-1).view(np.uint8)
            write(self._fd, content, self._end)
            self._end += -(-len(content) // _ALIGNMENT) * _ALIGNMENT
        # The last tensor may end before a multiple of the alignment.
        os.truncate(self._fd, self._end)
        self._records.append(_Record(type(item), tensors, others, begin, self._end - begin))

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        """Return an item, or a list of some."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        record = self._records[index]
        item: T = record.kind(**record.others, **self._map(record))
        return item

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._records)

    def _map(self, record: _Record) -> dict[str, Tensor]:
        first = record.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        ahead = record.begin - first
        mapping = mmap.mmap(self._fd, ahead + record.size, access=mmap.ACCESS_READ, offset=first)
        tensors = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            for name, (dtype, shape, offset) in record.tensors.items():
                count = shape.numel()
                flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=ahead + offset) if count else None
                tensors[name] = torch.empty(shape, dtype=dtype) if flat is None else flat.view(shape)
        return tensors


def group_order(groups_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers of the rows, ordered by size of the group, by group, and by number, (N,) int64."""
    sizes_G = np.bincount(groups_N)
    rank_G = np.empty_like(sizes_G)
    rank_G[np.argsort(sizes_G, kind="stable")] = np.arange(len(sizes_G))
    return np.argsort(rank_G[groups_N], kind="stable")


def _reserve(fd: int, size: int) -> None:
    """Give a file its size, and the disk space for it; raise `StorageFull`."""
    with storage_full():
        if sys.platform == "darwin":
            os.truncate(fd, size)
        else:
            os.posix_fallocate(fd, 0, size)


def write(fd: int, content: Bytes, offset: int) -> None:
    """Write bytes at an offset; raise `StorageFull`."""
    view = np.ascontiguousarray(content).reshape(-1).data
    with storage_full():
        while len(view):
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written


def _read(fd: int, size: int, offset: int) -> Bytes:
    content = np.empty(size, np.uint8)
    view = content.data
    while len(view):
        count = os.preadv(fd, [view], offset)
        view, offset = view[count:], offset + count
    return content


@contextmanager
def storage_full() -> Iterator[None]:
    """Raise `StorageFull` in place of an error of the system that means a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise StorageFull("the disk is full: the scratch files of the fit could not be written") from error
