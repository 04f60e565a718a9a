"""Batches of the rows of adapters that are trained together, each adapter's rows padded to one of a few shapes.

The order in which linear algebra adds depends on a matrix's shape and on its alignment in memory. Gradient descent
amplifies a difference in the last bit: if a gradient is only rounding, AdamW divides it by its own size. So that an
adapter of a fleet gets the same result as alone, its rows are a matrix of their own, which begins on a cache line and
whose length depends only on their number.
"""

# G adapters of a stack · D different orders · S steps of an epoch · K rows of a batch or of one adapter, padded
# T rows of all adapters, padded · N rows of the data · I in_features · O out_features · W numbers of a row and its data
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.statistics import base_outputs
from adapters.training.data_file import TrainingData
from adapters.training.gradient.losses import document_ids, target_columns
from adapters.training.gradient.sampling import StackEntry
from adapters.training.limits import CHUNK_ROWS, MAX_CACHED_OUTPUTS
from adapters.training.settings import TrainingSpec

# Number of float32 in a cache line of 64 bytes.
LINE = 16
# Number of float32 in 32 bytes. On x86, products that begin on a multiple of this had the same bits anywhere.
VECTOR = 8
# Fewest rows. A product with a single row or column uses another algorithm, which depends on the stack.
_MIN_ROWS = 4
_MAX_BATCH_ROWS = 4096
# Most numbers of one adapter's packed rows. An adapter with more rows is trained alone, without a packed copy.
_MAX_NUMBERS = 2**22


class Batch(NamedTuple):
    """Rows of one step, for each adapter of a stack."""

    x_GKI: Tensor
    base_GOK: Tensor
    """Outputs of the base layer."""
    targets: Tensor
    """(G, O, K) float32, or (G, K) int64."""
    weights_GK: Tensor | None
    """0 for padding; None if every row has weight 1."""
    documents_GK: Tensor | None
    """For `multiple_negatives`: equal numbers for equal targets, -1 for padding."""

    @classmethod
    def of_rows(
        cls, x_GKI: Tensor, base_GKO: Tensor, targets: Tensor, weights_GK: Tensor | None, documents_GK: Tensor | None
    ) -> "Batch":
        """Return the batch with outputs and targets, (G, K, O) or (G, K), turned into columns."""
        base_GOK = base_GKO.transpose(1, 2).contiguous()
        return cls(x_GKI, base_GOK, target_columns(targets).contiguous(), weights_GK, documents_GK)

    def select(self, positions: Sequence[int]) -> "Batch":
        """Return the batch of the adapters at these positions."""
        positions_G = torch.tensor(positions, dtype=torch.int64, device=self.x_GKI.device)
        return Batch(*(None if part is None else part.index_select(0, positions_G) for part in self))  # type: ignore[arg-type]


class PackedRows(NamedTuple):
    """Concatenated rows of several adapters, each padded with its first row."""

    x_TI: Tensor
    base_TO: Tensor
    """Outputs of the base layer."""
    targets_T: Tensor
    weights_T: Tensor | None
    documents_T: Tensor | None

    def batch(self, rows: int) -> Batch:
        """Return one batch of all rows, for adapters that all have `rows` rows."""
        return Batch.of_rows(*(None if part is None else part.unflatten(0, (-1, rows)) for part in self))  # type: ignore[arg-type]


def padded_rows(rows: int, *widths: int) -> int:
    """Return the number of rows after padding, at most a sixteenth more if they are many.

    A matrix of that many rows with one of these widths is a whole number of cache lines.
    """
    least = max(_MIN_ROWS, LINE // math.gcd(LINE, *widths))
    return _round_up(rows, max(least, 1 << max(0, (rows - 1).bit_length() - 5)))


def padded_width(numbers: int) -> int:
    """Return the width of a row after padding to whole cache lines."""
    return _round_up(numbers, LINE)


def is_packed(rows: int, batch: int, base: BaseLayer) -> bool:
    """Return whether an adapter with so many rows, and rows in a batch, is trained from packed rows."""
    return batch <= _MAX_BATCH_ROWS and rows * (base.in_features + 2 * base.out_features) <= _MAX_NUMBERS


def pack_rows(
    base: BaseLayer,
    data: TrainingData,
    rows: Sequence[Tensor],
    lengths: Sequence[int],
    documents_N: Tensor | None = None,
) -> PackedRows:
    """Pack the rows of each adapter, given by their indices in `data`, padded to its length."""
    rows_T, is_row_T = (part.to(base.device) for part in pad_rows(rows, torch.tensor(lengths)))
    x_TI = data.inputs_NI.index_select(0, rows_T)
    weights_T = None if data.weights_N is None else data.weights_N[rows_T]
    documents_T = None if documents_N is None else documents_N[rows_T]
    if not bool(is_row_T.all()):
        weights_T = is_row_T.float() if weights_T is None else weights_T * is_row_T
        documents_T = None if documents_T is None else documents_T.masked_fill(~is_row_T, -1)
    base_parts, begin = [], 0
    for K, run in itertools.groupby(lengths):
        end = begin + K * len(list(run))
        base_gOK = stack_base_outputs(base, x_TI[begin:end].unflatten(0, (-1, K)))
        base_parts.append(base_gOK.transpose(1, 2).flatten(0, 1))
        begin = end
    return PackedRows(x_TI, torch.cat(base_parts), data.targets.index_select(0, rows_T), weights_T, documents_T)


def pad_rows(rows: Sequence[Tensor], lengths_G: Tensor) -> tuple[Tensor, Tensor]:
    """Pad the rows of each adapter to its length with its first row: (T,) int64, and (T,) bool, False for padding."""
    counts_G = torch.tensor([len(rows_K) for rows_K in rows])
    offset_T = torch.arange(int(lengths_G.sum())) - _starts(lengths_G).repeat_interleave(lengths_G)
    is_row_T = offset_T < counts_G.repeat_interleave(lengths_G)
    begin_T = _starts(counts_G).repeat_interleave(lengths_G)
    return torch.cat(list(rows))[begin_T + offset_T * is_row_T], is_row_T


def _starts(lengths_G: Tensor) -> Tensor:
    return lengths_G.cumsum(0) - lengths_G


def stack_base_outputs(base: BaseLayer, x_GKI: Tensor) -> Tensor:
    """Return the outputs of the base layer, (G, K, I) -> (G, O, K) in the dtype of x, one product per adapter."""
    weight_OI = base.weight_OI.to(x_GKI.dtype)
    weight_GOI, x_GIK = weight_OI.expand(len(x_GKI), *weight_OI.shape), x_GKI.transpose(1, 2)
    if base.bias_O is None:
        return torch.bmm(weight_GOI, x_GIK)
    bias_O1 = base.bias_O.to(x_GKI.dtype).unsqueeze(1)
    return torch.baddbmm(bias_O1.expand(len(x_GKI), len(bias_O1), x_GKI.shape[1]), weight_GOI, x_GIK)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def open_batches(
    base: BaseLayer, data: TrainingData, spec: TrainingSpec, entries: Sequence[StackEntry]
) -> "FullBatches | MiniBatches | StreamedBatches":
    """Return the batches of a stack. An adapter with too many rows to be packed is the only one in its stack."""
    samplers = {entry.sampler for entry in entries}
    if not all(is_packed(len(sampler.training_K), sampler.batch, base) for sampler in samplers):
        (entry,) = entries
        return StreamedBatches(base, data, spec, entry)
    kind = FullBatches if all(sampler.is_full_batch for sampler in samplers) else MiniBatches
    return kind(base, data, spec, entries)


def batch_shape(base: BaseLayer, spec: TrainingSpec, rows: int) -> tuple[int, bool] | None:
    """Return the padded rows of a batch and whether a batch is all rows; None for an adapter that is trained alone.

    Adapters with equal batch shapes can be trained in one stack, each with the result that it has alone.
    """
    batch = spec.batch(rows)
    if not is_packed(rows, batch, base):
        return None
    return padded_rows(batch, base.in_features, base.out_features, spec.rank), batch == rows


def _batch_rows(base: BaseLayer, spec: TrainingSpec, entries: Sequence[StackEntry]) -> int:
    """Return the rows of each batch of a stack after padding."""
    return max(padded_rows(entry.sampler.batch, base.in_features, base.out_features, spec.rank) for entry in entries)


class FullBatches:
    """Batch of all rows of each adapter, the same in each step."""

    def __init__(self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, entries: Sequence[StackEntry]) -> None:
        rows = _batch_rows(base, spec, entries)
        packed = pack_rows(
            base, data, [entry.rows_K for entry in entries], [rows] * len(entries), document_ids(spec, data.targets)
        )
        self._all = self._batch = packed.batch(rows)

    def keep(self, live: Sequence[int]) -> None:
        """Keep the batches of the live entries alone."""
        self._batch = self._all.select(live)

    def batch_at(self, _step: int) -> Batch:
        """Return the batch of the live entries."""
        return self._batch


class MiniBatches:
    """Batches that are parts of the rows of each adapter, in the order of its sampler, padded to one length."""

    def __init__(self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, entries: Sequence[StackEntry]) -> None:
        self._entries, self._device = entries, base.device
        self._rows = _batch_rows(base, spec, entries)
        # One row more than the adapter has is the padding of short batches.
        widths = (base.in_features, base.out_features, spec.rank)
        lengths = [padded_rows(len(entry.rows_K) + 1, *widths) for entry in entries]
        packed = pack_rows(base, data, [entry.rows_K for entry in entries], lengths, document_ids(spec, data.targets))
        self._is_weighted, self._documents_T = data.weights_N is not None, packed.documents_T
        self._classes_T = packed.targets_T if packed.targets_T.dim() == 1 else None
        # In one table, so that a step fetches rows once instead of three times.
        parts = [packed.x_TI, packed.base_TO] + ([packed.targets_T] if self._classes_T is None else [])
        self._widths = [part.shape[1] for part in parts]
        width = sum(self._widths) + 1
        padding_TW = packed.x_TI.new_zeros(len(packed.x_TI), padded_width(width) - width)
        assert packed.weights_T is not None
        self._table_TW = torch.cat([*parts, padding_TW, packed.weights_T.unsqueeze(1)], dim=1)
        self._begins_G1 = torch.tensor([0, *lengths[:-1]]).cumsum(0).unsqueeze(1)
        self.keep(range(len(entries)))

    def keep(self, live: Sequence[int]) -> None:
        """Keep the batches of the live entries alone."""
        samplers = [self._entries[task].sampler for task in live]
        numbers = {sampler: number for number, sampler in enumerate(dict.fromkeys(samplers))}
        self._live_samplers = list(numbers)
        self._order_index_G = torch.tensor([numbers[sampler] for sampler in samplers], dtype=torch.int64)
        self._live_begins_G1 = self._begins_G1[list(live)]

    def batch_at(self, step: int) -> Batch:
        """Return the batches of a step, which counts from 1, for the live entries. Call it for each step in order."""
        orders = [sampler.batch_rows(step) for sampler in self._live_samplers]
        is_padded = min(map(len, orders)) < self._rows
        if is_padded:
            orders = [
                functional.pad(rows_K, (0, self._rows - len(rows_K)), value=len(sampler.training_K))
                for sampler, rows_K in zip(self._live_samplers, orders, strict=True)
            ]
        rows_DK = torch.stack(orders)
        rows_GK = (rows_DK if len(orders) == 1 else rows_DK[self._order_index_G]) + self._live_begins_G1
        rows_GK = rows_GK.to(self._device)
        row_GKW = self._table_TW.index_select(0, rows_GK.flatten()).view(*rows_GK.shape, -1)
        x_GKI, base_GKO, *targets = row_GKW[..., : sum(self._widths)].split(self._widths, dim=-1)
        return Batch.of_rows(
            x_GKI,
            base_GKO,
            targets[0] if self._classes_T is None else self._classes_T[rows_GK],
            row_GKW[..., -1].contiguous() if is_padded or self._is_weighted else None,
            None if self._documents_T is None else self._documents_T[rows_GK],
        )


def _base_outputs_in_chunks(base: BaseLayer, inputs_NI: Tensor) -> Tensor:
    """Return the outputs of the base layer for rows on disk, (N, O) float32, with one buffer for all chunks.

    The chunks are copied, because the rows on disk may not be aligned. One buffer is used, because outputs between
    freed buffers would fragment the memory.
    """
    base_NO = inputs_NI.new_empty(len(inputs_NI), base.out_features)
    copy_KI = inputs_NI.new_empty(min(CHUNK_ROWS, len(inputs_NI)), inputs_NI.shape[1])
    for begin in range(0, len(inputs_NI), CHUNK_ROWS):
        part_KI = inputs_NI[begin : begin + CHUNK_ROWS]
        copied_KI = copy_KI[: len(part_KI)].copy_(part_KI)
        base_NO[begin : begin + len(part_KI)] = base_outputs(base, copied_KI)
    return base_NO


class StreamedBatches:
    """Batches of one adapter with many rows, which are read from the data for each step."""

    def __init__(self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, entry: StackEntry) -> None:
        self._base, self._data, self._entry = base, data, entry
        self._documents_N = document_ids(spec, data.targets)
        self._base_NO: Tensor | None = None
        if data.rows * base.out_features <= MAX_CACHED_OUTPUTS:
            self._base_NO = _base_outputs_in_chunks(base, data.inputs_NI)
        self._batch: Batch | None = None

    def keep(self, _live: Sequence[int]) -> None:
        """Do nothing, because the stack has only one entry."""

    def batch_at(self, step: int) -> Batch:
        """Return the batch of a step, which counts from 1. Call it for each step in order."""
        sampler = self._entry.sampler
        if self._batch is None or not sampler.is_full_batch:
            self._batch = self._take(self._entry.rows_K[sampler.batch_rows(step)].to(self._base.device))
        return self._batch

    def _take(self, rows_K: Tensor) -> Batch:
        data = self._data
        # If the batch is all rows in order, nothing is copied.
        is_all = len(rows_K) == data.rows and bool((rows_K == torch.arange(data.rows, device=rows_K.device)).all())

        def take(part: Tensor) -> Tensor:
            return (part if is_all else part.index_select(0, rows_K)).unsqueeze(0)

        x_1KI = take(data.inputs_NI)
        return Batch.of_rows(
            x_1KI,
            base_outputs(self._base, x_1KI) if self._base_NO is None else take(self._base_NO),
            take(data.targets),
            None if data.weights_N is None else take(data.weights_N),
            None if self._documents_N is None else take(self._documents_N),
        )
