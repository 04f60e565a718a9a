"""One class a row: accuracy, macro F1, the confusion matrix, calibration."""

# N rows · K classes
import torch
from torch import Tensor

from adapters.training.evaluation.metrics.decisions import calibration_gaps, f1, wilson
from adapters.training.evaluation.metrics.rows import effective_rows, row_weights, slices
from adapters.training.evaluation.metrics.values import Metrics, number

MOST_CONFUSED = 50
"""Classes up to which the confusion matrix is told."""


def classification(logits_NK: Tensor, classes_N: Tensor, *, weights_N: Tensor | None = None) -> Metrics:
    """Finite logits (N, K) float, true classes (N,) int64 in 0 … K−1, weights (N,) ≥ 0.

    `accuracy` with `accuracy_interval` (Wilson, over the `effective_rows` of Kish where rows are weighted), `macro_f1`
    over the classes that are true or predicted in a row that weighs something, `confusion` (truth × prediction; counts,
    or sums of weights; None past 50 classes), `calibration_error` of the top probability. Of equal logits the first
    is the prediction.
    """
    rows, classes = logits_NK.shape
    weights = row_weights(weights_N, classes_N)
    predicted_N, top_N = _predictions(logits_NK)
    right_N = predicted_N == classes_N
    total, effective = weights.sum(), effective_rows(weights)
    accuracy = number((weights * right_N).sum() / total)
    present_K = torch.bincount(classes_N, weights, minlength=classes)
    said_K = torch.bincount(predicted_N, weights, minlength=classes)
    hit_K = torch.bincount(classes_N, weights * right_N, minlength=classes)
    gaps = calibration_gaps(top_N, right_N.double(), weights)
    return {
        "rows": rows,
        "effective_rows": effective,
        "accuracy": accuracy,
        "accuracy_interval": wilson(accuracy, effective),
        "macro_f1": number(f1(hit_K, present_K, said_K)[present_K + said_K > 0].mean()),
        "confusion": _confusion(classes_N, predicted_N, weights_N, classes=classes),
        "calibration_error": number(gaps.abs().sum() / total),
    }


def trivial_classification(counts_K: Tensor, classes_N: Tensor, *, weights_N: Tensor | None = None) -> Metrics:
    """What always answering with the class frequencies of the training rows reaches on these rows.

    counts_K: rows, or their weights, of each class in the training rows. The prediction is the most frequent class. As
    `classification`, and `loss`: the cross-entropy of the frequencies; None where a class occurs that was never trained
    on, which would make it infinite.
    """
    shares_K = counts_K.double() / counts_K.double().sum()
    weights = row_weights(weights_N, classes_N)
    present_K = torch.bincount(classes_N, weights, minlength=shares_K.shape[0])
    loss = number(-torch.xlogy(present_K, shares_K.to(present_K.device)).sum() / weights.sum())
    logits_NK = shares_K.to(classes_N.device).log().expand(classes_N.shape[0], -1)
    return {"loss": loss} | classification(logits_NK, classes_N, weights_N=weights_N)


def _predictions(logits_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) int64 the class with the largest logit, and (N,) float64 its softmax probability."""
    rows, classes = logits_NK.shape
    predicted_N = torch.empty(rows, dtype=torch.int64, device=logits_NK.device)
    top_N = torch.empty(rows, dtype=torch.float64, device=logits_NK.device)
    for part in slices(rows, classes):
        chunk_NK = logits_NK[part].double()
        largest_N, predicted_N[part] = chunk_NK.max(dim=1)
        top_N[part] = (largest_N - chunk_NK.logsumexp(dim=1)).exp()
    return predicted_N, top_N


def _confusion(
    classes_N: Tensor, predicted_N: Tensor, weights_N: Tensor | None, *, classes: int
) -> list[list[float]] | None:
    if classes > MOST_CONFUSED:
        return None
    weights = None if weights_N is None else row_weights(weights_N, classes_N)
    cells = torch.bincount(classes_N * classes + predicted_N, weights, minlength=classes * classes)
    matrix: list[list[float]] = cells.view(classes, classes).tolist()
    return matrix
