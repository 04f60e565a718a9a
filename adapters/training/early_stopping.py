"""The held-out loss on the way: the best step of each adapter, and when to wait no longer for a better one."""

# G adapters of a stack · K held-out rows · I in_features · O out_features · P numbers of a state
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.base_layer import BaseLayer
from adapters.training.closed_form import Factors
from adapters.training.data import TrainingData
from adapters.training.evaluation import reached
from adapters.training.gradient import Stack
from adapters.training.objective import documents_of, outputs_stack, row_losses, weighted_mean
from adapters.training.spec import Loss, TrainingSpec

_CHUNK_ROWS = 8192


class EarlyStopping:
    """Restores the best step; ends an adapter after `spec.patience` evaluations without a better one.

    The start counts as step 0: where no step is better, that is what is restored.
    """

    def __init__(
        self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, stack: Stack, held: Sequence[Tensor]
    ) -> None:
        self._base, self._data, self._spec, self._held = base, data, spec, held
        self._documents_N = documents_of(data.targets) if spec.loss is Loss.MULTIPLE_NEGATIVES else None
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
            if stack.step % (self._spec.evaluate_every or stack.steps_an_epoch(task)) == 0 or stack.has_ended(task)
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
        K = max(len(self._held[task]) for task in tasks)
        rows_GK = torch.zeros(len(tasks), K, dtype=torch.int64)
        there_GK = torch.zeros(len(tasks), K)
        for place, task in enumerate(tasks):
            rows_GK[place, : len(self._held[task])] = self._held[task]
            there_GK[place, : len(self._held[task])] = 1
        factors = stack.factors(places)
        total_G = torch.zeros(len(tasks), dtype=torch.float64)
        weight_G = torch.zeros(len(tasks), dtype=torch.float64)
        for begin in range(0, K, _CHUNK_ROWS):
            rows_GC = rows_GK[:, begin : begin + _CHUNK_ROWS].to(self._base.device)
            weights_GC = there_GK[:, begin : begin + _CHUNK_ROWS].to(self._base.device)
            if self._data.weights_N is not None:
                weights_GC = weights_GC * self._data.weights_N[rows_GC]
            y_GOC = outputs_stack(self._base, self._data.inputs_NI[rows_GC], factors, self._spec.scaling)
            targets = self._data.targets[rows_GC]
            targets = targets.transpose(1, 2) if targets.dim() == 3 else targets
            mean_G = weighted_mean(row_losses(self._spec, y_GOC, targets), weights_GC)
            total_G += (mean_G * weights_GC.sum(dim=1)).double().cpu()
            weight_G += weights_GC.sum(dim=1).double().cpu()
        return [float(loss) for loss in total_G / weight_G.clamp_min(1e-300)]

    def _negatives(self, stack: Stack, place: int, task: int) -> float:
        rows_K = self._held[task].to(self._base.device)
        assert self._documents_N is not None
        a_GOR, b_GRI, bias_GO = stack.factors([place])
        factors = Factors(a_GOR[0], b_GRI[0], None if bias_GO is None else bias_GO[0])
        return reached(self._base, self._data, rows_K, self._spec, factors, self._documents_N)["loss"]
