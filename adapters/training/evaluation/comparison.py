"""Comparison of stored versions and the base layer on the same labelled rows: the result of an evaluation job."""

# N rows · O out_features · C classes of the rows · K classes of the rows, then labels that only a version has
# S classes of these that are reported
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import (
    TASKS,
    ComparedFactors,
    LabelMatching,
    Labels,
    compared_outputs,
    evaluate_factors,
    match_labels,
    why_unmatched,
)
from adapters.training.evaluation.metrics import (
    CONFIDENCE_Z,
    MAX_CONFUSION_CLASSES,
    MAX_REPORTED_OUTPUTS,
    THRESHOLD,
    Number,
    Task,
    effective_rows,
    f1,
    measure,
    wilson,
)
from adapters.training.limits import CHUNK_ROWS
from adapters.training.settings import TrainingSpec

# Figure by which the versions are compared: a mean over rows, so that two versions have a gain for each row.
FIGURES: Mapping[Task, str] = {
    Task.CLASSIFICATION: "accuracy",
    Task.MULTILABEL: "label_accuracy",
    Task.REGRESSION: "mse",
}
_MAX_MISSING_LABELS = 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ComparedVersion:
    """A version to compare, or the base layer."""

    reference: str | None
    """`name@version`; None for the base layer."""
    adapter: Adapter | None = None
    """None for the base layer, and for a version that cannot be compared."""
    labels: Labels | None = None
    """Labels of its first outputs; None if it has no labels of its own."""
    loss: str | None = None
    """Loss of its training; None if it is not known."""
    problem: str | None = None
    """Reason for which it cannot be compared, if it is known before any outputs are computed."""

    @property
    def factors(self) -> Factors | None:
        """Return its factors; None for the base layer."""
        return None if self.adapter is None else Factors(self.adapter.a_OR, self.adapter.b_RI, self.adapter.bias_O)


class _Counts(NamedTuple):
    """Rows of each class, or sums of their weights."""

    hit_K: Tensor
    """True class and answer."""
    present_K: Tensor
    """True class."""
    predicted_K: Tensor
    """Answer."""


def compare_versions(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    versions: Iterable[ComparedVersion],
    *,
    labels: Labels | None,
    output_labels: Labels | None = None,
    progress: Callable[[int], None] = lambda _done: None,
) -> dict[str, Any]:
    """Return the result of an evaluation: the figures of each version on all rows, in order.

    versions: read one by one, so that only one adapter is in memory. labels: of the classes of the rows, to which the
    outputs are matched; None if the classes are numbers of outputs. output_labels: of the outputs of versions without
    labels of their own; labels of the base layer of the same type go before them. Without either, the label of an
    output is its number. progress: called with the number of versions done.
    """
    data = data.to(base.device)
    positions = range(base.out_features)
    names = positions[: spec.classes] if labels is None else labels
    default_names: Labels = positions
    if labels is not None and base.labels is not None and type(labels[0]) is type(base.labels[0]):
        default_names = base.labels
    elif labels is not None and output_labels is not None:
        default_names = output_labels
    entries: list[dict[str, Any]] = []
    first_N = None
    for version in versions:
        output_names = default_names if version.labels is None else version.labels
        problem = version.problem or why_unmatched(output_names, version.loss, names, spec.loss)
        entry: dict[str, Any] = {"adapter": version.reference, "problem": problem}
        if problem is None:
            matching = match_labels(output_names, names, spec, outputs=base.out_features)
            figures, scores_N = _evaluate(base, data, spec, version, matching, names, output_names)
            if first_N is not None:
                gain, error = _gain(TASKS[spec.loss], scores_N, first_N, data)
                figures |= {"gain": gain, "gain_error": error}
            entry |= figures
            first_N = scores_N if not entries else first_N
        entries.append(_NO_FIGURES | entry)
        progress(len(entries))
    return {"metric": FIGURES[TASKS[spec.loss]], "rows": data.rows, "adapters": entries}


_NO_FIGURES: dict[str, Any] = dict.fromkeys(
    ("adapter", "figure", "interval", "gain", "gain_error", "metrics", "classes", "confusion")
) | {"missing_labels": [], "missing_rows": 0}


def _evaluate(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    version: ComparedVersion,
    matching: LabelMatching | None,
    names: Sequence[str | int],
    output_names: Sequence[str | int],
) -> tuple[dict[str, Any], Tensor]:
    """Return the figures of a version, and the score of each row."""
    task, adapter = TASKS[spec.loss], version.adapter
    if adapter is not None:
        spec = replace(spec, alpha=adapter.alpha, rank=adapter.rank, rslora=adapter.rslora)
    loss = evaluate_factors(base, data, None, spec, version.factors, matching=matching)["loss"]
    outputs_NK = compared_outputs(base, data.inputs_NI, spec, ComparedFactors(version.factors, spec.scaling, matching))
    targets = data.targets if task is Task.CLASSIFICATION else data.targets.double()
    metrics = measure(task, outputs_NK, targets, weights_N=data.weights_N)
    # Its order is that of the outputs; the one below names its classes.
    metrics.pop("confusion", None)
    scores_N = _scores(task, outputs_NK, targets)
    mean, error = _mean_and_error(scores_N, data)
    figures: dict[str, Any] = {"figure": mean, "interval": _interval(task, mean, error, data)}
    figures["metrics"] = {"loss": loss if math.isfinite(loss) else None, **metrics}
    if task is not Task.REGRESSION:
        others = [] if matching is None or task is Task.MULTILABEL else matching.others_E.tolist()
        all_names = [*names, *(output_names[output] for output in others)]
        figures |= _class_figures(task, outputs_NK, targets, data.weights_N, all_names)
    if matching is not None:
        is_missing_C = matching.outputs_C < 0
        figures["missing_labels"] = [names[output] for output in is_missing_C.nonzero()[:_MAX_MISSING_LABELS, 0]]
        figures["missing_rows"] = _count_rows(targets, is_missing_C.to(targets.device))
    return figures, scores_N


def _scores(task: Task, outputs_NK: Tensor, targets: Tensor) -> Tensor:
    """Return the score of each row, (N,) float64: right or not, the share of right labels, or the squared error."""
    if task is Task.CLASSIFICATION:
        return (outputs_NK.argmax(dim=1) == targets).double()
    scores = []
    for output_NK, target_NK in zip(outputs_NK.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True):
        if task is Task.MULTILABEL:
            scores.append(((output_NK > 0) == (target_NK > THRESHOLD)).double().mean(dim=1))
        else:
            scores.append((output_NK - target_NK).square().mean(dim=1))
    return torch.cat(scores)


def _gain(task: Task, scores_N: Tensor, first_N: Tensor, data: TrainingData) -> tuple[Number, Number]:
    """Return the mean gain over the first entry, positive if better, and its paired standard error."""
    gains_N = first_N - scores_N if task is Task.REGRESSION else scores_N - first_N
    return _mean_and_error(gains_N, data)


def _mean_and_error(values_N: Tensor, data: TrainingData) -> tuple[Number, Number]:
    """Return the mean over rows and its standard error, s/√n; with weights, n is Kish's effective number of rows."""
    weights_N = _weights(data)
    total = weights_N.sum()
    mean = weights_N @ values_N / total
    rows = effective_rows(weights_N)
    if rows <= 1 or not bool(mean.isfinite()):
        return (float(mean) if bool(mean.isfinite()) else None), None
    variance = weights_N @ (values_N - mean).square() / total
    error = math.sqrt(float(variance) / (rows - 1))
    return float(mean), error if math.isfinite(error) else None


def _interval(task: Task, mean: Number, error: Number, data: TrainingData) -> list[float] | None:
    """Return the 95 % interval of a figure: Wilson's for the accuracy, otherwise that of a normal mean."""
    if mean is None:
        return None
    if task is Task.CLASSIFICATION:
        return wilson(mean, effective_rows(_weights(data)))
    return None if error is None else [mean - CONFIDENCE_Z * error, mean + CONFIDENCE_Z * error]


def _class_figures(
    task: Task, outputs_NK: Tensor, targets: Tensor, weights_N: Tensor | None, names: Sequence[str | int]
) -> dict[str, Any]:
    """Return the figures of each class that is true or answered, and the confusion matrix of these classes.

    The matrix is truth × answer, in the order of `classes`: counts, or sums of weights. It is for one class per row,
    and None past 50 classes.
    """
    confusion = None
    if task is Task.CLASSIFICATION:
        answers_N = outputs_NK.argmax(dim=1)
        if weights_N is not None:
            answers_N, targets = answers_N[weights_N > 0], targets[weights_N > 0]
            weights_N = weights_N[weights_N > 0].double()
        counts = _count_classes(answers_N, targets, weights_N, len(names))
    else:
        counts = _count_labels(outputs_NK, targets, weights_N)
    shown_S = (counts.present_K + counts.predicted_K > 0).nonzero()[:, 0]
    if task is Task.CLASSIFICATION and len(shown_S) <= MAX_CONFUSION_CLASSES:
        classes = len(shown_S)
        number_K = torch.zeros(len(names), dtype=torch.int64, device=shown_S.device)
        number_K[shown_S] = torch.arange(classes, device=shown_S.device)
        cells_N = number_K[targets] * classes + number_K[answers_N]
        confusion = torch.bincount(cells_N, weights_N, minlength=classes**2).view(classes, classes).tolist()
    if len(shown_S) > MAX_REPORTED_OUTPUTS:
        return {"classes": None, "confusion": None}
    f1_K = f1(*(count_K.double() for count_K in counts))
    figures = []
    for number in shown_S.tolist():
        hit, present, said = (count_K[number].item() for count_K in counts)
        precision, recall = hit / said if said else None, hit / present if present else None
        values = {"precision": precision, "recall": recall, "f1": float(f1_K[number])}
        figures.append({"label": names[number], "rows": present, **values})
    return {"classes": figures, "confusion": confusion}


def _count_classes(answers_N: Tensor, classes_N: Tensor, weights_N: Tensor | None, classes: int) -> _Counts:
    is_right_N = answers_N == classes_N
    right_N = classes_N[is_right_N]
    weights_of_right = None if weights_N is None else weights_N[is_right_N]
    return _Counts(
        torch.bincount(right_N, weights_of_right, minlength=classes),
        torch.bincount(classes_N, weights_N, minlength=classes),
        torch.bincount(answers_N, weights_N, minlength=classes),
    )


def _count_labels(outputs_NC: Tensor, targets_NC: Tensor, weights_N: Tensor | None) -> _Counts:
    counts = torch.zeros(3, targets_NC.shape[1], dtype=torch.float64, device=targets_NC.device)
    own_N = targets_NC.new_ones(len(targets_NC)) if weights_N is None else weights_N.double()
    parts = (tensor.split(CHUNK_ROWS) for tensor in (outputs_NC, targets_NC, own_N))
    for output_NC, target_NC, weight_N in zip(*parts, strict=True):
        is_said_NC, is_present_NC = output_NC > 0, target_NC > THRESHOLD
        for count_C, part_NC in zip(counts, (is_said_NC & is_present_NC, is_present_NC, is_said_NC), strict=True):
            count_C += weight_N @ part_NC.double()
    return _Counts(*(counts.long() if weights_N is None else counts))


def _count_rows(targets: Tensor, is_missing_C: Tensor) -> int:
    """Return the number of rows with a missing class or label."""
    if targets.dtype == torch.int64:
        return int(is_missing_C[targets].sum())
    return int((targets[:, is_missing_C] > THRESHOLD).any(dim=1).sum())


def _weights(data: TrainingData) -> Tensor:
    """Return the weights of the rows, (N,) float64."""
    if data.weights_N is None:
        return torch.ones(data.rows, dtype=torch.float64, device=data.inputs_NI.device)
    return data.weights_N.double()
