"""Early stopping: evaluation of the held-out loss during training, and the best step of each adapter."""

# G adapters of a stack · K held-out rows · I in_features · O out_features · P numbers of a state
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors
from adapters.training.closed_form.statistics import base_outputs
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import evaluate_factors
from adapters.training.gradient.batches import Batch, is_packed, pack_rows, padded_rows
from adapters.training.gradient.losses import (
    add_low_rank_stack,
    document_ids,
    row_losses,
    target_columns,
    weighted_mean,
)
from adapters.training.gradient.stack import Stack
from adapters.training.limits import CHUNK_ROWS
from adapters.training.settings import TrainingSpec


class EarlyStopping:
    """Ends an adapter after `spec.patience` evaluations without improvement, and restores its best step.

    The initial factors are step 0. They are restored if no step is better.
    """

    def __init__(
        self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, stack: Stack, held: Sequence[Tensor]
    ) -> None:
        self._base, self._data, self._spec, self._held = base, data, spec, held
        self._documents_N = document_ids(spec, data.targets)
        self._blocks = _pack_held_out(base, data, spec, held) if self._documents_N is None else []
        self._every = [spec.evaluate_every or entry.sampler.steps_an_epoch for entry in stack.entries]
        self.best_GP = stack.factors_GP.clone()
        self.best_step = [0] * len(held)
        self.without = [0] * len(held)
        self.best_loss = self._losses(stack, stack.live)

    def evaluate(self, stack: Stack) -> None:
        """Evaluate the adapters that are due after this step or have ended.

        Adapters that end, or are out of patience, end with their best step.
        """
        due = [
            position
            for position, entry in enumerate(stack.live)
            if stack.step % self._every[entry] == 0 or entry in stack.trained
        ]
        if not due:
            return
        for position, loss in zip(due, self._losses(stack, due), strict=True):
            entry = stack.live[position]
            trained = stack.trained.get(entry)
            if trained is not None and trained.error is not None:
                continue
            if loss < self.best_loss[entry] - self._spec.min_delta:
                self.best_loss[entry], self.best_step[entry], self.without[entry] = loss, stack.step, 0
                self.best_GP[entry] = stack.factors_GP[position]
            else:
                self.without[entry] += 1
            if self.without[entry] >= (self._spec.patience or math.inf) or trained is not None:
                stack.end(position, factors_P=self.best_GP[entry], step=self.best_step[entry])

    def _losses(self, stack: Stack, positions: Sequence[int]) -> list[float]:
        """Return the held-out losses with the current factors, for these positions of the stack."""
        position_of = {stack.live[position]: position for position in positions}
        losses: dict[int, float] = {}
        for index_of, batch in self._blocks:
            members = [entry for entry in position_of if entry in index_of]
            if members:
                if len(members) < len(index_of):
                    batch = batch.select([index_of[entry] for entry in members])
                factors = stack.factors([position_of[entry] for entry in members])
                y_GOK = add_low_rank_stack(batch.base_GOK, batch.x_GKI, factors, self._spec.scaling)
                losses_G = weighted_mean(row_losses(self._spec, y_GOK, batch.targets), batch.weights_GK)
                losses |= zip(members, losses_G.tolist(), strict=True)
        return [
            losses[entry] if entry in losses else self._loss_in_parts(stack.factors([position]), self._held[entry])
            for entry, position in position_of.items()
        ]

    def _loss_in_parts(self, factors: Factors, rows_K: Tensor) -> float:
        """Return the held-out loss of one adapter whose rows are not packed."""
        spec, rows_K = self._spec, rows_K.to(self._base.device)
        if self._documents_N is not None:
            return evaluate_factors(self._base, self._data, rows_K, spec, factors.at(0), self._documents_N)["loss"]
        total = weight = 0.0
        for part in self._data.parts(rows_K, CHUNK_ROWS):
            x_1KI = part.inputs_NI.unsqueeze(0)
            base_1OK = base_outputs(self._base, x_1KI).transpose(1, 2)
            y_1OK = add_low_rank_stack(base_1OK, x_1KI, factors, spec.scaling)
            weights_K = x_1KI.new_ones(part.rows) if part.weights_N is None else part.weights_N
            losses_1K = row_losses(spec, y_1OK, target_columns(part.targets.unsqueeze(0)))
            part_weight = float(weights_K.sum())
            total += float(weighted_mean(losses_1K, weights_K.unsqueeze(0))) * part_weight
            weight += part_weight
        return total / max(weight, 1e-300)


def _pack_held_out(
    base: BaseLayer, data: TrainingData, spec: TrainingSpec, held: Sequence[Tensor]
) -> list[tuple[Mapping[int, int], Batch]]:
    """Return a batch of the adapters whose held-out rows have one shape, with the index in it of each entry."""
    entries: dict[int, list[int]] = {}
    for entry, rows_K in enumerate(held):
        if is_packed(len(rows_K), len(rows_K), base):
            length = padded_rows(len(rows_K), base.in_features, base.out_features, spec.rank)
            entries.setdefault(length, []).append(entry)
    return [
        (
            {entry: index for index, entry in enumerate(members)},
            pack_rows(base, data, [held[entry] for entry in members], [length] * len(members)).batch(length),
        )
        for length, members in entries.items()
    ]
