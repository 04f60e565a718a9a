"""Several labels a row: exact matches, F1, calibration."""

# N rows · K labels · B bins
import torch
from torch import Tensor

from adapters.training.evaluation.metrics.decisions import BINS, calibration_gaps, f1, wilson
from adapters.training.evaluation.metrics.rows import effective_rows, row_weights, slices
from adapters.training.evaluation.metrics.values import Metrics, number

THRESHOLD = 0.5
"""A label is present, in truth or in the prediction, above it: scikit-learn's rule for a decision, logit > 0."""


def multilabel(logits_NK: Tensor, targets_NK: Tensor, *, weights_N: Tensor | None = None) -> Metrics:
    """Finite logits (N, K) float, targets (N, K) in 0 … 1, weights (N,) ≥ 0.

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


def trivial_multilabel(rates_K: Tensor, targets_NK: Tensor, *, weights_N: Tensor | None = None) -> Metrics:
    """What always answering with the label rates of the training rows reaches on these rows.

    rates_K: the mean of each label's training targets, 0 … 1. As `multilabel`, and `loss`: the mean binary
    cross-entropy of the rates; None where one of 0 or 1 is wrong about a row, which would make it infinite.
    """
    rates_K = rates_K.to(targets_NK.device, torch.float64)
    rows, labels = targets_NK.shape
    weights = row_weights(weights_N, targets_NK)
    # Both sums, not one from the other: a label that every row has must leave exactly nothing for the log of 0.
    present_K, absent_K = torch.zeros(2, labels, dtype=torch.float64, device=weights.device)
    for part in slices(rows, labels):
        targets = targets_NK[part].double()
        present_K += weights[part] @ targets
        absent_K += weights[part] @ (1 - targets)
    likelihood_K = torch.xlogy(present_K, rates_K) + torch.xlogy(absent_K, 1 - rates_K)
    loss = number(-likelihood_K.sum() / (weights.sum() * labels))
    return {"loss": loss} | multilabel(rates_K.logit().expand(rows, -1), targets_NK, weights_N=weights_N)
