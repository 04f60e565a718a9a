"""Groups of a fleet whose numbers are of another size than those of the others.

What a fleet has in common (moments, scales, means, and the losses of the other groups) are sums over rows. One group
with values of 1e10 among groups with values of 1 would decide all of them. Such a group is fitted by itself.
"""

# G groups · N rows · I in_features
from collections.abc import Mapping

import torch
from torch import Tensor

from adapters.training.candidates.task import FitTask
from adapters.training.closed_form.statistics import base_outputs
from adapters.training.data_file import TrainingData
from adapters.training.limits import CHUNK_ROWS, SUM_CHUNK_NUMBERS

# Squares of inputs and of residuals, and weights, relative to the median over the groups, above which a group is fitted
# by itself.
_MAX_SQUARE, _MAX_WEIGHT = 25.0, 10.0
# Groups from whose means the centre of the inputs is found.
_CENTERING_GROUPS = 1_000


def outlying_groups(task: FitTask, rows: Mapping[int, Tensor]) -> frozenset[int]:
    """Return the positions of the groups with much larger inputs, residuals of the base layer, or weights.

    Residuals count for numbers only: those of classes are bounded.
    """
    positions = list(rows)
    center_I = _center(task, [rows[position] for position in positions])
    sizes_N = torch.tensor([len(rows[position]) for position in positions])
    group_N = torch.repeat_interleave(torch.arange(len(positions)), sizes_N)
    chunk_rows = min(CHUNK_ROWS, max(1, SUM_CHUNK_NUMBERS // (4 * task.base.in_features)))
    parts = task.data.parts(torch.cat([rows[position] for position in positions]), chunk_rows)
    means_3G = torch.zeros(3, len(positions), dtype=torch.float64)
    for part, group_K in zip(parts, group_N.split(chunk_rows), strict=True):
        means_3G.index_add_(1, group_K, _sizes(task, part, center_I))
    means_3G /= sizes_N
    limits_3 = torch.tensor([_MAX_SQUARE, _MAX_SQUARE, _MAX_WEIGHT], dtype=torch.float64)
    medians_31 = means_3G.median(1, keepdim=True).values
    is_outlying_G = ((means_3G > limits_3[:, None] * medians_31) & (medians_31 > 0)).any(0)
    return frozenset(positions[index] for index in is_outlying_G.nonzero()[:, 0].tolist())


def _sizes(task: FitTask, part: TrainingData, center_I: Tensor) -> Tensor:
    """Return the squares of the inputs and of the residuals of each row, and its weight, (3, N) float64."""
    x_NI, squares_N = part.inputs_NI.double(), torch.zeros(part.rows, dtype=torch.float64)
    if task.scores.is_regression:
        outputs_NC = base_outputs(task.base, x_NI)[:, : task.outputs]
        squares_N = (task.scores.wide(part.targets, task.outputs) - outputs_NC).square().sum(1)
    weights_N = torch.ones(part.rows) if part.weights_N is None else part.weights_N
    return torch.stack([(x_NI - center_I).square().sum(1), squares_N, weights_N.double()])


def _center(task: FitTask, rows: list[Tensor]) -> Tensor:
    """Return the median of the groups' mean inputs, (I,)."""
    every = -(-len(rows) // _CENTERING_GROUPS)
    return torch.stack([task.data.inputs_NI[rows_K].double().mean(0) for rows_K in rows[::every]]).median(0).values
