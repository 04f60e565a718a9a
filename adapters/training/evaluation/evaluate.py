"""What factors reach on rows, in float64, and what people read about it."""

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

_CHUNK_NUMBERS = 2**17
"""Inputs and outputs of so many groups stay near the core, as float64."""
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
    """What the outputs of an adapter that minimises this loss are for."""
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
    """`loss`, the job's own, over these rows (None: all); with classes `accuracy` too. A part of the rows at a time.

    `error` is the standard error of the loss, by how much the rows' own differ.
    `multiple_negatives` is looked at in batches of the rows as they stand, with `documents_N` of all of the data's.
    own_weights_N: (N,), what the data's rows count without the weights of their classes, which are the loss's alone:
    the accuracy is by these.
    matching: where the classes are among the outputs, if not in their order.
    """
    negatives = spec.loss is Loss.MULTIPLE_NEGATIVES
    rows = data.rows if rows_K is None else len(rows_K)
    most = spec.batch(rows) if negatives else CHUNK_ROWS
    total = squares = weight = weight_squares = right = counted = 0.0
    begin = 0
    for part in data.parts(rows_K, most):
        y_NO = compute_outputs(base, part.inputs_NI, factors, spec.scaling)
        targets = part.targets if part.targets.dtype == torch.int64 else part.targets.double().T
        mine = slice(begin, begin + part.rows) if rows_K is None else rows_K[begin : begin + part.rows]
        if matching is not None:
            losses_N = matching.losses(spec, y_NO, part.targets)
            y_NO = matching.logits(spec.loss, y_NO)
        else:
            documents_1K = None if documents_N is None else documents_N[mine].unsqueeze(0)
            losses_N = row_losses(spec, y_NO.T.unsqueeze(0), targets.unsqueeze(0), documents_1K)[0]
            y_NO = y_NO[:, : spec.classes]
        weights_N = torch.ones_like(losses_N) if part.weights_N is None else part.weights_N.double()
        total += float(losses_N @ weights_N)
        squares += float(losses_N.square() @ weights_N)
        weight += float(weights_N.sum())
        weight_squares += float(weights_N.square().sum())
        if spec.loss is Loss.CROSS_ENTROPY:
            own_N = torch.ones_like(losses_N) if own_weights_N is None else own_weights_N[mine].to(losses_N)
            right += float((y_NO.argmax(dim=1) == part.targets).double() @ own_N)
            counted += float(own_N.sum())
        begin += part.rows
    mean = {"loss": 0.0, "error": 0.0}
    if weight > 0:
        spread = max(0.0, squares / weight - (total / weight) ** 2)
        mean = {"loss": total / weight, "error": math.sqrt(spread * weight_squares) / weight}
    return mean | {"accuracy": right / counted} if counted > 0 else mean


class ComparedFactors(NamedTuple):
    """Somebody whose outputs on the held-out rows are to be measured."""

    factors: Factors | None
    """None is the bare base layer."""
    scaling: float
    matching: LabelMatching | None = None
    """Where the classes are among its outputs, if not in their order."""


def compare_on_held_out(
    base: BaseLayer,
    data: TrainingData,
    held_K: Tensor | None,
    spec: TrainingSpec,
    contenders: Mapping[str, ComparedFactors],
    *,
    weights_N: Tensor | None,
    summary: Tensor,
    corpus_MO: Tensor | None,
) -> dict[str, Any]:
    """The metrics of each contender, and of the trivial baseline, on the same held-out rows.

    weights_N: (N,), the rows' own; the losses that are compared with training have the classes' in them too.
    summary: see `measure_trivial`.
    """
    held = next(data.parts(held_K, data.rows))
    held = held.weighted(None if weights_N is None else weights_N if held_K is None else weights_N[held_K])
    task, targets = task_of(spec.loss), held.targets if held.targets.dtype == torch.int64 else held.targets.double()
    found: dict[str, Any] = {"rows": held.rows}
    for name, contender in contenders.items():
        # Into one tensor: parts that are kept would lie between what is freed, and memory would grow by all of it.
        y_NO = held.inputs_NI.new_empty(held.rows, base.out_features, dtype=torch.float64)
        for begin in range(0, held.rows, CHUNK_ROWS):
            some = slice(begin, begin + CHUNK_ROWS)
            y_NO[some] = compute_outputs(base, held.inputs_NI[some], contender.factors, contender.scaling)
        classes = spec.classes
        if contender.matching is not None:
            y_NO, classes = contender.matching.logits(spec.loss, y_NO), None
        found[name] = measure(task, y_NO, targets, weights_N=held.weights_N, classes=classes, corpus_MO=corpus_MO)
    found["trivial"] = measure_trivial(task, summary, targets, weights_N=held.weights_N, corpus_MO=corpus_MO)
    return found


def summarize_targets(data: TrainingData, training_K: Tensor | None, spec: TrainingSpec, outputs: int) -> Tensor:
    """What the trivial baseline knows of the training rows: counts of classes, or the targets' means; float64."""
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
    """For each adapter the losses, and with classes the accuracies, of its rows on each side: adapted, and bare.

    `sides` gives for each name the adapters' rows of `table`; none of them has any where the name is without.
    own_weights_N: (N,), what rows count without the weights of their classes, as the accuracy has it.
    """
    metrics: list[dict[str, Any]] = [{} for _ in factors.a_OR]
    measures = ("loss", "accuracy") if spec.loss is Loss.CROSS_ENTROPY else ("loss",)
    for side, rows in sides.items():
        if not rows:
            found: list[dict[str, Any]] = [dict.fromkeys(f"{who}{each}" for who in _PREFIXES for each in measures)]
            found *= len(metrics)
        elif spec.loss is Loss.MULTIPLE_NEGATIVES or max(map(len, rows)) > CHUNK_ROWS:
            found = _measure_one_by_one(base, table, spec, rows, factors, own_weights_N)
        else:
            found = []
            numbers = max(map(len, rows)) * (base.in_features + 2 * base.out_features)
            at_once = max(1, _CHUNK_NUMBERS // numbers)
            for begin in range(0, len(rows), at_once):
                some = slice(begin, begin + at_once)
                bias_GO = None if factors.bias_O is None else factors.bias_O[some]
                mine = Factors(factors.a_OR[some], factors.b_RI[some], bias_GO)
                found += _measure_together(base, table, spec, rows[some], mine, own_weights_N)
        for of_all, of_side in zip(metrics, found, strict=True):
            of_all |= {
                f"{who}{side}_{measure}": of_side[f"{who}{measure}"] for who in _PREFIXES for measure in measures
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
    for who, y_GOK in zip(_PREFIXES, (adapted_GOK, base_only_GOK), strict=True):
        found[f"{who}loss"] = _weighted_means(row_losses(spec, y_GOK, targets), weights_GK)
        if spec.loss is Loss.CROSS_ENTROPY:
            right_GK = (y_GOK[:, : spec.classes].argmax(dim=1) == targets).double()
            found[f"{who}accuracy"] = _weighted_means(right_GK, own_GK)
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


def _measure_one_by_one(
    base: BaseLayer,
    table: TrainingData,
    spec: TrainingSpec,
    rows: Sequence[Tensor],
    factors: Factors,
    own_weights_N: Tensor | None,
) -> list[dict[str, Any]]:
    """Where there are very many rows; and where what a row is told apart from depends on how many its adapter has."""
    documents_N = document_ids(table.targets) if spec.loss is Loss.MULTIPLE_NEGATIVES else None
    metrics: list[dict[str, Any]] = []
    for place, rows_K in enumerate(rows):
        bias_O = None if factors.bias_O is None else factors.bias_O[place]
        mine = Factors(factors.a_OR[place], factors.b_RI[place], bias_O)
        found: dict[str, Any] = {}
        for who, some in zip(_PREFIXES, (mine, None), strict=True):
            told = evaluate_factors(base, table, rows_K.to(base.device), spec, some, documents_N, own_weights_N)
            found |= {f"{who}{measure}": told[measure] for measure in ("loss", "accuracy") if measure in told}
        metrics.append(found)
    return metrics


def _weighted_means(values_GK: Tensor, weights_GK: Tensor) -> list[float]:
    means: list[float] = ((values_GK * weights_GK).sum(dim=1) / weights_GK.sum(dim=1).clamp_min(1e-300)).tolist()
    return means


def pad_to_matrix(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(G, K) int64 row numbers, the first row where there are fewer, and (G, K) float32: 1 where there is one."""
    K = max(map(len, rows))
    rows_T, is_row_T = pad_rows(rows, torch.full((len(rows),), K))
    return rows_T.view(-1, K), is_row_T.view(-1, K).float()


def padded_row_weights(table: TrainingData, rows_GK: Tensor, is_row_GK: Tensor) -> Tensor:
    """(G, K): what each of these rows counts; nothing where there is none."""
    is_row_GK = is_row_GK.to(table.inputs_NI.device)
    return is_row_GK if table.weights_N is None else is_row_GK * table.weights_N[rows_GK.to(table.inputs_NI.device)]
