"""What the adapters of a stack reach on their own rows, in float64."""

# G groups of a stack · N rows · K rows of one group, filled up · O out_features
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adapters.base_layer import BaseLayer
from adapters.training.closed_form import Factors
from adapters.training.data import TrainingData
from adapters.training.evaluation import reached
from adapters.training.objective import adapted_stack, documents_of, row_losses
from adapters.training.spec import Loss, TrainingSpec


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
    if spec.loss is Loss.MULTIPLE_NEGATIVES:
        return _measure_negatives(base, table, spec, sides, factors)
    metrics: list[dict[str, Any]] = [{} for _ in factors.a_OR]
    parts = [factors.a_OR, factors.b_RI, factors.bias_O]
    a_GOR, b_GRI, bias_GO = (None if part is None else part.to(base.device).double() for part in parts)
    assert a_GOR is not None
    assert b_GRI is not None
    base_O = None if base.bias_O is None else base.bias_O.double()
    measures = ("loss", "accuracy") if spec.loss is Loss.CROSS_ENTROPY else ("loss",)
    for side, rows in sides.items():
        if not rows:
            for mine in metrics:
                mine |= {f"{who}{side}_{measure}": None for who in ("", "base_") for measure in measures}
            continue
        rows_GK, there_GK = padded(rows)
        rows_N = rows_GK.flatten().to(base.device)
        x_GKI = table.inputs_NI.index_select(0, rows_N).double().unflatten(0, rows_GK.shape)
        targets = table.targets.index_select(0, rows_N).unflatten(0, rows_GK.shape)
        targets = targets.double().transpose(1, 2) if targets.dim() == 3 else targets
        weights_GK = row_weights_of(table, rows_GK, there_GK).double()
        own_GK = row_weights_of(table.weighted(own_weights_N), rows_GK, there_GK).double()
        bare_GOK = functional.linear(x_GKI, base.weight_OI.double(), base_O).transpose(1, 2)
        adapted_GOK = adapted_stack(bare_GOK, x_GKI, (a_GOR, b_GRI, bias_GO), spec.scaling)
        for who, y_GOK in (("", adapted_GOK), ("base_", bare_GOK)):
            found = {"loss": (row_losses(spec, y_GOK, targets), weights_GK)}
            if spec.loss is Loss.CROSS_ENTROPY:
                found["accuracy"] = (y_GOK[:, : spec.classes].argmax(dim=1) == targets).double(), own_GK
            for measure, (values_GK, counted_GK) in found.items():
                mean_G = (values_GK * counted_GK).sum(dim=1) / counted_GK.sum(dim=1).clamp_min(1e-300)
                for place, value in enumerate(mean_G.tolist()):
                    metrics[place][f"{who}{side}_{measure}"] = value
    return metrics


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(G, K) int64 row numbers, the first row where there are fewer, and (G, K) float32: 1 where there is one."""
    K = max(len(rows_K) for rows_K in rows)
    rows_GK, there_GK = torch.zeros(len(rows), K, dtype=torch.int64), torch.zeros(len(rows), K)
    for place, rows_K in enumerate(rows):
        rows_GK[place, : len(rows_K)], there_GK[place, : len(rows_K)] = rows_K, 1
    return rows_GK, there_GK


def row_weights_of(table: TrainingData, rows_GK: Tensor, there_GK: Tensor) -> Tensor:
    """(G, K): what each of these rows counts; nothing where there is none."""
    there_GK = there_GK.to(table.inputs_NI.device)
    return there_GK if table.weights_N is None else there_GK * table.weights_N[rows_GK]


def _measure_negatives(
    base: BaseLayer, table: TrainingData, spec: TrainingSpec, sides: Mapping[str, Sequence[Tensor]], factors: Factors
) -> list[dict[str, Any]]:
    """One after the other: what a row is told apart from depends on how many rows its adapter has."""
    documents_N = documents_of(table.targets)
    metrics: list[dict[str, Any]] = []
    for place in range(len(factors.a_OR)):
        bias_O = None if factors.bias_O is None else factors.bias_O[place]
        mine = Factors(factors.a_OR[place], factors.b_RI[place], bias_O)
        found: dict[str, Any] = {}
        for side, rows in sides.items():
            for who, some in (("", mine), ("base_", None)):
                loss = None
                if rows:
                    loss = reached(base, table, rows[place].to(base.device), spec, some, documents_N)["loss"]
                found[f"{who}{side}_loss"] = loss
        metrics.append(found)
    return metrics
