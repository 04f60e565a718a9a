"""The candidate AdamW: learning rate and number of steps by rows that a part of the training rows is tested on."""

# N rows · K rows of one part · C outputs of the task
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import evaluate_factors
from adapters.training.gradient.losses import document_ids
from adapters.training.gradient.sampling import Sampler, StackEntry, initial_factors
from adapters.training.gradient.stack import History, TrainedFactors
from adapters.training.gradient.training_loop import CheckpointOptions, HeldOut, run_training_loop
from adapters.training.settings import Method, TrainingSpec

_PATIENCE = 20
# Rows to test on at most, about.
_MAX_TEST_ROWS = 20_000
# Largest rank that it trains.
_MAX_RANK = 32


class Descent(NamedTuple):
    """Chosen settings of AdamW, and its mean loss on rows that it was not trained on."""

    spec: TrainingSpec
    loss: float


def adamw_spec(spec: TrainingSpec, *, bias: bool) -> TrainingSpec:
    """Return the settings of AdamW, without the choices that are open."""
    rank = min(spec.rank, _MAX_RANK)
    return replace(
        spec,
        method=Method.ADAMW,
        rank=rank,
        alpha=float(rank) if spec.alpha_is_rank else spec.alpha,
        bias=bias,
        split=None,
        candidates=(),
        try_bias=False,
        try_ranks=(),
        try_rates=(),
        try_steps=False,
        try_ridges=False,
    )


def choose_descent(
    base: BaseLayer, data: TrainingData, spec: TrainingSpec, parts: Sequence[tuple[Tensor, Tensor]], *, bias: bool
) -> Descent:
    """Return rate and number of steps by the loss over pairs of rows to train on and rows to test on.

    The rate is the smallest within one standard error of the best (Breiman et al. 1984, section 3.4.3).

    All pairs are trained together. The number of steps is the median of the best ones.
    """
    plain = adamw_spec(spec, bias=bias)
    tried: list[tuple[Descent, float]] = []
    for rate in spec.try_rates or (spec.learning_rate,):
        trial = replace(plain, learning_rate=rate)
        if spec.try_steps:
            trial = replace(trial, patience=spec.patience or _PATIENCE)
        results = _train(base, data, trial, parts)
        steps = max(1, int(median(result.step for result in results)))
        chosen = replace(plain, learning_rate=rate, max_steps=steps if spec.try_steps else spec.max_steps)
        loss, error = _test(base, data, trial, parts, results)
        tried.append((Descent(chosen, loss), error))
    best, error = min(tried, key=lambda one: one[0].loss)
    # A large rate whose loss is as low by chance would not be as low again.
    return next(descent for descent, _ in tried if descent.loss <= best.loss + error)


def _test(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    parts: Sequence[tuple[Tensor, Tensor]],
    results: Sequence[TrainedFactors],
) -> tuple[float, float]:
    """Return the mean loss on the rows to test on, and its standard error; infinite if a training diverged."""
    if any(result.error is not None for result in results):
        return math.inf, 0.0
    documents_N = document_ids(spec, data.targets)
    total = square = rows = 0.0
    for (_, test_K), result in zip(parts, results, strict=True):
        values = evaluate_factors(base, data, test_K, spec, result.factors.map(Tensor.cpu), documents_N)
        total, rows = total + values["loss"] * len(test_K), rows + len(test_K)
        square += (values["error"] * len(test_K)) ** 2
    return total / rows, math.sqrt(square) / rows


def train_descent(
    base: BaseLayer, data: TrainingData, spec: TrainingSpec, rows_K: Tensor, checkpoint: CheckpointOptions | None
) -> tuple[Factors, History]:
    """Train on these rows with chosen settings; raise `Diverged`."""
    sampler = Sampler(spec, len(rows_K))
    entry = StackEntry(sampler, rows_K, initial_factors(base, data, spec, sampler))
    (result,), history = run_training_loop(
        base, data, spec, [entry], report=lambda _step, _loss, _history: None, checkpoint=checkpoint
    )
    if result.error is not None:
        raise result.error
    return result.factors.map(Tensor.cpu), history


def _train(
    base: BaseLayer, data: TrainingData, spec: TrainingSpec, parts: Sequence[tuple[Tensor, Tensor]]
) -> list[TrainedFactors]:
    """Train on the first rows of each pair, and stop by the second; pairs of one size are trained together."""
    by_size: dict[int, list[int]] = {}
    for index, (training_K, _) in enumerate(parts):
        by_size.setdefault(len(training_K), []).append(index)
    results: dict[int, TrainedFactors] = {}
    for indices in by_size.values():
        entries = []
        for index in indices:
            sampler = Sampler(spec, len(parts[index][0]))
            entries.append(StackEntry(sampler, parts[index][0], initial_factors(base, data, spec, sampler)))
        held_out = None if spec.patience is None else HeldOut(data, [parts[index][1] for index in indices])
        trained, _ = run_training_loop(
            base, data, spec, entries, report=lambda _step, _loss, _history: None, held_out=held_out
        )
        results |= zip(indices, trained, strict=True)
    return [results[index] for index in range(len(parts))]


def split_in_parts(keys_K: Tensor, rows_K: Tensor, parts: int) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of rows to train on and to test on; rows of one key are tested together.

    With one part, a fifth is tested on, otherwise each row once. Without two keys, all rows are trained and tested on.
    """
    unique, codes_K = torch.unique(keys_K, return_inverse=True)
    if len(unique) == 1:
        return [(rows_K, rows_K)]
    part_K = codes_K % max(parts, 5 if parts == 1 else min(parts, len(unique)))
    if parts == 1 and int((part_K == 0).sum()) > _MAX_TEST_ROWS:
        # More rows to test on would not choose better.
        part_K = torch.where(codes_K < 5 * _MAX_TEST_ROWS, part_K, 1)
    return [(rows_K[part_K != part], rows_K[part_K == part]) for part in range(parts) if bool((part_K == part).any())]
