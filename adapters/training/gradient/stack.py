"""Stack of adapters that are trained together by gradient descent on mini-batches, each as if it were alone."""

# G adapters of a stack · K rows of a batch · I in_features · O out_features · R rank · P numbers of the factors, padded
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.errors import Diverged
from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData
from adapters.training.gradient.batches import LINE, VECTOR, Batch, open_batches, padded_width
from adapters.training.gradient.losses import gradient_scale, loss_and_gradient
from adapters.training.gradient.optimizer import Optimizer
from adapters.training.gradient.sampling import Sampler
from adapters.training.limits import HISTORY_LENGTH
from adapters.training.settings import TrainingSpec

_CONTIGUOUS = torch.contiguous_format
# Steps, each with the loss of its batch before the update.
History = list[tuple[int, float]]
# Callback after each step, with the step, its loss and the history.
ReportStep = Callable[[int, float, History], None]


@dataclass(frozen=True, slots=True, eq=False)
class StackEntry:
    """One adapter to train: its sampler, rows and initial factors."""

    sampler: Sampler
    rows_K: Tensor
    """(K,) int64: the indices of its training rows in the data. The positions of `sampler` refer to this order."""
    start: tuple[Tensor, Tensor]
    """A (O, R) and B (R, I), float32."""


@dataclass(slots=True, eq=False)
class TrainedFactors:
    """Result of the training of one adapter."""

    a_OR: Tensor
    b_RI: Tensor
    bias_O: Tensor | None
    step: int
    """The step whose factors these are."""
    steps: int
    """Number of steps taken."""
    error: Diverged | None = None
    history: History = field(default_factory=list)


class Stack:
    """Factors and optimizer state of adapters that are trained together."""

    def __init__(self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, tasks: Sequence[StackEntry]) -> None:
        self._base, self._spec, self._tasks = base, spec, tasks
        # Rank 1 is trained as rank 2 with zeros, which stay zeros: products with a single row differ (see `batches`).
        self._rank = max(2, spec.rank)
        self._sizes = (base.out_features * self._rank, self._rank * base.in_features, base.out_features * spec.bias)
        self._widths = [padded_width(size) for size in self._sizes]
        # The whole width is a multiple of a vector, because the remainder of a tensor may be rounded differently.
        self._widths[-1] += -sum(self._widths) % (2 * LINE)
        self.step = 0
        self.history: History = []
        # Adapters with one sampler share their initial factors.
        flat = {key: self._flat(*start) for key, start in {id(task.start): task.start for task in tasks}.items()}
        self.factors_GP = torch.stack([flat[id(task.start)] for task in tasks]).to(base.device)
        self.optimizer = Optimizer(spec, self.factors_GP)
        # Entries that are still trained, in the order of the rows of `factors_GP`.
        self.live = list(range(len(tasks)))
        self.trained: list[TrainedFactors | None] = [None] * len(tasks)
        self._some_ended = False
        self._steps = [task.sampler.steps for task in tasks]
        self.steps = max(self._steps)
        self._next_end = min(self._steps)
        self._batches = open_batches(base, data, spec, [(task.sampler, task.rows_K) for task in tasks])
        self._batch: Batch | None = None
        self._share: Tensor | float | None = None
        self._reset_gradients()

    def advance(self) -> float:
        """Take one step with every live adapter; return the mean of their losses before the update."""
        self.step += 1
        batch = self._batches.batch_at(self.step, self.live)
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
        gradient_a, gradient_b, gradient_bias = self._gradients
        _multiply_into(gradient_a, gradient_GOK, h_GRK.transpose(1, 2))
        _multiply_into(gradient_b, a_GOR.transpose(1, 2) @ gradient_GOK, batch.x_GKI)
        if gradient_bias is not None:
            gradient_bias.copy_(gradient_GOK.sum(dim=2))
        self.optimizer.update(self.factors_GP, self._gradients_GP, self._rates(), step=self.step)
        return self._finish_ended(loss_G)

    def single_sampler(self) -> Sampler:
        """Return the sampler of the only adapter of a stack of one."""
        (task,) = self._tasks
        return task.sampler

    def steps_an_epoch(self, task: int) -> int:
        """Return the steps of an epoch of an entry."""
        return self._tasks[task].sampler.steps_an_epoch

    def has_ended(self, task: int) -> bool:
        """Return whether an entry has taken its last step or has diverged."""
        return self.trained[task] is not None

    def has_failed(self, task: int) -> bool:
        """Return whether an entry has diverged."""
        trained = self.trained[task]
        return trained is not None and trained.error is not None

    def factors(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the current A (G, O, R), B (G, R, I), and bias (G, O) or None, at these positions of the stack.

        Rank 1 has a second column and row of zeros.
        """
        return self._factors if len(positions) == len(self.live) else self._views(self.factors_GP[list(positions)])

    def result(self) -> list[TrainedFactors]:
        """Return the results of all entries, after the last one has ended."""
        assert not self.live
        return [trained for trained in self.trained if trained is not None]

    def end(self, position: int, *, factors_P: Tensor | None = None, step: int | None = None) -> None:
        """Set the result of an adapter: the current factors, or earlier ones. `drop` then removes it from the stack."""
        if factors_P is None:
            trained = self._as_trained(self._factors, position)
        else:
            trained = self._as_trained(self._views(factors_P.unsqueeze(0)), 0)
        trained.step = self.step if step is None else step
        self.trained[self.live[position]] = trained
        self._some_ended = True

    def end_all(self) -> None:
        """End all live adapters with their current factors."""
        for position, task in enumerate(self.live):
            if not self.has_ended(task):
                self.end(position)

    def drop(self) -> None:
        """Remove the adapters that have ended from the stack."""
        if not self._some_ended:
            return
        self._some_ended = False
        positions = [position for position, task in enumerate(self.live) if self.trained[task] is None]
        self.live = [self.live[position] for position in positions]
        positions_G = torch.tensor(positions, dtype=torch.int64, device=self._base.device)
        self.factors_GP = self.factors_GP[positions_G]
        self._reset_gradients()
        self._next_end = min((self._steps[task] for task in self.live), default=0)
        self.optimizer.keep(positions_G)
        self._batches.reset()

    def _reset_gradients(self) -> None:
        self._gradients_GP = torch.zeros_like(self.factors_GP)
        self._factors, self._gradients = self._views(self.factors_GP), self._views(self._gradients_GP)

    def _finish_ended(self, loss_G: Tensor) -> float:
        """End the adapters that have diverged or taken their last step; return the mean loss."""
        mean = float(loss_G.mean())
        # A sum is finite if all its terms are, so one pass suffices in the usual case.
        if not math.isfinite(mean + float(self.factors_GP.sum())):
            fine_G, sound_G = torch.isfinite(loss_G), torch.isfinite(self.factors_GP).all(dim=1)
            mean = float(loss_G[fine_G].mean()) if bool(fine_G.any()) else math.nan
            for position in (~(fine_G & sound_G)).nonzero()[:, 0].tolist():
                self.end(position)
                trained = self.trained[self.live[position]]
                assert trained is not None
                trained.error = Diverged(
                    f"the factors are not finite after step {self.step}"
                    if bool(fine_G[position])
                    else f"the loss of step {self.step} is not finite",
                    step=self.step,
                )
        if self.step >= self._next_end:
            for position, task in enumerate(self.live):
                if self.step >= self._steps[task] and self.trained[task] is None:
                    self.end(position)
        every = -(-self.steps // HISTORY_LENGTH)
        if self.step % every == 0 or self.step == self.steps:
            self.history.append((self.step, mean))
        return mean

    def _rates(self) -> Tensor | float:
        steps = [self._steps[task] for task in self.live]
        rates = {count: self._spec.rate(self.step, count) for count in set(steps)}
        if len(set(rates.values())) == 1:
            return rates[steps[0]]
        rates_G = torch.tensor([rates[count] for count in steps], dtype=torch.float64, device=self._base.device)
        return rates_G.unsqueeze(1)

    def _views(self, numbers_GP: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # Each part begins on a cache line (see `batches`).
        parts = numbers_GP.split(self._widths, dim=1)
        a_GP, b_GP, bias_GO = (part[:, :size] for part, size in zip(parts, self._sizes, strict=True))
        O, R, I = self._base.out_features, self._rank, self._base.in_features
        return a_GP.unflatten(1, (O, R)), b_GP.unflatten(1, (R, I)), bias_GO if self._spec.bias else None

    def _as_trained(self, factors: tuple[Tensor, Tensor, Tensor | None], position: int) -> TrainedFactors:
        rank, (a_GOR, b_GRI, bias_GO) = self._spec.rank, factors
        a_OR, b_RI = (
            a_GOR[position, :, :rank].clone(memory_format=_CONTIGUOUS),
            b_GRI[position, :rank].clone(memory_format=_CONTIGUOUS),
        )
        return TrainedFactors(a_OR, b_RI, None if bias_GO is None else bias_GO[position].clone(), self.step, self.step)

    def _flat(self, a_OR: Tensor, b_RI: Tensor) -> Tensor:
        flat_P = torch.zeros(1, sum(self._widths))
        a_1OR, b_1RI, _ = self._views(flat_P)
        a_1OR[..., : self._spec.rank] = a_OR
        b_1RI[:, : self._spec.rank] = b_RI
        return flat_P[0]


def _multiply_into(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Write a batched product to `target`.

    The product is computed in place only if the products of a stack would not begin on multiples of a vector, because
    that takes five times as long.
    """
    if target[0].numel() % VECTOR == 0:
        target.copy_(torch.bmm(left, right))
    else:
        torch.bmm(left, right, out=target)
