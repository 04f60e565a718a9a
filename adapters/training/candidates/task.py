"""Fit task: the base layer, rows, settings and scores that all adapters of one fit share."""

# G groups of a stack · N rows of a group, padded · K rows of one group · I in_features · C outputs of the task
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.errors import OutOfRange
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.candidates import small
from adapters.training.candidates.features import Moments
from adapters.training.candidates.scores import Scores
from adapters.training.candidates.small import Stack
from adapters.training.closed_form.statistics import base_outputs
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import LabelMatching, base_matching, match_labels
from adapters.training.evaluation.judgement import LiveVersion
from adapters.training.evaluation.row_errors import evidence_keys
from adapters.training.gradient.sampling import Sampler
from adapters.training.limits import CHUNK_ROWS
from adapters.training.planning.split import SplitBy
from adapters.training.scratch import Scratch
from adapters.training.settings import Loss, TrainingSpec

Labels = Sequence[str | int] | None
# Training rows up to which leave-one-out chooses; beyond them, a fifth of them does.
MAX_LEFT_OUT_ROWS = 500

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Sides:
    """Rows of one adapter: those that train it and choose, and those that do neither."""

    training_K: Tensor
    """int64: rows of the data."""
    read_held: Callable[[], TrainingData] | None
    """Reader of the held-out rows; None if none are. All of a fleet's would not fit in memory."""
    is_cross_validated: bool
    """True if the adapter is evaluated on its training rows, in outer folds."""

    @property
    def held(self) -> TrainingData | None:
        """Return the held-out rows; None if none are."""
        return None if self.read_held is None else self.read_held()


@dataclass(frozen=True, slots=True, eq=False)
class FitTask:
    """Base layer, rows, settings and scores of a fit."""

    base: BaseLayer
    data: TrainingData
    spec: TrainingSpec
    scores: Scores
    labels: Labels
    feature_space: str | None
    live: Mapping[int, LiveVersion]
    """By group."""
    is_shared_N: Tensor | None = None
    """(rows,) bool: whether several groups of a fleet have the row; None if no group has others beside it."""
    scratch: Scratch | None = None
    """Disk space for values of all groups that do not fit in memory; None if they fit."""

    def list_of(self, items: Iterable[T]) -> Sequence[T]:
        """Return a list of values with tensors, on disk if there is scratch space."""
        return list(items) if self.scratch is None else self.scratch.list_of(items)

    def keep(self, item: T) -> Callable[[], T]:
        """Keep a value with tensors, on disk if there is scratch space; return its reader."""
        return (lambda: item) if self.scratch is None else self.scratch.keep(item)

    @property
    def outputs(self) -> int:
        """Return C, the outputs that the task uses."""
        return self.spec.classes or self.base.out_features

    @property
    def names(self) -> dict[str, Any]:
        """Return the feature space and the labels of the adapters."""
        labels = None if self.labels is None else tuple(self.labels)
        return {"feature_space": self.feature_space, "labels": labels}

    def sides(self, rows_K: Tensor) -> Sides:
        """Divide the rows of one adapter; raise `OutOfRange` if a side has no row, or none with a weight."""
        sides = self._divide(rows_K)
        weights_N = self.data.weights_N
        held = None if weights_N is None and self.data.held_out is None else sides.held
        has_training = weights_N is None or bool(weights_N[sides.training_K].any())
        has_held = held is None or held.weights_N is None or bool(held.weights_N.any())
        if not (has_training and has_held):
            raise OutOfRange("no row of the group counts on one side: the weights are all 0", field="weights")
        return sides

    def _divide(self, rows_K: Tensor) -> Sides:
        data, spec = self.data, self.spec
        if (held_out := data.held_out) is not None:
            return Sides(rows_K, lambda: held_out, is_cross_validated=False)
        if spec.split is None:
            return Sides(rows_K, None, is_cross_validated=False)
        keys_K = None if data.key_N is None else data.key_N[rows_K]
        if spec.split.by is SplitBy.HASH and not spec.split.holds_out(len(rows_K), keys_K):
            # Many rows of a few groups, all on one side, are not evaluated.
            return Sides(rows_K, None, is_cross_validated=len(rows_K) <= MAX_LEFT_OUT_ROWS)
        classes_K = data.targets[rows_K] if data.targets.dtype == torch.int64 else None
        sampler = Sampler(spec, len(rows_K), key_N=keys_K, classes_N=classes_K)
        assert sampler.held_K is not None
        read_held = partial(data.take, rows_K[sampler.held_K])
        return Sides(rows_K[sampler.training_K], read_held, is_cross_validated=False)

    def keys(self, rows_K: Tensor) -> Tensor:
        """Return equal numbers for rows that stay together, (K,) int64."""
        keys_N, by = self.data.key_N, None if self.spec.split is None else self.spec.split.by
        return rows_K if keys_N is None or by not in (SplitBy.HASH, SplitBy.GROUP) else keys_N[rows_K]

    def evidence_keys(self, rows_K: Tensor) -> NDArray[np.int64]:
        """Return a hash of each row with its target, (K,) int64: the same for the same row in every training."""
        return evidence_keys(self.data, rows_K, self.labels)

    def chunks(self, rows_K: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield inputs (N, I), outputs of the base layer (N, C), targets (N, C) and weights (N,), float64, in parts."""
        for part in self.data.parts(rows_K, CHUNK_ROWS):
            x_NI = part.inputs_NI.double()
            weights_N = torch.ones(part.rows) if part.weights_N is None else part.weights_N
            z_NC = base_outputs(self.base, x_NI)[:, : self.outputs]
            yield x_NI, z_NC, self.scores.wide(part.targets, self.outputs), weights_N.double()

    def stack(self, groups: Sequence[int], rows: Sequence[Tensor]) -> Stack:
        """Read the rows of groups, padded to the largest."""
        G, N = len(groups), max(map(len, rows))
        index_GN = torch.zeros(G, N, dtype=torch.int64)
        weights_GN = torch.zeros(G, N, dtype=torch.float64)
        folds_GN, units_GN, has_units = torch.full_like(index_GN, -1), torch.full_like(index_GN, -1), False
        for index, rows_K in enumerate(rows):
            K = len(rows_K)
            index_GN[index, :K] = rows_K
            weights_GN[index, :K] = 1.0 if self.data.weights_N is None else self.data.weights_N[rows_K].double()
            classes_K = self.data.targets[rows_K] if self.data.targets.dtype == torch.int64 else None
            keys_K = self.keys(rows_K)
            folds_GN[index, :K] = small.outer_folds(keys_K, classes_K, self.spec.seed)
            units_K = small.units_of(keys_K)
            has_units |= units_K is not None
            units_GN[index, :K] = torch.arange(K) if units_K is None else units_K
        x_GNI = self.data.inputs_NI[index_GN].double()
        is_shared_N = torch.zeros(self.data.rows, dtype=torch.bool) if self.is_shared_N is None else self.is_shared_N
        y_GNC = self.scores.wide(self.data.targets[index_GN], self.outputs)
        self.data.release()
        return Stack(
            groups=torch.tensor(groups),
            x_GNI=x_GNI,
            outputs_GNC=base_outputs(self.base, x_GNI)[..., : self.outputs],
            y_GNC=y_GNC,
            weights_GN=weights_GN,
            is_shared_GN=is_shared_N[index_GN],
            folds_GN=folds_GN,
            units_GN=units_GN if has_units else None,
        )

    def moments(self, rows_N: Tensor) -> Moments:
        """Return mean and covariance of the inputs of these rows."""
        I = self.base.in_features
        dtype = torch.float64 if self.scores.is_regression else torch.float32
        shift_I = self.data.inputs_NI[rows_N[:CHUNK_ROWS]].double().mean(0)
        mean_I, square_II = torch.zeros(I, dtype=torch.float64), torch.zeros(I, I, dtype=torch.float64)
        for begin in range(0, len(rows_N), CHUNK_ROWS):
            x_NI = (self.data.inputs_NI[rows_N[begin : begin + CHUNK_ROWS]].double() - shift_I).to(dtype)
            mean_I += x_NI.sum(0)
            square_II += x_NI.T @ x_NI
            self.data.release()
        mean_I /= len(rows_N)
        return Moments(mean_I + shift_I, square_II / len(rows_N) - mean_I[:, None] * mean_I)

    def scale(self, rows_N: Tensor) -> float:
        """Return the scale of the base layer's outputs with the least loss on these rows."""
        totals = dict.fromkeys(self.scores.scales, 0.0)
        if len(totals) > 1:
            for _, z_NC, y_NC, weights_N in self.chunks(rows_N):
                for scale in totals:
                    totals[scale] += float(self.scores.losses(scale * z_NC, y_NC) @ weights_N)
        return min(totals, key=lambda scale: totals[scale])

    def base_errors(self, table: TrainingData) -> Tensor:
        """Return the errors of the base layer on these rows, (K,): its outputs are matched to the classes by label."""
        matching = base_matching(self.base, self.labels, self.spec)
        parts = table.parts(None, CHUNK_ROWS)
        return torch.cat([
            self._errors(base_outputs(self.base, part.inputs_NI.double()), part.targets, matching) for part in parts
        ])  # fmt: skip

    def live_errors(self, adapter: Adapter, table: TrainingData) -> Tensor:
        """Return the errors of a live version on these rows, (K,)."""
        base = self.base
        matching = match_labels(
            adapter.labels, self.labels, self.spec, outputs=base.out_features, base_labels=base.labels
        )
        parts = table.parts(None, CHUNK_ROWS)
        return torch.cat([
            self._errors(adapter_outputs(self.base, adapter, part.inputs_NI), part.targets, matching) for part in parts
        ])  # fmt: skip

    def guess_errors(self, training: TrainingData, rows_K: Tensor, table: TrainingData) -> Tensor:
        """Return the errors on a table, (K,), of the trivial guess from these rows of the training data."""
        C, total_C, weight = self.outputs, torch.zeros(self.outputs, dtype=torch.float64), 0.0
        for begin in range(0, len(rows_K), CHUNK_ROWS):
            part_K = rows_K[begin : begin + CHUNK_ROWS]
            weights_K = torch.ones(len(part_K)) if training.weights_N is None else training.weights_N[part_K]
            total_C += weights_K.double() @ self.scores.wide(training.targets[part_K], C)
            weight += float(weights_K.sum())
        guess_1C = self.scores.guess_of_mean(total_C / max(weight, 1e-300))[None]
        parts = table.targets.split(CHUNK_ROWS)
        return torch.cat([self.scores.errors(guess_1C, self.scores.wide(part, C)) for part in parts])

    def _errors(self, y_KO: Tensor, targets: Tensor, matching: LabelMatching | None) -> Tensor:
        width = self.outputs
        if matching is None:
            return self.scores.errors(y_KO[:, :width], self.scores.wide(targets, width))
        if self.spec.loss is Loss.CROSS_ENTROPY:
            width = len(matching.outputs_C) + len(matching.others_E)
        return self.scores.errors(matching.logits(self.spec.loss, y_KO), self.scores.wide(targets, width))


def shared_rows(data: TrainingData) -> Tensor | None:
    """Return for each row whether several groups have it, (N,) bool; None without keys."""
    if data.key_N is None or data.groups_N is None:
        return None
    codes_N = torch.unique(data.key_N, return_inverse=True)[1]
    groups_N = data.groups_N.long()
    first, last = (
        torch.zeros(int(codes_N.max()) + 1, dtype=torch.int64).scatter_reduce(
            0, codes_N, groups_N, reduce, include_self=False
        )
        for reduce in ("amin", "amax")
    )
    return (first != last)[codes_N]


def sample(rows_K: Tensor) -> Tensor:
    """Return at most `MAX_LEFT_OUT_ROWS` of a group's rows, evenly spaced, for what all groups have in common."""
    return rows_K[:: math.ceil(len(rows_K) / MAX_LEFT_OUT_ROWS)]


def adapter_outputs(base: BaseLayer, adapter: Adapter, inputs_KI: Tensor) -> Tensor:
    """Return the outputs with an adapter, (K, I) -> (K, O) float64."""
    x_KI = inputs_KI.double()
    y_KO = base_outputs(base, x_KI) + adapter.scaling * (x_KI @ adapter.b_RI.T.double()) @ adapter.a_OR.T.double()
    return y_KO if adapter.bias_O is None else y_KO + adapter.scaling * adapter.bias_O.double()


Progress = Callable[[int, float], None]
