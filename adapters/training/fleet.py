"""One table, an adapter for each of its groups: trained together, in stacks of groups of about one size."""

# G groups of a stack · N rows · K rows of one group · O out_features
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.base_layer import BaseLayer
from adapters.errors import Diverged, LoraplexError, OutOfRange
from adapters.training.closed_form import Factors, solve_stack
from adapters.training.data import TrainingData
from adapters.training.descent import HeldOut, descend
from adapters.training.draws import Draws, start_of
from adapters.training.gradient import Task
from adapters.training.objective import class_weights, documents_of, outputs_stack, row_losses, row_weights
from adapters.training.spec import Loss, TrainingSpec
from adapters.training.split import By
from adapters.training.statistics import gather_stack

_NUMBERS_AT_ONCE = 2**20
"""Inputs of a stack: its rows, what comes of them and the factors stay near the core."""
_MOST_AT_ONCE = 256
Progress = Callable[[int, float], None]
"""Told of a stack's step, and of the mean of its groups' losses."""


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
    draws: Draws
    rows_K: Tensor
    """(K,) int64: its rows, in the order of the data."""


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
    """An adapter for each code of `data.groups_N`, as `fit` would train it on the group's rows alone; stack by stack.

    Stacks in which every position is in `done` are passed over. Which groups share a stack depends on the data alone,
    so that an attempt after a death gives the rest as the first one would have.
    """
    assert data.groups_N is not None
    order_N = torch.argsort(data.groups_N, stable=True)
    members = order_N.split(torch.bincount(data.groups_N).tolist())
    for positions in _stacks([len(rows_K) for rows_K in members], base.in_features):
        if not all(position in done for position in positions):
            trained = _train_stack(base, data, spec, [(p, members[p]) for p in positions], progress)
            yield [
                _as_outcome(outcome, spec, feature_space, labels) for outcome in trained if outcome.position not in done
            ]


def _stacks(sizes: Sequence[int], in_features: int) -> Iterator[list[int]]:
    """Positions by size, so that a stack's groups need little padding, as many as are fast together."""
    stack: list[int] = []
    for position in sorted(range(len(sizes)), key=lambda each: (sizes[each], each)):
        if (stack and (len(stack) + 1) * sizes[position] * in_features > _NUMBERS_AT_ONCE) or len(
            stack
        ) == _MOST_AT_ONCE:
            yield stack
            stack = []
        stack.append(position)
    if stack:
        yield stack


@dataclass(frozen=True, slots=True)
class _Trained:
    position: int
    factors: Factors | None
    metrics: dict[str, Any]
    error: LoraplexError | None


def _train_stack(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    members: Sequence[tuple[int, Tensor]],
    progress: Progress,
) -> list[_Trained]:
    rows_N = torch.cat([rows_K for _, rows_K in members])
    table = data.take(rows_N).to(base.device)
    groups, failed = _lay(table, spec, members, None if data.key_N is None else data.key_N[rows_N])
    if not groups:
        return failed
    if spec.class_weights is not None:
        table = table.weighted(_balanced(table, spec, groups, base.out_features))
    factors, errors = (_solve if spec.is_exact else _descend)(base, data, table, spec, groups, progress)
    metrics = _measure(base, table, spec, groups, factors)
    trained = []
    for place, group in enumerate(groups):
        error = errors[place]
        if error is None and not all(value is None or math.isfinite(value) for value in metrics[place].values()):
            error = Diverged("the trained layer's loss is not finite", step=1)
        bias_O = None if factors.bias_O is None else factors.bias_O[place]
        mine = None if error else Factors(factors.a_OR[place], factors.b_RI[place], bias_O)
        trained.append(_Trained(group.position, mine, {} if error else metrics[place], error))
    return trained + failed


def _lay(
    table: TrainingData, spec: TrainingSpec, members: Sequence[tuple[int, Tensor]], key_N: Tensor | None
) -> tuple[list[_Group], list[_Trained]]:
    """Each group with what is drawn for it; those that cannot be split have failed."""
    groups, failed = [], []
    alike: dict[int, Draws] = {}
    by_chance = spec.split is None or (spec.split.by is By.ROWS and not spec.split.stratify)
    begin = 0
    for position, rows_K in members:
        mine = slice(begin, begin + len(rows_K))
        rows = torch.arange(begin, begin + len(rows_K))
        begin += len(rows_K)
        try:
            if by_chance:
                draws = alike.get(len(rows)) or alike.setdefault(len(rows), Draws(spec, len(rows)))
            else:
                classes_N = table.targets[mine].cpu() if table.targets.dtype == torch.int64 else None
                draws = Draws(spec, len(rows), key_N=None if key_N is None else key_N[mine], classes_N=classes_N)
        except LoraplexError as error:
            failed.append(_Trained(position, None, {}, error))
        else:
            group = _Group(position, draws, rows)
            sides = [draws.training_K] if draws.held_K is None else [draws.training_K, draws.held_K]
            if table.weights_N is not None and not all(bool(table.weights_N[rows[side_K]].any()) for side_K in sides):
                weightless = OutOfRange(
                    "no row of the group counts on one side: the weights are all 0", field="weights"
                )
                failed.append(_Trained(position, None, {}, weightless))
            else:
                groups.append(group)
    return groups, failed


def _balanced(table: TrainingData, spec: TrainingSpec, groups: Sequence[_Group], outputs: int) -> Tensor:
    weights_N = torch.ones(table.rows) if table.weights_N is None else table.weights_N.clone()
    for group in groups:
        training = table.take(group.rows_K[group.draws.training_K])
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
    rows_GK, there_GK = _padded([group.rows_K[group.draws.training_K] for group in groups])
    statistics = gather_stack(
        base, table.inputs_NI[rows_GK], table.targets[rows_GK], _weights(table, rows_GK, there_GK)
    )
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
    starts: dict[Draws, tuple[Tensor, Tensor]] = {}
    tasks = []
    for group in groups:
        if group.draws not in starts:
            starts[group.draws] = start_of(base, data, spec, group.draws)
        tasks.append(Task(group.draws, group.rows_K[group.draws.training_K], starts[group.draws]))
    held_out = None
    if spec.patience is not None:
        held_out = HeldOut(table, [_held_rows(group) for group in groups])
    trained, _ = descend(base, table, spec, tasks, report=lambda step, loss, _: progress(step, loss), held_out=held_out)
    biases = [each.bias_O for each in trained if each.bias_O is not None]
    factors = Factors(
        torch.stack([each.a_OR for each in trained]),
        torch.stack([each.b_RI for each in trained]),
        torch.stack(biases) if biases else None,
    )
    return factors, [each.error for each in trained]


def _held_rows(group: _Group) -> Tensor:
    assert group.draws.held_K is not None
    return group.rows_K[group.draws.held_K]


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(G, K) int64 row numbers, the first row where there are fewer, and (G, K) float32: 1 where there is one."""
    K = max(len(rows_K) for rows_K in rows)
    rows_GK, there_GK = torch.zeros(len(rows), K, dtype=torch.int64), torch.zeros(len(rows), K)
    for place, rows_K in enumerate(rows):
        rows_GK[place, : len(rows_K)], there_GK[place, : len(rows_K)] = rows_K, 1
    return rows_GK, there_GK


def _weights(table: TrainingData, rows_GK: Tensor, there_GK: Tensor) -> Tensor:
    there_GK = there_GK.to(table.inputs_NI.device)
    return there_GK if table.weights_N is None else there_GK * table.weights_N[rows_GK]


def _measure(
    base: BaseLayer, table: TrainingData, spec: TrainingSpec, groups: Sequence[_Group], factors: Factors
) -> list[dict[str, Any]]:
    """For each group the losses, and with classes the accuracies, of both sides: adapted, and bare."""
    metrics: list[dict[str, Any]] = [{} for _ in groups]
    a_GOR, b_GRI = factors.a_OR.to(base.device), factors.b_RI.to(base.device)
    bias_GO = None if factors.bias_O is None else factors.bias_O.to(base.device)
    documents_N = documents_of(table.targets) if spec.loss is Loss.MULTIPLE_NEGATIVES else None
    sides = {"train": [group.rows_K[group.draws.training_K] for group in groups]}
    if groups[0].draws.held_K is not None:
        sides["validation"] = [_held_rows(group) for group in groups]
    for side, rows in sides.items():
        rows_GK, there_GK = _padded(rows)
        x_GKI, targets = table.inputs_NI[rows_GK].double(), table.targets[rows_GK]
        documents_GK = None
        if documents_N is not None:
            documents_GK = documents_N[rows_GK].masked_fill(there_GK.to(base.device) == 0, -1)
        targets = targets.double().transpose(1, 2) if targets.dim() == 3 else targets
        weights_GK = _weights(table, rows_GK, there_GK).double()
        for who, scale in (("", spec.scaling), ("base_", 0.0)):
            y_GOK = outputs_stack(base, x_GKI, (a_GOR, b_GRI, bias_GO), scale)
            losses_GK = row_losses(spec, y_GOK, targets, documents_GK)
            found = {"loss": losses_GK}
            if spec.loss is Loss.CROSS_ENTROPY:
                found["accuracy"] = (y_GOK[:, : spec.classes].argmax(dim=1) == targets).double()
            for measure, values_GK in found.items():
                mean_G = (values_GK * weights_GK).sum(dim=1) / weights_GK.sum(dim=1).clamp_min(1e-300)
                for place, value in enumerate(mean_G.tolist()):
                    metrics[place][f"{who}{side}_{measure}"] = value
    return metrics


def _as_outcome(
    trained: _Trained, spec: TrainingSpec, feature_space: str | None, labels: Sequence[str | int] | None
) -> Outcome:
    if trained.factors is None:
        return Outcome(trained.position, None, {}, trained.error)
    a_OR, b_RI = trained.factors.a_OR.cpu().contiguous(), trained.factors.b_RI.cpu().contiguous()
    bias_O = None if trained.factors.bias_O is None else trained.factors.bias_O.cpu().contiguous()
    names = None if labels is None else tuple(labels)
    adapter = Adapter(a_OR, b_RI, bias_O, spec.alpha, spec.rslora, feature_space, names)
    return Outcome(trained.position, adapter, trained.metrics)
