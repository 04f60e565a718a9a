"""Suspects: rows of one adapter whose label the other rows contradict.

The rows are fitted by kernel ridge regression on the residuals y - softmax(z), as the candidates are, and the outputs
of each row are those of the fit without it. Four fits are compared: from the base layer's outputs or from 0, with a
Gaussian kernel of the inputs or of the inputs in the metric of W, because a base layer says much about the labels, or
nothing. The fit whose left-out outputs name the most labels is taken: a wrong label costs each fit one row, whereas it
would cost a fit the more log loss the surer it is. The fits choose nothing else, and are not published.
"""

# N rows of the adapter · M rows that leave together · I in_features · J features · C outputs of the task
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from adapters.training.candidates import small
from adapters.training.candidates.features import base_metric_factor
from adapters.training.candidates.leave_out import precision
from adapters.training.candidates.scores import Scores
from adapters.training.candidates.task import FitTask
from adapters.training.closed_form.statistics import base_outputs
from adapters.training.settings import Loss

# Most rows whose labels are doubted.
MAX_SUSPECTS = 200
# For kernels of 1 on the diagonal, measured on texts and digits.
RIDGE, STEP = 1.0, 10.0
_BANDWIDTH = 2.0
# Share of the log frequencies that is taken off: a ridge lets rare classes look less likely than they are.
_FREQUENCY_SHARE = 0.5
# Least weight of a row: a row that counts for nothing can still be contradicted.
_MIN_WEIGHT = 1e-6


def find_suspects(task: FitTask, rows_N: Tensor) -> list[dict[str, Any]]:
    """Return the rows whose label the other rows contradict, worst first. Memory grows with the square of the rows."""
    x_NI, keys_N = task.data.inputs_NI[rows_N].double(), task.keys(rows_N)
    weights_N = torch.ones(len(rows_N)) if task.data.weights_N is None else task.data.weights_N[rows_N]
    # Classes without rows are suggested by no row.
    classes_C, codes_N = task.data.targets[rows_N].unique(return_inverse=True)
    z_NC = base_outputs(task.base, x_NI)[:, classes_C]
    features, starts = [x_NI], [torch.zeros_like(z_NC)]
    if task.base.weight_norm > 0:
        features.append(base_metric_factor(task.base).features(x_NI))
        starts.append(z_NC)
    y_NC = task.scores.wide(codes_N, len(classes_C))
    units = [] if small.units_of(keys_N) is None else units_of(keys_N)
    outputs = [
        z_NC
        for phi_NJ in features
        for z_NC in left_out_outputs(gaussian_kernel(phi_NJ), starts, y_NC, weights_N.double(), units)
    ]
    scores = Scores(Loss.CROSS_ENTROPY)

    def mistakes(z_NC: Tensor) -> tuple[int, float]:
        return int(scores.errors(z_NC, y_NC).sum()), float(scores.losses(z_NC, y_NC).mean())

    all_NC = torch.full((len(rows_N), task.outputs), -torch.inf, dtype=torch.float64)
    all_NC[:, classes_C] = min(outputs, key=mistakes)
    return rank_suspects(task, rows_N, all_NC)


def gaussian_kernel(phi_NJ: Tensor) -> Tensor:
    """Return exp(-2·d²/mean(d²)) for the distances d between rows of features, (N, N)."""
    phi_NJ = phi_NJ - phi_NJ.mean(0)
    gram_NN = phi_NJ @ phi_NJ.T
    squares_N = gram_NN.diagonal()
    distances_NN = (squares_N[:, None] + squares_N - 2 * gram_NN).clamp_min(0)
    return torch.exp(-_BANDWIDTH / distances_NN.mean().clamp_min(1e-300) * distances_NN)


def units_of(keys_N: Tensor) -> list[Tensor]:
    """Return the rows of each key that several rows have: they leave together."""
    order_N = torch.argsort(keys_N, stable=True)
    _, counts = torch.unique(keys_N, return_counts=True)
    return [rows_M for rows_M in order_N.split(counts.tolist()) if len(rows_M) > 1]


def left_out_outputs(
    kernel_NN: Tensor, starts: Sequence[Tensor], y_NC: Tensor, weights_N: Tensor, units: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Yield the outputs (N, C) of each row by a fit without it, and without its unit, from each start.

    A row's residual in that fit is (P_SS)⁻¹·(P·r)_S (`leave_out.py`).
    """
    scores = Scores(Loss.CROSS_ENTROPY)
    weights_N = weights_N.clamp_min(_MIN_WEIGHT)
    P_NN = precision(kernel_NN[None], RIDGE, weights_N[None], free_intercept=False)[0]
    for z_NC in starts:
        residuals_NC = scores.residuals(z_NC, y_NC)
        alpha_NC = P_NN @ residuals_NC
        left_NC = alpha_NC / P_NN.diagonal()[:, None]
        for rows_M in units:
            left_NC[rows_M] = torch.linalg.solve(P_NN[rows_M][:, rows_M], alpha_NC[rows_M])
        yield z_NC + STEP * (residuals_NC - left_NC)


def rank_suspects(task: FitTask, rows_N: Tensor, outputs_NC: Tensor) -> list[dict[str, Any]]:
    """Return the rows by -log p of their label, worst first, each with the most likely other class.

    outputs_NC: logits of fits without the row. p compares the classes that the rows have.
    """
    classes_N = task.data.targets[rows_N]
    counts_C = torch.bincount(classes_N, minlength=outputs_NC.shape[1])
    if int((counts_C > 0).sum()) < 2:
        return []
    outputs_NC = outputs_NC - _FREQUENCY_SHARE * counts_C.clamp_min(1).log()
    outputs_NC = outputs_NC.masked_fill(counts_C == 0, -torch.inf)
    scores_N = -torch.log_softmax(outputs_NC, dim=1).gather(1, classes_N[:, None])[:, 0]
    suggested_N = outputs_NC.scatter(1, classes_N[:, None], -torch.inf).argmax(1)
    labels: Sequence[str | int] = range(task.outputs) if task.labels is None else task.labels
    return [
        {
            "row": int(rows_N[n]),
            "label": labels[int(classes_N[n])],
            "suggested": labels[int(suggested_N[n])],
            "score": float(scores_N[n]),
        }
        for n in torch.argsort(scores_N, descending=True, stable=True)[:MAX_SUSPECTS].tolist()
    ]
