"""What a training is asked to do, in full, and its bounds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from adapters.errors import OutOfRange

MAX_STEPS = 10_000_000
HISTORY_LENGTH = 1000
"""Steps up to which every one is kept in the history."""


class Method(StrEnum):
    """How the factors are found."""

    ADAMW = "adamw"
    """AdamW without weight decay (Loshchilov & Hutter 2019)."""
    SGD = "sgd"
    """Stochastic gradient descent without momentum."""
    CLOSED_FORM = "closed_form"
    """The exact minimum of the squared error at that rank, from one decomposition."""


class Loss(StrEnum):
    """What is minimised."""

    MSE = "mse"
    """Squared error, the mean over all elements."""
    CROSS_ENTROPY = "cross_entropy"
    """Softmax cross-entropy with class indices, the mean over rows."""


class Init(StrEnum):
    """Where the factors start."""

    ZERO_DELTA = "zero_delta"
    """A = 0 and B Kaiming-uniform, as PEFT starts: the first answer is the base layer's."""
    RANDN = "randn"
    """Both standard normal."""
    FACTORS = "factors"
    """A and B as given with the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """Settings of one training, all of them decided."""

    rank: int
    alpha: float
    rslora: bool = False
    method: Method = Method.ADAMW
    loss: Loss = Loss.MSE
    epochs: int = 50
    learning_rate: float = 0.01
    batch_size: int | None = 64
    """Rows of one step; None means all of them."""
    seed: int = 0
    init: Init = Init.ZERO_DELTA
    validation_fraction: float = 0.0
    ridge: float = 0.0

    def validation_rows(self, rows: int) -> int:
        """How many of `rows` are held out: the fraction of them, rounded half up."""
        return math.floor(rows * self.validation_fraction + 0.5)

    def steps(self, rows: int) -> int:
        """Updates that the training makes on data of `rows` rows, held-out ones included."""
        if self.method is Method.CLOSED_FORM:
            return 1
        training = rows - self.validation_rows(rows)
        return self.epochs * math.ceil(training / min(self.batch_size or training, training))

    def check_rows(self, rows: int) -> None:
        """Raises `OutOfRange` where a part of the split would be empty or the steps too many."""
        held_out = self.validation_rows(rows)
        if self.validation_fraction > 0 and not 0 < held_out < rows:
            raise OutOfRange(
                f"validation_fraction {self.validation_fraction:g} of {rows} rows leaves {rows - held_out} rows to "
                f"train on and {held_out} to validate on; neither may be empty",
                field="training.validation_fraction",
                given=self.validation_fraction,
                expected="a fraction that leaves rows on both sides",
            )
        if self.steps(rows) > MAX_STEPS:
            raise OutOfRange(
                f"{self.epochs} epochs of {rows} rows in batches of {self.batch_size or rows} are "
                f"{self.steps(rows)} steps",
                field="training.epochs",
                given=self.epochs,
                expected=f"at most {MAX_STEPS} steps",
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainingSpec":
        """The spec that `dataclasses.asdict` and JSON made `values` of."""
        kinds = {
            "method": Method(values["method"]),
            "loss": Loss(values["loss"]),
            "init": Init(values["init"]),
        }
        return cls(**{**values, **kinds})
