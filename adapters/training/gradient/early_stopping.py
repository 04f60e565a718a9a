"""Early stopping: evaluation of the held-out loss during training, and the best step of each adapter."""

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
    """Adapters whose packed held-out rows have one shape."""

    positions: Mapping[int, int]
    """Position in the batch, by entry."""
    batch: Batch


class EarlyStopping:
    """Ends an adapter after `spec.patience` evaluations without improvement, and restores its best step.

    The initial factors are step 0. They are restored if no step is better.
    """

    def __init__(
        self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, stack: Stack, held: Sequence[Tensor]
    ) -> None:
        self._base, self._data, self._spec, self._held = base, data, spec, held
        self._documents_N = document_ids(data.targets) if spec.loss is Loss.MULTIPLE_NEGATIVES else None
        self._blocks = [] if spec.loss is Loss.MULTIPLE_NEGATIVES else _pack_held_out(base, data, spec, held)
        self._packed_entries = {task for block in self._blocks for task in block.positions}
        self._every = [spec.evaluate_every or stack.steps_an_epoch(task) for task in range(len(held))]
        self.best_GP = stack.factors_GP.clone()
        self.best_step = [0] * len(held)
        self.without = [0] * len(held)
        self.best_loss = self._losses(stack, range(len(held)))

    def evaluate(self, stack: Stack) -> None:
        """Evaluate the adapters that are due after this step or have ended.

        Adapters that end, or are out of patience, end with their best step.
        """
        due = [
            position
            for position, task in enumerate(stack.live)
            if stack.step % self._every[task] == 0 or stack.has_ended(task)
        ]
        if not due:
            return
        for position, loss in zip(due, self._losses(stack, due), strict=True):
            task = stack.live[position]
            if stack.has_failed(task):
                continue
            if loss < self.best_loss[task] - self._spec.min_delta:
                self.best_loss[task], self.best_step[task], self.without[task] = loss, stack.step, 0
                self.best_GP[task] = stack.factors_GP[position]
            else:
                self.without[task] += 1
            if self.without[task] >= (self._spec.patience or math.inf) or stack.has_ended(task):
                stack.end(position, factors_P=self.best_GP[task], step=self.best_step[task])

    def _losses(self, stack: Stack, positions: Sequence[int]) -> list[float]:
        """Return the held-out losses with the current factors, for these positions of the stack."""
        tasks = [stack.live[position] for position in positions]
        if self._spec.loss is Loss.MULTIPLE_NEGATIVES:
            return [self._negatives(stack, position, task) for position, task in zip(positions, tasks, strict=True)]
        losses = {
            task: self._of_parts(stack, position, task)
            for position, task in zip(positions, tasks, strict=True)
            if task not in self._packed_entries
        }
        for block in self._blocks:
            members = [
                (position, task) for position, task in zip(positions, tasks, strict=True) if task in block.positions
            ]
            if members:
                batch = (
                    block.batch
                    if len(members) == len(block.positions)
                    else block.batch.select([block.positions[task] for _, task in members])
                )
                factors = stack.factors([position for position, _ in members])
                y_GOK = add_low_rank_stack(batch.base_GOK, batch.x_GKI, factors, self._spec.scaling)
                losses_G = weighted_mean(row_losses(self._spec, y_GOK, batch.targets), batch.weights_GK)
                losses |= zip((task for _, task in members), losses_G.tolist(), strict=True)
        return [losses[task] for task in tasks]

    def _of_parts(self, stack: Stack, position: int, task: int) -> float:
        """Return the held-out loss of one adapter with too many rows to be packed."""
        factors = stack.factors([position])
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

    def _negatives(self, stack: Stack, position: int, task: int) -> float:
        rows_K = self._held[task].to(self._base.device)
        assert self._documents_N is not None
        a_GOR, b_GRI, bias_GO = stack.factors([position])
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
            {task: position for position, task in enumerate(members)},
            pack_rows(base, data, [held[task] for task in members], [length] * len(members)).batch(length),
        )
        for length, members in tasks.items()
    ]
