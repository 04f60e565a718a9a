"""Errors of models on held-out rows, one per row: 0 or 1 for classes, the squared error for numbers."""

# N rows · K rows of one part · C classes or labels · O out_features
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import ComparedFactors, summarize_targets
from adapters.training.evaluation.judgement import AdapterReport, LiveVersion, judge, warnings_of
from adapters.training.evaluation.metrics import THRESHOLD
from adapters.training.gradient.losses import compute_outputs, document_ids, row_losses, target_columns
from adapters.training.limits import CHUNK_ROWS
from adapters.training.settings import Loss, TrainingSpec

# Metric that the mean error belongs to, by the loss. For the other losses, the error is the loss.
METRICS: Mapping[Loss, str] = {
    Loss.MSE: "mse",
    Loss.HUBER: "mse",
    Loss.CROSS_ENTROPY: "accuracy",
    Loss.BINARY_CROSS_ENTROPY: "label_accuracy",
}


def held_out_errors(
    base: BaseLayer,
    data: TrainingData,
    held_K: Tensor | None,
    spec: TrainingSpec,
    entries: Mapping[str, ComparedFactors],
    *,
    guess_C: Tensor,
) -> dict[str, Tensor]:
    """Return the errors of each entry, and of `guess`, the trivial guess, on the same rows, (K,) float64 each.

    held_K: indices of the rows; None means all. guess_C: outputs of the trivial guess, see `guess_outputs`.
    """
    documents_N = document_ids(spec, data.targets)
    errors: dict[str, list[Tensor]] = {name: [] for name in (*entries, "guess")}
    for part, rows in _parts(data, held_K, spec, has_batches=documents_N is not None):
        documents_K = None if documents_N is None else documents_N[rows]
        for name, entry in entries.items():
            y_KO = compute_outputs(base, part.inputs_NI, entry.factors, entry.scaling)
            y_KC = y_KO[:, : spec.classes] if entry.matching is None else entry.matching.logits(spec.loss, y_KO)
            errors[name].append(_errors(spec, y_KC, part.targets, documents_K))
        errors["guess"].append(_errors(spec, guess_C.expand(part.rows, -1), part.targets, documents_K))
    return {name: torch.cat(parts).cpu() for name, parts in errors.items()}


def guess_outputs(data: TrainingData, training_K: Tensor | None, spec: TrainingSpec, outputs: int) -> Tensor:
    """Return the outputs of the trivial guess from the training rows, (C,) float64, on the device of the rows.

    They are the counts of the classes, the log odds of the labels, or the mean of the targets. With
    `multiple_negatives`, they are 0, which is equally similar to every document.
    """
    summary_C = summarize_targets(data, training_K, spec, outputs)
    if spec.loss is Loss.BINARY_CROSS_ENTROPY:
        summary_C = summary_C.logit()
    elif spec.loss is Loss.MULTIPLE_NEGATIVES:
        summary_C = torch.zeros_like(summary_C)
    return summary_C.to(data.inputs_NI.device)


def replace_trained_errors(
    errors: dict[str, Tensor],
    live: LiveVersion | None,
    data: TrainingData,
    held_K: Tensor | None,
    labels: Sequence[str | int] | None,
) -> dict[str, Tensor]:
    """Return `errors` with those of `live` replaced on the rows that the live version was trained on.

    Its own error on them would be too low. The error of a fit without the row takes its place, or NaN if there is none.
    """
    if "live" not in errors or live is None or live.evidence is None:
        return errors
    rows_K = torch.arange(data.rows) if held_K is None else held_K.cpu()
    trained_N, left_out_N = live.evidence.look_up(evidence_keys(data, rows_K, labels))
    errors_N = torch.where(torch.from_numpy(trained_N), torch.from_numpy(left_out_N).double(), errors["live"])
    return {**errors, "live": errors_N}


def evidence_keys(data: TrainingData, rows_K: Tensor, labels: Sequence[str | int] | None) -> NDArray[np.int64]:
    """Return a hash of each row with its target, (K,) int64, which is the same in every training."""
    inputs_KI = data.inputs_NI[rows_K].cpu().numpy() + np.float32(0)
    targets_K = data.targets[rows_K].cpu().numpy()
    if labels and targets_K.ndim == 1:
        names = [repr(label).encode() for label in labels]
        targets = [names[number] for number in targets_K.tolist()]
    else:
        targets = [target.tobytes() for target in targets_K]
    inputs, size = inputs_KI.tobytes(), inputs_KI.shape[1] * inputs_KI.itemsize
    begins = range(0, len(inputs), size)
    hashes = [
        blake2b(inputs[begin : begin + size] + target, digest_size=8).digest()
        for begin, target in zip(begins, targets, strict=True)
    ]
    return np.frombuffer(b"".join(hashes), "<i8").astype(np.int64)


def report_of(
    errors: Mapping[str, Tensor],
    loss: Loss,
    weights_N: Tensor | None,
    *,
    live: LiveVersion | None = None,
    has_base: bool = True,
    others_gain: float | None = None,
) -> AdapterReport:
    """Return the report on an adapter from the errors on held-out rows, and their weights, (N,).

    live and has_base: see `warnings_of`. others_gain: see `judge`.
    """
    evaluation, judgement = judge(
        errors,
        by="held_out",
        metric=METRICS.get(loss, "loss"),
        is_regression=METRICS.get(loss) == "mse",
        weights_N=weights_N,
        others_gain=others_gain,
    )
    warnings = tuple(warnings_of(evaluation, live, has_base=has_base))
    return AdapterReport(evaluation=evaluation, judgement=judgement, warnings=warnings)


def _parts(
    data: TrainingData, held_K: Tensor | None, spec: TrainingSpec, *, has_batches: bool
) -> Iterator[tuple[TrainingData, Tensor | slice]]:
    """Yield the rows in parts, with their positions in the data; a loss within batches needs parts of their size."""
    rows, begin = data.rows if held_K is None else len(held_K), 0
    for part in data.parts(held_K, spec.batch(rows) if has_batches else CHUNK_ROWS):
        chunk = slice(begin, begin + part.rows)
        yield part, chunk if held_K is None else held_K[chunk]
        begin += part.rows


def _errors(spec: TrainingSpec, y_KC: Tensor, targets: Tensor, documents_K: Tensor | None) -> Tensor:
    """Return the error of each row, (K,) float64, of outputs (K, C) float64 in the order of the classes."""
    match spec.loss:
        case Loss.CROSS_ENTROPY:
            return (y_KC.argmax(dim=1) != targets).double()
        case Loss.BINARY_CROSS_ENTROPY:
            is_wrong_KC = (y_KC > 0) != (targets > THRESHOLD)
            return is_wrong_KC.double().mean(dim=1)
        case Loss.MSE | Loss.HUBER:
            return (y_KC - targets.double()).square().mean(dim=1)
    documents_1K = None if documents_K is None else documents_K.unsqueeze(0)
    columns = target_columns(targets.double().unsqueeze(0))
    return row_losses(spec, y_KC.T.unsqueeze(0), columns, documents_1K)[0]
