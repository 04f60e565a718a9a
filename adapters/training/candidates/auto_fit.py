"""Fit of what `method: auto` takes: for one adapter, and for each adapter of a fleet."""

# G groups of a stack · N rows of a group, padded · K rows of one group · C outputs of the task · X combinations
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapters.errors import LoraplexError
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.candidates import large, small
from adapters.training.candidates.descent import Descent, choose_descent, split_in_parts, train_descent
from adapters.training.candidates.descent_only import fit_descent_only
from adapters.training.candidates.features import FeatureMap, Kind, Moments, feature_map
from adapters.training.candidates.fleet_mean import ClusterModel, CommonModel, GroupRows, fit_clusters, fit_mean
from adapters.training.candidates.outcome import AutoFit, Tried, finish, gain_of, prior_fit, suspects_of
from adapters.training.candidates.scores import LINEAR_LOSSES, Scores
from adapters.training.candidates.small import Candidates, Combination, Composed, Search, Stack, Start
from adapters.training.candidates.task import FitTask, Labels, Sides
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.judgement import LiveVersion
from adapters.training.evaluation.row_errors import fair_errors
from adapters.training.fit import Watcher
from adapters.training.planning.split import FEW_ROWS
from adapters.training.settings import Candidate, Loss, TrainingSpec

_STACK_GROUPS = 64
# Training rows up to which leave-one-out chooses; beyond them, a fifth of them does.
_MAX_LEFT_OUT_ROWS = 500
_INNER_PARTS = 5
# Rows times classes up to which an adapter's suspects are found.
_MAX_SUSPECT_NUMBERS = 2**25
# Least relative improvement of AdamW over the others for which it is taken: it has chosen its steps by the same rows.
_MIN_IMPROVEMENT = 0.1
# Candidates without a closed form.
_DESCENT_ONLY = frozenset({Candidate.BASE, Candidate.ADAMW})

Progress = Callable[[int, float], None]


def fit_auto(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    *,
    labels: Labels = None,
    feature_space: str | None = None,
    live: LiveVersion | None = None,
    watcher: Watcher = Watcher(),  # noqa: B008 - immutable
) -> AutoFit:
    """Fit one adapter. The same base, data, spec and thread count give the same adapter, bit for bit.

    live: the version that answers now. Raises `Diverged`, and `OutOfRange` if a split leaves a side empty.
    """
    task = FitTask(base, data, spec, Scores(spec.loss), labels, feature_space, {} if live is None else {0: live})
    if spec.loss not in LINEAR_LOSSES or _DESCENT_ONLY.issuperset(spec.candidates):
        return fit_descent_only(task, torch.arange(data.rows), 0, watcher)
    results = [result for part in _fit_groups(task, {0: torch.arange(data.rows)}, watcher=watcher) for result in part]
    (result,) = results
    if result.error is not None:
        raise result.error
    return result


def fit_fleet_auto(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    *,
    labels: Labels = None,
    feature_space: str | None = None,
    live: Mapping[int, LiveVersion] | None = None,
    done: Collection[int] = (),
    wants_prior: bool = False,
    progress: Progress = lambda _step, _loss: None,
) -> Iterator[list[AutoFit]]:
    """Fit an adapter for each code of `data.groups_N`; yield them stack by stack, without those that are `done`.

    With `wants_prior`, the last one is what all groups have in common, at the position behind the groups.
    """
    assert data.groups_N is not None
    order_N = torch.argsort(data.groups_N, stable=True)
    rows = dict(enumerate(order_N.split(torch.bincount(data.groups_N).tolist())))
    task = FitTask(base, data, spec, Scores(spec.loss), labels, feature_space, live or {})
    if spec.loss not in LINEAR_LOSSES or _DESCENT_ONLY.issuperset(spec.candidates):
        for position, rows_K in rows.items():
            if position not in done:
                yield [_or_error(position, spec, partial(fit_descent_only, task, rows_K, position, Watcher()))]
                progress(1, 0.0)
        return
    watcher = Watcher(report=lambda step, loss, _history: progress(step, loss))
    for part in _fit_groups(task, rows, is_fleet=True, wants_prior=wants_prior, watcher=watcher):
        yield [result for result in part if result.position not in done]


def _or_error(position: int, spec: TrainingSpec, fit: Callable[[], AutoFit]) -> AutoFit:
    try:
        return fit()
    except LoraplexError as error:
        return AutoFit(position=position, spec=spec, error=error)


@dataclass(slots=True, eq=False)
class _Group:
    """One adapter on its way: its rows, and what was chosen for it."""

    position: int
    rows_K: Tensor
    sides: Sides
    fold_errors_K: Tensor | None = None
    """Errors of the training rows in outer folds."""
    composed: Composed | None = None
    descent: Descent | None = None
    tried: Tried | None = None
    adapter: Adapter | None = None
    error: LoraplexError | None = None
    left_out_NC: Tensor | None = None
    """Outputs of all rows, each by the combination without the row: for the suspects alone, which choose nothing."""
    errors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """Candidates to compare, and the regression over all groups that they start from."""

    candidates: Candidates
    moments: Moments
    mean: CommonModel | None
    scale: float


def _fit_groups(
    task: FitTask, rows: Mapping[int, Tensor], *, watcher: Watcher, is_fleet: bool = False, wants_prior: bool = False
) -> Iterator[list[AutoFit]]:
    groups, failed = [], []
    for position, rows_K in rows.items():
        try:
            groups.append(_Group(position, rows_K, task.sides(rows_K)))
        except LoraplexError as error:
            failed.append(AutoFit(position=position, spec=task.spec, error=error))
    if failed:
        yield failed
    if not groups:
        return
    few = [group for group in groups if len(group.sides.training_K) <= _MAX_LEFT_OUT_ROWS]
    many = [group for group in groups if len(group.sides.training_K) > _MAX_LEFT_OUT_ROWS]
    few.sort(key=lambda group: (len(group.sides.training_K), group.position))
    parts = [few[begin : begin + _STACK_GROUPS] for begin in range(0, len(few), _STACK_GROUPS)]
    stacks = [task.stack([g.position for g in part], [g.sides.training_K for g in part]) for part in parts]
    plan = _plan(task, groups, stacks, is_fleet=is_fleet, groups_in_all=len(rows), wants_prior=wants_prior)
    _choose(task, plan.candidates, parts, stacks)
    for group in few:
        _try_descent(task, group)
    for group in many:
        _fit_many(task, plan, group)
    for group in groups:
        _make_adapter(task, plan, group, watcher)
    gains = {group.position: gain_of(group.errors) for group in groups if group.errors}
    total, count = sum(gain for gain, _ in gains.values()), sum(weight for _, weight in gains.values())
    for part in [*parts, *([group] for group in many)]:
        results = []
        for group in part:
            gain, weight = gains.get(group.position, (0.0, 0.0))
            others = (total - gain) / (count - weight) if is_fleet and count > weight else None
            results.append(_result(task, group, others, is_fleet=is_fleet))
        watcher.report(1, 0.0, [])
        yield results
    if wants_prior and plan.mean is not None:
        features = plan.candidates.maps[plan.candidates.common_map or 0]
        yield [prior_fit(task, features, plan.mean, plan.scale, plan.moments, len(rows))]


def _plan(
    task: FitTask, groups: Sequence[_Group], stacks: Sequence[Stack], *, is_fleet: bool, groups_in_all: int,
    wants_prior: bool,
) -> _Plan:  # fmt: skip
    """Return what is tried: starts, features and ridges, with the regressions over all groups."""
    spec, scores, allowed = task.spec, task.scores, frozenset(task.spec.candidates)
    training_N = torch.cat([group.sides.training_K for group in groups])
    moments = task.moments(training_N)
    maps = _feature_maps(task, moments)
    # A group alone tries all scales; the rows of many groups, or many rows, give one.
    has_one_scale = is_fleet or len(training_N) >= FEW_ROWS // 2
    scales = (task.scale(training_N),) if has_one_scale else scores.scales
    mean, models = None, list[CommonModel | ClusterModel]()
    wants_mean = bool(allowed & {Candidate.FLEET_MEAN, Candidate.CLUSTER_MEAN})
    if is_fleet and stacks and groups_in_all > 1 and (wants_mean or wants_prior):
        cached = [stack.common_rows(maps[0], scales[0]) for stack in stacks]

        def of_groups() -> list[GroupRows]:
            return cached

        mean = fit_mean(of_groups, scores, groups_in_all)
        if wants_mean:
            models.append(mean)
        if Candidate.CLUSTER_MEAN in allowed:
            models += fit_clusters(of_groups, scores, groups_in_all, mean, seed=spec.seed)
    starts = _starts(scales, models, allowed)
    ridges: Sequence[float] = scores.ridges
    if not spec.try_ridges:
        # The client's ridge is for the inputs as they are.
        ridges = (max(spec.ridge / maps[-1].scale ** 2, 1e-9),)
    combinations = small.combinations_of(starts, maps, allowed, common_map=0, steps=scores.steps, ridges=ridges)
    candidates = Candidates(
        base=task.base, scores=scores, starts=starts, maps=maps, common_map=0 if models else None,
        combinations=list(combinations), max_rank=spec.rank,
    )  # fmt: skip
    return _Plan(candidates, moments, mean, scales[0])


def _feature_maps(task: FitTask, moments: Moments) -> list[FeatureMap]:
    """Return the features that are tried, those of the regressions over all groups first."""
    spec, is_regression = task.spec, task.scores.is_regression
    kinds: tuple[tuple[Kind, bool], ...] = (("base_metric", True), ("inputs", True))
    if is_regression:
        kinds = (*kinds, ("standardized", True))
    if spec.try_bias:
        kinds = (*kinds, ("base_metric", False))
    elif not spec.bias:
        kinds = tuple((kind, False) for kind, _ in kinds)
    return [feature_map(task.base, moments, kind=kind, bias=bias, free_intercept=is_regression) for kind, bias in kinds]


def _starts(
    scales: Sequence[float], models: Sequence[CommonModel | ClusterModel], allowed: frozenset[Candidate]
) -> list[Start]:
    starts = [Start(Candidate.BASE, Candidate.RIDGE, scale) for scale in scales]
    # From the outputs as they are, a row that the base layer gets right for sure changes nothing.
    starts += [Start(Candidate.BASE, Candidate.RIDGE, 1.0, scale) for scale in scales if scale < 1]
    if Candidate.OWN_HEAD in allowed:
        starts.append(Start(Candidate.OWN_HEAD, Candidate.OWN_HEAD, 0.0))
    for number, model in enumerate(models):
        candidate = Candidate.FLEET_MEAN if number == 0 else Candidate.CLUSTER_MEAN
        starts.append(Start(candidate, candidate, scales[0], model=model))
    return starts


def _choose(task: FitTask, candidates: Candidates, parts: Sequence[Sequence[_Group]], stacks: Sequence[Stack]) -> None:
    """Choose a combination for each group of few rows, by its losses of rows left out and the other groups' mean."""
    searches = [candidates.search(stack) for stack in stacks]
    if not searches:
        return
    has_others = sum(map(len, parts)) > 1
    first = candidates.combinations[0]
    can_keep_base = candidates.candidate(first) is Candidate.BASE
    totals_X = torch.stack([search.losses_GEX[:, -1].sum(0) for search in searches]).sum(0)
    gains = [small.gains(search, stack.weights_GN) for search, stack in zip(searches, stacks, strict=True)]
    gains_X = torch.stack([gains_GX.sum(0) for gains_GX in gains]).sum(0)
    weight = sum(float(search.weights_GE[:, -1].sum()) for search in searches)
    for part, stack, search, gains_GX in zip(parts, stacks, searches, gains, strict=True):
        others = None
        if has_others:
            rest_G1 = (weight - search.weights_GE[:, -1:]).clamp_min(1e-300)
            own_GX = search.losses_GEX[:, -1]
            others = small.Others((totals_X - own_GX) / rest_G1, (gains_X - gains_GX) / rest_G1)
        chosen_GE = small.choose(search, others, can_keep_base=can_keep_base, is_regression=task.scores.is_regression)
        errors_GN = small.chosen_errors(search, chosen_GE, stack.folds_GN)
        for index, group in enumerate(part):
            chosen = int(chosen_GE[index, -1])
            combination, pick = candidates.combinations[chosen], int(search.picks_GEX[index, -1, chosen])
            group.composed = candidates.compose(stack, index, combination, pick)
            group.tried = _tried(candidates, search, index, chosen, has_others=has_others)
            if candidates.is_bounded(stack):
                errors_GN[index] = _bounded_errors(candidates, stack, search, index, chosen_GE[index])
                base_N, weights_N = search.errors_GXN[index, 0].double(), stack.weights_GN[index]
                if can_keep_base and float((errors_GN[index] - base_N) @ weights_N) > 0:
                    # The largest rank cannot hold what was chosen.
                    errors_GN[index], group.composed = base_N, candidates.compose(stack, index, first, 0)
                    group.tried = _tried(candidates, search, index, 0, has_others=has_others)
            group.fold_errors_K = errors_GN[index, : len(group.sides.training_K)]
            if len(parts) == len(part) == 1:
                everything = stack
                if len(group.sides.training_K) < len(group.rows_K):
                    everything = task.stack([group.position], [group.rows_K])
                group.left_out_NC = candidates.left_out_outputs(everything, combination)


def _bounded_errors(candidates: Candidates, stack: Stack, search: Search, index: int, chosen_E: Tensor) -> Tensor:
    """Return the errors of a group's rows in outer folds, (N,), with every fit bounded to the largest rank."""
    one = stack.one(index)
    errors_N = torch.zeros(one.weights_GN.shape[1], dtype=torch.float64)
    for fold, chosen in enumerate(chosen_E[:-1].tolist()):
        held_N = one.folds_GN[0] == fold
        if not bool(held_N.any()):
            continue
        rest = replace(one, weights_GN=one.weights_GN * ~held_N)
        combination, pick = candidates.combinations[chosen], int(search.picks_GEX[index, fold, chosen])
        composed = candidates.compose(rest, 0, combination, pick)
        bounded, _ = composed.reduced(torch.eye(one.x_GNI.shape[-1], dtype=torch.float64), candidates.max_rank)
        y_NC = one.outputs_GNC[0] + bounded.outputs(one.x_GNI[0])
        errors_N = torch.where(held_N, candidates.scores.errors(y_NC, one.y_GNC[0]), errors_N)
    return errors_N


def _tried(candidates: Candidates, search: Search, index: int, taken: int, *, has_others: bool) -> Tried:
    """Return the best setting of each candidate by its own losses of rows left out."""
    means_X = search.losses_GEX[index, -1] / search.weights_GE[index, -1].clamp_min(1e-300)
    best: dict[Candidate, tuple[float, Combination]] = {}
    for combination, mean in zip(candidates.combinations, means_X.tolist(), strict=True):
        name = candidates.candidate(combination)
        if name not in best or mean < best[name][0]:
            best[name] = mean, combination
    combination = candidates.combinations[taken]
    name = candidates.candidate(combination)
    best[name] = float(means_X[taken]), combination
    reason = "its rows have the least loss when they are left out"
    if has_others:
        reason += f", beside {small.PSEUDO_ROWS} rows of the other groups' mean loss"
    figures = {candidate: (figure, candidates.settings(own)) for candidate, (figure, own) in best.items()}
    return Tried(candidates.scores, "leave_one_out", name, reason, figures)


def _try_descent(task: FitTask, group: _Group) -> None:
    """Compare AdamW with what was chosen, if there are enough rows."""
    training_K, tried = group.sides.training_K, group.tried
    if Candidate.ADAMW not in task.spec.candidates or len(group.rows_K) < FEW_ROWS or tried is None:
        return
    parts = split_in_parts(task.keys(training_K), training_K, _INNER_PARTS)
    _compare_descent(task, group, parts, tried.figures[tried.taken][0])


def _compare_descent(task: FitTask, group: _Group, parts: Sequence[tuple[Tensor, Tensor]], best: float) -> None:
    tried = group.tried
    assert tried is not None
    bias = task.spec.bias or task.spec.try_bias
    descent = choose_descent(task.base, task.data, task.spec, parts, bias=bias)
    settings = {"learning_rate": descent.spec.learning_rate, "steps": descent.spec.max_steps, "bias": bias}
    figures = {**tried.figures, Candidate.ADAMW: (descent.loss, settings)}
    group.tried = tried._replace(figures=figures)
    if descent.loss < best * (1 - _MIN_IMPROVEMENT):
        group.descent = descent
        reason = "its loss is the least on training rows that it was not trained on"
        group.tried = group.tried._replace(taken=Candidate.ADAMW, reason=reason)


def _fit_many(task: FitTask, plan: _Plan, group: _Group) -> None:
    """Choose for an adapter with many rows by a fifth of its training rows, and fit the choice to all of them."""
    candidates, training_K = plan.candidates, group.sides.training_K
    parts = split_in_parts(task.keys(training_K), training_K, 1)
    ((chosen_K, testing_K),) = parts
    plain = [index for index, start in enumerate(candidates.starts) if start.model is None]
    starts = [candidates.starts[index] for index in plain]
    combinations = [
        replace_start(combination, plain) for combination in candidates.combinations if combination.starts[0] in plain
    ]

    def chunks(rows_K: Tensor) -> Callable[[], Iterator[large.Chunk]]:
        def read() -> Iterator[large.Chunk]:
            for x_NI, z_NC, y_NC, weights_N in task.chunks(rows_K):
                yield large.Chunk(x_NI, [start.scale * z_NC for start in starts], y_NC, weights_N)

        return read

    scored = large.search(
        large.Reader(chunks(chosen_K), chunks(testing_K)),
        candidates.maps,
        combinations,
        [start.loss_scale for start in starts],
        task.scores,
        max_rank=candidates.max_rank,
    )
    best = min(scored, key=lambda one: one.loss)
    named = replace(candidates, starts=starts)
    figures: dict[Candidate, tuple[float, dict[str, Any]]] = {}
    for one in scored:
        name = named.candidate(one.combination)
        if name not in figures or one.loss < figures[name][0]:
            figures[name] = one.loss, named.settings(one.combination)
    taken = named.candidate(best.combination)
    group.tried = Tried(
        task.scores, "held_out", taken, "its loss on a fifth of the training rows is the least", figures
    )
    _compare_descent(task, group, parts, best.loss) if Candidate.ADAMW in task.spec.candidates else None
    if task.spec.loss is Loss.CROSS_ENTROPY and len(group.rows_K) * task.outputs <= _MAX_SUSPECT_NUMBERS:
        plain_best = min((one for one in scored if one.combination.step < large.CONVERGED), key=lambda one: one.loss)
        group.left_out_NC = large.left_out(chunks(group.rows_K), candidates.maps, plain_best, starts, task.scores)
    if group.descent is None:
        group.composed = large.compose(chunks(training_K), candidates.maps, best, starts, task)


def replace_start(combination: Combination, plain: Sequence[int]) -> Combination:
    """Return a combination with the number of its start among these."""
    return combination._replace(starts=(plain.index(combination.starts[0]),))


def _make_adapter(task: FitTask, plan: _Plan, group: _Group, watcher: Watcher) -> None:
    """Make the adapter of what was chosen, and the errors by which it is judged."""
    try:
        if group.descent is not None:
            factors, _ = train_descent(
                task.base, task.data, group.descent.spec, group.sides.training_K, watcher.checkpoint
            )
            group.adapter = Adapter(*factors, group.descent.spec.alpha, group.descent.spec.rslora, **task.names)
        else:
            assert group.composed is not None
            reduced, basis_CR = group.composed.reduced(plan.moments.covariance_II, plan.candidates.max_rank)
            group.adapter = reduced.adapter(basis_CR, task.base.out_features, **task.names)
        _measure(task, group)
    except LoraplexError as error:
        group.error = error


def _measure(task: FitTask, group: _Group) -> None:
    sides = group.sides
    assert group.adapter is not None
    if sides.held is None and not sides.is_cross_validated:
        return
    table = task.data.take(sides.training_K) if sides.held is None else sides.held
    weights_K = torch.ones(table.rows) if table.weights_N is None else table.weights_N
    group.errors = {"weights": weights_K.double(), "base": task.base_errors(table)}
    if sides.held is None:
        assert group.fold_errors_K is not None
        group.errors["adapter"] = group.fold_errors_K
        y_KC = task.scores.wide(table.targets, task.outputs)
        classes_K = table.targets if table.targets.dtype == torch.int64 else None
        folds_K = small.outer_folds(task.keys(sides.training_K), classes_K, task.spec.seed)
        guesses = [task.scores.guess(y_KC, weights_K.double() * (folds_K != fold)) for fold in range(small.FOLDS)]
        guess_KC = torch.stack([guesses[fold][0] for fold in folds_K.tolist()])
        group.errors["guess"] = task.scores.errors(guess_KC, y_KC)
    else:
        group.errors["adapter"] = task.live_errors(group.adapter, table)
        group.errors["guess"] = task.guess_errors(task.data, sides.training_K, table)
    live = task.live.get(group.position)
    if live is not None and live.adapter is not None:
        group.errors["live"] = task.live_errors(live.adapter, table)
        group.errors = fair_errors(group.errors, live, table, None, task.labels)


def _result(task: FitTask, group: _Group, others_gain: float | None, *, is_fleet: bool) -> AutoFit:
    if group.error is not None:
        return AutoFit(position=group.position, spec=task.spec, error=group.error)
    assert group.adapter is not None
    assert group.tried is not None
    return finish(
        task,
        group.position,
        group.adapter,
        group.sides,
        group.tried,
        group.errors,
        others_gain=others_gain,
        descent=group.descent,
        suspects=None if is_fleet else _suspects(task, group),
    )


def _suspects(task: FitTask, group: _Group) -> list[dict[str, Any]] | None:
    """Return the rows of an adapter whose label the other rows contradict; None without classes."""
    if group.left_out_NC is None or task.spec.loss is not Loss.CROSS_ENTROPY:
        return None
    rows_K = group.sides.training_K if task.data.held_out is not None else group.rows_K
    return suspects_of(task, rows_K, group.left_out_NC)
