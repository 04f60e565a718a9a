"""Candidates for adapters with few rows: every choice by leave-one-out, every figure by outer folds.

All groups of a fleet go through the same steps; one adapter alone is a fleet of one group without a mean.

1. `Candidates.search` computes the loss of each row, left out, for each combination of start, features, ridge and step:
   once in the fit of all rows, and once in each fit that lacks an outer fold. It also computes the errors of the rows
   of the folds.
2. `choice` takes the combination with the lowest loss.
3. `Candidates.compose` computes the update of the base layer that the combination makes.

A unit is a set of rows that are always left out together, because they have equal inputs or belong to one group.
"""

# G groups of a stack · N rows of a group, padded · I in_features · J features · C outputs of the task · O out_features
# F outer folds · E = F + 1 fits: without each fold, and of all rows · X combinations · R rank
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.lora.base_layer import BaseLayer
from adapters.training.candidates.composed import Composed
from adapters.training.candidates.features import FeatureMap
from adapters.training.candidates.fleet_mean import ClusterModel, CommonModel, GroupRows
from adapters.training.candidates.leave_out import LeaveOut, Sets, precision
from adapters.training.candidates.scores import Scores
from adapters.training.settings import Candidate

FOLDS = 5
# Rows of a class from which on it is spread over the folds by itself, see `outer_folds`.
_MIN_STRATUM_ROWS = 2 * FOLDS


class Start(NamedTuple):
    """Outputs that a candidate starts from."""

    candidate: Candidate
    """Candidate that has these outputs, without a regression on the group's own rows."""
    with_ridge: Candidate
    """Candidate that adds such a regression."""
    scale: float
    """Scale of the base layer's outputs; 0 without them."""
    loss_scale: float = 1.0
    """Factor of the outputs, start and change, when their loss is computed."""
    model: CommonModel | ClusterModel | None = None
    """Regression over other groups that is added to the base layer's outputs."""

    def from_base(self, delta_CI: Tensor, bias_C: Tensor | None, base: BaseLayer) -> Composed:
        """Return the update of the base layer that has the same answers as an update of these outputs."""
        if self.scale > 0:
            return Composed(delta_CI / self.scale, None if bias_C is None else bias_C / self.scale)
        C = delta_CI.shape[-2]
        if base.bias_O is not None:
            bias_C = (torch.zeros_like(delta_CI[..., 0]) if bias_C is None else bias_C) - base.bias_O[:C].double()
        return Composed(delta_CI - base.weight_OI[:C].double(), bias_C)


# Number of the start, number of the features, ridge and step.
_Key = tuple[int, int | None, float, float]


class Combination(NamedTuple):
    """One setting of everything that leave-one-out chooses."""

    starts: tuple[int, ...]
    """Numbers of starts. Of several (clusters), each fit takes the one with the lowest loss on its rows."""
    features: int | None
    """Number of the features; None without a regression on the group's own rows."""
    ridge: float
    step: float


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Rows of groups of about one size, padded with rows of weight 0."""

    groups: Tensor
    """(G,) int64: numbers of the groups."""
    x_GNI: Tensor
    outputs_GNC: Tensor
    """Outputs of the base layer, unscaled."""
    y_GNC: Tensor
    weights_GN: Tensor
    is_shared_GN: Tensor
    """bool: whether another group has the row too."""
    folds_GN: Tensor
    """int64; -1 for padding."""
    units_GN: Tensor | None
    """int64: number of the unit, -1 for padding; None if each row is a unit."""

    def at(self, positions: Tensor) -> "Stack":
        """Return the stack of some of the groups."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: part[positions] for name, part in parts.items() if part is not None})

    def common_rows(self, features: FeatureMap, scale: float) -> GroupRows:
        """Return the rows for the regressions over all groups."""
        features_GNJ = features(self.x_GNI).float() * (self.weights_GN > 0)[..., None]
        return GroupRows(self.groups, features_GNJ, scale * self.outputs_GNC, self.y_GNC, self.weights_GN)


class Search(NamedTuple):
    """Losses and errors of a stack for all combinations."""

    losses_GEX: Tensor
    """Sum of the losses of the rows of each fit, each row left out of it, float64."""
    squares_GEX: Tensor
    """Sum of the squared differences of these losses from those of the first combination, the base layer."""
    weights_GE: Tensor
    """Sum of the weights of these rows."""
    errors_GXN: Tensor
    """Error of each row in the fit that lacks its fold: float32 for classes, float64 for numbers."""
    picks_GEX: Tensor
    """Start that the fit took, as a position in `Combination.starts`, int8."""

    def of(self, combinations: Sequence[int]) -> "Search":
        """Return those of some of the combinations."""
        X = list(combinations)
        return Search(
            self.losses_GEX[..., X], self.squares_GEX[..., X], self.weights_GE, self.errors_GXN[:, X],
            self.picks_GEX[..., X],
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Candidates:
    """Combinations that are compared for each group, with what they are computed from."""

    base: BaseLayer
    scores: Scores
    starts: Sequence[Start]
    maps: Sequence[FeatureMap]
    common_map: int | None
    """Number of the features of the regressions over all groups; None without such regressions."""
    combinations: Sequence[Combination]
    max_rank: int

    @property
    def _dtype(self) -> torch.dtype:
        """Return the type that combinations are compared in: the ridges for classes are large enough for float32."""
        return torch.float64 if self.scores.is_regression else torch.float32

    def candidate(self, combination: Combination) -> Candidate:
        """Return the candidate that a combination belongs to."""
        start = self.starts[combination.starts[0]]
        if combination.features is None:
            return start.candidate
        if start.with_ridge is Candidate.RIDGE and self.maps[combination.features].is_base_metric:
            return Candidate.RIDGE_IN_BASE_METRIC
        return start.with_ridge

    def is_bounded(self, stack: Stack) -> bool:
        """Return whether a candidate may need a higher rank than is allowed."""
        return self.max_rank < min(stack.y_GNC.shape[-1], self.base.in_features)

    def settings(self, combination: Combination) -> dict[str, Any]:
        """Return the settings of a combination, as a job shows them."""
        if combination.features is None:
            return {}
        features = self.maps[combination.features]
        bias = features.constant is not None or features.free_intercept
        step: float | str = combination.step if math.isfinite(combination.step) else "converged"
        return {"ridge": combination.ridge, "step": step, "bias": bias}

    def _start_outputs(self, stack: Stack, dtype: torch.dtype) -> dict[int, Tensor]:
        """Return the outputs (G, N, C) of each start that is compared, by its number.

        Regressions over all groups are without the rows of the group.
        """
        outputs, rows = {}, None
        for number in sorted({number for combination in self.combinations for number in combination.starts}):
            start = self.starts[number]
            z_GNC = (start.scale * stack.outputs_GNC).to(dtype)
            if start.model is not None and self.common_map is not None:
                # All models have the same scale.
                rows = rows or stack.common_rows(self.maps[self.common_map], start.scale).to(dtype)
                z_GNC = z_GNC + start.model.changes(rows, self.scores)
            outputs[number] = z_GNC
        return outputs

    def search(self, stack: Stack) -> Search:
        """Return the losses and errors of all combinations."""
        G, N = stack.weights_GN.shape
        folds, units = Sets.of(stack.folds_GN, FOLDS), None
        if stack.units_GN is not None:
            units = Sets.of(stack.units_GN, int(stack.units_GN.max()) + 1)
        # Rows that take part in each fit.
        in_fit_GEN = torch.cat(
            [stack.folds_GN[:, None, :] != torch.arange(FOLDS)[:, None], torch.ones(G, 1, N, dtype=torch.bool)], dim=1
        )
        weights_GEN = stack.weights_GN[:, None] * in_fit_GEN
        by_key = self._losses_and_errors(stack, folds, units)
        losses, squares, errors, picks, first_GEN = [], [], [], [], None
        for combination in self.combinations:
            of_starts = [by_key[(start, *combination[1:])] for start in combination.starts]
            losses_GEN, error_GN, pick_GE = _pick(of_starts, weights_GEN, stack.folds_GN)
            first_GEN = losses_GEN if first_GEN is None else first_GEN
            losses.append((losses_GEN * weights_GEN).sum(-1))
            squares.append(((losses_GEN - first_GEN).double().square() * weights_GEN).sum(-1))
            errors.append(error_GN)
            picks.append(pick_GE)
        return Search(
            torch.stack(losses, dim=-1),
            torch.stack(squares, dim=-1),
            weights_GEN.sum(-1),
            torch.stack(errors, dim=1),
            torch.stack(picks, dim=-1),
        )

    def _losses_and_errors(self, stack: Stack, folds: Sets, units: Sets | None) -> dict[_Key, tuple[Tensor, Tensor]]:
        """Return for each start and setting the losses of rows left out of each fit, (G, E, N), and errors, (G, N)."""
        scores, dtype = self.scores, self._dtype
        weights_GN = stack.weights_GN.to(dtype)
        # Classes come before rows, because sums over them are faster so.
        y_GCN = stack.y_GNC.mT.to(dtype).contiguous()
        starts = {number: z_GNC.mT.contiguous() for number, z_GNC in self._start_outputs(stack, dtype).items()}
        residuals = {number: scores.residuals(z_GCN, y_GCN, dim=-2) for number, z_GCN in starts.items()}
        results: dict[_Key, tuple[Tensor, Tensor]] = {}
        for number, z_GCN in starts.items():
            losses_GN = scores.losses(self.starts[number].loss_scale * z_GCN, y_GCN, dim=-2)
            losses_GEN = losses_GN[:, None].expand(-1, FOLDS + 1, -1)
            results[number, None, 0.0, 0.0] = losses_GEN, scores.errors(z_GCN, y_GCN, dim=-2)
        numbers_of: dict[tuple[int | None, float], set[int]] = {}
        for combination in self.combinations:
            numbers_of.setdefault((combination.features, combination.ridge), set()).update(combination.starts)
        for features, feature_map in enumerate(self.maps):
            ridges = [ridge for of, ridge in numbers_of if of == features]
            if not ridges:
                continue
            phi_GNJ = feature_map(stack.x_GNI)
            kernel_GNN = (phi_GNJ @ phi_GNJ.mT).to(dtype)
            for ridge in ridges:
                P_GNN = precision(kernel_GNN, ridge, weights_GN, free_intercept=feature_map.free_intercept)
                leave_out = LeaveOut(P_GNN, folds, units)
                for number in sorted(numbers_of[features, ridge]):
                    fold_GCN, change_GECN = leave_out.left_out(residuals[number])
                    moved_GCN = residuals[number] - fold_GCN
                    for step in scores.steps:
                        losses_GEN = self._left_out_losses(stack, starts[number], number, change_GECN, step, y_GCN)
                        errors_GN = scores.errors(torch.add(starts[number], moved_GCN, alpha=step), y_GCN, dim=-2)
                        results[number, features, ridge, step] = losses_GEN, errors_GN
        return results

    def _left_out_losses(
        self, stack: Stack, z_GCN: Tensor, number: int, change_GECN: Tensor, step: float, y_GCN: Tensor
    ) -> Tensor:
        """Return the losses of rows left out of each fit, (G, E, N), with a step from a start."""
        start = self.starts[number]
        outputs_GECN = torch.add(z_GCN[:, None], change_GECN, alpha=step)
        if self.is_bounded(stack):
            base_G1CN = (start.scale * stack.outputs_GNC).mT[:, None].to(outputs_GECN.dtype)
            outputs_GECN = base_G1CN + bound_rank((outputs_GECN - base_G1CN).mT, self.max_rank).mT
        if start.loss_scale != 1:
            outputs_GECN = start.loss_scale * outputs_GECN
        return self.scores.losses(outputs_GECN, y_GCN[:, None], dim=-2)

    def compose(self, stack: Stack, combination: Combination, pick: int) -> Composed:
        """Return the update of the base layer by a combination, fitted to all rows of each group of a stack.

        pick: the start, as a position in `combination.starts`.
        """
        start = self.starts[combination.starts[pick]]
        G, C, I = len(stack.groups), stack.y_GNC.shape[-1], self.base.in_features
        z_GNC = start.scale * stack.outputs_GNC
        delta_GCI, bias_GC = torch.zeros(G, C, I, dtype=torch.float64), None
        if start.model is not None and self.common_map is not None:
            common = self.maps[self.common_map]
            rows = stack.common_rows(common, start.scale).to(self._dtype)
            theta_GJC = start.model.thetas(rows, self.scores).double()
            z_GNC = z_GNC + rows.features_GNJ.double() @ theta_GJC
            delta_GCI, bias_GC = common.update(theta_GJC, None)
        if combination.features is not None:
            own_GCI, own_bias_GC = self._own_update(stack, z_GNC, combination)
            delta_GCI = delta_GCI + own_GCI
            if own_bias_GC is not None:
                bias_GC = own_bias_GC if bias_GC is None else bias_GC + own_bias_GC
        return start.from_base(delta_GCI, bias_GC, self.base)

    def _own_update(self, stack: Stack, z_GNC: Tensor, combination: Combination) -> tuple[Tensor, Tensor | None]:
        """Return ΔW (G, C, I) and the change of the bias (G, C) of the ridge on each group's own rows."""
        assert combination.features is not None
        feature_map, weights_GN = self.maps[combination.features], stack.weights_GN
        phi_GNJ = feature_map(stack.x_GNI)
        kernel_GNN = phi_GNJ @ phi_GNJ.mT
        residuals_GNC = self.scores.residuals(z_GNC, stack.y_GNC)
        free = feature_map.free_intercept
        P_GNN = precision(kernel_GNN, combination.ridge, weights_GN, free_intercept=free)
        alpha_GNC = combination.step * (P_GNN @ residuals_GNC)
        intercept_GC = None
        if free:
            counts_GN1 = (weights_GN > 0)[..., None]
            rest_GNC = combination.step * residuals_GNC - kernel_GNN @ alpha_GNC
            noise_GNC = alpha_GNC * (combination.ridge / weights_GN.clamp_min(1e-300))[..., None]
            intercept_GC = torch.where(counts_GN1, rest_GNC - noise_GNC, 0.0).sum(1) / counts_GN1.sum(1)
        return feature_map.update(phi_GNJ.mT @ alpha_GNC, intercept_GC)


def bound_rank(change_NC: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a change of outputs, (…, N, C), by a bias and a change of this rank."""
    mean_1C = change_NC.mean(-2, keepdim=True)
    centered_NC = change_NC - mean_1C
    basis_CR = torch.linalg.eigh(centered_NC.mT @ centered_NC)[1][..., -rank:]
    bounded_NC: Tensor = mean_1C + centered_NC @ basis_CR @ basis_CR.mT
    return bounded_NC


def _pick(
    of_starts: Sequence[tuple[Tensor, Tensor]], weights_GEN: Tensor, folds_GN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (G, E, N), the errors (G, N) and the picked starts (G, E) of a combination.

    Of several starts, a row that is left out takes the one with the lowest loss on the other rows of the fit, and the
    rows of a fold take the one with the lowest loss on the rows outside the fold.
    """
    if len(of_starts) == 1:
        losses_GEN, errors_GN = of_starts[0]
        return losses_GEN, errors_GN, torch.zeros(losses_GEN.shape[:2], dtype=torch.int8)
    losses_SGEN = torch.stack([losses for losses, _ in of_starts])
    weighted_SGEN = losses_SGEN * weights_GEN.to(losses_SGEN.dtype)
    totals_SGE1 = weighted_SGEN.sum(-1, keepdim=True)
    picked_GEN = losses_SGEN.gather(0, (totals_SGE1 - weighted_SGEN).argmin(0, keepdim=True))[0]
    picks_GE = totals_SGE1[..., 0].argmin(0)
    errors_SGN = torch.stack([errors for _, errors in of_starts])
    start_GN = picks_GE.gather(1, folds_GN.clamp_min(0))
    return picked_GEN, errors_SGN.gather(0, start_GN[None])[0], picks_GE.to(torch.int8)


def outer_folds(keys_N: Tensor, classes_N: Tensor | None, seed: int) -> Tensor:
    """Return the fold of each row, (N,) int64: rows of one key in one fold, and classes spread over the folds.

    Classes with few rows are spread as if they were one class. If each of them were spread evenly, a left-out row would
    have more rows of its class in its fit than a new row has, and the figures would be too good.
    """
    first_of: dict[int, int] = {}
    for row, key in enumerate(keys_N.tolist()):
        first_of.setdefault(key, row)
    classes = [0] * len(keys_N) if classes_N is None else classes_N.tolist()
    sizes = Counter(classes[row] for row in first_of.values())

    def place(key: int) -> tuple[int, int]:
        stratum = classes[first_of[key]]
        return (stratum if sizes[stratum] >= _MIN_STRATUM_ROWS else -1), key

    fold_of = {key: (position + seed) % FOLDS for position, key in enumerate(sorted(first_of, key=place))}
    return torch.tensor([fold_of[key] for key in keys_N.tolist()])


def units_of(keys_N: Tensor) -> Tensor | None:
    """Return the number of the unit of each row, (N,) int64: rows of equal keys; None if all keys differ."""
    codes_N = torch.unique(keys_N, return_inverse=True)[1]
    return None if int(codes_N.max()) + 1 == len(keys_N) else codes_N


def combinations_of(
    starts: Sequence[Start], maps: Sequence[FeatureMap], allowed: frozenset[Candidate], *,
    common_map: int | None, steps: Sequence[float], ridges: Sequence[float],
) -> Iterator[Combination]:  # fmt: skip
    """Yield the combinations to compare. Steps and ridges apply to those with a regression on the group's own rows."""
    clusters = tuple(i for i, start in enumerate(starts) if start.candidate is Candidate.CLUSTER_MEAN)
    for i, start in enumerate(starts):
        if i in clusters and i != clusters[0]:
            continue
        members = clusters if i in clusters else (i,)
        if start.candidate in allowed and start.candidate is not Candidate.OWN_HEAD:
            yield Combination(members, None, 0.0, 0.0)
        for features, feature_map in enumerate(maps):
            name = start.with_ridge
            if name is Candidate.RIDGE and feature_map.is_base_metric:
                name = Candidate.RIDGE_IN_BASE_METRIC
            has_bias = feature_map.constant is not None or feature_map.free_intercept
            if name not in allowed or (start.model is not None and features != common_map):
                continue
            if name is Candidate.OWN_HEAD and not has_bias and any(m.constant or m.free_intercept for m in maps):
                continue
            # Little is left for the group's own rows to add to what all groups have in common.
            own_ridges = ridges if start.model is None else [ridge for ridge in ridges if ridge >= 1] or ridges
            for ridge in own_ridges:
                yield from (Combination(members, features, ridge, step) for step in steps)
