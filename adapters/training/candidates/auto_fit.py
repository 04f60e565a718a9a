"""Training with `method: auto`: compare candidates and fit the best one, for one adapter or each adapter of a fleet.

`_fit_groups` has the steps. A group with few training rows chooses by leave-one-out (`small`), one with many by a fifth
of its training rows (`large`).
"""

# G groups of a stack · N rows of a group, padded · K rows of one group · C outputs of the task · X combinations
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adapters.errors import Diverged, LoraplexError
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.candidates import large, small
from adapters.training.candidates.choice import PSEUDO_ROWS, choose_all, chosen_errors, search_all, worth_their_risk
from adapters.training.candidates.descent import choose_descent, split_in_parts, train_descent
from adapters.training.candidates.descent_only import fit_descent_only
from adapters.training.candidates.features import FeatureMap, Kind, Moments, feature_map
from adapters.training.candidates.fit_result import AutoFit, Tried, finish, gain_of, prior_fit
from adapters.training.candidates.fleet_mean import ClusterModel, CommonModel, GroupRows, fit_clusters, fit_mean
from adapters.training.candidates.group_fit import Group, compare_with_base, measure_errors, metrics_of_stack
from adapters.training.candidates.outliers import outlying_groups
from adapters.training.candidates.scores import LINEAR_LOSSES, Scores
from adapters.training.candidates.small import Candidates, Combination, Search, Stack, Start
from adapters.training.candidates.suspects import find_suspects, rank_suspects
from adapters.training.candidates.task import MAX_LEFT_OUT_ROWS, FitTask, Labels, sample, shared_rows
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.judgement import LiveVersion
from adapters.training.fit import Watcher
from adapters.training.planning.split import FEW_ROWS
from adapters.training.scratch import Scratch
from adapters.training.settings import Candidate, Loss, TrainingSpec

_STACK_GROUPS = 64
_INNER_PARTS = 5
# Numbers of the updates that are composed at once.
_COMPOSED_NUMBERS = 2**20
# Rows up to which suspects have a fit of their own, and rows times classes up to which they are found at all.
_MAX_KERNEL_ROWS = 1_000
_MAX_SUSPECT_NUMBERS = 2**25
# AdamW is taken only if its loss is lower by this share: its steps were chosen by the rows that measure the loss.
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

    live: the live version of the name. Raises `Diverged`, and `OutOfRange` if a split leaves a side empty.
    """
    task = FitTask(base, data, spec, Scores(spec.loss), labels, feature_space, {} if live is None else {0: live})
    if spec.loss not in LINEAR_LOSSES or _DESCENT_ONLY.issuperset(spec.candidates):
        return fit_descent_only(task, torch.arange(data.rows), 0, watcher)
    (result,) = _fit_alone(task, 0, torch.arange(data.rows), watcher)
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
    scratch: Scratch | None = None,
) -> Iterator[list[AutoFit]]:
    """Fit an adapter for each code of `data.groups_N`; yield them stack by stack, without those that are `done`.

    With `wants_prior`, the last one is the prior of the fleet, at the position after the groups. scratch: disk space
    for a fleet that does not fit in memory.
    """
    assert data.groups_N is not None
    order_N = torch.argsort(data.groups_N, stable=True)
    rows = dict(enumerate(order_N.split(torch.bincount(data.groups_N).tolist())))
    task = FitTask(base, data, spec, Scores(spec.loss), labels, feature_space, live or {}, shared_rows(data), scratch)
    if spec.loss not in LINEAR_LOSSES or _DESCENT_ONLY.issuperset(spec.candidates):
        for position, rows_K in rows.items():
            if position not in done:
                yield [_or_error(position, spec, partial(fit_descent_only, task, rows_K, position, Watcher()))]
                progress(1, 0.0)
        return
    watcher = Watcher(report=lambda step, loss, _history: progress(step, loss))
    outlying = outlying_groups(task, rows)
    for position in sorted(outlying.difference(done)):
        yield _fit_alone(task, position, rows[position], watcher)
    others = {position: rows_K for position, rows_K in rows.items() if position not in outlying}
    for part in _fit_groups(task, others, groups_in_all=len(rows), wants_prior=wants_prior, watcher=watcher):
        yield [result for result in part if result.position not in done]


def _fit_alone(task: FitTask, position: int, rows_K: Tensor, watcher: Watcher) -> list[AutoFit]:
    """Fit one adapter as if there were no others; numbers that no decomposition can bear are its error."""
    try:
        parts = _fit_groups(task, {position: rows_K}, groups_in_all=None, wants_prior=False, watcher=watcher)
        return [result for part in parts for result in part]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but not in __all__
        detail, expected = "float64 cannot bear the rows", "inputs, targets and weights of more similar magnitude"
        return [AutoFit(position=position, spec=task.spec, error=Diverged(detail, step=1, expected=expected))]


def _or_error(position: int, spec: TrainingSpec, fit: Callable[[], AutoFit]) -> AutoFit:
    """Return the result of a fit; if it raises, a result with the error."""
    try:
        return fit()
    except LoraplexError as error:
        return AutoFit(position=position, spec=spec, error=error)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """Candidates to compare, and what the groups have in common."""

    candidates: Candidates
    moments: Moments
    mean: CommonModel | None
    scale: float


def _fit_groups(
    task: FitTask, rows: Mapping[int, Tensor], *, groups_in_all: int | None, wants_prior: bool, watcher: Watcher
) -> Iterator[list[AutoFit]]:
    """Choose, fit and judge an adapter for each group of rows; yield the results stack by stack.

    rows: the rows of each group, by its position among the adapters of the job. groups_in_all: groups of the fleet,
    with those that are fitted by themselves; None for one adapter alone.
    """
    is_fleet, groups, failed = groups_in_all is not None, list[Group](), list[AutoFit]()
    for position, rows_K in rows.items():
        try:
            groups.append(Group(position, rows_K, task.sides(rows_K)))
        except LoraplexError as error:
            failed.append(AutoFit(position=position, spec=task.spec, error=error))
    if failed:
        yield failed
    if not groups:
        return
    few = [group for group in groups if len(group.sides.training_K) <= MAX_LEFT_OUT_ROWS]
    many = [group for group in groups if len(group.sides.training_K) > MAX_LEFT_OUT_ROWS]
    few.sort(key=lambda group: (len(group.sides.training_K), group.position))
    parts = [few[begin : begin + _STACK_GROUPS] for begin in range(0, len(few), _STACK_GROUPS)]
    stacks = task.list_of(task.stack([g.position for g in part], [g.sides.training_K for g in part]) for part in parts)
    plan = _plan(task, groups, stacks, groups_in_all=groups_in_all, wants_prior=wants_prior)
    _choose(task, plan, parts, stacks)
    for part, stack in zip(parts, stacks, strict=True):
        compare_with_base(task, part, stack)
    for group in few:
        _try_descent(task, group)
        _make_adapter(task, plan, group, watcher)
    for group in many:
        _fit_many(task, plan, group)
        _make_adapter(task, plan, group, watcher)
    gains = {group.position: gain_of(group.errors, task.scores) for group in groups if group.errors}
    total, count = sum(gain.total for gain in gains.values()), sum(gain.weight for gain in gains.values())
    for part in [*parts, *([group] for group in many)]:
        results, metrics = [], metrics_of_stack(task, part) if is_fleet else {}
        for group in part:
            others, gain = None, gains.get(group.position)
            if is_fleet and gain is not None and count > gain.weight:
                others = gain.unit * (total - gain.total) / (count - gain.weight)
            results.append(_result(task, group, others, metrics.get(group.position), is_fleet=is_fleet))
        watcher.report(1, 0.0, [])
        task.data.release()
        yield results
    if wants_prior and plan.mean is not None and groups_in_all is not None:
        features = plan.candidates.maps[plan.candidates.common_map or 0]
        yield [prior_fit(task, features, plan.mean, plan.scale, plan.moments, groups_in_all)]


def _plan(
    task: FitTask, groups: Sequence[Group], stacks: Sequence[Stack], *, groups_in_all: int | None, wants_prior: bool
) -> _Plan:  # fmt: skip
    """Return the candidates for these groups, after the regressions over all groups that some of them start from.

    groups_in_all: groups of the fleet, with those that failed.
    """
    spec, scores, allowed = task.spec, task.scores, frozenset(task.spec.candidates)
    training_N = torch.cat([group.sides.training_K for group in groups])
    if is_fleet := groups_in_all is not None:
        training_N = torch.cat([sample(group.sides.training_K) for group in groups])
    moments = task.moments(training_N)
    maps = _feature_maps(task, moments)
    # One adapter with few rows tries all scales of the outputs; otherwise the rows decide one.
    has_one_scale = is_fleet or len(training_N) >= FEW_ROWS // 2
    scales = (task.scale(training_N),) if has_one_scale else scores.scales
    mean, models = None, list[CommonModel | ClusterModel]()
    wants_mean = bool(allowed & {Candidate.FLEET_MEAN, Candidate.CLUSTER_MEAN}) and len(groups) > 1
    if groups_in_all is not None and (wants_prior or wants_mean):
        with_many = [group for group in groups if len(group.sides.training_K) > MAX_LEFT_OUT_ROWS]
        sampled = (task.stack([group.position], [sample(group.sides.training_K)]) for group in with_many)
        cached = task.list_of(stack.common_rows(maps[0], scales[0]) for stack in chain(stacks, sampled))

        def of_groups() -> Sequence[GroupRows]:
            return cached

        mean = fit_mean(of_groups, scores, groups_in_all)
        if wants_mean:
            models.append(mean)
        if models and Candidate.CLUSTER_MEAN in allowed:
            models += fit_clusters(of_groups, scores, groups_in_all, mean, seed=spec.seed)
    starts = _starts(scales, models, allowed)
    ridges: Sequence[float] = scores.ridges
    if not spec.try_ridges:
        # The client's ridge is for the inputs as they are, the second kind of features.
        ridges = (max(spec.ridge / maps[1].scale ** 2, 1e-9),)
    combinations = small.combinations_of(starts, maps, allowed, common_map=0, steps=scores.steps, ridges=ridges)
    candidates = Candidates(
        base=task.base, scores=scores, starts=starts, maps=maps, common_map=0 if models else None,
        combinations=list(combinations), max_rank=spec.rank,
    )  # fmt: skip
    return _Plan(candidates, moments, mean, scales[0])


def _feature_maps(task: FitTask, moments: Moments) -> list[FeatureMap]:
    """Return the features to compare; the first are also those of the regressions over all groups."""
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
    # Unscaled outputs have a residual of 0 for rows of which the base layer is right and sure: they ask for no change.
    starts += [Start(Candidate.BASE, Candidate.RIDGE, 1.0, scale) for scale in scales if scale < 1]
    if Candidate.OWN_HEAD in allowed:
        starts.append(Start(Candidate.OWN_HEAD, Candidate.OWN_HEAD, 0.0))
    for number, model in enumerate(models):
        candidate = Candidate.FLEET_MEAN if number == 0 else Candidate.CLUSTER_MEAN
        starts.append(Start(candidate, candidate, scales[0], model=model))
    return starts


def _choose(task: FitTask, plan: _Plan, parts: Sequence[Sequence[Group]], stacks: Sequence[Stack]) -> None:
    """Choose a combination for each group with few rows, by its left-out rows and those of the other groups."""
    if not stacks:
        return
    candidates, searches = search_all(plan.candidates, stacks, task.list_of)
    has_others = sum(map(len, parts)) > 1
    can_keep_base = candidates.candidate(candidates.combinations[0]) is Candidate.BASE
    choices = list(choose_all(candidates, stacks, searches))
    errors = [
        _fold_errors(candidates, plan.moments, stack, search, chosen_GE)
        for stack, search, chosen_GE in zip(stacks, searches, choices, strict=True)
    ]
    if can_keep_base and any(map(candidates.is_bounded, stacks)):
        _keep_base(candidates, stacks, searches, choices, errors)
    for part, stack, search, chosen_GE, errors_GN in zip(parts, stacks, searches, choices, errors, strict=True):
        for index, group in enumerate(part):
            group.tried = _tried(candidates, search, index, int(chosen_GE[index, -1]), has_others=has_others)
            group.fold_errors_K = errors_GN[index, : len(group.sides.training_K)]
        _compose(task, candidates, plan.moments, part, stack, search, chosen_GE[:, -1])


def _keep_base(
    candidates: Candidates, stacks: Sequence[Stack], searches: Sequence[Search], choices: Sequence[Tensor],
    errors: Sequence[Tensor],
) -> None:  # fmt: skip
    """Take the base layer for groups whose choice, bounded to the allowed rank, is not worth its risk."""
    worth = worth_their_risk(errors, stacks, searches, is_regression=candidates.scores.is_regression)
    for is_worth_G, search, chosen_GE, errors_GN in zip(worth, searches, choices, errors, strict=True):
        chosen_GE[~is_worth_G, -1] = 0
        errors_GN[~is_worth_G] = search.errors_GXN[~is_worth_G, 0].double()


def _compose(
    task: FitTask, candidates: Candidates, moments: Moments, part: Sequence[Group], stack: Stack, search: Search,
    chosen_G: Tensor,
) -> None:  # fmt: skip
    """Make the adapters of the groups of a stack, those of one combination together."""
    picks_G = search.picks_GEX[:, -1].gather(1, chosen_G[:, None])[:, 0]
    at_once = max(1, _COMPOSED_NUMBERS // (stack.y_GNC.shape[-1] * task.base.in_features))
    for chosen, pick in torch.stack([chosen_G, picks_G]).unique(dim=1).T.tolist():
        for positions in ((chosen_G == chosen) & (picks_G == pick)).nonzero()[:, 0].split(at_once):
            composed = candidates.compose(stack.at(positions), candidates.combinations[chosen], pick)
            made = composed.adapters(moments.covariance_II, candidates.max_rank, task.base.out_features, **task.names)
            for index, adapter in zip(positions.tolist(), made, strict=True):
                if isinstance(adapter, LoraplexError):
                    part[index].error = adapter
                else:
                    part[index].read_adapter = task.keep(adapter)


def _fold_errors(candidates: Candidates, moments: Moments, stack: Stack, search: Search, chosen_GE: Tensor) -> Tensor:
    """Return the errors of the rows of each group in outer folds, (G, N) float64."""
    if not candidates.is_bounded(stack):
        return chosen_errors(search, chosen_GE, stack.folds_GN)
    return torch.stack([
        _bounded_errors(candidates, moments, stack, search, index, chosen_E)
        for index, chosen_E in enumerate(chosen_GE)
    ])  # fmt: skip


def _bounded_errors(
    candidates: Candidates, moments: Moments, stack: Stack, search: Search, index: int, chosen_E: Tensor
) -> Tensor:
    """Return the errors of a group's rows in outer folds, (N,), with every fit bounded to the allowed rank."""
    one = stack.at(torch.tensor([index]))
    errors_N = torch.zeros(one.weights_GN.shape[1], dtype=torch.float64)
    for fold, chosen in enumerate(chosen_E[:-1].tolist()):
        held_N = one.folds_GN[0] == fold
        if not bool(held_N.any()):
            continue
        rest = replace(one, weights_GN=one.weights_GN * ~held_N)
        combination, pick = candidates.combinations[chosen], int(search.picks_GEX[index, fold, chosen])
        composed = candidates.compose(rest, combination, pick)
        bounded = composed.bounded(moments.covariance_II, candidates.max_rank)
        y_GNC = one.outputs_GNC + bounded.outputs(one.x_GNI)
        errors_N = torch.where(held_N, candidates.scores.errors(y_GNC, one.y_GNC)[0], errors_N)
    return errors_N


def _tried(candidates: Candidates, search: Search, index: int, taken: int, *, has_others: bool) -> Tried:
    """Return the comparison: the best setting of each candidate by the losses of the group's left-out rows."""
    means_X = search.losses_GEX[index, -1] / search.weights_GE[index, -1].clamp_min(1e-300)
    best: dict[Candidate, tuple[float, Combination]] = {}
    for combination, mean in zip(candidates.combinations, means_X.tolist(), strict=True):
        name = candidates.candidate(combination)
        if name not in best or mean < best[name][0]:
            best[name] = mean, combination
    combination = candidates.combinations[taken]
    name = candidates.candidate(combination)
    best[name] = float(means_X[taken]), combination
    reason = "it has the lowest loss on training rows that were left out"
    if has_others:
        reason += f", counted with {PSEUDO_ROWS} rows of the other groups' mean loss"
    figures = {candidate: (figure, candidates.settings(own)) for candidate, (figure, own) in best.items()}
    return Tried(candidates.scores, "leave_one_out", name, reason, figures)


def _try_descent(task: FitTask, group: Group) -> None:
    """Compare AdamW with the choice, if there are enough rows."""
    training_K, tried = group.sides.training_K, group.tried
    if Candidate.ADAMW not in task.spec.candidates or len(group.rows_K) < FEW_ROWS or tried is None:
        return
    if group.sides.is_cross_validated:
        # Its errors in outer folds are those of the other candidates.
        return
    parts = split_in_parts(task.keys(training_K), training_K, _INNER_PARTS)
    _compare_descent(task, group, parts, tried.figures[tried.taken][0])


def _compare_descent(task: FitTask, group: Group, parts: Sequence[tuple[Tensor, Tensor]], best: float) -> None:
    """Choose the settings of AdamW on pairs of rows to train and to test on, and take it if it is clearly better.

    best: the loss of the choice so far.
    """
    tried = group.tried
    assert tried is not None
    bias = task.spec.bias or task.spec.try_bias
    descent = choose_descent(task.base, task.data, task.spec, parts, bias=bias)
    settings = {"learning_rate": descent.spec.learning_rate, "steps": descent.spec.max_steps, "bias": bias}
    figures = {**tried.figures, Candidate.ADAMW: (descent.loss, settings)}
    group.tried = tried._replace(figures=figures)
    if descent.loss < best * (1 - _MIN_IMPROVEMENT):
        group.descent = descent
        reason = "it has the lowest loss on training rows that were left out"
        group.tried = group.tried._replace(taken=Candidate.ADAMW, reason=reason)


def _fit_many(task: FitTask, plan: _Plan, group: Group) -> None:
    """Choose for an adapter with many rows by a fifth of its training rows, and fit the choice to all of them."""
    candidates, training_K = plan.candidates, group.sides.training_K
    parts = split_in_parts(task.keys(training_K), training_K, 1)
    ((chosen_K, testing_K),) = parts
    plain = [index for index, start in enumerate(candidates.starts) if start.model is None]
    starts = [candidates.starts[index] for index in plain]
    combinations = [
        _renumber_start(combination, plain) for combination in candidates.combinations if combination.starts[0] in plain
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
    reason = "it has the lowest loss on the fifth of the training rows that was left out"
    group.tried = Tried(task.scores, "held_out", taken, reason, figures)
    if Candidate.ADAMW in task.spec.candidates:
        _compare_descent(task, group, parts, best.loss)
    is_fleet = task.data.groups_N is not None
    has_suspects = not is_fleet and task.spec.loss is Loss.CROSS_ENTROPY and len(group.rows_K) > _MAX_KERNEL_ROWS
    if has_suspects and len(group.rows_K) * task.outputs <= _MAX_SUSPECT_NUMBERS:
        plain_best = min((one for one in scored if one.combination.step < large.CONVERGED), key=lambda one: one.loss)
        group.left_out_NC = large.left_out(chunks(group.rows_K), candidates.maps, plain_best, starts, task.scores)
    if group.descent is None:
        group.composed = large.compose(chunks(training_K), candidates.maps, best, starts, task)


def _renumber_start(combination: Combination, plain: Sequence[int]) -> Combination:
    """Return a combination with its start numbered among `plain`, the numbers of the starts without a regression."""
    return combination._replace(starts=(plain.index(combination.starts[0]),))


def _make_adapter(task: FitTask, plan: _Plan, group: Group, watcher: Watcher) -> None:
    """Make the adapter of the choice if there is none yet, and compute the errors by which it is judged."""
    try:
        if group.descent is not None:
            factors, _ = train_descent(
                task.base, task.data, group.descent.spec, group.sides.training_K, watcher.checkpoint
            )
            adapter = Adapter(*factors, group.descent.spec.alpha, group.descent.spec.rslora, **task.names)
            group.read_adapter = task.keep(adapter)
        elif group.composed is not None:
            adapter = group.composed.adapter(
                plan.moments.covariance_II, plan.candidates.max_rank, task.base.out_features, **task.names
            )
            group.read_adapter, group.composed = task.keep(adapter), None
        if group.read_adapter is not None:
            measure_errors(task, group)
    except LoraplexError as error:
        group.error = error


def _result(
    task: FitTask, group: Group, others_gain: float | None, metrics: Mapping[str, Any] | None, *, is_fleet: bool
) -> AutoFit:
    if group.error is not None:
        return AutoFit(position=group.position, spec=task.spec, error=group.error)
    adapter = group.adapter
    assert adapter is not None
    assert group.tried is not None
    return finish(
        task,
        group.position,
        adapter,
        group.sides,
        group.tried,
        group.errors,
        others_gain=others_gain,
        descent=group.descent,
        metrics=metrics,
        suspects=None if is_fleet else _suspects(task, group),
    )


def _suspects(task: FitTask, group: Group) -> list[dict[str, Any]] | None:
    """Return the rows of an adapter whose label the other rows contradict; None without classes."""
    if task.spec.loss is not Loss.CROSS_ENTROPY:
        return None
    if len(group.rows_K) <= _MAX_KERNEL_ROWS:
        return find_suspects(task, group.rows_K)
    if len(group.sides.training_K) <= MAX_LEFT_OUT_ROWS:
        return find_suspects(task, group.sides.training_K)
    return None if group.left_out_NC is None else rank_suspects(task, group.rows_K, group.left_out_NC)
