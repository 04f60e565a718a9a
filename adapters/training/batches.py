"""The rows of each step of adapters that are trained together, padded to one shape."""

# G adapters of a stack · K rows of a batch · N rows · I in_features · O out_features
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.base_layer import BaseLayer
from adapters.training.data import TrainingData
from adapters.training.draws import Draws
from adapters.training.objective import documents_of
from adapters.training.spec import Loss, TrainingSpec

_FROZEN_AT_ONCE = 2**26
"""Numbers of the base's answers that are kept for all steps; past it they are computed batch by batch."""


class Batch(NamedTuple):
    """What one step sees: for each adapter its rows."""

    x_GKI: Tensor
    frozen_GOK: Tensor
    """The base layer's answers."""
    targets: Tensor
    """(G, O, K) float32, or (G, K) int64."""
    weights_GK: Tensor | None
    """0 for padding; None where every row counts 1."""
    documents_GK: Tensor | None
    """For `multiple_negatives`: equal targets have equal numbers, padding has -1."""


class _Lane(NamedTuple):
    """Adapters for which the same is drawn."""

    draws: Draws
    places: list[int]
    """Where they are in the stack."""
    rows_GK: Tensor
    """Their rows of the data."""


class Batches:
    """Goes with a stack from step to step."""

    def __init__(
        self, base: BaseLayer, data: TrainingData, spec: TrainingSpec, tasks: Sequence[tuple[Draws, Tensor]]
    ) -> None:
        self._base, self._data, self._tasks = base, data, tasks
        self._documents_N = documents_of(data.targets) if spec.loss is Loss.MULTIPLE_NEGATIVES else None
        self._frozen_NO = self._frozen(data.inputs_NI) if data.rows * base.out_features <= _FROZEN_AT_ONCE else None
        self._lanes: list[_Lane] | None = None
        self._full: Batch | None = None

    def forget(self) -> None:
        """Other tasks are live from now on."""
        self._lanes = self._full = None

    def of(self, step: int, live: Sequence[int]) -> Batch:
        """The batches of a step, counted from 1, for the tasks that are live; call it for each step in turn."""
        if self._lanes is None:
            self._lanes = self._lay(live)
        if self._full is not None:
            return self._full
        parts = [(lane, lane.rows_GK[:, lane.draws.rows_of(step)]) for lane in self._lanes]
        K = max(rows_GK.shape[1] for _, rows_GK in parts)
        if len(parts) == 1:
            batch = self._gather(parts[0][1], None)
        else:
            rows_GK = torch.zeros(len(live), K, dtype=torch.int64)
            there_GK = torch.zeros(len(live), K, dtype=torch.bool)
            for lane, lane_GK in parts:
                rows_GK[lane.places, : lane_GK.shape[1]] = lane_GK
                there_GK[lane.places, : lane_GK.shape[1]] = True
            batch = self._gather(rows_GK, None if bool(there_GK.all()) else there_GK)
        if all(lane.draws.is_full_batch for lane in self._lanes):
            self._full = batch
        return batch

    def _lay(self, live: Sequence[int]) -> list[_Lane]:
        places: dict[Draws, list[int]] = {}
        for place, task in enumerate(live):
            places.setdefault(self._tasks[task][0], []).append(place)
        return [
            _Lane(draws, mine, torch.stack([self._tasks[live[place]][1] for place in mine]))
            for draws, mine in places.items()
        ]

    def _gather(self, rows_GK: Tensor, there_GK: Tensor | None) -> Batch:
        data, device = self._data, self._base.device
        rows_GK = rows_GK.to(device)
        if rows_GK.numel() == data.rows and bool((rows_GK.flatten() == torch.arange(data.rows, device=device)).all()):
            # All rows as they lie: nothing to copy.
            def take(flat: Tensor) -> Tensor:
                return flat.view(*rows_GK.shape, *flat.shape[1:])
        else:

            def take(flat: Tensor) -> Tensor:
                return flat.index_select(0, rows_GK.flatten()).view(*rows_GK.shape, *flat.shape[1:])

        x_GKI = take(data.inputs_NI)
        weights_GK = None if data.weights_N is None else take(data.weights_N)
        documents_GK = None if self._documents_N is None else take(self._documents_N)
        if there_GK is not None:
            there_GK = there_GK.to(device)
            weights_GK = there_GK.float() if weights_GK is None else weights_GK * there_GK
            documents_GK = None if documents_GK is None else documents_GK.masked_fill(~there_GK, -1)
        frozen_GKO = self._frozen(x_GKI) if self._frozen_NO is None else take(self._frozen_NO)
        targets = take(data.targets)
        if targets.dim() == 3:
            targets = targets.transpose(1, 2).contiguous()
        return Batch(x_GKI, frozen_GKO.transpose(1, 2).contiguous(), targets, weights_GK, documents_GK)

    def _frozen(self, inputs: Tensor) -> Tensor:
        bias_O = None if self._base.bias_O is None else self._base.bias_O.float()
        return functional.linear(inputs, self._base.weight_OI.float(), bias_O)
