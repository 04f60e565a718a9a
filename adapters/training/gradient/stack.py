"""Training by gradient descent on mini-batches: a stack of adapters at once, each as if it were alone."""

# G adapters of a stack · K rows of a batch · I in_features · O out_features · R rank · P numbers of a state
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
History = list[tuple[int, float]]
"""Step, and the loss of its batch before its update."""
ReportStep = Callable[[int, float, History], None]
"""Told after every step."""


@dataclass(frozen=True, slots=True, eq=False)
class StackEntry:
    """One adapter to train: its rows, and what is drawn for it."""

    draws: Sampler
    rows_K: Tensor
    """(K,) int64: which of the data's rows it is trained on, in the order in which `draws` counts them."""
    start: tuple[Tensor, Tensor]
    """A (O, R) and B (R, I), float32."""


@dataclass(slots=True, eq=False)
class TrainedFactors:
    """How the training of one adapter ended."""

    a_OR: Tensor
    b_RI: Tensor
    bias_O: Tensor | None
    step: int
    """The step that the factors are of."""
    steps: int
    """Steps taken."""
    error: Diverged | None = None
    history: History = field(default_factory=list)


class Stack:
    """The state of adapters that are trained together, between two steps."""

    def __init__(self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, tasks: Sequence[StackEntry]) -> None:
        self._base, self._spec, self._tasks = base, spec, tasks
        # Rank 1 is trained as rank 2 with zeros, which stay zeros: see `layout` on products with a single row.
        self._rank = max(2, spec.rank)
        self._sizes = (base.out_features * self._rank, self._rank * base.in_features, base.out_features * spec.bias)
        self._widths = [padded_width(size) for size in self._sizes]
        # And all of it is whole vectors: what is left over at the end of a tensor may be rounded otherwise.
        self._widths[-1] += -sum(self._widths) % (2 * LINE)
        self.step = 0
        self.history: History = []
        # Adapters for which the same is drawn share their start.
        flat = {key: self._flat(*start) for key, start in {id(task.start): task.start for task in tasks}.items()}
        self.factors_GP = torch.stack([flat[id(task.start)] for task in tasks]).to(base.device)
        self.optimizer = Optimizer(spec, self.factors_GP)
        self.live = list(range(len(tasks)))
        """The tasks that are still trained, in the order of the rows of `factors_GP`."""
        self.trained: list[TrainedFactors | None] = [None] * len(tasks)
        self._some_ended = False
        self._steps = [task.draws.steps for task in tasks]
        self.steps = max(self._steps)
        self._next_end = min(self._steps)
        self._batches = open_batches(base, data, spec, [(task.draws, task.rows_K) for task in tasks])
        self._batch: Batch | None = None
        self._share: Tensor | float | None = None
        self._begin_slopes()

    def advance(self) -> float:
        """Take one step with every adapter that has not ended; the mean of their losses before it."""
        self.step += 1
        batch = self._batches.of(self.step, self.live)
        a_GOR, b_GRI, bias_GO = self._factors
        h_GRK = b_GRI @ batch.x_GKI.transpose(1, 2)
        y_GOK = torch.baddbmm(batch.frozen_GOK, a_GOR, h_GRK, alpha=self._spec.scaling)
        if bias_GO is not None:
            y_GOK.add_(bias_GO.unsqueeze(2), alpha=self._spec.scaling)
        if batch is not self._batch:
            self._batch, self._share = batch, gradient_scale(self._spec, y_GOK, batch.weights_GK)
        loss_G, slope_GOK = loss_and_gradient(
            self._spec, y_GOK, batch.targets, batch.weights_GK, batch.documents_GK, self._share
        )
        if self._spec.scaling != 1:
            slope_GOK.mul_(self._spec.scaling)
        slope_a, slope_b, slope_bias = self._slopes
        _multiply_into(slope_a, slope_GOK, h_GRK.transpose(1, 2))
        _multiply_into(slope_b, a_GOR.transpose(1, 2) @ slope_GOK, batch.x_GKI)
        if slope_bias is not None:
            slope_bias.copy_(slope_GOK.sum(dim=2))
        self.optimizer.update(self.factors_GP, self._slopes_GP, self._rates(), step=self.step)
        return self._look(loss_G)

    def draws_of_one(self) -> Sampler:
        """What is drawn for the one adapter of a stack of one."""
        (task,) = self._tasks
        return task.draws

    def steps_an_epoch(self, task: int) -> int:
        """Steps in which a task's rows are seen once."""
        return self._tasks[task].draws.steps_an_epoch

    def has_ended(self, task: int) -> bool:
        """Whether it has taken its last step, or has failed."""
        return self.trained[task] is not None

    def has_failed(self, task: int) -> bool:
        """Whether it has diverged."""
        trained = self.trained[task]
        return trained is not None and trained.error is not None

    def factors(self, places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """A (G, O, R), B (G, R, I) and bias (G, O) or None of those at these places of the stack, as they are now.

        Rank 1 comes with a second column and row of zeros.
        """
        return self._factors if len(places) == len(self.live) else self._views(self.factors_GP[list(places)])

    def result(self) -> list[TrainedFactors]:
        """All of them, once none is left to train."""
        assert not self.live
        return [trained for trained in self.trained if trained is not None]

    def end(self, place: int, *, factors_P: Tensor | None = None, step: int | None = None) -> None:
        """Note what an adapter ends with: the factors of now, or earlier ones. `drop` takes it out of the stack."""
        if factors_P is None:
            trained = self._as_trained(self._factors, place)
        else:
            trained = self._as_trained(self._views(factors_P.unsqueeze(0)), 0)
        trained.step = self.step if step is None else step
        self.trained[self.live[place]] = trained
        self._some_ended = True

    def end_all(self) -> None:
        """End all that are still trained, with the factors of now."""
        for place, task in enumerate(self.live):
            if not self.has_ended(task):
                self.end(place)

    def drop(self) -> None:
        """Go on without those that have ended."""
        if not self._some_ended:
            return
        self._some_ended = False
        places = [place for place, task in enumerate(self.live) if self.trained[task] is None]
        self.live = [self.live[place] for place in places]
        places_G = torch.tensor(places, dtype=torch.int64, device=self._base.device)
        self.factors_GP = self.factors_GP[places_G]
        self._begin_slopes()
        self._next_end = min((self._steps[task] for task in self.live), default=0)
        self.optimizer.keep(places_G)
        self._batches.forget()

    def _begin_slopes(self) -> None:
        self._slopes_GP = torch.zeros_like(self.factors_GP)
        self._factors, self._slopes = self._views(self.factors_GP), self._views(self._slopes_GP)

    def _look(self, loss_G: Tensor) -> float:
        """End what has diverged or reached its last step."""
        mean = float(loss_G.mean())
        # A sum is finite where all its terms are: one pass, and a closer look only where it is not.
        if not math.isfinite(mean + float(self.factors_GP.sum())):
            fine_G, sound_G = torch.isfinite(loss_G), torch.isfinite(self.factors_GP).all(dim=1)
            mean = float(loss_G[fine_G].mean()) if bool(fine_G.any()) else math.nan
            for place in (~(fine_G & sound_G)).nonzero()[:, 0].tolist():
                self.end(place)
                trained = self.trained[self.live[place]]
                assert trained is not None
                trained.error = Diverged(
                    f"the factors are not finite after step {self.step}"
                    if bool(fine_G[place])
                    else f"the loss of step {self.step} is not finite",
                    step=self.step,
                )
        if self.step >= self._next_end:
            for place, task in enumerate(self.live):
                if self.step >= self._steps[task] and self.trained[task] is None:
                    self.end(place)
        every = -(-self.steps // HISTORY_LENGTH)
        if self.step % every == 0 or self.step == self.steps:
            self.history.append((self.step, mean))
        return mean

    def _rates(self) -> Tensor | float:
        steps = [self._steps[task] for task in self.live]
        rates = {each: self._spec.rate(self.step, each) for each in set(steps)}
        if len(set(rates.values())) == 1:
            return rates[steps[0]]
        each_G = torch.tensor([rates[each] for each in steps], dtype=torch.float64, device=self._base.device)
        return each_G.unsqueeze(1)

    def _views(self, numbers_GP: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # Each begins on a cache line, see `layout`.
        parts = numbers_GP.split(self._widths, dim=1)
        a_GP, b_GP, bias_GO = (part[:, :size] for part, size in zip(parts, self._sizes, strict=True))
        O, R, I = self._base.out_features, self._rank, self._base.in_features
        return a_GP.unflatten(1, (O, R)), b_GP.unflatten(1, (R, I)), bias_GO if self._spec.bias else None

    def _as_trained(self, factors: tuple[Tensor, Tensor, Tensor | None], place: int) -> TrainedFactors:
        rank, (a_GOR, b_GRI, bias_GO) = self._spec.rank, factors
        a_OR, b_RI = (
            a_GOR[place, :, :rank].clone(memory_format=_CONTIGUOUS),
            b_GRI[place, :rank].clone(memory_format=_CONTIGUOUS),
        )
        return TrainedFactors(a_OR, b_RI, None if bias_GO is None else bias_GO[place].clone(), self.step, self.step)

    def _flat(self, a_OR: Tensor, b_RI: Tensor) -> Tensor:
        flat_P = torch.zeros(1, sum(self._widths))
        a_1OR, b_1RI, _ = self._views(flat_P)
        a_1OR[..., : self._spec.rank] = a_OR
        b_1RI[:, : self._spec.rank] = b_RI
        return flat_P[0]


def _multiply_into(place: Tensor, left: Tensor, right: Tensor) -> None:
    """A product where it belongs, see `layout`. In place, which takes five times as long, where those of a stack would
    not by themselves begin on vectors."""
    if place[0].numel() % VECTOR == 0:
        place.copy_(torch.bmm(left, right))
    else:
        torch.bmm(left, right, out=place)
