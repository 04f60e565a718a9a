"""Training data: the rows of a training in memory, and the memory-mapped file that passes them to the fit."""

# N rows · I in_features · O out_features · R rank · M documents
import hashlib
import json
import mmap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DTYPES = {"F32": torch.float32, "I64": torch.int64}


class Column(NamedTuple):
    """Array that a data file stores, read part by part, so that it need not be in memory as a whole."""

    dtype: str
    """`F32` or `I64`."""
    shape: Sequence[int]
    parts: Callable[[], Iterator[NDArray[Any]]]
    """Iterator over chunks of its rows in order; a new one per call."""

    @classmethod
    def of(cls, array: NDArray[Any]) -> "Column":
        """Return the column of an array in memory."""
        return cls("I64" if array.dtype == np.int64 else "F32", array.shape, lambda: iter([array]))


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """Inputs and targets, row weights, and the other tensors of a training.

    inputs_NI: (N, I) float32. targets: (N, O) float32, or (N,) int64 class indices. weights_N: (N,) float32.
    key_N: (N,) int64, see `Split.sides`. groups_N: (N,) int64: the adapter of a fleet that a row is for.
    held_*: rows that are held out whole. start_OR, start_RI: factors to start from. prior_OR, prior_RI: ΔW₀ =
    their product. corpus_MO: documents to search. gone_*: rows to forget.
    """

    inputs_NI: Tensor
    targets: Tensor
    start_OR: Tensor | None = None
    start_RI: Tensor | None = None
    weights_N: Tensor | None = None
    key_N: Tensor | None = None
    groups_N: Tensor | None = None
    held_inputs_NI: Tensor | None = None
    held_targets: Tensor | None = None
    held_weights_N: Tensor | None = None
    prior_OR: Tensor | None = None
    prior_RI: Tensor | None = None
    corpus_MO: Tensor | None = None
    gone_inputs_NI: Tensor | None = None
    gone_targets: Tensor | None = None
    gone_weights_N: Tensor | None = None
    mapping: mmap.mmap | None = None

    @property
    def rows(self) -> int:
        """Return N."""
        return self.inputs_NI.shape[0]

    @property
    def prior(self) -> Tensor | None:
        """Return the ΔW to shrink towards, (O, I) float64, if there is one."""
        if self.prior_OR is None or self.prior_RI is None:
            return None
        return self.prior_OR.double() @ self.prior_RI.double()

    @property
    def held_out(self) -> "TrainingData | None":
        """Return the rows of a separate held-out table, if there is one."""
        return self._table("held_")

    @property
    def gone(self) -> "TrainingData | None":
        """Return the rows to forget, if there are any."""
        return self._table("gone_")

    def _table(self, prefix: str) -> "TrainingData | None":
        inputs_NI, targets, weights_N = (getattr(self, prefix + name) for name in ("inputs_NI", "targets", "weights_N"))
        return None if inputs_NI is None else TrainingData(inputs_NI, targets, weights_N=weights_N)

    def take(self, rows_K: Tensor) -> "TrainingData":
        """Return these rows."""
        weights_K = None if self.weights_N is None else self.weights_N[rows_K]
        # `index_select` is three times as fast as indexing.
        rows = TrainingData(
            self.inputs_NI.index_select(0, rows_K), self.targets.index_select(0, rows_K), weights_N=weights_K
        )
        self.release()
        return rows

    def parts(self, rows_K: Tensor | None, most: int) -> "Iterator[TrainingData]":
        """Yield these rows (None: all) in chunks of at most `most` rows, as rows on disk may not fit in memory."""
        for begin in range(0, self.rows if rows_K is None else len(rows_K), most):
            chunk = slice(begin, begin + most)
            if rows_K is not None:
                yield self.take(rows_K[chunk])
            else:
                weights_K = None if self.weights_N is None else self.weights_N[chunk]
                yield TrainingData(self.inputs_NI[chunk], self.targets[chunk], weights_N=weights_K)
                self.release()

    def release(self) -> None:
        """Let go of the pages of a file larger than memory that were read; they are read again when they are needed."""
        if self.mapping is not None:
            self.mapping.madvise(mmap.MADV_DONTNEED)

    def weighted(self, weights_N: Tensor | None) -> "TrainingData":
        """Return the same rows with other weights."""
        return replace(self, weights_N=weights_N)

    def to(self, device: torch.device) -> "TrainingData":
        """Return the data on a device."""
        if device.type == "cpu":
            return self
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _HOST_TENSORS}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})

    @classmethod
    def open(cls, path: Path) -> "TrainingData":
        """Open the file that `write_data_file` wrote. It is mapped: read on demand, and not to be written to."""
        with path.open("rb") as file:
            return cls.of_file(file)

    @classmethod
    def of_file(cls, file: BinaryIO, *, releases: bool = False) -> "TrainingData":
        """Map an open file, which may be closed then; with `releases`, pages that were read are released."""
        mapping, content = map_file(file)
        tensors = {name: _tensor(content, entry) for name, entry in read_entries(content).items()}
        return cls(**tensors, mapping=mapping if releases else None)


class Entry(NamedTuple):
    """Tensor of a data file."""

    dtype: str
    shape: Sequence[int]
    begin: int
    """Its first byte in the file."""
    end: int


def map_file(file: BinaryIO) -> tuple[mmap.mmap, NDArray[np.uint8]]:
    """Return a shared mapping of a file, and its bytes; they stay readable after the file is closed."""
    # Not with safetensors, whose private mapping counts towards the memory limit of the process.
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return mapping, np.frombuffer(mapping, np.uint8)


def read_entries(content: NDArray[np.uint8]) -> dict[str, Entry]:
    """Return the tensors of a data file by name."""
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:begin].tobytes())
    return {
        name: Entry(entry["dtype"], entry["shape"], *(begin + offset for offset in entry["data_offsets"]))
        for name, entry in header.items()
    }


def _tensor(content: NDArray[np.uint8], entry: Entry) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        flat = torch.from_numpy(content[entry.begin : entry.end])
    return flat.view(_DTYPES[entry.dtype]).view(entry.shape)


# Tensors with an entry for each row.
ROW_TENSORS = frozenset({"inputs_NI", "targets", "weights_N", "key_N", "groups_N"})
_FACTOR_TENSORS = frozenset({"start_OR", "start_RI", "prior_OR", "prior_RI"})
_HOST_TENSORS = _FACTOR_TENSORS | {"key_N", "groups_N", "mapping"}


def write_data_file(columns: Mapping[str, Column], file: BinaryIO) -> None:
    """Write a safetensors file of training data, which may be larger than memory.

    The format is an 8-byte length, a JSON header of that length, and the tensors one after the other
    (safetensors' README).
    """
    for content in _contents(columns):
        file.write(content)


def rows_digest(columns: Mapping[str, Column]) -> str:
    """Return `sha256:` + hex of a data file with the rows alone, without the factors to start from or shrink to."""
    digest = hashlib.sha256()
    for content in _contents({name: column for name, column in columns.items() if name not in _FACTOR_TENSORS}):
        digest.update(content)
    return f"sha256:{digest.hexdigest()}"


def _contents(columns: Mapping[str, Column]) -> Iterator[bytes | memoryview]:
    """Yield the header and the tensors, those of larger dtypes first, so that each is aligned to its dtype."""
    columns = dict(sorted(columns.items(), key=lambda named: -_DTYPES[named[1].dtype].itemsize))
    entries, offset = {}, 0
    for name, column in columns.items():
        size = int(np.prod(column.shape, dtype=np.int64)) * _DTYPES[column.dtype].itemsize
        entries[name] = {"dtype": column.dtype, "shape": list(column.shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for column in columns.values():
        for part in column.parts():
            yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
