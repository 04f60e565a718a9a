"""What the seed decides of one training: which rows are held out, where it starts, in which order rows come."""

# N rows · K rows of one side · I in_features · O out_features · R rank
import math

import torch
from torch import Tensor

from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData
from adapters.training.settings import Init, TrainingSpec


class Sampler:
    """One CPU generator from the seed, drawn from in this order: the split, the start, a permutation an epoch.

    Nothing is drawn for a split that is none, for a start that is given, or for batches of all rows. Adapters of a
    fleet with as many rows each draw the same, and share one of these.
    """

    def __init__(
        self,
        spec: TrainingSpec,
        rows: int,
        *,
        key_N: Tensor | None = None,
        classes_N: Tensor | None = None,
    ) -> None:
        self._spec = spec
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.training_K: Tensor = torch.arange(rows)
        """Numbers of the rows to train on, sorted."""
        self.held_K: Tensor | None = None
        """Numbers of those held out, sorted; None where none are."""
        if spec.split is not None:
            self.training_K, self.held_K = spec.split.sides(rows, self.generator, key_N=key_N, classes_N=classes_N)
        self.order_K: Tensor = torch.arange(len(self.training_K))
        """The order of the present epoch, as places in `training_K`."""

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return self._spec.batch(len(self.training_K))

    @property
    def is_full_batch(self) -> bool:
        """Whether every step sees every row, in one order."""
        return self.batch == len(self.training_K)

    @property
    def steps_an_epoch(self) -> int:
        """Steps in which each row is seen once."""
        return self._spec.steps_an_epoch(len(self.training_K))

    @property
    def steps(self) -> int:
        """Steps to the end."""
        return self._spec.steps(len(self.training_K))

    def start(self, base: BaseLayer) -> tuple[Tensor, Tensor]:
        """A (O, R) and B (R, I), float32 on the CPU, as `spec.init` says; not for factors that are given."""
        a_OR = torch.zeros(base.out_features, self._spec.rank)
        b_RI = torch.empty(self._spec.rank, base.in_features)
        if self._spec.init is Init.RANDN:
            return a_OR.normal_(generator=self.generator), b_RI.normal_(generator=self.generator)
        # Kaiming-uniform with a = √5 is uniform within ±1/√in (He et al. 2015, eq. 14; PEFT's default).
        torch.nn.init.kaiming_uniform_(b_RI, a=math.sqrt(5), generator=self.generator)
        return a_OR, b_RI

    def rows_of(self, step: int) -> Tensor:
        """Places in `training_K` of the rows of a step, counted from 1; call it for each step in turn."""
        place = (step - 1) % self.steps_an_epoch
        if place == 0 and not self.is_full_batch:
            self.order_K = torch.randperm(len(self.training_K), generator=self.generator)
        return self.order_K[place * self.batch : (place + 1) * self.batch]


def initial_factors(base: BaseLayer, data: TrainingData, spec: TrainingSpec, draws: Sampler) -> tuple[Tensor, Tensor]:
    """A (O, R) and B (R, I), float32 on the CPU: as given with the data, or drawn."""
    if spec.init is not Init.FACTORS:
        return draws.start(base)
    assert data.start_OR is not None
    assert data.start_RI is not None
    return data.start_OR, data.start_RI
