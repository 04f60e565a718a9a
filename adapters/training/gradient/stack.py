"""Stack of adapters that are trained together by gradient descent on mini-batches, each as if it were alone."""

# G adapters of a stack · K rows of a batch · I in_features · O out_features · R rank · P numbers of the factors, padded
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import Diverged
from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors
from adapters.training.data_file import TrainingData
from adapters.training.gradient.batches import LINE, VECTOR, Batch, open_batches, padded_width
from adapters.training.gradient.losses import gradient_scale, loss_and_gradient
from adapters.training.gradient.optimizer import Optimizer, learning_rate
from adapters.training.gradient.sampling import StackEntry
from adapters.training.limits import HISTORY_LENGTH
from adapters.training.settings import TrainingSpec

# Steps, each with the loss of its batch before the update.
History = list[tuple[int, float]]
# Callback after each step, with the step, its loss and the history.
ReportStep = Callable[[int, float, History], None]


@dataclass(slots=True, eq=False)
class TrainedFactors:
    """Result of the training of one adapter."""

    factors: Factors
    step: int
    """The step whose factors these are."""
    steps: int
    """Number of steps taken."""
    error: Diverged | None = None


class Stack:
    """Factors and optimizer state of adapters that are trained together."""

    def __init__(self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, entries: Sequence[StackEntry]) -> None:
        self._base, self._spec, self.entries = base, spec, entries
        # Rank 1 is trained as rank 2 with zeros, which stay zeros: products with a single row differ (see `batches`).
        self._rank = max(2, spec.rank)
        self._sizes = (base.out_features * self._rank, self._rank * base.in_features, base.out_features * spec.bias)
        self._widths = [padded_width(size) for size in self._sizes]
        # The whole width is a multiple of a vector, because the remainder of a tensor may be rounded differently.
        self._widths[-1] += -sum(self._widths) % (2 * LINE)
        self.step = 0
        self.history: History = []
        # Adapters with one sampler share their initial factors.
        starts = {id(entry.start): entry.start for entry in entries}
        flat = {key: self._flat(*start) for key, start in starts.items()}
        self.factors_GP = torch.stack([flat[id(entry.start)] for entry in entries]).to(base.device)
        self.optimizer = Optimizer(spec, self.factors_GP)
        # Entries that are still trained, in the order of the rows of `factors_GP`.
        self.live = list(range(len(entries)))
        # Results, by entry.
        self.trained: dict[int, TrainedFactors] = {}
        # Whether an entry has ended since the last `drop`.
        self.some_ended = False
        self._steps = [entry.sampler.steps for entry in entries]
        self.steps = max(self._steps)
        self._next_end = min(self._steps)
        self._batches = open_batches(base, data, spec, entries)
        self._batch: Batch | None = None
        self._share: Tensor | float | None = None
        self._reset_gradients()

    def advance(self) -> float:
        """Take one step with every live adapter; return the mean of their losses before the update."""
        self.step += 1
        batch = self._batches.batch_at(self.step)
        a_GOR, b_GRI, bias_GO = self._factors
        h_GRK = b_GRI @ batch.x_GKI.transpose(1, 2)
        y_GOK = torch.baddbmm(batch.base_GOK, a_GOR, h_GRK, alpha=self._spec.scaling)
        if bias_GO is not None:
            y_GOK.add_(bias_GO.unsqueeze(2), alpha=self._spec.scaling)
        if batch is not self._batch:
            self._batch, self._share = batch, gradient_scale(self._spec, y_GOK, batch.weights_GK)
        loss_G, gradient_GOK = loss_and_gradient(
            self._spec, y_GOK, batch.targets, batch.weights_GK, batch.documents_GK, self._share
        )
        if self._spec.scaling != 1:
            gradient_GOK.mul_(self._spec.scaling)
        gradients = self._gradients
        _multiply_into(gradients.a_OR, gradient_GOK, h_GRK.transpose(1, 2))
        _multiply_into(gradients.b_RI, a_GOR.transpose(1, 2) @ gradient_GOK, batch.x_GKI)
        if gradients.bias_O is not None:
            gradients.bias_O.copy_(gradient_GOK.sum(dim=2))
        self.optimizer.update(self.factors_GP, self._gradients_GP, self._rates(), step=self.step)
        return self._finish_ended(loss_G)

    def factors(self, positions: Sequence[int]) -> Factors:
        """Return the current factors at these positions of the stack. Rank 1 has a second column and row of zeros."""
        return self._factors if len(positions) == len(self.live) else self._views(self.factors_GP[list(positions)])

    def end(self, position: int, *, factors_P: Tensor | None = None, step: int | None = None) -> None:
        """Set the result of an adapter: the current factors, or earlier ones. `drop` then removes it from the stack."""
        ended = self._factors.at(position) if factors_P is None else self._views(factors_P.unsqueeze(0)).at(0)
        a_OR, b_RI, bias_O = ended
        factors = Factors(a_OR[:, : self._spec.rank], b_RI[: self._spec.rank], bias_O)
        # Copied, because the next step changes the views.
        factors = factors.map(lambda part: part.clone(memory_format=torch.contiguous_format))
        self.trained[self.live[position]] = TrainedFactors(factors, self.step if step is None else step, self.step)
        self.some_ended = True

    def end_all(self) -> None:
        """End all live adapters with their current factors."""
        for position, entry in enumerate(self.live):
            if entry not in self.trained:
                self.end(position)

    def drop(self) -> None:
        """Remove the adapters that have ended from the stack."""
        if not self.some_ended:
            return
        self.some_ended = False
        positions = [position for position, entry in enumerate(self.live) if entry not in self.trained]
        self.live = [self.live[position] for position in positions]
        positions_G = torch.tensor(positions, dtype=torch.int64, device=self._base.device)
        self.factors_GP = self.factors_GP[positions_G]
        self._reset_gradients()
        self._next_end = min((self._steps[entry] for entry in self.live), default=0)
        self.optimizer.keep(positions_G)
        self._batches.keep(self.live)

    def _reset_gradients(self) -> None:
        self._gradients_GP = torch.zeros_like(self.factors_GP)
        self._factors, self._gradients = self._views(self.factors_GP), self._views(self._gradients_GP)

    def _finish_ended(self, loss_G: Tensor) -> float:
        """End the adapters that have diverged or taken their last step; return the mean loss."""
        mean = float(loss_G.mean())
        # A sum is finite if all its terms are, so one pass suffices in the usual case.
        if not math.isfinite(mean + float(self.factors_GP.sum())):
            has_loss_G, is_sound_G = torch.isfinite(loss_G), torch.isfinite(self.factors_GP).all(dim=1)
            mean = float(loss_G[has_loss_G].mean())
            for position in (~(has_loss_G & is_sound_G)).nonzero()[:, 0].tolist():
                self.end(position)
                self.trained[self.live[position]].error = Diverged(
                    f"the factors are not finite after step {self.step}"
                    if bool(has_loss_G[position])
                    else f"the loss of step {self.step} is not finite",
                    step=self.step,
                )
        if self.step >= self._next_end:
            for position, entry in enumerate(self.live):
                if self.step >= self._steps[entry] and entry not in self.trained:
                    self.end(position)
        every = -(-self.steps // HISTORY_LENGTH)
        if self.step % every == 0 or self.step == self.steps:
            self.history.append((self.step, mean))
        return mean

    def _rates(self) -> Tensor | float:
        steps = [self._steps[entry] for entry in self.live]
        rates = {count: learning_rate(self._spec, self.step, count) for count in set(steps)}
        if len(set(rates.values())) == 1:
            return rates[steps[0]]
        rates_G = torch.tensor([rates[count] for count in steps], dtype=torch.float64, device=self._base.device)
        return rates_G.unsqueeze(1)

    def _views(self, numbers_GP: Tensor) -> Factors:
        # Each part begins on a cache line (see `batches`).
        parts = numbers_GP.split(self._widths, dim=1)
        a_GP, b_GP, bias_GO = (part[:, :size] for part, size in zip(parts, self._sizes, strict=True))
        a_GOR = a_GP.unflatten(1, (self._base.out_features, self._rank))
        b_GRI = b_GP.unflatten(1, (self._rank, self._base.in_features))
        return Factors(a_GOR, b_GRI, bias_GO if self._spec.bias else None)

    def _flat(self, a_OR: Tensor, b_RI: Tensor) -> Tensor:
        flat_P = torch.zeros(sum(self._widths))
        views = self._views(flat_P.unsqueeze(0)).at(0)
        views.a_OR[:, : self._spec.rank] = a_OR
        views.b_RI[: self._spec.rank] = b_RI
        return flat_P


def _multiply_into(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Write a batched product to `target`.

    The product is computed in place only if the products of a stack would not begin on multiples of a vector, because
    that takes five times as long.
    """
    if target[0].numel() % VECTOR == 0:
        target.copy_(torch.bmm(left, right))
    else:
        torch.bmm(left, right, out=target)
