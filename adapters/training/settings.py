"""What a training is asked to do, in full, and its bounds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from adapters.errors import OutOfRange
from adapters.lora.adapter import scaling_of
from adapters.training.planning.split import By, Split

MAX_STEPS = 10_000_000
HISTORY_LENGTH = 1000
"""Steps up to which every one is kept in the history."""
BALANCED = "balanced"
"""Class weights that give every class of the training rows the same total weight."""


class Method(StrEnum):
    """How the factors are found."""

    ADAMW = "adamw"
    """AdamW (Loshchilov & Hutter 2019)."""
    SGD = "sgd"
    """Stochastic gradient descent, with momentum where that is asked for."""
    CLOSED_FORM = "closed_form"
    """The exact minimum of the squared error at that rank, from one decomposition."""


class Loss(StrEnum):
    """What is minimised: the weighted mean over rows of what each row has."""

    MSE = "mse"
    """Squared error, the mean over outputs."""
    HUBER = "huber"
    """Squared error up to a distance, straight beyond it (Huber 1964), the mean over outputs."""
    CROSS_ENTROPY = "cross_entropy"
    """Softmax cross-entropy with one class a row."""
    BINARY_CROSS_ENTROPY = "binary_cross_entropy"
    """Logistic loss of each output by itself, the mean over outputs: several labels a row."""
    COSINE = "cosine"
    """1 - cos(output, target)."""
    MULTIPLE_NEGATIVES = "multiple_negatives"
    """Cross-entropy of the row's own target among the targets of its batch, by cosine (Henderson et al. 2017)."""


class Init(StrEnum):
    """Where the factors start."""

    ZERO_DELTA = "zero_delta"
    """A = 0 and B Kaiming-uniform, as PEFT starts: the first answer is the base layer's."""
    RANDN = "randn"
    """Both standard normal."""
    FACTORS = "factors"
    """A and B as given with the data."""


class Schedule(StrEnum):
    """How the learning rate goes on after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    """Straight down, so that one step after the last it would be 0."""
    COSINE = "cosine"
    """By half a cosine (Loshchilov & Hutter 2017, eq. 5), down to the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """Settings of one training, all of them decided but for what only held-out rows can decide."""

    rank: int
    alpha: float
    rslora: bool = False
    method: Method = Method.ADAMW
    loss: Loss = Loss.MSE
    bias: bool = False
    """Train the factor `bias` too."""
    epochs: int = 50
    learning_rate: float = 0.01
    batch_size: int | None = 64
    """Rows of one step; None means all of them."""
    seed: int = 0
    init: Init = Init.ZERO_DELTA
    split: Split | None = None
    """None where nothing is held out, or a data set of its own is."""
    ridge: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip_norm: float | None = None
    """The gradient's norm, over all factors of an adapter, is brought down to this."""
    schedule: Schedule = Schedule.CONSTANT
    warmup_steps: int = 0
    """Steps in which the learning rate grows from 0, straight."""
    patience: int | None = None
    """Evaluations without a better held-out loss after which it ends; None goes to the end."""
    min_delta: float = 0.0
    """A held-out loss is better where it is lower by more than this."""
    evaluate_every: int | None = None
    """Steps between evaluations; None means an epoch."""
    max_steps: int | None = None
    max_seconds: float | None = None
    huber_delta: float = 1.0
    label_smoothing: float = 0.0
    class_weights: str | tuple[float, ...] | None = None
    temperature: float = 0.05
    classes: int | None = None
    """How many of the first outputs are the task's; None means all."""
    keep_statistics: bool = False
    try_ranks: tuple[int, ...] = ()
    """Ranks of which the held-out loss chooses; empty keeps `rank`."""
    try_rates: tuple[float, ...] = ()
    """Learning rates of which it chooses; empty keeps `learning_rate`."""
    try_ridges: bool = False
    """Whether it chooses the ridge."""
    alpha_is_rank: bool = False
    """Whether alpha goes with a rank that is chosen."""

    @property
    def scaling(self) -> float:
        """s, the factor in front of the low-rank term."""
        return scaling_of(self.alpha, self.rank, rslora=self.rslora)

    @property
    def is_exact(self) -> bool:
        """Whether one decomposition gives the factors."""
        return self.method is Method.CLOSED_FORM

    def batch(self, training_rows: int) -> int:
        """Rows of a step."""
        return min(self.batch_size or training_rows, training_rows)

    def steps_an_epoch(self, training_rows: int) -> int:
        """Updates in which each row is seen once; a last short batch counts."""
        return math.ceil(training_rows / self.batch(training_rows))

    def steps(self, training_rows: int) -> int:
        """Updates that the training makes at most."""
        if self.is_exact:
            return 1
        steps = self.epochs * self.steps_an_epoch(training_rows)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 1, of so many."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.schedule is Schedule.CONSTANT:
            return self.learning_rate
        done = (step - self.warmup_steps - 1) / max(1, steps - self.warmup_steps)
        return self.learning_rate * (
            1 - done if self.schedule is Schedule.LINEAR else (1 + math.cos(math.pi * done)) / 2
        )

    def check_steps(self, training_rows: int) -> None:
        """Raises `OutOfRange` where the steps are too many."""
        if self.steps(training_rows) > MAX_STEPS:
            raise OutOfRange(
                f"{self.epochs} epochs of {training_rows} rows in batches of {self.batch(training_rows)} are "
                f"{self.steps(training_rows)} steps",
                field="training.epochs",
                given=self.epochs,
                expected=f"at most {MAX_STEPS} steps",
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainingSpec":
        """The spec that `dataclasses.asdict` and JSON made `values` of."""
        weights, split = values["class_weights"], values["split"]
        kinds = {
            "method": Method(values["method"]),
            "loss": Loss(values["loss"]),
            "init": Init(values["init"]),
            "schedule": Schedule(values["schedule"]),
            "split": None if split is None else Split(**{**split, "by": By(split["by"])}),
            "class_weights": tuple(weights) if isinstance(weights, list) else weights,
            "try_ranks": tuple(values["try_ranks"]),
            "try_rates": tuple(values["try_rates"]),
        }
        return cls(**{**values, **kinds})
