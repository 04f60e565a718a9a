"""Metrics that tell how good an adapter is on held-out rows; docs/metrics.md has every formula.

This file defines the tasks, the metrics that each task has, its primary metric, and whether more of a metric is better.
The modules compute them: `classification`, `regression`, `retrieval`, with row weights from `weighting`.
"""

# N rows · K classes or labels · O outputs · M documents of a corpus
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from torch import Tensor

from adapters.training.evaluation.metrics.classification import (
    measure_classification,
    measure_multilabel,
    measure_trivial_classification,
    measure_trivial_multilabel,
)
from adapters.training.evaluation.metrics.regression import measure_regression, measure_trivial_regression
from adapters.training.evaluation.metrics.retrieval import measure_retrieval, measure_trivial_retrieval
from adapters.training.evaluation.metrics.weighting import Metrics

__all__ = ["HIGHER_IS_BETTER", "PRIMARY", "Metrics", "Task", "measure", "measure_trivial", "scalars"]


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
HIGHER_IS_BETTER: Mapping[str, bool] = MappingProxyType(
    {
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
)

# Primary metric of each task, and whether higher is better.
PRIMARY: Mapping[Task, tuple[str, bool]] = MappingProxyType(
    {
        task: (name, HIGHER_IS_BETTER[name])
        for task, name in (
            (Task.CLASSIFICATION, "accuracy"),
            (Task.MULTILABEL, "macro_f1"),
            # Not r2_mean, which does not exist on one row or where no target varies.
            (Task.REGRESSION, "rmse"),
            (Task.RETRIEVAL, "recall_at_1"),
        )
    }
)


def measure(
    task: Task,
    outputs_NO: Tensor,
    targets: Tensor,
    *,
    weights_N: Tensor | None = None,
    classes: int | None = None,
    corpus_MO: Tensor | None = None,
) -> Metrics:
    """Return the metrics of a task for these outputs.

    `classes` (K) is for classification alone, with None for all outputs. `corpus_MO` is for retrieval alone.
    """
    if task is Task.CLASSIFICATION:
        return measure_classification(outputs_NO[:, :classes], targets, weights_N=weights_N)
    if task is Task.MULTILABEL:
        return measure_multilabel(outputs_NO[:, : targets.shape[1]], targets, weights_N=weights_N)
    if task is Task.REGRESSION:
        return measure_regression(outputs_NO, targets, weights_N=weights_N)
    return measure_retrieval(outputs_NO, targets, corpus_MO=corpus_MO, weights_N=weights_N)


def measure_trivial(
    task: Task, summary_K: Tensor, targets: Tensor, *, weights_N: Tensor | None = None, corpus_MO: Tensor | None = None
) -> Metrics:
    """Return the metrics of the task's trivial baseline on these rows.

    summary_K summarizes the training targets: class counts (K,), label rates (K,), or means (O,). Retrieval ignores it.
    """
    if task is Task.CLASSIFICATION:
        return measure_trivial_classification(summary_K, targets, weights_N=weights_N)
    if task is Task.MULTILABEL:
        return measure_trivial_multilabel(summary_K, targets, weights_N=weights_N)
    if task is Task.REGRESSION:
        return measure_trivial_regression(summary_K, targets, weights_N=weights_N)
    return measure_trivial_retrieval(targets, corpus_MO=corpus_MO, weights_N=weights_N)


def scalars(metrics: Metrics) -> dict[str, float | None]:
    """Return the metrics of `HIGHER_IS_BETTER` that are present, in its order."""
    return {
        name: value
        for name in HIGHER_IS_BETTER
        if name in metrics and isinstance(value := metrics[name], float | int | None)
    }
