"""Fit of a fleet: one adapter for each group of a table, trained in stacks of groups of about one size."""

# G groups of a stack · N rows · K rows of one group
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from adapters.errors import Diverged, LoraplexError, OutOfRange
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors, solve_stack
from adapters.training.closed_form.statistics import accumulate
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import LabelMatching, base_matching, measure_stack, pad_to_matrix
from adapters.training.evaluation.judgement import AdapterReport, LiveVersion, relative_gain
from adapters.training.evaluation.row_errors import guess_outputs, held_out_errors, replace_trained_errors, report_of
from adapters.training.fit import compared_factors
from adapters.training.gradient.batches import batch_shape
from adapters.training.gradient.losses import class_weights, row_weights
from adapters.training.gradient.sampling import Sampler, StackEntry, initial_factors
from adapters.training.gradient.stack import TrainedFactors
from adapters.training.gradient.training_loop import HeldOut, run_training_loop
from adapters.training.limits import MAX_STACK_GROUPS, STACK_NUMBERS
from adapters.training.planning.split import SplitBy
from adapters.training.settings import TrainingSpec

NO_VERSIONS: Mapping[int, LiveVersion] = MappingProxyType({})
# Callback with a stack's step, and the mean of its groups' losses.
Progress = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the training of one group ended: with an adapter, or with an error."""

    position: int
    adapter: Adapter | None
    metrics: dict[str, Any]
    error: LoraplexError | None = None
    report: AdapterReport | None = None
    """None if no rows of the group are held out."""


class FleetSource:
    """Source of the rows of a fleet: the seam `FleetSource`. Here, one table with the rows of a group in any order.

    For a table larger than memory, it is a copy on disk in the order of `stacks`, see `Scratch.sort_by_group`: then a
    stack is read as one piece.

    A source over many files or machines must promise the same. `stacks` has each position of a group exactly once.
    Which groups share a stack, and the order of the stacks, depends on the data, the base layer and the specification
    alone, so that another attempt after a death gives the adapters that the first one would have given. The rows of a
    stack fit in memory together, unless it is a single group. `read` returns all rows of a group, in the order of the
    data, with their weights and keys, and with the factors to start from and to shrink towards.
    """

    def __init__(self, data: TrainingData) -> None:
        assert data.groups_N is not None
        self._data = data
        order_N = torch.argsort(data.groups_N, stable=True)
        self._rows = order_N.split(torch.bincount(data.groups_N).tolist())

    def share(
        self, base: BaseLayer, spec: TrainingSpec, share: tuple[int, int], *, rows: range | None = None
    ) -> Iterator[list[int]]:
        """Yield the stacks of one of several shares, `(share, shares)`: each has small and large groups.

        rows: of a copy in the order of `stacks`, the share is the stacks that begin with one of these rows.
        """
        stacks = self.stacks(base, spec)
        if rows is not None:
            return (stack for stack in stacks if int(self._rows[stack[0]][0]) in rows)
        first, shares = share
        return islice(stacks, first, None, shares)

    def stacks(self, base: BaseLayer, spec: TrainingSpec) -> Iterator[list[int]]:
        """Yield the positions of groups of one shape, as many as are fast together, from the smallest groups on."""
        stack: list[int] = []
        last_shape = None
        for position, size in sorted(enumerate(map(len, self._rows)), key=itemgetter(1, 0)):
            shape = _shape(base, spec, size)
            is_too_large = (len(stack) + 1) * _numbers(base, spec, size) > STACK_NUMBERS
            if stack and (shape is None or shape != last_shape or is_too_large or len(stack) == MAX_STACK_GROUPS):
                yield stack
                stack = []
            stack.append(position)
            last_shape = shape
        if stack:
            yield stack

    def read(self, positions: Sequence[int]) -> tuple[TrainingData, list[Tensor]]:
        """Return the rows of these groups as one table, and the indices of the rows of each group, int64."""
        data, sizes = self._data, [len(self._rows[position]) for position in positions]
        rows_N = torch.cat([self._rows[position] for position in positions])
        taken = data.take(rows_N)
        table = replace(
            data,
            inputs_NI=taken.inputs_NI,
            targets=taken.targets,
            weights_N=taken.weights_N,
            key_N=None if data.key_N is None else data.key_N[rows_N],
            groups_N=None,
            mapping=None,
        )
        return table, list(torch.arange(len(rows_N)).split(sizes))


def _shape(base: BaseLayer, spec: TrainingSpec, size: int) -> tuple[int, bool] | None:
    """Return what the groups of a stack have in common by their size; a group with None is trained alone."""
    if spec.is_exact:
        return 0, True
    splits_by_size = spec.split is not None and spec.split.by in (SplitBy.ROWS, SplitBy.TIME)
    held = spec.split.held_out_rows(size) if spec.split is not None and splits_by_size else 0
    return batch_shape(base, spec, max(1, size - held))


def _numbers(base: BaseLayer, spec: TrainingSpec, size: int) -> int:
    I, O = base.in_features, base.out_features
    return size * (I + 2 * O) + (I * (I + O) if spec.is_exact else 6 * spec.rank * (I + O))


def fit_fleet(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    *,
    done: Collection[int] = (),
    feature_space: str | None = None,
    labels: Sequence[str | int] | None = None,
    live: Mapping[int, LiveVersion] = NO_VERSIONS,
    progress: Progress = lambda _step, _loss: None,
    share: tuple[int, int] = (0, 1),
    rows: range | None = None,
) -> Iterator[list[Outcome]]:
    """Train an adapter for each code of `data.groups_N` as `fit` would on the rows of the group; yield stack by stack.

    Stacks in which every position is in `done` are passed over. live: the versions to compare with, by code. share: the
    share of the stacks, and the number of shares; see `FleetSource.share` for `rows`.
    """
    source, of_base = FleetSource(data), base_matching(base, labels, spec)
    for positions in source.share(base, spec, share, rows=rows):
        if all(position in done for position in positions):
            continue
        table, rows_of_group = source.read(positions)
        split_groups, outcomes = _split_groups(table, spec, dict(zip(positions, rows_of_group, strict=True)))
        # A hash may hold rows of some groups out, and none of others.
        for holds_out in (True, False):
            groups = [group for group in split_groups if (group.held_K is not None) == holds_out]
            if not groups:
                continue
            factors, errors, metrics = _fit_stack(base, table, spec, groups, progress, of_base)
            reports: Sequence[AdapterReport | None] = [None] * len(groups)
            if holds_out:
                reports = _judge_stack(base, table, spec, groups, factors, live, labels)
            factors = factors.map(Tensor.cpu)
            for index, group in enumerate(groups):
                if (error := errors[index]) is not None:
                    outcomes.append(Outcome(group.position, None, {}, error))
                    continue
                own, names = factors.at(index).map(Tensor.contiguous), None if labels is None else tuple(labels)
                adapter = Adapter(*own, spec.alpha, spec.rslora, feature_space, names)
                outcomes.append(Outcome(group.position, adapter, metrics[index], report=reports[index]))
        yield [outcome for outcome in outcomes if outcome.position not in done]


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Rows of one group, as indices in the table of its stack."""

    position: int
    sampler: Sampler
    rows_K: Tensor
    """(K,) int64: its rows, in the order of the data."""
    training_K: Tensor
    """Rows to train on."""
    held_K: Tensor | None
    """Held-out rows; None if none are."""


def _split_groups(
    table: TrainingData, spec: TrainingSpec, members: Mapping[int, Tensor]
) -> tuple[list[_Group], list[Outcome]]:
    """Return each group with its samples; one that cannot be split has failed."""
    groups, failed = [], []
    samplers: dict[int, Sampler] = {}
    # Groups of one size draw the same rows then, and share a sampler.
    depends_on_size_alone = spec.split is None or (spec.split.by is SplitBy.ROWS and not spec.split.stratify)
    for position, rows_K in members.items():
        size = len(rows_K)
        try:
            sampler = samplers.get(size) if depends_on_size_alone else None
            if sampler is None:
                key_N = None if table.key_N is None else table.key_N[rows_K]
                classes_N = table.targets[rows_K] if table.targets.dtype == torch.int64 else None
                sampler = samplers[size] = Sampler(spec, size, key_N=key_N, classes_N=classes_N)
            training_K, held_K = rows_K[sampler.training_K], None
            if sampler.held_K is not None:
                held_K = rows_K[sampler.held_K]
            for side_K in (training_K, held_K):
                if table.weights_N is not None and side_K is not None and not table.weights_N[side_K].any():
                    raise OutOfRange("no row of the group counts on one side: the weights are all 0", field="weights")
        except LoraplexError as error:
            failed.append(Outcome(position, None, {}, error))
        else:
            groups.append(_Group(position, sampler, rows_K, training_K, held_K))
    return groups, failed


def _fit_stack(
    base: BaseLayer,
    table: TrainingData,
    spec: TrainingSpec,
    groups: Sequence[_Group],
    progress: Progress,
    of_base: LabelMatching | None,
) -> tuple[Factors, Sequence[LoraplexError | None], list[dict[str, Any]]]:
    """Return the factors of each group, the error of each or None, and the metrics of each."""
    is_weighted = not spec.is_exact and (spec.class_weights is not None or table.weights_N is not None)
    weights_N = _balanced(table, spec, groups, base.out_features) if is_weighted else table.weights_N
    table = table.to(base.device)
    own_weights_N = table.weights_N
    table = table.weighted(None if weights_N is None else weights_N.to(base.device))
    factors, errors = (_solve if spec.is_exact else _descend)(base, table, spec, groups, progress)
    held = [group.held_K for group in groups if group.held_K is not None]
    sides = {"train": [group.training_K for group in groups], "validation": held}
    metrics = measure_stack(base, table, spec, sides, factors, own_weights_N, of_base)
    for index, values in enumerate(metrics):
        if errors[index] is None and not all(value is None or math.isfinite(value) for value in values.values()):
            errors[index] = Diverged("the trained layer's loss is not finite", step=1)
    return factors, errors, metrics


def _judge_stack(
    base: BaseLayer,
    table: TrainingData,
    spec: TrainingSpec,
    groups: Sequence[_Group],
    factors: Factors,
    live: Mapping[int, LiveVersion],
    labels: Sequence[str | int] | None,
) -> list[AdapterReport]:
    """Judge the adapter of each group on its held-out rows, its gain shrunk towards that of the other groups."""
    table, compared = table.to(base.device), []
    for index, group in enumerate(groups):
        assert group.held_K is not None
        version = live.get(group.position)
        present = None if version is None or version.unjudged is not None else version.adapter
        held, training_K = table.take(group.held_K), group.training_K
        guess_C = guess_outputs(table, training_K, spec, base.out_features)
        entries = compared_factors(base, spec, factors.at(index), present, labels)
        errors = held_out_errors(base, held, None, spec, entries, guess_C=guess_C)
        errors = replace_trained_errors(errors, version, held, None, labels)
        compared.append((errors, None if held.weights_N is None else held.weights_N.cpu()))
    alone = [report_of(errors, spec.loss, weights_N).evaluation or {} for errors, weights_N in compared]
    gains = [
        relative_gain(
            one["gain"],
            one["base"] if one["live"] is None else one["live"],
            is_regression=not one["metric"].endswith("accuracy"),
        )
        for one in alone
    ]
    total = sum(one["rows"] * share for one, (share, _) in zip(alone, gains, strict=True))
    rows = sum(one["rows"] for one in alone)
    reports = []
    for group, (errors, weights_N), one, (share, unit) in zip(groups, compared, alone, gains, strict=True):
        others = rows - one["rows"]
        others_gain = unit * (total - one["rows"] * share) / others if others else None
        version = live.get(group.position)
        has_base = base.weight_norm > 0
        reports.append(
            report_of(errors, spec.loss, weights_N, live=version, has_base=has_base, others_gain=others_gain)
        )
    return reports


def _balanced(table: TrainingData, spec: TrainingSpec, groups: Sequence[_Group], outputs: int) -> Tensor:
    weights_N = torch.ones(table.rows) if table.weights_N is None else table.weights_N.clone()
    for group in groups:
        training = table.take(group.training_K)
        weights_C = class_weights(spec, training.targets, training.weights_N, outputs)
        group_weights_K = row_weights(table.take(group.rows_K), weights_C)
        assert group_weights_K is not None
        weights_N[group.rows_K] = group_weights_K
    return weights_N


def _solve(
    base: BaseLayer, table: TrainingData, spec: TrainingSpec, groups: Sequence[_Group], progress: Progress
) -> "tuple[Factors, list[Diverged | None]]":
    rows_GK, weights_GK = pad_to_matrix([group.training_K for group in groups], base.device)
    if table.weights_N is not None:
        weights_GK = weights_GK * table.weights_N[rows_GK]
    chunk = (table.inputs_NI[rows_GK], table.targets[rows_GK], weights_GK)
    statistics = accumulate(base, [chunk], groups=len(rows_GK))
    solved = solve_stack(
        statistics, rank=spec.rank, scaling=spec.scaling, ridge=spec.ridge, bias=spec.bias, prior_OI=table.prior
    )
    progress(1, 0.0)
    return solved


def _descend(
    base: BaseLayer, table: TrainingData, spec: TrainingSpec, groups: Sequence[_Group], progress: Progress
) -> "tuple[Factors, list[Diverged | None]]":
    starts = {
        sampler: initial_factors(base, table, spec, sampler)
        for sampler in dict.fromkeys(group.sampler for group in groups)
    }
    # A split by chance leaves all groups of a stack one shape; another may not.
    indices_by_shape: dict[object, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        shape = batch_shape(base, spec, len(group.training_K))
        indices_by_shape[index if shape is None else shape].append(index)
    trained: dict[int, TrainedFactors] = {}
    for indices in indices_by_shape.values():
        members = [groups[index] for index in indices]
        entries = [StackEntry(group.sampler, group.training_K, starts[group.sampler]) for group in members]
        held = [group.held_K for group in members if group.held_K is not None]
        held_out = HeldOut(table, held) if spec.patience is not None and held else None
        results, _ = run_training_loop(
            base, table, spec, entries, report=lambda step, loss, _: progress(step, loss), held_out=held_out
        )
        trained |= zip(indices, results, strict=True)
    in_order = [trained[index] for index in range(len(groups))]
    a_GOR, b_GRI, biases = zip(*(result.factors for result in in_order), strict=True)
    bias_GO = torch.stack(biases) if spec.bias else None
    return Factors(torch.stack(a_GOR), torch.stack(b_GRI), bias_GO), [result.error for result in in_order]
