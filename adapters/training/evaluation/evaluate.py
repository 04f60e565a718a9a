"""Losses, accuracies and metrics of factors on rows, in float64, for one adapter or a stack."""

# G adapters of a stack · N rows · K rows of one part · I in_features · O out_features · M documents
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.label_matching import LabelMatching
from adapters.training.evaluation.metrics import Task, measure, measure_trivial
from adapters.training.gradient.batches import pad_rows, stack_base_outputs
from adapters.training.gradient.losses import add_low_rank_stack, compute_outputs, document_ids, row_losses
from adapters.training.limits import CHUNK_ROWS
from adapters.training.settings import Loss, TrainingSpec

# Most inputs and outputs that are measured together: as float64, they fit in the processor's cache.
_CHUNK_NUMBERS = 2**17
_PREFIXES = ("", "base_")
_TASKS = {
    Loss.MSE: Task.REGRESSION,
    Loss.HUBER: Task.REGRESSION,
    Loss.COSINE: Task.REGRESSION,
    Loss.CROSS_ENTROPY: Task.CLASSIFICATION,
    Loss.BINARY_CROSS_ENTROPY: Task.MULTILABEL,
    Loss.MULTIPLE_NEGATIVES: Task.RETRIEVAL,
}


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


def task_of(loss: Loss) -> Task:
    """Return the task of a training with this loss."""
    return _TASKS[loss]


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
    negatives = spec.loss is Loss.MULTIPLE_NEGATIVES
    rows = data.rows if rows_K is None else len(rows_K)
    most = spec.batch(rows) if negatives else CHUNK_ROWS
    total = squares = weight = weight_squares = right = counted = 0.0
    begin = 0
    for part in data.parts(rows_K, most):
        y_NO = compute_outputs(base, part.inputs_NI, factors, spec.scaling)
        targets = part.targets if part.targets.dtype == torch.int64 else part.targets.double().T
        part_rows = slice(begin, begin + part.rows) if rows_K is None else rows_K[begin : begin + part.rows]
        if matching is not None:
            losses_N = matching.losses(spec, y_NO, part.targets)
            y_NO = matching.logits(spec.loss, y_NO)
        else:
            documents_1K = None if documents_N is None else documents_N[part_rows].unsqueeze(0)
            losses_N = row_losses(spec, y_NO.T.unsqueeze(0), targets.unsqueeze(0), documents_1K)[0]
            y_NO = y_NO[:, : spec.classes]
        weights_N = torch.ones_like(losses_N) if part.weights_N is None else part.weights_N.double()
        total += float(losses_N @ weights_N)
        squares += float(losses_N.square() @ weights_N)
        weight += float(weights_N.sum())
        weight_squares += float(weights_N.square().sum())
        if spec.loss is Loss.CROSS_ENTROPY:
            own_N = torch.ones_like(losses_N) if own_weights_N is None else own_weights_N[part_rows].to(losses_N)
            right += float((y_NO.argmax(dim=1) == part.targets).double() @ own_N)
            counted += float(own_N.sum())
        begin += part.rows
    mean = {"loss": 0.0, "error": 0.0}
    if weight > 0:
        spread = max(0.0, squares / weight - (total / weight) ** 2)
        mean = {"loss": total / weight, "error": math.sqrt(spread * weight_squares) / weight}
    return mean | {"accuracy": right / counted} if counted > 0 else mean


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
    task, targets = task_of(spec.loss), held.targets if held.targets.dtype == torch.int64 else held.targets.double()
    metrics: dict[str, Any] = {"rows": held.rows}
    for name, entry in entries.items():
        # All chunks write to one tensor, because tensors between freed ones would fragment the memory.
        y_NO = held.inputs_NI.new_empty(held.rows, base.out_features, dtype=torch.float64)
        for begin in range(0, held.rows, CHUNK_ROWS):
            chunk = slice(begin, begin + CHUNK_ROWS)
            y_NO[chunk] = compute_outputs(base, held.inputs_NI[chunk], entry.factors, entry.scaling)
        classes = spec.classes
        if entry.matching is not None:
            y_NO, classes = entry.matching.logits(spec.loss, y_NO), None
        metrics[name] = measure(task, y_NO, targets, weights_N=held.weights_N, classes=classes, corpus_MO=corpus_MO)
    metrics["trivial"] = measure_trivial(task, summary, targets, weights_N=held.weights_N, corpus_MO=corpus_MO)
    return metrics


def summarize_targets(data: TrainingData, training_K: Tensor | None, spec: TrainingSpec, outputs: int) -> Tensor:
    """Return the summary of the training rows for the trivial baseline: class counts, or mean targets; float64."""
    classes = spec.classes or outputs
    total = torch.zeros(classes if task_of(spec.loss) is Task.CLASSIFICATION else data.targets.shape[-1]).double()
    weight = 0.0
    for part in data.parts(training_K, CHUNK_ROWS):
        weights_N = torch.ones(part.rows).double() if part.weights_N is None else part.weights_N.double().cpu()
        weight += float(weights_N.sum())
        if part.targets.dtype == torch.int64:
            total += weights_N @ functional.one_hot(part.targets.cpu(), classes).double()
        else:
            total += weights_N @ part.targets.double().cpu()
    return total if task_of(spec.loss) is Task.CLASSIFICATION else total / max(weight, 1e-300)


def measure_stack(
    base: BaseLayer,
    table: TrainingData,
    spec: TrainingSpec,
    sides: Mapping[str, Sequence[Tensor]],
    factors: Factors,
    own_weights_N: Tensor | None,
) -> list[dict[str, Any]]:
    """Return the losses, and for classes the accuracies, of each adapter and of the base layer, on each part.

    `sides` has the indices in `table` of each adapter's rows, by name of the part; the list is empty if no adapter has
    rows there. own_weights_N: (N,), the row weights without class weights, for the accuracy.
    """
    metrics: list[dict[str, Any]] = [{} for _ in factors.a_OR]
    measures = ("loss", "accuracy") if spec.loss is Loss.CROSS_ENTROPY else ("loss",)
    for side, rows in sides.items():
        if not rows:
            found: list[dict[str, Any]] = [
                dict.fromkeys(f"{prefix}{measure}" for prefix in _PREFIXES for measure in measures)
            ]
            found *= len(metrics)
        elif spec.loss is Loss.MULTIPLE_NEGATIVES or max(map(len, rows)) > CHUNK_ROWS:
            found = _measure_one_by_one(base, table, spec, rows, factors, own_weights_N)
        else:
            found = []
            numbers = max(map(len, rows)) * (base.in_features + 2 * base.out_features)
            groups_at_once = max(1, _CHUNK_NUMBERS // numbers)
            for begin in range(0, len(rows), groups_at_once):
                chunk = slice(begin, begin + groups_at_once)
                bias_GO = None if factors.bias_O is None else factors.bias_O[chunk]
                own = Factors(factors.a_OR[chunk], factors.b_RI[chunk], bias_GO)
                found += _measure_together(base, table, spec, rows[chunk], own, own_weights_N)
        for of_all, of_side in zip(metrics, found, strict=True):
            of_all |= {
                f"{prefix}{side}_{measure}": of_side[f"{prefix}{measure}"]
                for prefix in _PREFIXES
                for measure in measures
            }
    return metrics


def _measure_together(
    base: BaseLayer,
    table: TrainingData,
    spec: TrainingSpec,
    rows: Sequence[Tensor],
    factors: Factors,
    own_weights_N: Tensor | None,
) -> list[dict[str, Any]]:
    parts = [factors.a_OR, factors.b_RI, factors.bias_O]
    a_GOR, b_GRI, bias_GO = (None if part is None else part.to(base.device).double() for part in parts)
    assert a_GOR is not None
    assert b_GRI is not None
    rows_GK, is_row_GK = pad_to_matrix(rows)
    rows_N = rows_GK.flatten().to(base.device)
    x_GKI = table.inputs_NI.index_select(0, rows_N).double().unflatten(0, rows_GK.shape)
    targets = table.targets.index_select(0, rows_N).unflatten(0, rows_GK.shape)
    targets = targets.double().transpose(1, 2) if targets.dim() == 3 else targets
    weights_GK = padded_row_weights(table, rows_GK, is_row_GK).double()
    own_GK = padded_row_weights(table.weighted(own_weights_N), rows_GK, is_row_GK).double()
    base_only_GOK = stack_base_outputs(base, x_GKI)
    adapted_GOK = add_low_rank_stack(base_only_GOK, x_GKI, (a_GOR, b_GRI, bias_GO), spec.scaling)
    found: dict[str, list[float]] = {}
    for prefix, y_GOK in zip(_PREFIXES, (adapted_GOK, base_only_GOK), strict=True):
        found[f"{prefix}loss"] = _weighted_means(row_losses(spec, y_GOK, targets), weights_GK)
        if spec.loss is Loss.CROSS_ENTROPY:
            right_GK = (y_GOK[:, : spec.classes].argmax(dim=1) == targets).double()
            found[f"{prefix}accuracy"] = _weighted_means(right_GK, own_GK)
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


def _measure_one_by_one(
    base: BaseLayer,
    table: TrainingData,
    spec: TrainingSpec,
    rows: Sequence[Tensor],
    factors: Factors,
    own_weights_N: Tensor | None,
) -> list[dict[str, Any]]:
    """Measure each adapter by itself: for very many rows, or for a loss that depends on an adapter's number of rows."""
    documents_N = document_ids(table.targets) if spec.loss is Loss.MULTIPLE_NEGATIVES else None
    metrics: list[dict[str, Any]] = []
    for index, rows_K in enumerate(rows):
        bias_O = None if factors.bias_O is None else factors.bias_O[index]
        own = Factors(factors.a_OR[index], factors.b_RI[index], bias_O)
        found: dict[str, Any] = {}
        for prefix, factors_or_none in zip(_PREFIXES, (own, None), strict=True):
            values = evaluate_factors(
                base, table, rows_K.to(base.device), spec, factors_or_none, documents_N, own_weights_N
            )
            found |= {f"{prefix}{measure}": values[measure] for measure in ("loss", "accuracy") if measure in values}
        metrics.append(found)
    return metrics


def _weighted_means(values_GK: Tensor, weights_GK: Tensor) -> list[float]:
    means: list[float] = ((values_GK * weights_GK).sum(dim=1) / weights_GK.sum(dim=1).clamp_min(1e-300)).tolist()
    return means


def pad_to_matrix(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return row indices padded with the first row, (G, K) int64, and 1 for rows or 0 for padding, (G, K) float32."""
    K = max(map(len, rows))
    rows_T, is_row_T = pad_rows(rows, torch.full((len(rows),), K))
    return rows_T.view(-1, K), is_row_T.view(-1, K).float()


def padded_row_weights(table: TrainingData, rows_GK: Tensor, is_row_GK: Tensor) -> Tensor:
    """Return the weights of padded rows, (G, K), with 0 for padding."""
    is_row_GK = is_row_GK.to(table.inputs_NI.device)
    return is_row_GK if table.weights_N is None else is_row_GK * table.weights_N[rows_GK.to(table.inputs_NI.device)]
