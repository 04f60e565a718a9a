"""Random choices of one training, from its seed: the held-out rows, the initial factors, the order of the rows."""

# N rows · K rows of one part · I in_features · O out_features · R rank
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData
from adapters.training.settings import Init, TrainingSpec


class Sampler:
    """One CPU generator from the seed. It draws the split, then the initial factors, then one permutation per epoch.

    Nothing is drawn without a split, for given initial factors, or if a batch is all rows. Adapters of a fleet with
    equally many rows draw the same values, and share one sampler.
    """

    def __init__(
        self, spec: TrainingSpec, rows: int, *, key_N: Tensor | None = None, classes_N: Tensor | None = None
    ) -> None:
        self._spec = spec
        self.generator = torch.Generator().manual_seed(spec.seed)
        # Indices of the rows to train on, sorted.
        self.training_K: Tensor = torch.arange(rows)
        # Indices of the held-out rows, sorted; None if none are held out.
        self.held_K: Tensor | None = None
        if spec.split is not None and spec.split.holds_out(rows, key_N):
            self.training_K, self.held_K = spec.split.sides(rows, self.generator, key_N=key_N, classes_N=classes_N)
        rows = len(self.training_K)
        # Rows of a step. If it is all rows, every step has them in a fixed order.
        self.batch = spec.batch(rows)
        self.is_full_batch = self.batch == rows
        self.steps_an_epoch = spec.steps_an_epoch(rows)
        self.steps = spec.steps(rows)
        # Order of the rows in the current epoch, as positions in `training_K`.
        self.order_K: Tensor = torch.arange(rows)

    def draw_factors(self, base: BaseLayer) -> tuple[Tensor, Tensor]:
        """Draw A (O, R) and B (R, I), float32 on the CPU, as `spec.init` says. Not for given factors."""
        a_OR = torch.zeros(base.out_features, self._spec.rank)
        b_RI = torch.empty(self._spec.rank, base.in_features)
        if self._spec.init is Init.RANDN:
            return a_OR.normal_(generator=self.generator), b_RI.normal_(generator=self.generator)
        # Kaiming-uniform with a = √5 is uniform within ±1/√in (He et al. 2015, eq. 14; PEFT's default).
        torch.nn.init.kaiming_uniform_(b_RI, a=math.sqrt(5), generator=self.generator)
        return a_OR, b_RI

    def batch_rows(self, step: int) -> Tensor:
        """Return the positions in `training_K` of a step's rows. Steps count from 1; call it for each in order."""
        step_of_epoch = (step - 1) % self.steps_an_epoch
        if step_of_epoch == 0 and not self.is_full_batch:
            self.order_K = torch.randperm(len(self.training_K), generator=self.generator)
        return self.order_K[step_of_epoch * self.batch : (step_of_epoch + 1) * self.batch]


def initial_factors(base: BaseLayer, data: TrainingData, spec: TrainingSpec, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Return A (O, R) and B (R, I), float32 on the CPU: those given with the data, or drawn ones."""
    if spec.init is not Init.FACTORS:
        return sampler.draw_factors(base)
    assert data.start_OR is not None
    assert data.start_RI is not None
    return data.start_OR, data.start_RI


@dataclass(frozen=True, slots=True, eq=False)
class StackEntry:
    """One adapter to train: its sampler, rows and initial factors."""

    sampler: Sampler
    rows_K: Tensor
    """(K,) int64: the indices of its training rows in the data. The positions of `sampler` refer to this order."""
    start: tuple[Tensor, Tensor]
    """A (O, R) and B (R, I), float32."""
