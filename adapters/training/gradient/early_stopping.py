"""The held-out loss on the way: the best step of each adapter, and when to wait no longer for a better one."""

# G adapters of a stack · K held-out rows · I in_features · O out_features · P numbers of a state
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import evaluate_factors
from adapters.training.gradient.batches import Batch, is_packed, pack_rows, padded_rows
from adapters.training.gradient.losses import (
    add_low_rank_stack,
    compute_stack_outputs,
    document_ids,
    row_losses,
    weighted_mean,
)
from adapters.training.gradient.stack import Stack
from adapters.training.limits import CHUNK_ROWS
from adapters.training.settings import Loss, TrainingSpec


class _HeldOutBlock(NamedTuple):
    """Adapters with held-out rows of one shape."""

    places: Mapping[int, int]
    """Of its tasks in the batch."""
    batch: Batch


class EarlyStopping:
    """Restores the best step; ends an adapter after `spec.patience` evaluations without a better one.

    The start counts as step 0: where no step is better, that is what is restored.
    """

    def __init__(
        self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, stack: Stack, held: Sequence[Tensor]
    ) -> None:
        self._base, self._data, self._spec, self._held = base, data, spec, held
        self._documents_N = document_ids(data.targets) if spec.loss is Loss.MULTIPLE_NEGATIVES else None
        self._blocks = [] if spec.loss is Loss.MULTIPLE_NEGATIVES else _pack_held_out(base, data, spec, held)
        self._laid = {task for block in self._blocks for task in block.places}
        self._every = [spec.evaluate_every or stack.steps_an_epoch(task) for task in range(len(held))]
        self.best_GP = stack.factors_GP.clone()
        self.best_step = [0] * len(held)
        self.without = [0] * len(held)
        self.best_loss = self._losses(stack, range(len(held)))

    def look(self, stack: Stack) -> None:
        """Evaluate the adapters whose turn it is after this step or that have ended, end those that are waited for no
        longer, and have those that end do so with their best step."""
        due = [
            place
            for place, task in enumerate(stack.live)
            if stack.step % self._every[task] == 0 or stack.has_ended(task)
        ]
        if not due:
            return
        for place, loss in zip(due, self._losses(stack, due), strict=True):
            task = stack.live[place]
            if stack.has_failed(task):
                continue
            if loss < self.best_loss[task] - self._spec.min_delta:
                self.best_loss[task], self.best_step[task], self.without[task] = loss, stack.step, 0
                self.best_GP[task] = stack.factors_GP[place]
            else:
                self.without[task] += 1
            if self.without[task] >= (self._spec.patience or math.inf) or stack.has_ended(task):
                stack.end(place, factors_P=self.best_GP[task], step=self.best_step[task])

    def _losses(self, stack: Stack, places: Sequence[int]) -> list[float]:
        """The held-out loss of those at these places of the stack, with the factors of now."""
        tasks = [stack.live[place] for place in places]
        if self._spec.loss is Loss.MULTIPLE_NEGATIVES:
            return [self._negatives(stack, place, task) for place, task in zip(places, tasks, strict=True)]
        losses = {
            task: self._of_parts(stack, place, task)
            for place, task in zip(places, tasks, strict=True)
            if task not in self._laid
        }
        for block in self._blocks:
            mine = [(place, task) for place, task in zip(places, tasks, strict=True) if task in block.places]
            if mine:
                batch = (
                    block.batch
                    if len(mine) == len(block.places)
                    else block.batch.of([block.places[task] for _, task in mine])
                )
                factors = stack.factors([place for place, _ in mine])
                y_GOK = add_low_rank_stack(batch.frozen_GOK, batch.x_GKI, factors, self._spec.scaling)
                losses_G = weighted_mean(row_losses(self._spec, y_GOK, batch.targets), batch.weights_GK)
                losses |= zip((task for _, task in mine), losses_G.tolist(), strict=True)
        return [losses[task] for task in tasks]

    def _of_parts(self, stack: Stack, place: int, task: int) -> float:
        """Of one adapter whose held-out rows are too many to be laid out."""
        factors = stack.factors([place])
        total = weight = 0.0
        for part in self._data.parts(self._held[task].to(self._base.device), CHUNK_ROWS):
            y_1OK = compute_stack_outputs(self._base, part.inputs_NI.unsqueeze(0), factors, self._spec.scaling)
            targets = part.targets.unsqueeze(0)
            targets = targets.transpose(1, 2) if targets.dim() == 3 else targets
            weights_1K = (
                torch.ones(1, part.rows, device=self._base.device)
                if part.weights_N is None
                else part.weights_N.unsqueeze(0)
            )
            rows = float(weights_1K.sum())
            total += float(weighted_mean(row_losses(self._spec, y_1OK, targets), weights_1K)) * rows
            weight += rows
        return total / max(weight, 1e-300)

    def _negatives(self, stack: Stack, place: int, task: int) -> float:
        rows_K = self._held[task].to(self._base.device)
        assert self._documents_N is not None
        a_GOR, b_GRI, bias_GO = stack.factors([place])
        factors = Factors(a_GOR[0], b_GRI[0], None if bias_GO is None else bias_GO[0])
        return evaluate_factors(self._base, self._data, rows_K, self._spec, factors, self._documents_N)["loss"]


def _pack_held_out(
    base: BaseLayer, data: TrainingData, spec: TrainingSpec, held: Sequence[Tensor]
) -> list[_HeldOutBlock]:
    tasks: dict[int, list[int]] = {}
    for task, rows_K in enumerate(held):
        if is_packed(len(rows_K), len(rows_K), base):
            length = padded_rows(len(rows_K), base.in_features, base.out_features, spec.rank)
            tasks.setdefault(length, []).append(task)
    return [
        _HeldOutBlock(
            {task: place for place, task in enumerate(mine)},
            pack_rows(base, data, [held[task] for task in mine], [length] * len(mine)).batch(length),
        )
        for length, mine in tasks.items()
    ]
