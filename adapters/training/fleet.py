"""Fit of a fleet: one adapter for each group of a table, trained in stacks of groups of about one size."""

# G groups of a stack · N rows · K rows of one group
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.errors import Diverged, LoraplexError, OutOfRange
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors, solve_stack
from adapters.training.closed_form.statistics import accumulate_stack
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import measure_stack, pad_to_matrix
from adapters.training.gradient.batches import batch_shape
from adapters.training.gradient.losses import class_weights, row_weights
from adapters.training.gradient.sampling import Sampler, StackEntry, initial_factors
from adapters.training.gradient.stack import TrainedFactors
from adapters.training.gradient.training_loop import HeldOut, run_training_loop
from adapters.training.limits import MAX_STACK_GROUPS, STACK_NUMBERS
from adapters.training.planning.split import SplitBy
from adapters.training.settings import TrainingSpec

# Told of a stack's step, and of the mean of its groups' losses.
Progress = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the training of one group ended: with an adapter, or with an error."""

    position: int
    adapter: Adapter | None
    metrics: dict[str, Any]
    error: LoraplexError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """One group's rows of a stack's table."""

    position: int
    sampler: Sampler
    rows_K: Tensor
    """(K,) int64: its rows, in the order of the data."""
    training_K: Tensor
    """Those to train on."""
    held_K: Tensor | None
    """Those held out; None where none are."""


def fit_fleet(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    *,
    done: Collection[int] = (),
    feature_space: str | None = None,
    labels: Sequence[str | int] | None = None,
    progress: Progress = lambda _step, _loss: None,
) -> Iterator[list[Outcome]]:
    """Train an adapter for each code of `data.groups_N` as `fit` would on the rows of the group; yield stack by stack.

    Stacks in which every position is in `done` are passed over. Which groups share a stack depends on the data alone,
    so that an attempt after a death gives the rest as the first one would have.
    """
    assert data.groups_N is not None
    order_N = torch.argsort(data.groups_N, stable=True)
    members = order_N.split(torch.bincount(data.groups_N).tolist())
    for positions in _stacks([len(rows_K) for rows_K in members], base, spec):
        if not all(position in done for position in positions):
            trained = _train_stack(base, data, spec, [(p, members[p]) for p in positions], progress)
            yield [
                _as_outcome(outcome, spec, feature_space, labels) for outcome in trained if outcome.position not in done
            ]


def _stacks(sizes: Sequence[int], base: BaseLayer, spec: TrainingSpec) -> Iterator[list[int]]:
    """Positions by size: groups of one shape, as many as are fast together."""
    stack: list[int] = []
    before = None
    for position in sorted(range(len(sizes)), key=lambda each: (sizes[each], each)):
        shape = _shape(base, spec, sizes[position])
        too_many = (len(stack) + 1) * _numbers(base, spec, sizes[position]) > STACK_NUMBERS
        if stack and (shape is None or shape != before or too_many or len(stack) == MAX_STACK_GROUPS):
            yield stack
            stack = []
        stack.append(position)
        before = shape
    if stack:
        yield stack


def _shape(base: BaseLayer, spec: TrainingSpec, size: int) -> tuple[int, bool] | None:
    """Return what the groups of a stack have in common by their size; a group with None is trained alone."""
    if spec.is_exact:
        return 0, True
    held = (
        0 if spec.split is None or spec.split.by in (SplitBy.GROUP, SplitBy.COLUMN) else spec.split.held_out_rows(size)
    )
    return batch_shape(base, spec, max(1, size - held))


def _numbers(base: BaseLayer, spec: TrainingSpec, size: int) -> int:
    I, O = base.in_features, base.out_features
    return size * (I + 2 * O) + (I * (I + O) if spec.is_exact else 6 * spec.rank * (I + O))


@dataclass(frozen=True, slots=True)
class _Trained:
    position: int
    factors: Factors | None
    metrics: dict[str, Any]
    error: LoraplexError | None


def _train_stack(
    base: BaseLayer, data: TrainingData, spec: TrainingSpec, members: Sequence[tuple[int, Tensor]], progress: Progress
) -> list[_Trained]:
    rows_N = torch.cat([rows_K for _, rows_K in members])
    table = data.take(rows_N).to(base.device)
    groups, failed = _lay(table, spec, members, None if data.key_N is None else data.key_N[rows_N])
    if not groups:
        return failed
    own_weights_N = table.weights_N
    if not spec.is_exact and (spec.class_weights is not None or table.weights_N is not None):
        table = table.weighted(_balanced(table, spec, groups, base.out_features))
    factors, errors = (_solve if spec.is_exact else _descend)(base, data, table, spec, groups, progress)
    held = [group.held_K for group in groups if group.held_K is not None]
    sides = {"train": [group.training_K for group in groups], "validation": held}
    metrics = measure_stack(base, table, spec, sides, factors, own_weights_N)
    trained = []
    for place, group in enumerate(groups):
        error = errors[place]
        if error is None and not all(value is None or math.isfinite(value) for value in metrics[place].values()):
            error = Diverged("the trained layer's loss is not finite", step=1)
        mine = None if error else factors.at(place)
        trained.append(_Trained(group.position, mine, {} if error else metrics[place], error))
    return trained + failed


def _lay(
    table: TrainingData, spec: TrainingSpec, members: Sequence[tuple[int, Tensor]], key_N: Tensor | None
) -> tuple[list[_Group], list[_Trained]]:
    """Each group with what is drawn for it; those that cannot be split have failed."""
    groups, failed = [], []
    alike: dict[int, Sampler] = {}
    by_chance = spec.split is None or (spec.split.by is SplitBy.ROWS and not spec.split.stratify)
    begin = 0
    for position, rows_K in members:
        mine = slice(begin, begin + len(rows_K))
        rows = torch.arange(begin, begin + len(rows_K))
        begin += len(rows_K)
        try:
            if by_chance:
                sampler = alike.get(len(rows)) or alike.setdefault(len(rows), Sampler(spec, len(rows)))
            else:
                classes_N = table.targets[mine].cpu() if table.targets.dtype == torch.int64 else None
                sampler = Sampler(spec, len(rows), key_N=None if key_N is None else key_N[mine], classes_N=classes_N)
        except LoraplexError as error:
            failed.append(_Trained(position, None, {}, error))
        else:
            training_K, held_K = rows, None
            if sampler.held_K is not None:
                training_K, held_K = rows[sampler.training_K], rows[sampler.held_K]
            sides = [training_K] if held_K is None else [training_K, held_K]
            if table.weights_N is not None and not all(bool(table.weights_N[side_K].any()) for side_K in sides):
                weightless = OutOfRange(
                    "no row of the group counts on one side: the weights are all 0", field="weights"
                )
                failed.append(_Trained(position, None, {}, weightless))
            else:
                groups.append(_Group(position, sampler, rows, training_K, held_K))
    return groups, failed


def _balanced(table: TrainingData, spec: TrainingSpec, groups: Sequence[_Group], outputs: int) -> Tensor:
    weights_N = torch.ones(table.rows) if table.weights_N is None else table.weights_N.clone()
    for group in groups:
        training = table.take(group.training_K)
        weights_C = class_weights(spec, training.targets, training.weights_N, outputs)
        counted = row_weights(table.take(group.rows_K), weights_C)
        assert counted is not None
        weights_N[group.rows_K] = counted
    return weights_N


def _solve(
    base: BaseLayer,
    data: TrainingData,
    table: TrainingData,
    spec: TrainingSpec,
    groups: Sequence[_Group],
    progress: Progress,
) -> tuple[Factors, "list[Diverged | None]"]:
    rows_GK, weights_GK = pad_to_matrix([group.training_K for group in groups], base.device)
    if table.weights_N is not None:
        weights_GK = weights_GK * table.weights_N[rows_GK]
    statistics = accumulate_stack(base, table.inputs_NI[rows_GK], table.targets[rows_GK], weights_GK)
    solved = solve_stack(
        statistics, rank=spec.rank, scaling=spec.scaling, ridge=spec.ridge, bias=spec.bias, prior_OI=data.prior
    )
    progress(1, 0.0)
    return solved


def _descend(
    base: BaseLayer,
    data: TrainingData,
    table: TrainingData,
    spec: TrainingSpec,
    groups: Sequence[_Group],
    progress: Progress,
) -> tuple[Factors, "list[Diverged | None]"]:
    starts: dict[Sampler, tuple[Tensor, Tensor]] = {}
    alike: dict[object, list[int]] = {}
    for place, group in enumerate(groups):
        if group.sampler not in starts:
            starts[group.sampler] = initial_factors(base, data, spec, group.sampler)
        # A split by chance leaves all of them one shape; another may not.
        shape = batch_shape(base, spec, len(group.training_K))
        alike.setdefault(place if shape is None else shape, []).append(place)
    trained: dict[int, TrainedFactors] = {}
    for places in alike.values():
        some = [groups[place] for place in places]
        tasks = [StackEntry(group.sampler, group.training_K, starts[group.sampler]) for group in some]
        held = [group.held_K for group in some if group.held_K is not None]
        held_out = HeldOut(table, held) if spec.patience is not None else None
        done, _ = run_training_loop(
            base, table, spec, tasks, report=lambda step, loss, _: progress(step, loss), held_out=held_out
        )
        trained |= zip(places, done, strict=True)
    in_order = [trained[place] for place in range(len(groups))]
    a_GOR, b_GRI, biases = zip(*(each.factors for each in in_order), strict=True)
    bias_GO = torch.stack(biases) if spec.bias else None
    factors = Factors(torch.stack(a_GOR), torch.stack(b_GRI), bias_GO)
    return factors, [each.error for each in in_order]


def _as_outcome(
    trained: _Trained, spec: TrainingSpec, feature_space: str | None, labels: Sequence[str | int] | None
) -> Outcome:
    if trained.factors is None:
        return Outcome(trained.position, None, {}, trained.error)
    factors = trained.factors.map(lambda part: part.cpu().contiguous())
    adapter = Adapter(*factors, spec.alpha, spec.rslora, feature_space, None if labels is None else tuple(labels))
    return Outcome(trained.position, adapter, trained.metrics)
