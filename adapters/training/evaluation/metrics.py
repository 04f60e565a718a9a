"""Metrics that tell how good an adapter is on held-out rows; docs/metrics.md has every formula.

`measure` and `measure_trivial` return the metrics of a task. Rows are processed in chunks, so that no temporary tensor
is as large as the outputs.
"""

# N rows · K classes or labels · O outputs · B bins · M documents of a corpus · D distinct ones
import math
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from hashlib import blake2b
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional

# The largest temporary: 8 MiB of float64.
CHUNK_ELEMENTS = 2**20
CONFIDENCE = 0.95
# Quantile of the normal distribution for it.
CONFIDENCE_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
BINS = 15
# Most classes for which the confusion matrix is reported.
MAX_CONFUSION_CLASSES = 50
# A label is present, in truth or in the prediction, above it: scikit-learn's rule for a decision, logit > 0.
THRESHOLD = 0.5
# Most outputs for which metrics per output are reported.
MAX_REPORTED_OUTPUTS = 1000
CUTOFFS = (1, 5, 10)
# Largest difference of cosines that is rounding (at most O·ε); they then count as equal.
_TIE = 1e-12

# Value of a metric. None is undefined; no value is infinite or NaN.
Number = float | int | None
# JSON values by the names in docs/metrics.md.
Metrics = dict[str, Number | Sequence[Number] | Sequence[Sequence[Number]]]


class Task(StrEnum):
    """Kind of task that the outputs are for."""

    CLASSIFICATION = "classification"
    """One class per row: the first K outputs are logits."""
    MULTILABEL = "multilabel"
    """Any number of labels per row: the first K outputs are logits."""
    REGRESSION = "regression"
    """The outputs are numbers that should equal the targets, or have their direction."""
    RETRIEVAL = "retrieval"
    """The output is a query that should be nearest to its document."""


# The metrics that are one number and have a better direction: those that a gate can compare.
HIGHER_IS_BETTER: Mapping[str, bool] = {
    "loss": False,
    "accuracy": True,
    "macro_f1": True,
    "micro_f1": True,
    "exact_match": True,
    "calibration_error": False,
    "r2_mean": True,
    "mae_mean": False,
    "rmse": False,
    "cosine": True,
    "recall_at_1": True,
    "recall_at_5": True,
    "recall_at_10": True,
    "mrr": True,
}
# Primary metric of each task.
PRIMARY: Mapping[Task, str] = {
    Task.CLASSIFICATION: "accuracy",
    Task.MULTILABEL: "macro_f1",
    # Not r2_mean, which does not exist on one row or where no target varies.
    Task.REGRESSION: "rmse",
    Task.RETRIEVAL: "recall_at_1",
}


def measure(
    task: Task,
    outputs_NO: Tensor,
    targets: Tensor,
    *,
    weights_N: Tensor | None = None,
    classes: int | None = None,
    corpus_MO: Tensor | None = None,
) -> Metrics:
    """Return the metrics of a task for finite outputs (N, O), targets and weights (N,) ≥ 0.

    targets: true classes (N,) int64, shares of labels (N, K) in 0 … 1, numbers (N, O), or documents (N, O). `classes`
    (K) is for classification alone, with None for all outputs. `corpus_MO` is for retrieval alone.
    """
    weights = _row_weights(weights_N, targets)
    match task:
        case Task.CLASSIFICATION:
            metrics = _classification(outputs_NO[:, :classes], targets, weights, is_weighted=weights_N is not None)
        case Task.MULTILABEL:
            metrics = _multilabel(outputs_NO[:, : targets.shape[1]], targets, weights)
        case Task.REGRESSION:
            metrics = _regression(outputs_NO, targets, weights)
        case Task.RETRIEVAL:
            metrics = _retrieval(outputs_NO, targets, weights, corpus_MO)
    return {"rows": len(targets), "effective_rows": effective_rows(weights)} | metrics


def measure_trivial(
    task: Task, summary_K: Tensor, targets: Tensor, *, weights_N: Tensor | None = None, corpus_MO: Tensor | None = None
) -> Metrics:
    """Return the metrics of the task's trivial baseline on these rows, as `measure` does.

    The baseline predicts the class frequencies, label rates or means of the training targets. summary_K: the class
    counts (K,), label rates (K,), or means (O,); ignored for retrieval, whose baseline is a random order of documents.
    With classes or labels, `loss` is the cross-entropy of the frequencies or rates; None if something occurs to which
    they give a probability of 0, which would make it infinite.
    """
    weights, summary_K = _row_weights(weights_N, targets), summary_K.to(targets.device, torch.float64)
    loss: Metrics = {}
    match task:
        case Task.CLASSIFICATION:
            shares_K = summary_K / summary_K.sum()
            present_K = torch.bincount(targets, weights, minlength=len(shares_K))
            loss = {"loss": _number(-torch.xlogy(present_K, shares_K).sum() / weights.sum())}
            output_K = shares_K.log()
        case Task.MULTILABEL:
            # Both sums are computed, because a label that every row has must leave exactly 0 for the log of 0.
            present_K, absent_K = torch.zeros(2, *summary_K.shape, dtype=torch.float64, device=weights.device)
            for part in _slices(*targets.shape):
                present_K += weights[part] @ targets[part].double()
                absent_K += weights[part] @ (1 - targets[part].double())
            likelihood_K = torch.xlogy(present_K, summary_K) + torch.xlogy(absent_K, 1 - summary_K)
            loss = {"loss": _number(-likelihood_K.sum() / (weights.sum() * len(summary_K)))}
            output_K = summary_K.logit()
        case Task.REGRESSION:
            output_K = summary_K
        case Task.RETRIEVAL:
            chance = _retrieval(None, targets, weights, corpus_MO)
            return {"rows": len(targets), "effective_rows": effective_rows(weights)} | chance
    return loss | measure(task, output_K.expand(len(targets), -1), targets, weights_N=weights_N)


def _classification(logits_NK: Tensor, classes_N: Tensor, weights: Tensor, *, is_weighted: bool) -> Metrics:
    """Return the metrics of logits (N, K) and true classes (N,).

    `accuracy` with `accuracy_interval` (Wilson, over the `effective_rows` of Kish if rows are weighted), `macro_f1`
    over the classes that are true or predicted in a row with a weight, `confusion` (truth × prediction; counts,
    or sums of weights; None past 50 classes), `calibration_error` of the top probability. Of equal logits the first
    is the prediction.
    """
    classes = logits_NK.shape[1]
    predicted_N, top_N = torch.empty_like(classes_N), torch.empty_like(weights)
    for part in _slices(*logits_NK.shape):
        chunk_NK = logits_NK[part].double()
        largest_N, predicted_N[part] = chunk_NK.max(dim=1)
        top_N[part] = (largest_N - chunk_NK.logsumexp(dim=1)).exp()
    right_N = predicted_N == classes_N
    accuracy = _number((weights * right_N).sum() / weights.sum())
    present_K = torch.bincount(classes_N, weights, minlength=classes)
    said_K = torch.bincount(predicted_N, weights, minlength=classes)
    hit_K = torch.bincount(classes_N, weights * right_N, minlength=classes)
    confusion = None
    if classes <= MAX_CONFUSION_CLASSES:
        cells_N = classes_N * classes + predicted_N
        cells = torch.bincount(cells_N, weights if is_weighted else None, minlength=classes * classes)
        confusion = cells.view(classes, classes).tolist()
    return {
        "accuracy": accuracy,
        "accuracy_interval": wilson(accuracy, effective_rows(weights)),
        "macro_f1": _number(f1(hit_K, present_K, said_K)[present_K + said_K > 0].mean()),
        "confusion": confusion,
        "calibration_error": _number(calibration_gaps(top_N, right_N.double(), weights).abs().sum() / weights.sum()),
    }


def _multilabel(logits_NK: Tensor, targets_NK: Tensor, weights: Tensor) -> Metrics:
    """Return the metrics of logits (N, K) and targets (N, K).

    `exact_match`: the share of rows with every label right, and its `exact_match_interval` (Wilson, over the
    `effective_rows` of Kish if rows are weighted). `micro_f1` over all decisions, `macro_f1` the mean over all K
    labels. `calibration_error`: of all N·K probabilities against their targets.
    """
    labels = logits_NK.shape[1]
    hit_K, present_K, said_K = torch.zeros(3, labels, dtype=torch.float64, device=weights.device)
    gaps_B, exact = weights.new_zeros(BINS), weights.new_zeros(())
    for part in _slices(*logits_NK.shape):
        probability_NK, targets, weight_N = logits_NK[part].double().sigmoid(), targets_NK[part].double(), weights[part]
        said_NK, present_NK = probability_NK > THRESHOLD, targets > THRESHOLD
        hit_K += weight_N @ (said_NK & present_NK).double()
        present_K += weight_N @ present_NK.double()
        said_K += weight_N @ said_NK.double()
        exact += weight_N @ (said_NK == present_NK).all(dim=1).double()
        gaps_B += calibration_gaps(probability_NK.flatten(), targets.flatten(), weight_N.repeat_interleave(labels))
    matched = _number(exact / weights.sum())
    return {
        "exact_match": matched,
        "exact_match_interval": wilson(matched, effective_rows(weights)),
        "micro_f1": _number(f1(hit_K.sum(), present_K.sum(), said_K.sum())),
        "macro_f1": _number(f1(hit_K, present_K, said_K).mean()),
        "calibration_error": _number(gaps_B.abs().sum() / (weights.sum() * labels)),
    }


def wilson(share: float | None, rows: float) -> list[float] | None:
    """Return the 95 % score interval [low, high] of a proportion over an effective number of rows; None without rows.

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n), Wilson 1927.
    """
    if share is None or rows <= 0:
        return None
    squared = CONFIDENCE_Z * CONFIDENCE_Z / rows
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


def _regression(outputs_NO: Tensor, targets_NO: Tensor, weights: Tensor) -> Metrics:
    """Return the metrics of outputs and targets (N, O).

    `r2_per_output`, `mae_per_output`, `rmse_per_output` (None past 1,000 outputs); `r2_mean` over the outputs that
    have one, `mae_mean`, `rmse` over all elements; `cosine`, the mean over rows. R² of an output whose target is the
    same in all rows with a weight is None. The cosine with a zero vector is 0.
    """
    outputs, total = targets_NO.shape[1], weights.sum()
    absolute_O, squared_O, shift_O, spread_O = weights.new_zeros(4, outputs)
    cosine = weights.new_zeros(())
    # Relative to a row with a weight, so that a constant is 0 in every row, whatever the rounding of its mean.
    origin_O = targets_NO[weights.argmax()].double()
    for part in _slices(*targets_NO.shape):
        output, target, weight_N = outputs_NO[part].double(), targets_NO[part].double(), weights[part]
        error = output - target
        absolute_O += weight_N @ error.abs()
        squared_O += weight_N @ error.square_()
        cosine += weight_N @ _cosines(output, target)
        shift_O += weight_N @ (target - origin_O)
    shift_O /= total
    for part in _slices(*targets_NO.shape):
        spread_O += weights[part] @ (targets_NO[part].double() - origin_O - shift_O).square_()
    r2_O = torch.where(spread_O > 0, 1 - squared_O / spread_O, torch.nan)
    mae_O, mse_O = absolute_O / total, squared_O / total
    per_output = {"r2_per_output": r2_O, "mae_per_output": mae_O, "rmse_per_output": mse_O.sqrt()}
    return {
        "r2_mean": _number(r2_O.nanmean()),
        "mae_mean": _number(mae_O.mean()),
        "rmse": _number(mse_O.mean().sqrt()),
        "cosine": _number(cosine / total),
        **{
            name: [_number(value) for value in values_O.tolist()] if outputs <= MAX_REPORTED_OUTPUTS else None
            for name, values_O in per_output.items()
        },
    }


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosine of the angle between vectors, (…, O) twice -> (…); 0 if one vector is 0."""
    lengths = torch.linalg.vector_norm(one, dim=-1) * torch.linalg.vector_norm(other, dim=-1)
    cosines: Tensor = torch.linalg.vecdot(one, other) / lengths
    return torch.where(lengths > 0, cosines, 0.0)


def _retrieval(outputs_NO: Tensor | None, documents_NO: Tensor, weights: Tensor, corpus_MO: Tensor | None) -> Metrics:
    """Return the metrics of queries (N, O) and their true documents (N, O).

    The corpus (M, O) is searched, or all true documents. Equal rows are one document; `documents` is their number.
    `recall_at_1`, `_5`, `_10`: the share of rows whose document has at most that rank; `mrr`: the mean of 1/rank. The
    rank is the number of documents that are at least as similar as the true one, itself included, so that ties count
    against the adapter. Rows whose document is not in the corpus are never found; `missing` is their number. This takes
    N·D·O multiplications, one tile at a time.

    Without outputs, the metrics are those expected of a random order: the rank is uniform over 1 … D, so recall at k is
    min(k, D)/D and the reciprocal rank (1 + 1/2 + … + 1/D)/D.
    """
    searched_MO, distinct_D, found_N = _distinct_documents(documents_NO, corpus_MO)
    documents, found = len(distinct_D), weights * found_N
    if outputs_NO is None:
        recalls = [found * min(k, documents) / documents for k in CUTOFFS]
        reciprocal_N = found * sum(1 / rank for rank in range(1, documents + 1)) / documents
    else:
        ranks_N = _ranks(outputs_NO, documents_NO, searched_MO, distinct_D)
        recalls = [found * (ranks_N <= k) for k in CUTOFFS]
        reciprocal_N = torch.where(found_N, weights / ranks_N, 0.0)
    metrics: Metrics = {
        f"recall_at_{k}": _number(recalled_N.sum() / weights.sum())
        for k, recalled_N in zip(CUTOFFS, recalls, strict=True)
    }
    mrr = _number(reciprocal_N.sum() / weights.sum())
    return metrics | {"mrr": mrr, "documents": documents, "missing": int((~found_N).sum())}


def _distinct_documents(documents_NO: Tensor, corpus_MO: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the corpus, the position of each distinct row, (D,), and whether it has each row's document, (N,)."""
    own = list(_digests(documents_NO))
    positions: dict[bytes, int] = {}
    for position, digest in enumerate(own if corpus_MO is None else _digests(corpus_MO)):
        positions.setdefault(digest, position)
    device = documents_NO.device
    found_N = torch.tensor([digest in positions for digest in own], dtype=torch.bool, device=device)
    searched_MO = documents_NO if corpus_MO is None else corpus_MO.to(device)
    return searched_MO, torch.tensor(list(positions.values()), dtype=torch.int64, device=device), found_N


def _digests(rows_MO: Tensor) -> Iterator[bytes]:
    """Yield a hash of each row's float64 bytes, with −0 as 0."""
    for part in _slices(*rows_MO.shape):
        for row_O in (rows_MO[part].double() + 0.0).cpu().numpy():
            yield blake2b(row_O, digest_size=16).digest()


def _ranks(outputs_NO: Tensor, documents_NO: Tensor, searched_MO: Tensor, distinct_D: Tensor) -> Tensor:
    """Return the number of distinct documents that are at least as similar as the row's own, (N,) int64."""
    rows, outputs = outputs_NO.shape
    # So short that all pairs of rows of two slices stay within the limit too.
    width = max(outputs, math.isqrt(CHUNK_ELEMENTS - 1) + 1)
    ranks_N = torch.zeros(rows, dtype=torch.int64, device=outputs_NO.device)
    for columns in _slices(len(distinct_D), width):
        unit_DO = _unit(searched_MO[distinct_D[columns]])
        for part in _slices(rows, width):
            own_N = _cosines(outputs_NO[part].double(), documents_NO[part].double())
            cosine_ND = _unit(outputs_NO[part]) @ unit_DO.T
            # Counted as not less similar, so that the rank of a NaN output is the last one.
            ranks_N[part] += unit_DO.shape[0] - (cosine_ND < own_N[:, None] - _TIE).sum(dim=1)
    return ranks_N


def _unit(rows_NO: Tensor) -> Tensor:
    """Return each row with length 1, in float64; 0 stays 0."""
    return functional.normalize(rows_NO.double(), dim=1, eps=torch.finfo(torch.float64).tiny)


def _slices(rows: int, width: int) -> Iterator[slice]:
    """Yield slices of all rows in order, with rows × width ≤ `CHUNK_ELEMENTS` (but at least one row)."""
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def _row_weights(weights_N: Tensor | None, like_N: Tensor) -> Tensor:
    """Return the weights, or ones without any, (N,) float64 on the device of `like_N`."""
    if weights_N is None:
        return torch.ones(like_N.shape[0], dtype=torch.float64, device=like_N.device)
    return weights_N.to(like_N.device, torch.float64)


def effective_rows(weights_N: Tensor) -> float:
    """Return (Σw)² / Σw², the number of rows of equal weight with the same information (Kish 1965, section 11.7)."""
    squares = float(weights_N.square().sum())
    return float(weights_N.sum()) ** 2 / squares if squares > 0 else 0.0


def _number(value: Tensor | float) -> float | None:
    """Return a scalar as a float, or None if it is not finite (0/0, the log of 0)."""
    plain = float(value)
    return plain if math.isfinite(plain) else None
