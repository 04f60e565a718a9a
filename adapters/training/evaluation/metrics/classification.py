"""Metrics of classification, with one class or several labels per row: accuracy, F1, confusion, calibration."""

# N rows · K classes or labels · B bins
import math
from statistics import NormalDist

import torch
from torch import Tensor

from adapters.training.evaluation.metrics.weighting import Metrics, effective_rows, number, row_weights, slices

CONFIDENCE = 0.95
BINS = 15
# Most classes for which the confusion matrix is reported.
MAX_CONFUSION_CLASSES = 50
# A label is present, in truth or in the prediction, above it: scikit-learn's rule for a decision, logit > 0.
THRESHOLD = 0.5
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def wilson(share: float | None, rows: float) -> list[float] | None:
    """Return the 95 % score interval [low, high] of a proportion on so many (effective) rows; None without any.

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n), Wilson 1927.
    """
    if share is None or rows <= 0:
        return None
    squared = _Z * _Z / rows
    middle = share + squared / 2
    spread = math.sqrt(squared * max(0.0, share * (1 - share)) + squared * squared / 4)
    low = max(0.0, (middle - spread) / (1 + squared))
    # Rounding would end some intervals of a proportion of 1 just below 1.
    high = 1.0 if share >= 1 else min(1.0, (middle + spread) / (1 + squared))
    return [low, high]


def f1(hit: Tensor, present: Tensor, predicted: Tensor) -> Tensor:
    """Return F1, 2·hit / (present + predicted), elementwise.

    The arguments are weights of rows: with the label in both, in truth, and in the prediction. F1 is 0 if no row has
    the label in either (scikit-learn's `zero_division=0`).
    """
    either = present + predicted
    return torch.where(either > 0, 2 * hit / either, 0.0)


def calibration_gaps(probability_N: Tensor, outcome_N: Tensor, weights_N: Tensor) -> Tensor:
    """Return Σ w·(outcome − probability) over the rows of each bin, (B,).

    Bin m is (m/15, (m+1)/15]; the first bin includes 0. The expected calibration error (Guo et al. 2017, eq. 3) is
    Σ|gap| / Σw. Gaps of chunks add up.
    """
    edges = torch.arange(1, BINS, dtype=torch.float64, device=probability_N.device) / BINS
    bin_N = torch.bucketize(probability_N, edges)
    return torch.bincount(bin_N, weights_N * (outcome_N - probability_N), minlength=BINS)


def measure_classification(logits_NK: Tensor, classes_N: Tensor, *, weights_N: Tensor | None = None) -> Metrics:
    """Return the metrics of finite logits (N, K), true classes (N,) int64 in 0 … K−1, and weights (N,) ≥ 0.

    `accuracy` with `accuracy_interval` (Wilson, over the `effective_rows` of Kish where rows are weighted), `macro_f1`
    over the classes that are true or predicted in a row with a weight, `confusion` (truth × prediction; counts,
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


def measure_trivial_classification(counts_K: Tensor, classes_N: Tensor, *, weights_N: Tensor | None = None) -> Metrics:
    """Return the metrics, and `loss`, of always predicting the class frequencies of the training rows.

    counts_K: rows, or their weights, of each class in the training rows. The prediction is the most frequent class. As
    `classification`, and `loss`: the cross-entropy of the frequencies; None where a class occurs that was never trained
    on, which would make it infinite.
    """
    shares_K = counts_K.double() / counts_K.double().sum()
    weights = row_weights(weights_N, classes_N)
    present_K = torch.bincount(classes_N, weights, minlength=shares_K.shape[0])
    loss = number(-torch.xlogy(present_K, shares_K.to(present_K.device)).sum() / weights.sum())
    logits_NK = shares_K.to(classes_N.device).log().expand(classes_N.shape[0], -1)
    return {"loss": loss} | measure_classification(logits_NK, classes_N, weights_N=weights_N)


def _predictions(logits_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class with the largest logit, (N,) int64, and its softmax probability, (N,) float64."""
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
    if classes > MAX_CONFUSION_CLASSES:
        return None
    weights = None if weights_N is None else row_weights(weights_N, classes_N)
    cells = torch.bincount(classes_N * classes + predicted_N, weights, minlength=classes * classes)
    matrix: list[list[float]] = cells.view(classes, classes).tolist()
    return matrix


def measure_multilabel(logits_NK: Tensor, targets_NK: Tensor, *, weights_N: Tensor | None = None) -> Metrics:
    """Return the metrics of finite logits (N, K), targets (N, K) in 0 … 1, and weights (N,) ≥ 0.

    `exact_match`: the share of rows with every label right, and its `exact_match_interval` (Wilson, over the
    `effective_rows` of Kish where rows are weighted). `micro_f1` over all decisions, `macro_f1` the mean over all K
    labels. `calibration_error`: of all N·K probabilities against their targets.
    """
    rows, labels = logits_NK.shape
    weights = row_weights(weights_N, targets_NK)
    hit_K, present_K, said_K = torch.zeros(3, labels, dtype=torch.float64, device=weights.device)
    gaps_B = torch.zeros(BINS, dtype=torch.float64, device=weights.device)
    exact = torch.zeros((), dtype=torch.float64, device=weights.device)
    for part in slices(rows, labels):
        probability_NK, targets, weight_N = logits_NK[part].double().sigmoid(), targets_NK[part].double(), weights[part]
        said_NK, present_NK = probability_NK > THRESHOLD, targets > THRESHOLD
        hit_K += weight_N @ (said_NK & present_NK).double()
        present_K += weight_N @ present_NK.double()
        said_K += weight_N @ said_NK.double()
        exact += weight_N @ (said_NK == present_NK).all(dim=1).double()
        each = weight_N[:, None].expand_as(targets).reshape(-1)
        gaps_B += calibration_gaps(probability_NK.view(-1), targets.reshape(-1), each)
    total, effective = weights.sum(), effective_rows(weights)
    matched = number(exact / total)
    return {
        "rows": rows,
        "effective_rows": effective,
        "exact_match": matched,
        "exact_match_interval": wilson(matched, effective),
        "micro_f1": number(f1(hit_K.sum(), present_K.sum(), said_K.sum())),
        "macro_f1": number(f1(hit_K, present_K, said_K).mean()),
        "calibration_error": number(gaps_B.abs().sum() / (total * labels)),
    }


def measure_trivial_multilabel(rates_K: Tensor, targets_NK: Tensor, *, weights_N: Tensor | None = None) -> Metrics:
    """Return the metrics, and `loss`, of always predicting the label rates of the training rows.

    rates_K: the mean of each label's training targets, 0 … 1. As `measure_multilabel`, and `loss`: the mean binary
    cross-entropy of the rates; None where one of 0 or 1 is wrong about a row, which would make it infinite.
    """
    rates_K = rates_K.to(targets_NK.device, torch.float64)
    rows, labels = targets_NK.shape
    weights = row_weights(weights_N, targets_NK)
    # Both sums are computed, because a label that every row has must leave exactly 0 for the log of 0.
    present_K, absent_K = torch.zeros(2, labels, dtype=torch.float64, device=weights.device)
    for part in slices(rows, labels):
        targets = targets_NK[part].double()
        present_K += weights[part] @ targets
        absent_K += weights[part] @ (1 - targets)
    likelihood_K = torch.xlogy(present_K, rates_K) + torch.xlogy(absent_K, 1 - rates_K)
    loss = number(-likelihood_K.sum() / (weights.sum() * labels))
    return {"loss": loss} | measure_multilabel(rates_K.logit().expand(rows, -1), targets_NK, weights_N=weights_N)
