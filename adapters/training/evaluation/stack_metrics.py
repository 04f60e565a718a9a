"""What the adapters of a stack reach on their own rows, in float64."""

# G groups of a stack · N rows · K rows of one group, filled up · O out_features
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import reached
from adapters.training.gradient.layout import fill_up, frozen_stack
from adapters.training.gradient.losses import adapted_stack, documents_of, row_losses
from adapters.training.settings import Loss, TrainingSpec

_ROWS_AT_ONCE = 8192
_NUMBERS_AT_ONCE = 2**17
"""Inputs and outputs of so many groups stay near the core, as float64."""
_WHO = ("", "base_")


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
            found: list[dict[str, Any]] = [dict.fromkeys(f"{who}{each}" for who in _WHO for each in measures)]
            found *= len(metrics)
        elif spec.loss is Loss.MULTIPLE_NEGATIVES or max(map(len, rows)) > _ROWS_AT_ONCE:
            found = _one_by_one(base, table, spec, rows, factors, own_weights_N)
        else:
            found = []
            numbers = max(map(len, rows)) * (base.in_features + 2 * base.out_features)
            at_once = max(1, _NUMBERS_AT_ONCE // numbers)
            for begin in range(0, len(rows), at_once):
                some = slice(begin, begin + at_once)
                bias_GO = None if factors.bias_O is None else factors.bias_O[some]
                mine = Factors(factors.a_OR[some], factors.b_RI[some], bias_GO)
                found += _together(base, table, spec, rows[some], mine, own_weights_N)
        for of_all, of_side in zip(metrics, found, strict=True):
            of_all |= {f"{who}{side}_{measure}": of_side[f"{who}{measure}"] for who in _WHO for measure in measures}
    return metrics


def _together(
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
    rows_GK, there_GK = padded(rows)
    rows_N = rows_GK.flatten().to(base.device)
    x_GKI = table.inputs_NI.index_select(0, rows_N).double().unflatten(0, rows_GK.shape)
    targets = table.targets.index_select(0, rows_N).unflatten(0, rows_GK.shape)
    targets = targets.double().transpose(1, 2) if targets.dim() == 3 else targets
    weights_GK = row_weights_of(table, rows_GK, there_GK).double()
    own_GK = row_weights_of(table.weighted(own_weights_N), rows_GK, there_GK).double()
    bare_GOK = frozen_stack(base, x_GKI)
    adapted_GOK = adapted_stack(bare_GOK, x_GKI, (a_GOR, b_GRI, bias_GO), spec.scaling)
    found: dict[str, list[float]] = {}
    for who, y_GOK in zip(_WHO, (adapted_GOK, bare_GOK), strict=True):
        found[f"{who}loss"] = _means(row_losses(spec, y_GOK, targets), weights_GK)
        if spec.loss is Loss.CROSS_ENTROPY:
            right_GK = (y_GOK[:, : spec.classes].argmax(dim=1) == targets).double()
            found[f"{who}accuracy"] = _means(right_GK, own_GK)
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


def _one_by_one(
    base: BaseLayer,
    table: TrainingData,
    spec: TrainingSpec,
    rows: Sequence[Tensor],
    factors: Factors,
    own_weights_N: Tensor | None,
) -> list[dict[str, Any]]:
    """Where there are very many rows; and where what a row is told apart from depends on how many its adapter has."""
    documents_N = documents_of(table.targets) if spec.loss is Loss.MULTIPLE_NEGATIVES else None
    metrics: list[dict[str, Any]] = []
    for place, rows_K in enumerate(rows):
        bias_O = None if factors.bias_O is None else factors.bias_O[place]
        mine = Factors(factors.a_OR[place], factors.b_RI[place], bias_O)
        found: dict[str, Any] = {}
        for who, some in zip(_WHO, (mine, None), strict=True):
            told = reached(base, table, rows_K.to(base.device), spec, some, documents_N, own_weights_N)
            found |= {f"{who}{measure}": told[measure] for measure in ("loss", "accuracy") if measure in told}
        metrics.append(found)
    return metrics


def _means(values_GK: Tensor, weights_GK: Tensor) -> list[float]:
    means: list[float] = ((values_GK * weights_GK).sum(dim=1) / weights_GK.sum(dim=1).clamp_min(1e-300)).tolist()
    return means


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(G, K) int64 row numbers, the first row where there are fewer, and (G, K) float32: 1 where there is one."""
    K = max(map(len, rows))
    rows_T, there_T = fill_up(rows, torch.full((len(rows),), K))
    return rows_T.view(-1, K), there_T.view(-1, K).float()


def row_weights_of(table: TrainingData, rows_GK: Tensor, there_GK: Tensor) -> Tensor:
    """(G, K): what each of these rows counts; nothing where there is none."""
    there_GK = there_GK.to(table.inputs_NI.device)
    return there_GK if table.weights_N is None else there_GK * table.weights_N[rows_GK.to(table.inputs_NI.device)]
