"""Held-out rows of each kind of task, made up."""

# N rows · O outputs · K classes or labels
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.training.evaluation.metrics import HIGHER_IS_BETTER, Metrics, Task

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Outputs of a layer and what they should have been; whole weights from 0, so that a row can be repeated."""

    task: Task
    outputs_NO: Tensor
    targets: Tensor
    weights_N: Tensor

    def repeated(self) -> tuple[Tensor, Tensor]:
        """Outputs and targets with each row as often as it weighs."""
        times_N = self.weights_N.long()
        return self.outputs_NO.repeat_interleave(times_N, dim=0), self.targets.repeat_interleave(times_N, dim=0)


def held_out(task: Task, *, rows: int = 60, outputs: int = 4, seed: int = 0) -> Rows:
    """Better than chance and far from perfect; the last class and document are rare."""
    draw = torch.Generator().manual_seed(seed)
    outputs_NO = torch.randn(rows, outputs, generator=draw, dtype=torch.float64)
    noise_NO = torch.randn(rows, outputs, generator=draw, dtype=torch.float64)
    weights_N = torch.randint(0, 4, (rows,), generator=draw).double()
    targets: Tensor
    match task:
        case Task.CLASSIFICATION:
            targets = (outputs_NO + noise_NO)[:, : outputs - 1].argmax(dim=1)
        case Task.MULTILABEL:
            targets = (outputs_NO + noise_NO > 0.3).double()
        case Task.REGRESSION:
            targets = 1.2 * outputs_NO + 0.5 + noise_NO / 2
        case Task.RETRIEVAL:
            targets = (outputs_NO + noise_NO / 2).repeat_interleave(2, dim=0)[:rows]
    return Rows(task, outputs_NO, targets, weights_N)


def plain(metrics: Metrics, name: str) -> float:
    """A metric that must be one number."""
    value = metrics[name]
    assert isinstance(value, float)
    return value


def listed(metrics: Metrics, name: str) -> Float64:
    """A metric that must be a list, or a list of lists, of numbers."""
    value = metrics[name]
    assert isinstance(value, list)
    return np.array(value, dtype=np.float64)


def scalars(metrics: Metrics) -> dict[str, float | None]:
    """Return the metrics that have a better direction, in the order of `HIGHER_IS_BETTER`."""
    values = {name: metrics[name] for name in HIGHER_IS_BETTER if name in metrics}
    return {name: value for name, value in values.items() if isinstance(value, float | int | None)}
