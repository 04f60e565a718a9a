"""In which shapes adapters are trained: in a few only, so that those of a fleet share them, each as if it were alone.

Linear algebra adds up in an order that depends on a matrix's shape and on where it begins in memory, and gradient
descent lets the last bit grow: where a gradient is all rounding, AdamW divides it by its own size. So the rows of each
adapter are a matrix of their own, which begins on a cache line, and whose length depends on their number alone.
"""

# G adapters · N rows of the data · K rows of one adapter, filled up · T rows of all of them, filled up
# I in_features · O out_features
# G adapters of a stack · L lanes · S steps of an epoch · K rows of a batch · T rows of all adapters, filled up
# N rows · I in_features · O out_features · W numbers of a row with all that belongs to it
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData
from adapters.training.gradient.losses import document_ids
from adapters.training.gradient.sampling import Sampler
from adapters.training.limits import CHUNK_ROWS, MAX_CACHED_OUTPUTS
from adapters.training.settings import Loss, TrainingSpec

LINE = 16
"""float32 numbers in a cache line of 64 bytes."""
VECTOR = 8
"""float32 numbers in 32 bytes. A product that begins on these came out the same wherever that was, on x86."""
_MIN_ROWS = 4
"""A product with a single row or column goes another way, which depends on how many there are in a stack."""
_MAX_BATCH_ROWS = 4096
_MAX_NUMBERS = 2**22
"""An adapter with more than this is trained from where its rows are: they would not be laid out in little memory."""


class Batch(NamedTuple):
    """What one step sees: for each adapter its rows."""

    x_GKI: Tensor
    frozen_GOK: Tensor
    """The base layer's answers."""
    targets: Tensor
    """(G, O, K) float32, or (G, K) int64."""
    weights_GK: Tensor | None
    """0 for what only fills up; None where every row counts 1."""
    documents_GK: Tensor | None
    """For `multiple_negatives`: equal targets have equal numbers, what only fills up has -1."""

    def of(self, places: Sequence[int]) -> "Batch":
        """These adapters' part."""
        places_G = torch.tensor(places, dtype=torch.int64, device=self.x_GKI.device)
        return Batch(*(None if part is None else part.index_select(0, places_G) for part in self))  # type: ignore[arg-type]


class PackedRows(NamedTuple):
    """Rows of adapters under one another, those of each filled up with its first one."""

    x_TI: Tensor
    base_outputs: Sequence[Tensor]
    """(g, O, K) each: the base layer's answers for as many adapters as have one number of rows."""
    targets_T: Tensor
    weights_T: Tensor | None
    documents_T: Tensor | None

    def answers(self) -> Tensor:
        """(T, O): the base layer's, row by row."""
        return torch.cat([frozen_gOK.transpose(1, 2).flatten(0, 1) for frozen_gOK in self.base_outputs])

    def batch(self, rows: int) -> Batch:
        """All of them, where each adapter has so many."""
        (frozen_GOK,) = self.base_outputs
        targets = self.targets_T.unflatten(0, (-1, rows))
        return Batch(
            self.x_TI.unflatten(0, (-1, rows)),
            frozen_GOK,
            targets.transpose(1, 2).contiguous() if targets.dim() == 3 else targets,
            None if self.weights_T is None else self.weights_T.unflatten(0, (-1, rows)),
            None if self.documents_T is None else self.documents_T.unflatten(0, (-1, rows)),
        )


def padded_rows(rows: int, *widths: int) -> int:
    """How many rows so many are filled up to: at most a sixteenth more, once they are many.

    A matrix of that many rows with one of these widths is whole cache lines.
    """
    least = max(_MIN_ROWS, LINE // math.gcd(LINE, *widths))
    return _round_up(rows, max(least, 1 << max(0, (rows - 1).bit_length() - 5)))


def padded_width(numbers: int) -> int:
    """The same for numbers in a row."""
    return _round_up(numbers, LINE)


def is_packed(rows: int, batch: int, base: BaseLayer) -> bool:
    """Whether an adapter with so many rows, and so many in a batch, is trained in such a shape."""
    return batch <= _MAX_BATCH_ROWS and rows * (base.in_features + 2 * base.out_features) <= _MAX_NUMBERS


def pack_rows(
    base: BaseLayer,
    data: TrainingData,
    rows: Sequence[Tensor],
    lengths: Sequence[int],
    documents_N: Tensor | None = None,
) -> PackedRows:
    """The rows of each adapter, by their numbers in `data`, filled up to its length."""
    rows_T, there_T = (part.to(base.device) for part in pad_rows(rows, torch.tensor(lengths)))
    x_TI = data.inputs_NI.index_select(0, rows_T)
    weights_T = None if data.weights_N is None else data.weights_N[rows_T]
    documents_T = None if documents_N is None else documents_N[rows_T]
    if not bool(there_T.all()):
        weights_T = there_T.float() if weights_T is None else weights_T * there_T
        documents_T = None if documents_T is None else documents_T.masked_fill(~there_T, -1)
    answers, begin = [], 0
    for K, some in itertools.groupby(lengths):
        end = begin + K * len(list(some))
        answers.append(stack_base_outputs(base, x_TI[begin:end].unflatten(0, (-1, K))))
        begin = end
    return PackedRows(x_TI, answers, data.targets.index_select(0, rows_T), weights_T, documents_T)


def pad_rows(rows: Sequence[Tensor], lengths_G: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) int64: the rows of each adapter, filled up to its length with its first one; (T,) bool: which are there."""
    counts_G = torch.tensor([len(rows_K) for rows_K in rows])
    place_T = torch.arange(int(lengths_G.sum())) - _starts(lengths_G).repeat_interleave(lengths_G)
    there_T = place_T < counts_G.repeat_interleave(lengths_G)
    begin_T = _starts(counts_G).repeat_interleave(lengths_G)
    return torch.cat(list(rows))[begin_T + place_T * there_T], there_T


def _starts(lengths_G: Tensor) -> Tensor:
    return lengths_G.cumsum(0) - lengths_G


def base_outputs(base: BaseLayer, x_NI: Tensor) -> Tensor:
    """(N, O) float32: the base layer's answers."""
    bias_O = None if base.bias_O is None else base.bias_O.float()
    return functional.linear(x_NI, base.weight_OI.float(), bias_O)


def stack_base_outputs(base: BaseLayer, x_GKI: Tensor) -> Tensor:
    """(G, O, K) in the dtype of `x_GKI`: the same, each adapter's columns a product of their own."""
    weight_OI = base.weight_OI.to(x_GKI.dtype)
    weight_GOI, x_GIK = weight_OI.expand(len(x_GKI), *weight_OI.shape), x_GKI.transpose(1, 2)
    if base.bias_O is None:
        return torch.bmm(weight_GOI, x_GIK)
    bias_O1 = base.bias_O.to(x_GKI.dtype).unsqueeze(1)
    return torch.baddbmm(bias_O1.expand(len(x_GKI), len(bias_O1), x_GKI.shape[1]), weight_GOI, x_GIK)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


SampledRows = tuple[Sampler, Tensor]
"""What is drawn for an adapter, and (N,) int64: its rows of the data."""


def open_batches(
    base: BaseLayer, data: TrainingData, spec: TrainingSpec, tasks: Sequence[SampledRows]
) -> "PackedBatches | StreamedBatches":
    """Batches that go with a stack from step to step. An adapter that has too many rows to be laid out is alone."""
    if all(is_packed(len(draws.training_K), draws.batch, base) for draws in dict(tasks)):
        return PackedBatches(base, data, spec, tasks)
    (task,) = tasks
    return StreamedBatches(base, data, spec, task)


def batch_shape(base: BaseLayer, spec: TrainingSpec, rows: int) -> tuple[int, bool] | None:
    """Adapters for whose numbers of rows this is the same train together as each would alone; None trains alone.

    How many rows a batch is filled up to, and whether it has all of them.
    """
    batch = spec.batch(rows)
    if not is_packed(rows, batch, base):
        return None
    return padded_rows(batch, base.in_features, base.out_features, spec.rank), batch == rows


class PackedBatches:
    """Of adapters whose rows are laid out; a batch is filled up to one number of rows for all of them."""

    def __init__(self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, tasks: Sequence[SampledRows]) -> None:
        widths = (base.in_features, base.out_features, spec.rank)
        self._tasks, self._device = [draws for draws, _ in tasks], base.device
        drawn = dict.fromkeys(self._tasks)
        self._rows = max(padded_rows(draws.batch, *widths) for draws in drawn)
        documents_N = document_ids(data.targets) if spec.loss is Loss.MULTIPLE_NEGATIVES else None
        self._all = all(draws.is_full_batch for draws in drawn)
        # One more than there are where batches are taken out: what fills up the short ones.
        lengths = [self._rows if self._all else padded_rows(len(rows_N) + 1, *widths) for _, rows_N in tasks]
        laid = pack_rows(base, data, [rows_N for _, rows_N in tasks], lengths, documents_N)
        self._batch: Batch | None = None
        self._whole = laid.batch(self._rows) if self._all else None
        self._live: Sequence[int] | None = None
        if self._all:
            return
        self._weighted, self._documents_T = data.weights_N is not None, laid.documents_T
        self._classes_T = laid.targets_T if laid.targets_T.dim() == 1 else None
        # Side by side: rows are fetched once a step and not three times.
        parts = [laid.x_TI, laid.answers()] + ([laid.targets_T] if self._classes_T is None else [])
        self._widths = [part.shape[1] for part in parts]
        width = sum(self._widths) + 1
        blank_TW = laid.x_TI.new_zeros(len(laid.x_TI), padded_width(width) - width)
        assert laid.weights_T is not None
        self._table_TW = torch.cat([*parts, blank_TW, laid.weights_T.unsqueeze(1)], dim=1)
        begins = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        self._begins_G1 = begins.unsqueeze(1)
        self._lanes = {draws: _BatchOrder(draws, self._rows) for draws in drawn}

    def forget(self) -> None:
        """Other tasks are live from now on."""
        self._live = self._batch = None

    def of(self, step: int, live: Sequence[int]) -> Batch:
        """The batches of a step, counted from 1, for the tasks that are live; call it for each step in turn."""
        if self._whole is not None:
            if self._batch is None:
                self._batch = self._whole if len(live) == len(self._tasks) else self._whole.of(live)
            return self._batch
        if self._live is None:
            self._live = live
            drawn = list(dict.fromkeys(self._tasks[task] for task in live))
            place = {draws: number for number, draws in enumerate(drawn)}
            self._drawn = [self._lanes[draws] for draws in drawn]
            self._lane_G = torch.tensor([place[self._tasks[task]] for task in live])
            self._live_begins_G1 = self._begins_G1[list(live)]
        rows_LK = torch.stack([lane.rows_of(step) for lane in self._drawn])
        rows_GK = (rows_LK if len(self._drawn) == 1 else rows_LK[self._lane_G]) + self._live_begins_G1
        return self._take(rows_GK.to(self._device), filled=any(lane.fills(step) for lane in self._drawn))

    def _take(self, rows_GK: Tensor, *, filled: bool) -> Batch:
        rows_T = rows_GK.flatten()
        row_GKW = self._table_TW.index_select(0, rows_T).view(*rows_GK.shape, -1)
        x_GKI, frozen_GKO, *rest = row_GKW[..., : sum(self._widths)].split(self._widths, dim=-1)
        return Batch(
            x_GKI,
            frozen_GKO.transpose(1, 2).contiguous(),
            rest[0].transpose(1, 2).contiguous() if self._classes_T is None else self._classes_T[rows_GK],
            row_GKW[..., -1].contiguous() if filled or self._weighted else None,
            None if self._documents_T is None else self._documents_T[rows_GK],
        )


class _BatchOrder:
    """Adapters for which the same is drawn: which of its rows a batch has, filled up with the one past the last."""

    def __init__(self, draws: Sampler, rows: int) -> None:
        self._draws, self._rows = draws, rows
        self._order_SK: Tensor | None = None

    def rows_of(self, step: int) -> Tensor:
        """(K,) int64; call it for each step in turn."""
        draws = self._draws
        place = (step - 1) % draws.steps_an_epoch
        if place == 0:
            draws.rows_of(step)
            self._order_SK = None
        if self._order_SK is None:
            # Not drawn anew in the middle of an epoch, which is where a checkpoint may be.
            batch, count = draws.batch, len(draws.order_K)
            self._order_SK = torch.full((draws.steps_an_epoch, self._rows), count)
            whole = count // batch
            self._order_SK[:whole, :batch] = draws.order_K[: whole * batch].view(whole, batch)
            if whole < draws.steps_an_epoch:
                self._order_SK[whole, : count - whole * batch] = draws.order_K[whole * batch :]
        return self._order_SK[place]

    def fills(self, step: int) -> bool:
        """Whether the batch of a step is short of rows."""
        draws = self._draws
        last = (step - 1) % draws.steps_an_epoch + 1
        return draws.batch < self._rows or last * draws.batch > len(draws.order_K)


def _base_outputs_in_chunks(base: BaseLayer, inputs_NI: Tensor) -> Tensor:
    """(N, O) float32: the base layer's answers to rows that lie on the disk, by way of one copy.

    A copy, as they may not begin where the processor likes numbers to begin. One, as answers would come to lie between
    many: what is freed could not be used again, and memory would grow by all of them.
    """
    frozen_NO = inputs_NI.new_empty(len(inputs_NI), base.out_features)
    copy_KI = inputs_NI.new_empty(min(CHUNK_ROWS, len(inputs_NI)), inputs_NI.shape[1])
    for begin in range(0, len(inputs_NI), CHUNK_ROWS):
        part_KI = inputs_NI[begin : begin + CHUNK_ROWS]
        mine_KI = copy_KI[: len(part_KI)].copy_(part_KI)
        frozen_NO[begin : begin + len(part_KI)] = base_outputs(base, mine_KI)
    return frozen_NO


class StreamedBatches:
    """Of one adapter with many rows, which are read where they are."""

    def __init__(self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, task: SampledRows) -> None:
        self._base, self._data = base, data
        self._draws, self._rows_N = task
        self._documents_N = document_ids(data.targets) if spec.loss is Loss.MULTIPLE_NEGATIVES else None
        self._frozen_NO: Tensor | None = None
        if data.rows * base.out_features <= MAX_CACHED_OUTPUTS:
            self._frozen_NO = _base_outputs_in_chunks(base, data.inputs_NI)
        self._batch: Batch | None = None

    def forget(self) -> None:
        """There is but one task."""

    def of(self, step: int, _live: Sequence[int]) -> Batch:
        """The batch of a step, counted from 1; call it for each step in turn."""
        if self._batch is not None:
            return self._batch
        batch = self._take(self._rows_N[self._draws.rows_of(step)])
        if self._draws.is_full_batch:
            self._batch = batch
        return batch

    def _take(self, rows_K: Tensor) -> Batch:
        data, rows_K = self._data, rows_K.to(self._base.device)
        whole = len(rows_K) == data.rows and bool((rows_K == torch.arange(data.rows, device=rows_K.device)).all())

        def take(flat: Tensor) -> Tensor:
            # All rows as they lie: nothing to copy.
            return (flat if whole else flat.index_select(0, rows_K)).unsqueeze(0)

        x_1KI, targets = take(data.inputs_NI), take(data.targets)
        frozen_1KO = base_outputs(self._base, x_1KI) if self._frozen_NO is None else take(self._frozen_NO)
        return Batch(
            x_1KI,
            frozen_1KO.transpose(1, 2).contiguous(),
            targets.transpose(1, 2).contiguous() if targets.dim() == 3 else targets,
            None if data.weights_N is None else take(data.weights_N),
            None if self._documents_N is None else take(self._documents_N),
        )
