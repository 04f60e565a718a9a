"""Fit of what `method: auto` takes: for one adapter, and for each adapter of a fleet."""

# G groups of a stack · N rows of a group, padded · K rows of one group · C outputs of the task · X combinations
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.errors import LoraplexError
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.candidates import small
from adapters.training.candidates.features import FeatureMap, Moments, feature_map
from adapters.training.candidates.fleet_mean import ClusterModel, CommonModel, GroupRows, fit_clusters, fit_mean
from adapters.training.candidates.scores import Scores
from adapters.training.candidates.small import Candidates, Combination, Composed, Search, Stack, Start
from adapters.training.closed_form.solver import Factors
from adapters.training.closed_form.statistics import base_outputs
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import base_matching, evaluate_factors, match_labels
from adapters.training.evaluation.judgement import AdapterReport, LiveVersion, RowEvidence, judge
from adapters.training.fit import Watcher
from adapters.training.settings import Candidate, Loss, TrainingSpec

Labels = Sequence[str | int] | None
# Fewest rows of an adapter of which a fifth is held out; fewer are evaluated by cross-validation.
MIN_HELD_OUT_ROWS = 100
_STACK_GROUPS = 64
_MAX_SUSPECTS = 200


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AutoFit:
    """How the fit of one adapter ended."""

    position: int
    adapter: Adapter | None
    metrics: dict[str, Any]
    report: AdapterReport | None
    """None if the fit failed."""
    evidence: RowEvidence | None
    """Rows that it was trained on, if they are so few that all of them were."""
    spec: TrainingSpec
    """The specification with everything that was chosen."""
    error: LoraplexError | None = None
    suspects: Sequence[Mapping[str, Any]] | None = None
    """Rows whose label the other rows contradict, worst first; only of one adapter, with classes."""


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What all groups of a fit share."""

    base: BaseLayer
    data: TrainingData
    spec: TrainingSpec
    scores: Scores
    labels: Labels
    feature_space: str | None
    live: Mapping[int, LiveVersion]

    @property
    def names(self) -> dict[str, Any]:
        """Return the feature space and the labels of the adapters."""
        labels = None if self.labels is None else tuple(self.labels)
        return {"feature_space": self.feature_space, "labels": labels}

    @property
    def outputs(self) -> int:
        """Return C, the outputs that the task uses."""
        return self.spec.classes or self.base.out_features


def row_keys(data: TrainingData, rows_K: Tensor, labels: Labels) -> NDArray[np.int64]:
    """Return a hash of each row with its target, (K,) int64: the same for the same row in every training."""
    inputs_KI = np.ascontiguousarray(data.inputs_NI[rows_K].numpy() + np.float32(0))
    targets = data.targets[rows_K].numpy()
    contents = []
    for x_I, target in zip(inputs_KI, targets, strict=True):
        name = repr(labels[int(target)]).encode() if target.ndim == 0 and labels is not None else target.tobytes()
        contents.append(hashlib.blake2b(x_I.tobytes() + name, digest_size=8).digest())
    return np.frombuffer(b"".join(contents), "<i8").astype(np.int64)


def _stacks_of(rows: Mapping[int, Tensor]) -> Iterator[list[int]]:
    """Yield the numbers of groups in stacks of about one size, the smallest groups first."""
    order = sorted(rows, key=lambda group: (len(rows[group]), group))
    for begin in range(0, len(order), _STACK_GROUPS):
        yield order[begin : begin + _STACK_GROUPS]


def _read_stack(context: Context, rows: Mapping[int, Tensor], positions: Sequence[int]) -> Stack:
    """Read the rows of groups, padded to the largest."""
    data, base, scores, C = context.data, context.base, context.scores, context.outputs
    N = max(len(rows[position]) for position in positions)
    index_GN = torch.zeros(len(positions), N, dtype=torch.int64)
    weights_GN = torch.zeros(len(positions), N, dtype=torch.float64)
    folds_GN, units_GN = torch.full_like(index_GN, -1), torch.full_like(index_GN, -1)
    has_units = False
    for group, position in enumerate(positions):
        rows_K = rows[position]
        K = len(rows_K)
        index_GN[group, :K] = rows_K
        weights_GN[group, :K] = 1.0 if data.weights_N is None else data.weights_N[rows_K].double()
        keys_K = rows_K if data.key_N is None else data.key_N[rows_K]
        classes_K = data.targets[rows_K] if data.targets.dtype == torch.int64 else None
        folds_GN[group, :K] = small.outer_folds(keys_K, classes_K, context.spec.seed)
        units_K = small.units_of(keys_K)
        has_units |= units_K is not None
        units_GN[group, :K] = torch.arange(K) if units_K is None else units_K
    x_GNI = data.inputs_NI[index_GN].double()
    outputs_GNO = base_outputs(base, x_GNI)
    y_GNC = scores.wide(data.targets[index_GN], C)
    return Stack(
        groups=torch.tensor(positions),
        x_GNI=x_GNI,
        outputs_GNC=outputs_GNO[..., :C],
        y_GNC=y_GNC,
        weights_GN=weights_GN,
        folds_GN=folds_GN,
        units_GN=units_GN if has_units else None,
    )


def _moments(context: Context, rows_N: Tensor) -> Moments:
    """Return mean and covariance of the inputs of these rows."""
    I = context.base.in_features
    total, mean_I, square_II = 0, torch.zeros(I, dtype=torch.float64), torch.zeros(I, I, dtype=torch.float64)
    for begin in range(0, len(rows_N), 8192):
        x_NI = context.data.inputs_NI[rows_N[begin : begin + 8192]].double()
        if total == 0:
            shift_I = x_NI.mean(0)
        x_NI = x_NI - shift_I
        mean_I += x_NI.sum(0)
        square_II += x_NI.T @ x_NI
        total += len(x_NI)
    mean_I /= total
    return Moments(mean_I + shift_I, square_II / total - mean_I[:, None] * mean_I)


def _feature_maps(context: Context, moments: Moments, allowed: frozenset[Candidate]) -> tuple[list[FeatureMap], int]:
    """Return the features that are tried, and the position of those of the regressions over all groups."""
    spec = context.spec
    biases = (True, False) if spec.try_bias else (spec.bias,)
    in_metric = (True,) if Candidate.RIDGE not in allowed and Candidate.OWN_HEAD not in allowed else (True, False)
    maps = [
        feature_map(
            context.base, moments, in_base_metric=is_metric, bias=bias, free_intercept=context.scores.is_regression
        )
        for bias in biases
        for is_metric in in_metric
    ]
    return maps, 0


def _scale_of(context: Context, rows_N: Tensor) -> float:
    """Return the scale of the base layer's outputs with the least loss on these rows."""
    scores = context.scores
    totals = dict.fromkeys(scores.scales, 0.0)
    for begin in range(0, len(rows_N), 8192):
        part_N = rows_N[begin : begin + 8192]
        z_NC = base_outputs(context.base, context.data.inputs_NI[part_N].double())[:, : context.outputs]
        y_NC = scores.wide(context.data.targets[part_N], context.outputs)
        for scale in totals:
            totals[scale] += float(scores.losses(scale * z_NC, y_NC).sum())
    return min(totals, key=lambda scale: totals[scale])


def _starts(scales: Sequence[float], models: Sequence[CommonModel | ClusterModel]) -> list[Start]:
    starts = [Start(Candidate.BASE, Candidate.RIDGE, scale) for scale in scales]
    # From the outputs as they are, a row that the base layer gets right for sure changes nothing.
    starts += [Start(Candidate.BASE, Candidate.RIDGE, 1.0, scale) for scale in scales if scale < 1]
    starts.append(Start(Candidate.OWN_HEAD, Candidate.OWN_HEAD, 0.0))
    for number, model in enumerate(models):
        candidate = Candidate.FLEET_MEAN if number == 0 else Candidate.CLUSTER_MEAN
        starts.append(Start(candidate, candidate, scales[0], model=model))
    return starts


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
    progress: Any = lambda _step, _loss: None,
) -> Iterator[list[AutoFit]]:
    """Fit an adapter for each code of `data.groups_N`; yield them stack by stack.

    With `wants_prior`, the last one is what all groups have in common, at the position behind the groups.
    """
    assert data.groups_N is not None
    order_N = torch.argsort(data.groups_N, stable=True)
    rows = dict(enumerate(order_N.split(torch.bincount(data.groups_N).tolist())))
    yield from _fit_groups(
        Context(base, data, spec, Scores(spec.loss), labels, feature_space, live or {}),
        rows,
        done=done,
        wants_prior=wants_prior,
        progress=progress,
    )


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
    """Fit one adapter."""
    del watcher
    context = Context(base, data, spec, Scores(spec.loss), labels, feature_space, {} if live is None else {0: live})
    ((result,),) = _fit_groups(context, {0: torch.arange(data.rows)}, is_fleet=False)
    return result


def _fit_groups(
    context: Context,
    rows: Mapping[int, Tensor],
    *,
    is_fleet: bool = True,
    done: Collection[int] = (),
    wants_prior: bool = False,
    progress: Any = lambda _step, _loss: None,
) -> Iterator[list[AutoFit]]:
    spec, scores = context.spec, context.scores
    allowed = frozenset(spec.candidates)
    every_N = torch.cat(list(rows.values()))
    moments = _moments(context, every_N)
    maps, common_map = _feature_maps(context, moments, allowed)
    scales = (_scale_of(context, every_N),) if is_fleet else scores.scales
    stacks = [(positions, _read_stack(context, rows, positions)) for positions in _stacks_of(rows)]
    models: list[CommonModel | ClusterModel] = []
    wants_mean = bool(allowed & {Candidate.FLEET_MEAN, Candidate.CLUSTER_MEAN})
    if is_fleet and len(rows) > 1 and (wants_mean or wants_prior):
        cached = [stack.common_rows(maps[common_map], scales[0]) for _, stack in stacks]

        def of_groups() -> list[GroupRows]:
            return cached

        mean = fit_mean(of_groups, scores, len(rows))
        models = [mean]
        if Candidate.CLUSTER_MEAN in allowed:
            models += fit_clusters(of_groups, scores, len(rows), mean, seed=spec.seed)
        del cached
    starts = _starts(scales, models if wants_mean else [])
    candidates = Candidates(
        base=context.base,
        scores=scores,
        starts=starts,
        maps=maps,
        common_map=common_map if models else None,
        combinations=list(
            small.combinations_of(starts, maps, allowed, common_map=common_map, steps=scores.steps, ridges=small.RIDGES)
        ),
        max_rank=spec.rank,
    )
    searches = [candidates.search(stack) for _, stack in stacks]
    totals_X = sum(search.losses_GEX[:, -1].sum(0) for search in searches)
    weight = float(sum(search.weights_GE[:, -1].sum() for search in searches))
    chosen = []
    for search in searches:
        others_X = None
        if is_fleet and len(rows) > 1:
            own_GX, own_G1 = search.losses_GEX[:, -1], search.weights_GE[:, -1:]
            others_X = (totals_X - own_GX) / (weight - own_G1).clamp_min(1e-300)
        chosen.append(small.choose(search, others_X))
    errors = [
        small.chosen_errors(search, chosen_GE, stack.folds_GN)
        for search, chosen_GE, (_, stack) in zip(searches, chosen, stacks, strict=True)
    ]
    raw = [_compare(context, stack, errors_GN, rows) for (_, stack), errors_GN in zip(stacks, errors, strict=True)]
    total_gain, total_rows = 0.0, 0.0
    for of_stack in raw:
        for gain, count in (gain_of(compared) for compared in of_stack):
            total_gain += gain
            total_rows += count
    for (positions, stack), search, chosen_GE, of_stack in zip(stacks, searches, chosen, raw, strict=True):
        if all(position in done for position in positions):
            continue
        results = []
        for index, position in enumerate(positions):
            gain, count = gain_of(of_stack[index])
            others = (total_gain - gain) / (total_rows - count) if is_fleet and total_rows > count else None
            combination = candidates.combinations[int(chosen_GE[index, -1])]
            pick = int(search.picks_GEX[index, -1, int(chosen_GE[index, -1])])
            composed = candidates.compose(stack, index, combination, pick)
            results.append(
                _finish(
                    context,
                    position,
                    rows[position],
                    composed,
                    of_stack[index],
                    others,
                    _tried(candidates, search, index, combination),
                )
            )
        progress(1, 0.0)
        yield [result for result in results if result.position not in done]
    if wants_prior and models:
        yield [_prior(context, maps[common_map], mean, scales[0], len(rows))]


def gain_of(errors: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the summed gain of a group's rows, and their weight."""
    weights_K = errors["weights"]
    other = errors.get("live", errors["base"])
    judged_K = torch.isfinite(other) if bool(torch.isfinite(other).any()) else torch.zeros_like(other, dtype=torch.bool)
    if not bool(judged_K.any()):
        other, judged_K = errors["base"], torch.ones_like(judged_K)
    gains_K = torch.where(judged_K, other - errors["adapter"], 0.0)
    return float(gains_K @ weights_K), float(weights_K[judged_K].sum())


def _compare(context: Context, stack: Stack, errors_GN: Tensor, rows: Mapping[int, Tensor]) -> list[dict[str, Tensor]]:
    """Return, for each group of a stack, the errors of its rows by what is compared, and their weights."""
    scores, base, spec = context.scores, context.base, context.spec
    matching = base_matching(base, context.labels, spec)
    results = []
    for index, position in enumerate(stack.groups.tolist()):
        rows_K = rows[position]
        K = len(rows_K)
        y_KC, weights_K = stack.y_GNC[index, :K], stack.weights_GN[index, :K]
        folds_K = stack.folds_GN[index, :K]
        guesses = [scores.guess(y_KC, weights_K * (folds_K != fold)) for fold in range(small.FOLDS)]
        guess_KC = torch.stack([guesses[fold][0] for fold in folds_K.tolist()])
        base_K = scores.errors(stack.outputs_GNC[index, :K], y_KC)
        if matching is not None:
            base_K = scores.errors(
                matching.logits(spec.loss, base_outputs(base, stack.x_GNI[index, :K])),
                scores.wide(context.data.targets[rows_K], len(matching.outputs_C) + len(matching.others_E)),
            )
        compared = {
            "adapter": errors_GN[index, :K],
            "base": base_K,
            "guess": scores.errors(guess_KC, y_KC),
            "weights": weights_K,
        }
        live = context.live.get(position)
        if live is not None and live.adapter is not None:
            compared["live"] = _live_errors(context, live, stack.x_GNI[index, :K], rows_K)
        results.append(compared)
    return results


def _live_errors(context: Context, live: LiveVersion, x_KI: Tensor, rows_K: Tensor) -> Tensor:
    """Return the errors of the live version, (K,): those of rows that it was trained on are as it was without them."""
    adapter, spec, scores = live.adapter, context.spec, context.scores
    assert adapter is not None
    y_KO = base_outputs(context.base, x_KI)
    y_KO = y_KO + adapter.scaling * (x_KI @ adapter.b_RI.T.double()) @ adapter.a_OR.T.double()
    if adapter.bias_O is not None:
        y_KO = y_KO + adapter.scaling * adapter.bias_O.double()
    matching = match_labels(adapter.labels, context.labels, spec, outputs=context.base.out_features)
    targets = context.data.targets[rows_K]
    if matching is None:
        errors_K = scores.errors(y_KO[:, : context.outputs], scores.wide(targets, context.outputs))
    else:
        width = context.outputs
        if spec.loss is Loss.CROSS_ENTROPY:
            width = len(matching.outputs_C) + len(matching.others_E)
        errors_K = scores.errors(matching.logits(spec.loss, y_KO), scores.wide(targets, width))
    if live.evidence is not None:
        trained_K, left_out_K = live.evidence.look_up(row_keys(context.data, rows_K, context.labels))
        errors_K = torch.where(torch.from_numpy(trained_K), torch.from_numpy(left_out_K).double(), errors_K)
    return errors_K


def _tried(candidates: Candidates, search: Search, index: int, taken: Combination) -> dict[str, Any]:
    """Return what was tried for one group: the best setting of each candidate by its losses of left-out rows."""
    weight = max(float(search.weights_GE[index, -1]), 1e-300)
    means = (search.losses_GEX[index, -1] / weight).tolist()
    best: dict[Candidate, tuple[float, Combination]] = {}
    for combination, mean in zip(candidates.combinations, means, strict=True):
        name = candidates.candidate(combination)
        if name not in best or mean < best[name][0]:
            best[name] = mean, combination
    name = candidates.candidate(taken)
    best[name] = means[candidates.combinations.index(taken)], taken
    entries = [
        {"candidate": str(candidate), "figure": figure, "settings": _settings(candidates, combination), "skipped": None}
        for candidate, (figure, combination) in best.items()
    ]
    metric = "mse" if candidates.scores.is_regression else "log_loss"
    reason = f"the least {metric} of rows left out, with {small.PSEUDO_ROWS} rows of the other groups' mean"
    return {"metric": metric, "by": "leave_one_out", "taken": str(name), "reason": reason, "candidates": entries}


def _settings(candidates: Candidates, combination: Combination) -> dict[str, Any]:
    if combination.features is None:
        return {}
    feature_map = candidates.maps[combination.features]
    bias = feature_map.constant is not None or feature_map.free_intercept
    return {"ridge": combination.ridge, "step": combination.step, "bias": bias}


def _finish(
    context: Context,
    position: int,
    rows_K: Tensor,
    composed: Composed,
    errors: Mapping[str, Tensor],
    others_gain: float | None,
    auto: dict[str, Any],
) -> AutoFit:
    spec, scores = context.spec, context.scores
    rank = min(spec.rank, small.needed_rank(composed.delta_CI))
    adapter = composed.adapter(rank, context.base.out_features, **context.names)
    compared = {name: values for name, values in errors.items() if name != "weights"}
    evaluation, judgement = judge(
        compared,
        by="cross_validation",
        metric=scores.metric,
        is_regression=scores.is_regression,
        weights_N=errors["weights"],
        others_gain=others_gain,
    )
    keys_K = row_keys(context.data, rows_K, context.labels)
    evidence = RowEvidence(keys_K, errors["adapter"].numpy().astype(np.float32))
    chosen = replace(
        spec, rank=rank, alpha=float(rank), candidates=(), try_bias=False, bias=composed.bias_C is not None
    )
    factors = Factors(adapter.a_OR, adapter.b_RI, adapter.bias_O)
    metrics: dict[str, Any] = {}
    for prefix, own in (("", factors), ("base_", None)):
        values = evaluate_factors(context.base, context.data, rows_K, chosen, own)
        metrics[f"{prefix}train_loss"] = values["loss"]
        if "accuracy" in values:
            metrics[f"{prefix}train_accuracy"] = values["accuracy"]
    report = AdapterReport(evaluation=evaluation, judgement=judgement, auto=auto | {"rows": len(rows_K)})
    return AutoFit(position=position, adapter=adapter, metrics=metrics, report=report, evidence=evidence, spec=chosen)


def _prior(context: Context, features: FeatureMap, model: CommonModel, scale: float, position: int) -> AutoFit:
    """Return the adapter of what all groups have in common, for names without rows."""
    delta_CI, bias_C = features.update(model.step * model.theta_JC, None)
    composed = Composed(delta_CI / scale, None if bias_C is None else bias_C / scale)
    rank = min(context.spec.rank, small.needed_rank(composed.delta_CI))
    chosen = replace(context.spec, rank=rank, alpha=float(rank), candidates=(), try_bias=False)
    return AutoFit(
        position=position,
        adapter=composed.adapter(rank, context.base.out_features, **context.names),
        metrics={},
        report=AdapterReport(),
        evidence=None,
        spec=chosen,
    )
