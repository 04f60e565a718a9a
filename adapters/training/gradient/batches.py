"""The rows of each step of adapters that are trained together."""

# G adapters of a stack · L lanes · S steps of an epoch · K rows of a batch · T rows of all adapters, filled up
# N rows · I in_features · O out_features · W numbers of a row with all that belongs to it
from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData
from adapters.training.gradient.layout import Batch, frozen, is_laid, laid_numbers, laid_rows, lay
from adapters.training.gradient.losses import documents_of
from adapters.training.sampling import Draws
from adapters.training.settings import Loss, TrainingSpec

_FROZEN_AT_ONCE = 2**26
"""Numbers of the base's answers that are kept for all steps; past it they are computed batch by batch."""
_ROWS_AT_ONCE = 8192

Rows = tuple[Draws, Tensor]
"""What is drawn for an adapter, and (N,) int64: its rows of the data."""


def open_batches(
    base: BaseLayer, data: TrainingData, spec: TrainingSpec, tasks: Sequence[Rows]
) -> "LaidBatches | LooseBatches":
    """Batches that go with a stack from step to step. An adapter that has too many rows to be laid out is alone."""
    if all(is_laid(len(draws.training_K), draws.batch, base) for draws in dict(tasks)):
        return LaidBatches(base, data, spec, tasks)
    (task,) = tasks
    return LooseBatches(base, data, spec, task)


def batch_shape(base: BaseLayer, spec: TrainingSpec, rows: int) -> tuple[int, bool] | None:
    """Adapters for whose numbers of rows this is the same train together as each would alone; None trains alone.

    How many rows a batch is filled up to, and whether it has all of them.
    """
    batch = spec.batch(rows)
    if not is_laid(rows, batch, base):
        return None
    return laid_rows(batch, base.in_features, base.out_features, spec.rank), batch == rows


class LaidBatches:
    """Of adapters whose rows are laid out; a batch is filled up to one number of rows for all of them."""

    def __init__(self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, tasks: Sequence[Rows]) -> None:
        widths = (base.in_features, base.out_features, spec.rank)
        self._tasks, self._device = [draws for draws, _ in tasks], base.device
        drawn = dict.fromkeys(self._tasks)
        self._rows = max(laid_rows(draws.batch, *widths) for draws in drawn)
        documents_N = documents_of(data.targets) if spec.loss is Loss.MULTIPLE_NEGATIVES else None
        self._all = all(draws.is_full_batch for draws in drawn)
        # One more than there are where batches are taken out: what fills up the short ones.
        lengths = [self._rows if self._all else laid_rows(len(rows_N) + 1, *widths) for _, rows_N in tasks]
        laid = lay(base, data, [rows_N for _, rows_N in tasks], lengths, documents_N)
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
        blank_TW = laid.x_TI.new_zeros(len(laid.x_TI), laid_numbers(width) - width)
        assert laid.weights_T is not None
        self._table_TW = torch.cat([*parts, blank_TW, laid.weights_T.unsqueeze(1)], dim=1)
        begins = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        self._begins_G1 = begins.unsqueeze(1)
        self._lanes = {draws: _Lane(draws, self._rows) for draws in drawn}

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


class _Lane:
    """Adapters for which the same is drawn: which of its rows a batch has, filled up with the one past the last."""

    def __init__(self, draws: Draws, rows: int) -> None:
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


def _frozen_part_by_part(base: BaseLayer, inputs_NI: Tensor) -> Tensor:
    """(N, O) float32: the base layer's answers to rows that lie on the disk, by way of one copy.

    A copy, as they may not begin where the processor likes numbers to begin. One, as answers would come to lie between
    many: what is freed could not be used again, and memory would grow by all of them.
    """
    frozen_NO = inputs_NI.new_empty(len(inputs_NI), base.out_features)
    copy_KI = inputs_NI.new_empty(min(_ROWS_AT_ONCE, len(inputs_NI)), inputs_NI.shape[1])
    for begin in range(0, len(inputs_NI), _ROWS_AT_ONCE):
        part_KI = inputs_NI[begin : begin + _ROWS_AT_ONCE]
        mine_KI = copy_KI[: len(part_KI)].copy_(part_KI)
        frozen_NO[begin : begin + len(part_KI)] = frozen(base, mine_KI)
    return frozen_NO


class LooseBatches:
    """Of one adapter with many rows, which are read where they are."""

    def __init__(self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, task: Rows) -> None:
        self._base, self._data = base, data
        self._draws, self._rows_N = task
        self._documents_N = documents_of(data.targets) if spec.loss is Loss.MULTIPLE_NEGATIVES else None
        self._frozen_NO: Tensor | None = None
        if data.rows * base.out_features <= _FROZEN_AT_ONCE:
            self._frozen_NO = _frozen_part_by_part(base, data.inputs_NI)
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
        frozen_1KO = frozen(self._base, x_1KI) if self._frozen_NO is None else take(self._frozen_NO)
        return Batch(
            x_1KI,
            frozen_1KO.transpose(1, 2).contiguous(),
            targets.transpose(1, 2).contiguous() if targets.dim() == 3 else targets,
            None if data.weights_N is None else take(data.weights_N),
            None if self._documents_N is None else take(self._documents_N),
        )
