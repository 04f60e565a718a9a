"""Candidates for adapters with few rows: every choice by leave-one-out, every figure by outer folds.

All groups of a fleet go through the same steps; one adapter alone is a fleet of one group without a mean.

1. `Search` computes, for each combination of start, features, ridge and step, the losses of rows left out: of all rows,
   and of the rows without each outer fold. It also computes the errors of the rows of each fold.
2. `choose` takes the combination with the least loss, where a group has some rows of the other groups' mean loss beside
   its own, so that a tiny group does not choose by noise.
3. `compose` makes the adapter of the combination.
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
from torch.nn import functional

from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.candidates.features import FeatureMap
from adapters.training.candidates.fleet_mean import ClusterModel, CommonModel, GroupRows
from adapters.training.candidates.leave_out import LeaveOut, Sets, precision
from adapters.training.candidates.scores import Scores
from adapters.training.closed_form.solver import balanced_factors
from adapters.training.settings import Candidate

FOLDS = 5
# Rows of the other groups' mean loss that count beside a group's own.
PSEUDO_ROWS = 100
# Gain of the other groups, in shares of their rows, below which a change is not worth its risk.
_MIN_GAIN = 0.02
# Standard errors by which a group's own loss is clearly lower: beside other groups, and alone.
_CLEAR, _CLEAR_ALONE = 2.5, 0.5
# Rows of a class from which it is spread over the folds by itself.
_MIN_STRATUM_ROWS = 2 * FOLDS
# Share of the energy of the change of the outputs that a smaller rank may lose.
_LOST_ENERGY = 1e-4


class Start(NamedTuple):
    """Outputs that a candidate starts from."""

    candidate: Candidate
    """Name of the candidate that stops at the start, without a ridge on the group's own rows."""
    with_ridge: Candidate
    scale: float
    """Scale of the base layer's outputs; 0 without them."""
    loss_scale: float = 1.0
    """Scale of the new outputs for the loss."""
    model: CommonModel | ClusterModel | None = None

    def from_base(self, delta_CI: Tensor, bias_C: Tensor | None, base: BaseLayer) -> "Composed":
        """Return the update of the base layer that has the same answers as an update of these outputs."""
        if self.scale > 0:
            return Composed(delta_CI / self.scale, None if bias_C is None else bias_C / self.scale)
        C = len(delta_CI)
        if base.bias_O is not None:
            bias_C = (0.0 if bias_C is None else bias_C) - base.bias_O[:C].double()
        return Composed(delta_CI - base.weight_OI[:C].double(), bias_C)


# Start, features, ridge and step.
_Key = tuple[int, int | None, float, float]


class Combination(NamedTuple):
    """One setting of everything that leave-one-out chooses."""

    starts: tuple[int, ...]
    """Of several starts, the rows that are not left out choose one: clusters."""
    features: int | None
    """None without a ridge of the group's own."""
    ridge: float
    step: float


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Rows of groups of about one size, padded with rows of weight 0."""

    groups: Tensor
    """(G,) int64: numbers of the groups."""
    x_GNI: Tensor
    outputs_GNC: Tensor
    """Of the base layer, as they are."""
    y_GNC: Tensor
    weights_GN: Tensor
    folds_GN: Tensor
    """int64; -1 for padding."""
    units_GN: Tensor | None
    """int64: rows that leave together have equal numbers, -1 for padding; None if each leaves alone."""

    def one(self, index: int) -> "Stack":
        """Return the stack of one of the groups."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: part[index : index + 1] for name, part in parts.items() if part is not None})

    def common_rows(self, features: FeatureMap, scale: float) -> GroupRows:
        """Return the rows as the regressions over all groups take them."""
        features_GNJ = features(self.x_GNI).float() * (self.weights_GN > 0)[..., None]
        return GroupRows(self.groups, features_GNJ, scale * self.outputs_GNC, self.y_GNC, self.weights_GN)


class Search(NamedTuple):
    """Losses and errors of a stack for all combinations."""

    losses_GEX: Tensor
    """Sums over the rows of each fit of their losses when they are left out, float64."""
    squares_GEX: Tensor
    """Sums of the squared differences of these losses from those of the first combination."""
    weights_GE: Tensor
    """Sums of the weights of these rows."""
    errors_GXN: Tensor
    """Error of each row without its fold, float32."""
    picks_GEX: Tensor
    """Number of the start among those of the combination, int8."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Candidates:
    """All that is tried for each group of a fleet."""

    base: BaseLayer
    scores: Scores
    starts: Sequence[Start]
    maps: Sequence[FeatureMap]
    common_map: int | None
    """The features of the regressions over all groups."""
    combinations: Sequence[Combination]
    max_rank: int

    def candidate(self, combination: Combination) -> Candidate:
        """Return what a combination is called."""
        start = self.starts[combination.starts[0]]
        if combination.features is None:
            return start.candidate
        if start.with_ridge is Candidate.RIDGE and self.maps[combination.features].is_base_metric:
            return Candidate.RIDGE_IN_BASE_METRIC
        return start.with_ridge

    def is_bounded(self, stack: Stack) -> bool:
        """Return whether the largest rank is less than a candidate may need."""
        return self.max_rank < min(stack.y_GNC.shape[-1], self.base.in_features)

    def settings(self, combination: Combination) -> dict[str, Any]:
        """Return the settings of a combination, as a job shows them."""
        if combination.features is None:
            return {}
        features = self.maps[combination.features]
        bias = features.constant is not None or features.free_intercept
        step: float | str = combination.step if math.isfinite(combination.step) else "converged"
        return {"ridge": combination.ridge, "step": step, "bias": bias}

    def left_out_outputs(self, stack: Stack, combination: Combination) -> Tensor:
        """Return the outputs (N, C) of the rows of a stack of one group, each without its unit."""
        scale = self.starts[combination.starts[0]].loss_scale
        z_GNC = self._start_outputs(stack)[combination.starts[0]]
        if combination.features is None:
            return scale * z_GNC[0]
        folds = Sets.of(stack.folds_GN, FOLDS)
        units = None if stack.units_GN is None else Sets.of(stack.units_GN, int(stack.units_GN.max()) + 1)
        leave_out = self._leave_out(stack, combination.features, combination.ridge, folds, units)
        residuals_GNC = self.scores.residuals(z_GNC, stack.y_GNC)
        _, alpha_GENC = leave_out.coefficients(residuals_GNC)
        left_GNC = leave_out.unit_residuals(alpha_GENC, residuals_GNC)[:, -1]
        outputs_GNC: Tensor = z_GNC + combination.step * (residuals_GNC - left_GNC)
        return scale * outputs_GNC[0]

    def _start_outputs(self, stack: Stack) -> list[Tensor]:
        """Return the outputs (G, N, C) of each start, for each group without its own rows."""
        outputs = []
        for start in self.starts:
            z_GNC = start.scale * stack.outputs_GNC
            if start.model is not None and self.common_map is not None:
                rows = stack.common_rows(self.maps[self.common_map], start.scale).double()
                z_GNC = z_GNC + start.model.without_own_rows(rows, self.scores)[0]
            outputs.append(z_GNC)
        return outputs

    def search(self, stack: Stack) -> Search:
        """Compute the losses and errors of all combinations."""
        G, N = stack.weights_GN.shape
        folds, units = Sets.of(stack.folds_GN, FOLDS), None
        if stack.units_GN is not None:
            units = Sets.of(stack.units_GN, int(stack.units_GN.max()) + 1)
        # Rows that take part in each fit.
        in_fit_GEN = torch.cat(
            [stack.folds_GN[:, None, :] != torch.arange(FOLDS)[:, None], torch.ones(G, 1, N, dtype=torch.bool)], dim=1
        )
        weights_GEN = stack.weights_GN[:, None] * in_fit_GEN
        by_key = self._scores_of_all(stack, folds, units)
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

    def _scores_of_all(self, stack: Stack, folds: Sets, units: Sets | None) -> dict[_Key, tuple[Tensor, Tensor]]:
        """Return, by start and setting, the losses of rows left out of each fit (G, E, N) and the errors of folds."""
        # Classes have ridges that float32 can bear.
        scores, dtype = self.scores, torch.float64 if self.scores.is_regression else torch.float32
        y_GNC, weights_GN = stack.y_GNC.to(dtype), stack.weights_GN.to(dtype)
        starts = [z_GNC.to(dtype) for z_GNC in self._start_outputs(stack)]
        residuals = [scores.residuals(z_GNC, y_GNC) for z_GNC in starts]
        results: dict[_Key, tuple[Tensor, Tensor]] = {}
        for number, z_GNC in enumerate(starts):
            losses_GN = scores.losses(self.starts[number].loss_scale * z_GNC, y_GNC).float()
            losses_GEN = losses_GN[:, None].expand(-1, FOLDS + 1, -1)
            results[number, None, 0.0, 0.0] = losses_GEN, scores.errors(z_GNC, y_GNC).float()
        settings = dict.fromkeys((combination.features, combination.ridge) for combination in self.combinations)
        for features, feature_map in enumerate(self.maps):
            phi_GNJ = feature_map(stack.x_GNI)
            kernel_GNN = (phi_GNJ @ phi_GNJ.mT).to(dtype)
            for ridge in [ridge for of, ridge in settings if of == features]:
                P_GNN = precision(kernel_GNN, ridge, weights_GN, free_intercept=feature_map.free_intercept)
                leave_out = LeaveOut(P_GNN, folds, units)
                numbers = {
                    start
                    for combination in self.combinations
                    if combination[1:3] == (features, ridge)
                    for start in combination.starts
                }
                for number in sorted(numbers):
                    fold_GNC, alpha_GENC = leave_out.coefficients(residuals[number])
                    left_GENC = leave_out.unit_residuals(alpha_GENC, residuals[number])
                    change_GENC = (residuals[number][:, None] - left_GENC).float()
                    for step in scores.steps:
                        scale, z_G1NC = self.starts[number].loss_scale, starts[number][:, None].float()
                        outputs_GENC = torch.add(z_G1NC, change_GENC, alpha=step)
                        if self.is_bounded(stack):
                            base_G1NC = (self.starts[number].scale * stack.outputs_GNC)[:, None].float()
                            outputs_GENC = base_G1NC + bound_rank(outputs_GENC - base_G1NC, self.max_rank)
                        losses_GEN = scores.losses(scale * outputs_GENC, y_GNC[:, None].float())
                        outputs_GNC = starts[number] + step * (residuals[number] - fold_GNC)
                        results[number, features, ridge, step] = losses_GEN, scores.errors(outputs_GNC, y_GNC).float()
        return results

    def _leave_out(self, stack: Stack, features: int, ridge: float, folds: Sets, units: Sets | None) -> LeaveOut:
        feature_map = self.maps[features]
        phi_GNJ = feature_map(stack.x_GNI)
        P_GNN = precision(phi_GNJ @ phi_GNJ.mT, ridge, stack.weights_GN, free_intercept=feature_map.free_intercept)
        return LeaveOut(P_GNN, folds, units)

    def compose(self, stack: Stack, index: int, combination: Combination, pick: int) -> "Composed":
        """Return the update that a combination makes for one group, fitted to all of its rows."""
        one = stack.one(index)
        start = self.starts[combination.starts[pick]]
        C, I = stack.y_GNC.shape[-1], self.base.in_features
        z_NC = start.scale * one.outputs_GNC[0]
        delta_CI, bias_C = torch.zeros(C, I, dtype=torch.float64), None
        if start.model is not None and self.common_map is not None:
            common = self.maps[self.common_map]
            change_GNC, theta_GJC = start.model.without_own_rows(
                one.common_rows(common, start.scale).double(), self.scores
            )
            z_NC = z_NC + change_GNC[0]
            delta_CI, bias_C = common.update(theta_GJC[0], None)
        if combination.features is not None:
            own_CI, own_bias_C = self._own_update(one, z_NC, combination)
            delta_CI = delta_CI + own_CI
            if own_bias_C is not None:
                bias_C = own_bias_C if bias_C is None else bias_C + own_bias_C
        return start.from_base(delta_CI, bias_C, self.base)

    def _own_update(self, one: Stack, z_NC: Tensor, combination: Combination) -> tuple[Tensor, Tensor | None]:
        """Return ΔW (C, I) and the change of the bias of the ridge on the group's own rows."""
        assert combination.features is not None
        feature_map = self.maps[combination.features]
        phi_GNJ = feature_map(one.x_GNI)
        weights_GN = one.weights_GN
        kernel_GNN = phi_GNJ @ phi_GNJ.mT
        residuals_NC = self.scores.residuals(z_NC, one.y_GNC[0])
        free = feature_map.free_intercept
        P_NN = precision(kernel_GNN, combination.ridge, weights_GN, free_intercept=free)[0]
        alpha_NC = combination.step * (P_NN @ residuals_NC)
        intercept_C = None
        if free:
            counts_N = weights_GN[0] > 0
            rest_NC = combination.step * residuals_NC - kernel_GNN[0] @ alpha_NC
            noise_NC = alpha_NC * (combination.ridge / weights_GN[0].clamp_min(1e-300))[:, None]
            intercept_C = (rest_NC - noise_NC)[counts_N].mean(0)
        return feature_map.update(phi_GNJ[0].T @ alpha_NC, intercept_C)


def bound_rank(change_NC: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a change of outputs, (…, N, C), by a bias and a change of this rank."""
    mean_1C = change_NC.mean(-2, keepdim=True)
    centered_NC = change_NC - mean_1C
    basis_CR = torch.linalg.eigh(centered_NC.mT @ centered_NC)[1][..., -rank:]
    bounded_NC: Tensor = mean_1C + centered_NC @ basis_CR @ basis_CR.mT
    return bounded_NC


class Composed(NamedTuple):
    """Update of the base layer, in float64."""

    delta_CI: Tensor
    bias_C: Tensor | None

    def outputs(self, x_NI: Tensor) -> Tensor:
        """Return the change of the outputs, (N, C)."""
        change_NC = x_NI @ self.delta_CI.T
        return change_NC if self.bias_C is None else change_NC + self.bias_C

    def reduced(self, covariance_II: Tensor, max_rank: int) -> tuple["Composed", Tensor]:
        """Return the update at the smallest rank that loses no visible part of it, and a basis of its outputs (C, R).

        The part is measured by the change of the outputs for inputs of this covariance.
        """
        spread = covariance_II.diagonal().mean() * 0.1
        moved_CI = self.delta_CI @ covariance_II + spread * self.delta_CI
        values_C, vectors_CC = torch.linalg.eigh(moved_CI @ self.delta_CI.T)
        values_C, vectors_CC = values_C.flip(0).clamp_min(0), vectors_CC.flip(1)
        lost_C = values_C.sum() - values_C.cumsum(0)
        rank = int((lost_C > _LOST_ENERGY * values_C.sum()).sum()) + 1
        basis_CR = vectors_CC[:, : min(rank, max_rank, len(values_C))]
        return Composed(basis_CR @ (basis_CR.T @ self.delta_CI), self.bias_C), basis_CR

    def adapter(self, basis_CR: Tensor, outputs: int, **names: Any) -> Adapter:
        """Return the adapter with the outputs of this basis, with alpha equal to the rank."""
        C, rank = basis_CR.shape
        basis_OR = functional.pad(basis_CR, (0, 0, 0, outputs - C))
        solution_IO = functional.pad(self.delta_CI.T, (0, outputs - C))
        a_GOR, b_GRI = balanced_factors(solution_IO[None], basis_OR[None], scaling=1.0)
        bias_O = None
        if self.bias_C is not None:
            bias_O = functional.pad(self.bias_C.float(), (0, outputs - C)).contiguous()
        return Adapter(a_GOR[0].contiguous(), b_GRI[0].contiguous(), bias_O, float(rank), **names)


def _pick(
    of_starts: Sequence[tuple[Tensor, Tensor]], weights_GEN: Tensor, folds_GN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (G, E, N), the errors (G, N) and the picked starts (G, E) of a combination.

    Of several starts, each row takes the one with the least loss on the other rows of the fit, and the rows of a fold
    the one with the least loss on the rows outside.
    """
    if len(of_starts) == 1:
        losses_GEN, errors_GN = of_starts[0]
        return losses_GEN, errors_GN, torch.zeros(losses_GEN.shape[:2], dtype=torch.int8)
    losses_SGEN = torch.stack([losses for losses, _ in of_starts])
    weighted_SGEN = losses_SGEN * weights_GEN.float()
    totals_SGE1 = weighted_SGEN.sum(-1, keepdim=True)
    picked_GEN = losses_SGEN.gather(0, (totals_SGE1 - weighted_SGEN).argmin(0, keepdim=True))[0]
    picks_GE = totals_SGE1[..., 0].argmin(0)
    errors_SGN = torch.stack([errors for _, errors in of_starts])
    start_GN = picks_GE.gather(1, folds_GN.clamp_min(0))
    return picked_GEN, errors_SGN.gather(0, start_GN[None])[0], picks_GE.to(torch.int8)


class Others(NamedTuple):
    """The other groups of each group of a stack, per row of theirs."""

    losses_GX: Tensor
    """Mean losses of rows left out."""
    gains_GX: Tensor
    """Mean gains over the base layer: 0/1 for classes."""


def choose(search: Search, others: Others | None, *, can_keep_base: bool, is_regression: bool) -> Tensor:
    """Return the combination with the least loss for each fit, (G, E) int64.

    can_keep_base: whether the first combination is the base layer. For classes, it is kept unless the other groups gain
    by the combination, or the group's own rows say clearly that they do.
    """
    losses_GEX, weights_GE1 = search.losses_GEX, search.weights_GE[..., None]
    means_GEX = losses_GEX / weights_GE1.clamp_min(1e-300)
    if others is not None:
        means_GEX = (losses_GEX + PSEUDO_ROWS * others.losses_GX[:, None]) / (weights_GE1 + PSEUDO_ROWS)
    chosen_GE = means_GEX.argmin(-1)
    if not can_keep_base or is_regression:
        return chosen_GE
    chosen_GE1 = chosen_GE[..., None]
    rows_GE = search.weights_GE.clamp_min(1.0)
    gain_GE = (losses_GEX[..., 0] - losses_GEX.gather(-1, chosen_GE1)[..., 0]) / rows_GE
    squares_GE = search.squares_GEX.gather(-1, chosen_GE1)[..., 0] / rows_GE
    error_GE = ((squares_GE - gain_GE.square()).clamp_min(0) / rows_GE).sqrt()
    is_clear_GE = gain_GE > (_CLEAR_ALONE if others is None else _CLEAR) * error_GE
    if others is not None:
        is_clear_GE = is_clear_GE | (others.gains_GX.gather(1, chosen_GE) >= _MIN_GAIN)
    return torch.where(is_clear_GE, chosen_GE, 0)


def gains(search: Search, weights_GN: Tensor) -> Tensor:
    """Return the sum of each group's gains over the first combination in outer folds, (G, X) float64."""
    fewer_GXN = search.errors_GXN[:, :1] - search.errors_GXN
    return (fewer_GXN.double() * weights_GN[:, None]).sum(-1)


def chosen_errors(search: Search, chosen_GE: Tensor, folds_GN: Tensor) -> Tensor:
    """Return the error of each row by the combination that the rows outside its fold chose, (G, N) float64."""
    combination_GN = chosen_GE.gather(1, folds_GN.clamp_min(0))
    return search.errors_GXN.gather(1, combination_GN[:, None])[:, 0].double()


def outer_folds(keys_N: Tensor, classes_N: Tensor | None, seed: int) -> Tensor:
    """Return the fold of each row, (N,) int64: rows of one key in one fold, and classes spread over the folds.

    Classes with few rows are spread together. Each by itself, a row that is left out would find more rows of its class
    among the others than a new row does, and the figures would be too good.
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
    """Return equal numbers for rows of equal keys, (N,) int64; None if all keys differ."""
    codes_N = torch.unique(keys_N, return_inverse=True)[1]
    return None if int(codes_N.max()) + 1 == len(keys_N) else codes_N


def combinations_of(
    starts: Sequence[Start], maps: Sequence[FeatureMap], allowed: frozenset[Candidate], *,
    common_map: int | None, steps: Sequence[float], ridges: Sequence[float],
) -> Iterator[Combination]:  # fmt: skip
    """Yield what is tried."""
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
