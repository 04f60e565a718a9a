"""What factors reach on rows, in float64, and what people read about it."""

# N rows · K rows of one side · I in_features · O out_features · M documents
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.label_matching import Matching
from adapters.training.evaluation.metrics import Task, measure, measure_trivial
from adapters.training.gradient.losses import outputs_of, row_losses
from adapters.training.settings import Loss, TrainingSpec

_ROWS_AT_ONCE = 8192
_TASKS = {
    Loss.MSE: Task.REGRESSION,
    Loss.HUBER: Task.REGRESSION,
    Loss.COSINE: Task.REGRESSION,
    Loss.CROSS_ENTROPY: Task.CLASSIFICATION,
    Loss.BINARY_CROSS_ENTROPY: Task.MULTILABEL,
    Loss.MULTIPLE_NEGATIVES: Task.RETRIEVAL,
}


def task_of(loss: Loss) -> Task:
    """What the outputs of an adapter that minimises this loss are for."""
    return _TASKS[loss]


def reached(
    base: BaseLayer,
    data: TrainingData,
    rows_K: Tensor | None,
    spec: TrainingSpec,
    factors: Factors | None,
    documents_N: Tensor | None = None,
    own_weights_N: Tensor | None = None,
    matching: Matching | None = None,
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
    most = spec.batch(rows) if negatives else _ROWS_AT_ONCE
    total = squares = weight = weight_squares = right = counted = 0.0
    begin = 0
    for part in data.parts(rows_K, most):
        y_NO = outputs_of(base, part.inputs_NI, factors, spec.scaling)
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


class Contender(NamedTuple):
    """Somebody whose outputs on the held-out rows are to be measured."""

    factors: Factors | None
    """None is the bare base layer."""
    scaling: float
    matching: Matching | None = None
    """Where the classes are among its outputs, if not in their order."""


def compare(
    base: BaseLayer,
    data: TrainingData,
    held_K: Tensor | None,
    spec: TrainingSpec,
    contenders: Mapping[str, Contender],
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
        for begin in range(0, held.rows, _ROWS_AT_ONCE):
            some = slice(begin, begin + _ROWS_AT_ONCE)
            y_NO[some] = outputs_of(base, held.inputs_NI[some], contender.factors, contender.scaling)
        classes = spec.classes
        if contender.matching is not None:
            y_NO, classes = contender.matching.logits(spec.loss, y_NO), None
        found[name] = measure(task, y_NO, targets, weights_N=held.weights_N, classes=classes, corpus_MO=corpus_MO)
    found["trivial"] = measure_trivial(task, summary, targets, weights_N=held.weights_N, corpus_MO=corpus_MO)
    return found


def summary_of(data: TrainingData, training_K: Tensor | None, spec: TrainingSpec, outputs: int) -> Tensor:
    """What the trivial baseline knows of the training rows: counts of classes, or the targets' means; float64."""
    classes = spec.classes or outputs
    total = torch.zeros(classes if task_of(spec.loss) is Task.CLASSIFICATION else data.targets.shape[-1]).double()
    weight = 0.0
    for part in data.parts(training_K, _ROWS_AT_ONCE):
        weights_N = torch.ones(part.rows).double() if part.weights_N is None else part.weights_N.double().cpu()
        weight += float(weights_N.sum())
        if part.targets.dtype == torch.int64:
            total += weights_N @ functional.one_hot(part.targets.cpu(), classes).double()
        else:
            total += weights_N @ part.targets.double().cpu()
    return total if task_of(spec.loss) is Task.CLASSIFICATION else total / max(weight, 1e-300)
