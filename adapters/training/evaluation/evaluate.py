"""Losses, accuracies and metrics of factors on rows, in float64, for one adapter or a stack.

A stored version may have other labels than the training, or the same in another order. `match_labels` finds its output
for each class, so that the versions can be compared.
"""

# G adapters of a stack · N rows · K rows of one part · I in_features · O out_features · M documents
# C classes of the training · L labels of a version · E of these that the training lacks
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.metrics import Task, measure, measure_trivial
from adapters.training.gradient.batches import pad_rows, stack_base_outputs
from adapters.training.gradient.losses import (
    add_low_rank_stack,
    compute_outputs,
    document_ids,
    row_losses,
    target_columns,
)
from adapters.training.limits import CHUNK_ROWS
from adapters.training.settings import Loss, TrainingSpec

Labels: TypeAlias = Sequence[str | int]

# Task of a training, by its loss.
TASKS: Mapping[Loss, Task] = {
    Loss.MSE: Task.REGRESSION,
    Loss.HUBER: Task.REGRESSION,
    Loss.COSINE: Task.REGRESSION,
    Loss.CROSS_ENTROPY: Task.CLASSIFICATION,
    Loss.BINARY_CROSS_ENTROPY: Task.MULTILABEL,
    Loss.MULTIPLE_NEGATIVES: Task.RETRIEVAL,
}
_PREFIXES = ("", "base_")
_CLASS_LOSSES = (Loss.CROSS_ENTROPY, Loss.BINARY_CROSS_ENTROPY)
# Most inputs and outputs that are measured together: as float64, they fit in the processor's cache.
_CHUNK_NUMBERS = 2**17
# Probability of a class that the version lacks. With 0, its loss would be infinite; `log_loss` clips here too.
_MIN_PROBABILITY = torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Losses on both sides of the split, and metrics on the held-out rows."""

    losses: Mapping[str, float | None]
    """`train_loss`, `base_train_loss`, `validation_loss`, …; with classes the accuracies too. None without rows."""
    held_out: Mapping[str, Any] | None = None
    """Rows, and metrics by what was compared; None if no rows are held out."""
    rows: int | None = None
    """Rows in the statistics of an update."""

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as a job shows them."""
        optional = {"rows": self.rows, "held_out": self.held_out}
        return {**self.losses, **{name: value for name, value in optional.items() if value is not None}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Evaluation":
        """Read what `to_json` returned."""
        losses = {name: value for name, value in values.items() if name not in ("rows", "held_out")}
        return cls(losses=losses, held_out=values.get("held_out"), rows=values.get("rows"))


@dataclass(frozen=True, slots=True, eq=False)
class LabelMatching:
    """Matching of a training's classes to the outputs of a version with other labels."""

    labels: int
    """L: the outputs of the version that have a label, the first ones."""
    outputs_C: Tensor
    """(C,) int64: the output of the version for each class; -1 if the version has no such label."""
    others_E: Tensor
    """(E,) int64: outputs of the version whose labels the training lacks."""

    def logits(self, loss: Loss, y_NO: Tensor) -> Tensor:
        """Return the version's outputs in the order of the classes: (N, O) float64 -> (N, C), or (N, C + E).

        With `cross_entropy`, the labels that only the version has follow: it can answer with them, and then it is
        wrong. A class that the version lacks has the least probability, so it is never the answer.
        """
        y_NL, outputs_C = y_NO[:, : self.labels], self.outputs_C.to(y_NO.device)
        own_NC = y_NL[:, outputs_C.clamp_min(0)]
        if loss is Loss.BINARY_CROSS_ENTROPY:
            least = math.log(_MIN_PROBABILITY) - math.log1p(-_MIN_PROBABILITY)
            return torch.where(outputs_C >= 0, own_NC, least)
        least_N1 = y_NL.logsumexp(dim=1, keepdim=True) + math.log(_MIN_PROBABILITY)
        own_NC = torch.where(outputs_C >= 0, own_NC, least_N1)
        return torch.cat([own_NC, y_NL[:, self.others_E.to(y_NO.device)]], dim=1)

    def losses(self, spec: TrainingSpec, y_NO: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row, (N,): of outputs (N, O) float64 against classes (N,), or shares (N, C).

        With `cross_entropy`, the probabilities (and the label smoothing) are over the version's own labels, and a row
        of a class that it lacks has the loss of the least probability.
        """
        if spec.loss is Loss.BINARY_CROSS_ENTROPY:
            logits_NC = self.logits(spec.loss, y_NO)
            return _losses_of_rows(replace(spec, classes=None), logits_NC, targets)
        own_N = self.outputs_C.to(targets.device)[targets]
        losses_N = _losses_of_rows(replace(spec, classes=self.labels), y_NO, own_N.clamp_min(0))
        return torch.where(own_N >= 0, losses_N, -math.log(_MIN_PROBABILITY))


def match_labels(
    version: Labels | None,
    training: Labels | None,
    spec: TrainingSpec,
    *,
    outputs: int,
    base_labels: Labels | None = None,
) -> LabelMatching | None:
    """Return how to match a version's outputs, or None if they are in the order of the training's classes already.

    Outputs that are numbers to hit have no labels, and stay in their order. base_labels: those of a version or training
    without labels of its own.
    """
    if spec.loss not in _CLASS_LOSSES or version == training:
        return None
    # Outputs without a label have names that no label equals, unless labels are the numbers of outputs.
    unnamed = range(outputs) if base_labels is None else [(output,) for output in range(len(base_labels), outputs)]
    theirs: Sequence[object] = version or base_labels or range(outputs)
    ours: Sequence[object] = training or [*(base_labels or ()), *unnamed][: spec.classes]
    if list(theirs) == list(ours):
        return None
    output_of, known = {label: output for output, label in enumerate(theirs)}, set(ours)
    outputs_C = torch.tensor([output_of.get(label, -1) for label in ours])
    others = [output for label, output in output_of.items() if label not in known]
    return LabelMatching(len(theirs), outputs_C, torch.tensor(others, dtype=torch.int64))


def base_matching(base: BaseLayer, labels: Labels | None, spec: TrainingSpec) -> LabelMatching | None:
    """Return how to match the outputs of the base layer, or None if they are in the order of the classes already.

    Without labels on both sides, output k is class k. With other labels than those of the training, it has none of the
    classes, and is never right.
    """
    if base.labels is None or labels is None:
        return None
    return match_labels(base.labels, labels, spec, outputs=base.out_features)


def why_unmatched(
    version: Labels | None, version_loss: object, training: Labels | None, loss: Loss, base_labels: Labels | None = None
) -> str | None:
    """Say why a version's outputs cannot be matched to the classes of a training; None if they can.

    version_loss: what the version was trained with, None if that is not known. base_labels: those of a version or
    training without labels of its own.
    """
    version, training = version or base_labels, training or base_labels
    if loss not in _CLASS_LOSSES:
        return None
    if version_loss in _CLASS_LOSSES and version_loss != loss:
        return f"it was trained with {version_loss}, and the rows are for {loss}"
    if version is not None and training is not None:
        return None if set(version) & set(training) else "it has none of the labels of the rows"
    if version is None and not _are_positions(training):
        return "it has no labels, and this training has"
    if training is None and not _are_positions(version):
        return "it has labels, and this training has none"
    return None


def _are_positions(labels: Labels | None) -> bool:
    """Return whether each label is the number of its output, which is the name of an output without a label."""
    return labels is None or list(labels) == list(range(len(labels)))


def evaluate_factors(
    base: BaseLayer,
    data: TrainingData,
    rows_K: Tensor | None,
    spec: TrainingSpec,
    factors: Factors | None,
    documents_N: Tensor | None = None,
    own_weights_N: Tensor | None = None,
    matching: LabelMatching | None = None,
) -> dict[str, float]:
    """Return `loss`, the training's own loss, over these rows (None: all), its standard `error`, and maybe `accuracy`.

    The rows are evaluated in chunks. `multiple_negatives` is evaluated in batches of the rows in order, with the
    document ids of all rows in documents_N. own_weights_N: (N,), the row weights without class weights, for the
    accuracy, because class weights are part of the loss alone. matching: which outputs are the classes, if they are not
    the first ones in order.
    """
    rows = data.rows if rows_K is None else len(rows_K)
    chunk_rows = CHUNK_ROWS if documents_N is None else spec.batch(rows)
    sums, right, counted, begin = torch.zeros(4, dtype=torch.float64), 0.0, 0.0, 0
    for part in data.parts(rows_K, chunk_rows):
        y_NO = compute_outputs(base, part.inputs_NI, factors, spec.scaling)
        part_rows = slice(begin, begin + part.rows) if rows_K is None else rows_K[begin : begin + part.rows]
        begin += part.rows
        if matching is not None:
            losses_N = matching.losses(spec, y_NO, part.targets)
            y_NO = matching.logits(spec.loss, y_NO)
        else:
            documents_K = None if documents_N is None else documents_N[part_rows]
            losses_N = _losses_of_rows(spec, y_NO, part.targets, documents_K)
            y_NO = y_NO[:, : spec.classes]
        ones_N = torch.ones_like(losses_N)
        weights_N = ones_N if part.weights_N is None else part.weights_N.double()
        terms = (losses_N, losses_N.square(), ones_N, weights_N)
        sums += torch.stack([term_N @ weights_N for term_N in terms]).cpu()
        if spec.loss is Loss.CROSS_ENTROPY:
            own_N = ones_N if own_weights_N is None else own_weights_N[part_rows].double()
            right += float((y_NO.argmax(dim=1) == part.targets).double() @ own_N)
            counted += float(own_N.sum())
    total, squares, weight, weight_squares = sums.tolist()
    mean = {"loss": 0.0, "error": 0.0}
    if weight > 0:
        spread = max(0.0, squares / weight - (total / weight) ** 2)
        mean = {"loss": total / weight, "error": math.sqrt(spread * weight_squares) / weight}
    return mean | {"accuracy": right / counted} if counted > 0 else mean


def _losses_of_rows(spec: TrainingSpec, y_NO: Tensor, targets: Tensor, documents_N: Tensor | None = None) -> Tensor:
    documents_1N = None if documents_N is None else documents_N.unsqueeze(0)
    targets = target_columns(_float64(targets).unsqueeze(0))
    return row_losses(spec, y_NO.T.unsqueeze(0), targets, documents_1N)[0]


class ComparedFactors(NamedTuple):
    """Factors that are measured on the held-out rows."""

    factors: Factors | None
    """None for the base layer alone."""
    scaling: float
    matching: LabelMatching | None = None
    """Which outputs are the classes, if they are not the first ones in order."""


def compare_on_held_out(
    base: BaseLayer,
    data: TrainingData,
    held_K: Tensor | None,
    spec: TrainingSpec,
    entries: Mapping[str, ComparedFactors],
    *,
    weights_N: Tensor | None,
    summary: Tensor,
    corpus_MO: Tensor | None,
) -> dict[str, Any]:
    """Return the metrics of each entry, and of the trivial baseline, on the same held-out rows.

    weights_N: (N,), the row weights without class weights. summary: see `measure_trivial`.
    """
    held = next(data.parts(held_K, data.rows))
    held = held.weighted(None if weights_N is None else weights_N if held_K is None else weights_N[held_K])
    task, targets = TASKS[spec.loss], _float64(held.targets)
    metrics: dict[str, Any] = {"rows": held.rows}
    for name, entry in entries.items():
        y_NO = compared_outputs(base, held.inputs_NI, spec, entry)
        metrics[name] = measure(task, y_NO, targets, weights_N=held.weights_N, corpus_MO=corpus_MO)
    metrics["trivial"] = measure_trivial(task, summary, targets, weights_N=held.weights_N, corpus_MO=corpus_MO)
    return metrics


def compared_outputs(base: BaseLayer, inputs_NI: Tensor, spec: TrainingSpec, entry: ComparedFactors) -> Tensor:
    """Return the outputs that the task uses, in the order of its classes: (N, I) -> (N, C or more) float64.

    See `LabelMatching.logits` for those of an entry with other labels.
    """
    rows = len(inputs_NI)
    # All chunks write to one tensor, because tensors between freed ones would fragment the memory.
    y_NO = inputs_NI.new_empty(rows, base.out_features, dtype=torch.float64)
    for begin in range(0, rows, CHUNK_ROWS):
        chunk = slice(begin, begin + CHUNK_ROWS)
        y_NO[chunk] = compute_outputs(base, inputs_NI[chunk], entry.factors, entry.scaling)
    return y_NO[:, : spec.classes] if entry.matching is None else entry.matching.logits(spec.loss, y_NO)


def summarize_targets(data: TrainingData, training_K: Tensor | None, spec: TrainingSpec, outputs: int) -> Tensor:
    """Return the summary of the training rows for the trivial baseline: class counts, or mean targets; float64."""
    classes = spec.classes or outputs
    is_classes = data.targets.dtype == torch.int64
    total = torch.zeros(classes if is_classes else data.targets.shape[-1], dtype=torch.float64)
    weight = 0.0
    for part in data.parts(training_K, CHUNK_ROWS):
        weights_N = torch.ones(part.rows).double() if part.weights_N is None else part.weights_N.double().cpu()
        weight += float(weights_N.sum())
        targets = part.targets.cpu()
        total += weights_N @ (functional.one_hot(targets, classes) if is_classes else targets).double()
    return total if is_classes else total / max(weight, 1e-300)


def measure_stack(
    base: BaseLayer,
    table: TrainingData,
    spec: TrainingSpec,
    sides: Mapping[str, Sequence[Tensor]],
    factors: Factors,
    own_weights_N: Tensor | None,
    of_base: LabelMatching | None = None,
) -> list[dict[str, Any]]:
    """Return the losses, and for classes the accuracies, of each adapter and of the base layer, on each part.

    `sides` has the indices in `table` of each adapter's rows, by name of the part; the list is empty if no adapter has
    rows there. own_weights_N: (N,), the row weights without class weights, for the accuracy. of_base: which outputs of
    the base layer are the classes, if they are not the first ones in order.
    """
    metrics: list[dict[str, Any]] = [{} for _ in factors.a_OR]
    names = ("loss", "accuracy") if spec.loss is Loss.CROSS_ENTROPY else ("loss",)
    for side, rows in sides.items():
        measured: Iterable[dict[str, float]] = repeat({}, len(metrics))
        if rows:
            measured = _measure_side(base, table, spec, rows, factors, own_weights_N, of_base)
        for of_adapter, values in zip(metrics, measured, strict=True):
            of_adapter |= {
                f"{prefix}{side}_{name}": values.get(prefix + name) for prefix in _PREFIXES for name in names
            }
    return metrics


def _measure_side(
    base: BaseLayer,
    table: TrainingData,
    spec: TrainingSpec,
    rows: Sequence[Tensor],
    factors: Factors,
    own_weights_N: Tensor | None,
    of_base: LabelMatching | None,
) -> Iterator[dict[str, float]]:
    """Yield `loss`, `base_loss` and maybe the accuracies of each adapter on its rows."""
    largest = max(map(len, rows))
    documents_N = document_ids(spec, table.targets)
    if documents_N is None and largest <= CHUNK_ROWS:
        groups_at_once = max(1, _CHUNK_NUMBERS // (largest * (base.in_features + 2 * base.out_features)))
        for begin in range(0, len(rows), groups_at_once):
            chunk = slice(begin, begin + groups_at_once)
            yield from _measure_together(base, table, spec, rows[chunk], factors.at(chunk), own_weights_N, of_base)
        return
    # One by one: with very many rows, or a loss that depends on an adapter's number of rows.
    for group, rows_K in enumerate(rows):
        measured: dict[str, float] = {}
        rows_K = rows_K.to(base.device)
        for prefix, own, matching in zip(_PREFIXES, (factors.at(group), None), (None, of_base), strict=True):
            of_rows = evaluate_factors(base, table, rows_K, spec, own, documents_N, own_weights_N, matching)
            measured |= {prefix + name: value for name, value in of_rows.items()}
        yield measured


def _measure_together(
    base: BaseLayer,
    table: TrainingData,
    spec: TrainingSpec,
    rows: Sequence[Tensor],
    factors: Factors,
    own_weights_N: Tensor | None,
    of_base: LabelMatching | None,
) -> list[dict[str, float]]:
    rows_GK, is_row_GK = pad_to_matrix(rows, base.device)
    x_GKI = table.inputs_NI.index_select(0, rows_GK.flatten()).double().unflatten(0, rows_GK.shape)
    targets = table.targets.index_select(0, rows_GK.flatten()).unflatten(0, rows_GK.shape)
    targets = target_columns(_float64(targets))
    weights_GK, own_GK = (
        (is_row_GK if weights_N is None else is_row_GK * weights_N[rows_GK]).double()
        for weights_N in (table.weights_N, own_weights_N)
    )
    base_GOK = stack_base_outputs(base, x_GKI)
    adapted_GOK = add_low_rank_stack(base_GOK, x_GKI, factors.map(lambda part: part.to(x_GKI)), spec.scaling)
    means: dict[str, list[float]] = {}
    for prefix, y_GOK, matching in zip(_PREFIXES, (adapted_GOK, base_GOK), (None, of_base), strict=True):
        if matching is None:
            losses_GK, y_GCK = row_losses(spec, y_GOK, targets), y_GOK[:, : spec.classes]
        else:
            # Row by row, as `LabelMatching` takes them.
            G, y_TO = len(y_GOK), y_GOK.transpose(1, 2).flatten(0, 1)
            rows_T = (targets.transpose(1, 2) if targets.dim() == 3 else targets).flatten(0, 1)
            losses_GK = matching.losses(spec, y_TO, rows_T).view(G, -1)
            y_GCK = matching.logits(spec.loss, y_TO).unflatten(0, (G, -1)).transpose(1, 2)
        means[f"{prefix}loss"] = _weighted_means(losses_GK, weights_GK)
        if spec.loss is Loss.CROSS_ENTROPY:
            means[f"{prefix}accuracy"] = _weighted_means((y_GCK.argmax(dim=1) == targets).double(), own_GK)
    return [dict(zip(means, of_adapter, strict=True)) for of_adapter in zip(*means.values(), strict=True)]


def _weighted_means(values_GK: Tensor, weights_GK: Tensor) -> list[float]:
    means: list[float] = ((values_GK * weights_GK).sum(dim=1) / weights_GK.sum(dim=1).clamp_min(1e-300)).tolist()
    return means


def _float64(targets: Tensor) -> Tensor:
    """Return targets in float64; classes as they are."""
    return targets if targets.dtype == torch.int64 else targets.double()


def pad_to_matrix(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row indices padded with the first row, (G, K) int64, and 1 for rows or 0 for padding, (G, K) float32."""
    K = max(map(len, rows))
    rows_T, is_row_T = pad_rows(rows, torch.full((len(rows),), K))
    return rows_T.view(-1, K).to(device), is_row_T.view(-1, K).float().to(device)
