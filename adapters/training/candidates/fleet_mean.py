"""Means of a fleet: ridge regressions over the rows of all groups, or of clusters of them.

A group must not see its own rows in what it starts from. The coefficients without group g follow from those with it:
with A = ΦᵀΦ + ridge·1, θ = A⁻¹·ΦᵀR and the residuals e of its rows,

    e' = (1 - Φ_g·A⁻¹·Φ_gᵀ)⁻¹·e,    θ₋g = θ - A⁻¹·Φ_gᵀ·e'

which is exact for a fixed ridge and fixed clusters (Cook & Weisberg 1982, section 2.2).
"""

# G groups · N rows of a group, padded · J features · C outputs of the task · K models
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.training.candidates.scores import Scores

RIDGES = (1.0, 5.0, 25.0, 100.0)
CLASS_STEPS = (1.0, 3.0, 10.0, 30.0, 100.0)
CLUSTERS = 5
# Fewest groups for means of clusters.
MIN_CLUSTERED_GROUPS = 4 * CLUSTERS
_ROUNDS = 3
# Parts of a fleet that get the clusters of the others; fewer of a large one, to save time.
_PARTS, _FEW_PARTS, _MANY_GROUPS = 5, 2, 200
_SKETCH_FEATURES = 32
# Groups by which ridge and step of a mean are chosen.
_CHOOSING_GROUPS = 64


class GroupRows(NamedTuple):
    """Rows of a stack of groups, padded with rows of weight 0."""

    groups: Tensor
    """(G,) int64: numbers of the groups."""
    features_GNJ: Tensor
    base_GNC: Tensor
    """Scaled outputs of the base layer."""
    y_GNC: Tensor
    weights_GN: Tensor

    def at(self, positions: Tensor) -> "GroupRows":
        """Return the rows of some of the groups."""
        return GroupRows(*(part[positions] for part in self))

    def double(self) -> "GroupRows":
        """Return them in float64."""
        return self._replace(features_GNJ=self.features_GNJ.double())


# Returns the stacks of a fleet; a new iterator per call.
Stacks = Callable[[], Iterable[GroupRows]]


@dataclass(frozen=True, slots=True, eq=False)
class CommonModel:
    """Ridge regression over the rows of several groups."""

    inverse_JJ: Tensor
    """A⁻¹."""
    theta_JC: Tensor
    is_member: Tensor
    """(all groups,) bool."""
    ridge: float
    step: float

    def without_own_rows(self, rows: GroupRows, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return for each group the step's change of its outputs, (G, N, C), and the coefficients, (G, J, C).

        Both are those of the regression without the rows of the group itself.
        """
        dtype = rows.features_GNJ.dtype
        x_GNJ, roots_GN1 = rows.features_GNJ, rows.weights_GN.sqrt()[..., None].to(dtype)
        inverse_JJ, theta_JC = self.inverse_JJ.to(dtype), self.theta_JC.to(dtype)
        theta_GJC = theta_JC.expand(len(x_GNJ), -1, -1)
        members = self.is_member[rows.groups].nonzero()[:, 0]
        if len(members):
            scaled_GNJ = x_GNJ[members] * roots_GN1[members]
            residuals_GNC = scores.residuals(rows.base_GNC[members], rows.y_GNC[members]).to(dtype)
            errors_GNC = roots_GN1[members] * residuals_GNC - scaled_GNJ @ theta_JC
            influence_GNJ = scaled_GNJ @ inverse_JJ
            hat_GNN = influence_GNJ @ scaled_GNJ.mT
            left_GNC = torch.linalg.solve(torch.eye(hat_GNN.shape[-1], dtype=dtype) - hat_GNN, errors_GNC)
            theta_GJC = theta_GJC.clone()
            theta_GJC[members] -= influence_GNJ.mT @ left_GNC
        return self.step * (x_GNJ @ theta_GJC), self.step * theta_GJC


@dataclass(slots=True, eq=False)
class _Sums:
    gram_JJ: Tensor
    cross_JC: Tensor

    @classmethod
    def of(cls, stacks: Iterable[GroupRows], scores: Scores) -> "_Sums | None":
        sums = None
        for rows in stacks:
            weighted_GNJ = (rows.features_GNJ * rows.weights_GN[..., None].to(rows.features_GNJ.dtype)).flatten(0, 1)
            residuals_NC = scores.residuals(rows.base_GNC, rows.y_GNC).to(weighted_GNJ.dtype).flatten(0, 1)
            gram_JJ = (weighted_GNJ.T @ rows.features_GNJ.flatten(0, 1)).double()
            cross_JC = (weighted_GNJ.T @ residuals_NC).double()
            sums = cls(gram_JJ, cross_JC) if sums is None else cls(sums.gram_JJ + gram_JJ, sums.cross_JC + cross_JC)
        return sums

    def model(self, ridge: float, step: float, is_member: Tensor) -> CommonModel:
        shifted_JJ = self.gram_JJ + ridge * torch.eye(len(self.gram_JJ), dtype=torch.float64)
        inverse_JJ = torch.cholesky_inverse(torch.linalg.cholesky(shifted_JJ))
        return CommonModel(inverse_JJ, inverse_JJ @ self.cross_JC, is_member, ridge, step)


@dataclass(frozen=True, slots=True, eq=False)
class ClusterModel:
    """Regression over a cluster of groups, one for each part of the fleet, whose groups are in none of the clusters."""

    models: Sequence[CommonModel]
    """By part."""
    part_of: Tensor
    """(all groups,) int64."""

    def without_own_rows(self, rows: GroupRows, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return what `CommonModel.without_own_rows` returns, from the model of each group's part."""
        parts_G = self.part_of[rows.groups]
        changes_GNC, thetas_GJC = torch.zeros_like(rows.base_GNC), None
        for part in parts_G.unique().tolist():
            positions = (parts_G == part).nonzero()[:, 0]
            change_GNC, theta_GJC = self.models[part].without_own_rows(rows.at(positions), scores)
            if thetas_GJC is None:
                thetas_GJC = theta_GJC.new_zeros(len(parts_G), *theta_GJC.shape[1:])
            changes_GNC[positions], thetas_GJC[positions] = change_GNC.to(changes_GNC.dtype), theta_GJC
        assert thetas_GJC is not None
        return changes_GNC, thetas_GJC


def fit_mean(stacks: Stacks, scores: Scores, groups: int) -> CommonModel:
    """Return the regression over all groups."""
    return _choose(stacks, scores, torch.ones(groups, dtype=torch.bool))


def fit_clusters(stacks: Stacks, scores: Scores, groups: int, mean: CommonModel, *, seed: int) -> list[ClusterModel]:
    """Return regressions over clusters of groups; none if there are too few groups.

    A cluster that a group has helped to form fits the group's rows better than new ones, even if they are left out of
    the regression. So the groups are divided into parts, and each gets the clusters that the other parts have formed.
    """
    # Without the groups that are not in the stacks: they have many rows, or failed.
    used = torch.cat([rows.groups for rows in stacks()]).sort().values
    if len(used) < MIN_CLUSTERED_GROUPS:
        return []
    parts = _FEW_PARTS if len(used) >= _MANY_GROUPS else _PARTS
    part_of = torch.full((groups,), -1)
    part_of[used[torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))]] = (
        torch.arange(len(used)) % parts
    )
    points_GS = _sketch(stacks, scores, groups, seed)
    of_parts = [
        _fit_clusters_of(stacks, scores, (part_of >= 0) & (part_of != part), points_GS, mean) for part in range(parts)
    ]
    return [
        ClusterModel([models[min(cluster, len(models) - 1)] for models in of_parts], part_of)
        for cluster in range(max(map(len, of_parts)))
    ]


def _fit_clusters_of(
    stacks: Stacks, scores: Scores, is_used: Tensor, points_GS: Tensor, mean: CommonModel
) -> list[CommonModel]:
    """Return regressions over clusters of the groups that are used."""
    cluster_of = _initial_clusters(points_GS, is_used)
    for _ in range(_ROUNDS):
        models = [
            _fit(stacks, scores, cluster_of == cluster, mean.ridge, mean.step)
            for cluster in cluster_of[is_used].unique().tolist()
        ]
        assigned = torch.where(is_used, _assign(stacks, scores, models, is_used), -1)
        if torch.equal(assigned, cluster_of):
            break
        cluster_of = assigned
    clusters = cluster_of[is_used].unique().tolist()
    # Fewer rows than the mean has, and so a smaller ridge.
    return [_fit(stacks, scores, cluster_of == cluster, mean.ridge / 2, mean.step) for cluster in clusters]


def _members(stacks: Stacks, is_member: Tensor) -> Iterable[GroupRows]:
    for rows in stacks():
        positions = is_member[rows.groups].nonzero()[:, 0]
        if len(positions):
            yield rows.at(positions)


def _fit(stacks: Stacks, scores: Scores, is_member: Tensor, ridge: float, step: float) -> CommonModel:
    sums = _Sums.of(_members(stacks, is_member), scores)
    assert sums is not None
    return sums.model(ridge, step, is_member)


def _choose(stacks: Stacks, scores: Scores, is_member: Tensor) -> CommonModel:
    """Return the regression over these groups, with ridge and step chosen by the loss of groups left out in turn."""
    sums = _Sums.of((rows.double() for rows in _members(stacks, is_member)), scores)
    assert sums is not None
    chosen = torch.zeros_like(is_member)
    chosen[is_member.nonzero()[:_CHOOSING_GROUPS, 0]] = True
    steps = (1.0,) if scores.is_regression else CLASS_STEPS
    best: tuple[float, float, float] | None = None
    for ridge in RIDGES:
        model = sums.model(ridge, 1.0, is_member)
        totals = dict.fromkeys(steps, 0.0)
        for rows in _members(stacks, chosen):
            change_GNC, _ = model.without_own_rows(rows.double(), scores)
            for step in steps:
                losses_GN = scores.losses(rows.base_GNC + step * change_GNC, rows.y_GNC)
                totals[step] += float((losses_GN * rows.weights_GN).sum())
        for step, total in totals.items():
            if best is None or total < best[0]:
                best = total, ridge, step
    assert best is not None
    return sums.model(best[1], best[2], is_member)


def _sketch(stacks: Stacks, scores: Scores, groups: int, seed: int) -> Tensor:
    """Return the directions of the groups' cross moments of features and residuals, (groups, S), by random features."""
    moments: list[Tensor] = []
    order: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    projection_JS: Tensor | None = None
    for rows in stacks():
        if projection_JS is None:
            projection_JS = torch.randn(rows.features_GNJ.shape[-1], _SKETCH_FEATURES, generator=generator)
        sketch_GNS = rows.features_GNJ.float() @ projection_JS * rows.weights_GN[..., None].float()
        residuals_GNC = scores.residuals(rows.base_GNC, rows.y_GNC).float()
        moments.append((sketch_GNS.mT @ residuals_GNC).flatten(1))
        order.append(rows.groups)
    used = torch.cat(order)
    moments_GS = torch.zeros(groups, moments[0].shape[1])
    moments_GS[used] = torch.cat(moments)
    return functional.normalize(moments_GS - moments_GS[used.sort().values].mean(0), dim=1)


def _initial_clusters(points_GS: Tensor, is_used: Tensor) -> Tensor:
    """Return a cluster for each group that is used, -1 for others: k-means by cosine, from centres far apart."""
    used_GS = points_GS[is_used]
    centers = [used_GS[0]]
    while len(centers) < CLUSTERS:
        nearest_G = torch.stack([used_GS @ center for center in centers]).amax(0)
        centers.append(used_GS[nearest_G.argmin()])
    centers_KS = torch.stack(centers)
    for _ in range(10):
        cluster_of = (used_GS @ centers_KS.T).argmax(1)
        sums_KS = torch.zeros_like(centers_KS).index_add_(0, cluster_of, used_GS)
        centers_KS = functional.normalize(sums_KS, dim=1)
    clusters_G = torch.full((len(points_GS),), -1)
    clusters_G[is_used] = cluster_of
    return clusters_G


def _assign(stacks: Stacks, scores: Scores, models: Sequence[CommonModel], is_used: Tensor) -> Tensor:
    """Return for each group the model with the least loss on its rows, without them where they are in the model."""
    cluster_of = torch.zeros(len(is_used), dtype=torch.int64)
    for rows in _members(stacks, is_used):
        losses_KG = []
        for model in models:
            change_GNC, _ = model.without_own_rows(rows, scores)
            losses_GN = scores.losses(rows.base_GNC + change_GNC, rows.y_GNC)
            losses_KG.append((losses_GN * rows.weights_GN).sum(1))
        cluster_of[rows.groups] = torch.stack(losses_KG).argmin(0)
    return cluster_of
