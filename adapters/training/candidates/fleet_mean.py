"""Means of a fleet: ridge regressions over the rows of all groups, or of clusters of them.

A group must not see its own rows in what it starts from. The coefficients without group g follow from those with it:
with A = ΦᵀΦ + ridge·1, θ = A⁻¹·ΦᵀR and the residuals e of its rows,

    e' = (1 - Φ_g·A⁻¹·Φ_gᵀ)⁻¹·e,    θ₋g = θ - A⁻¹·Φ_gᵀ·e'

which is exact for a fixed ridge and fixed clusters (Cook & Weisberg 1982, section 2.2).
"""

# G groups · N rows of a group, padded · J features · C outputs of the task · K models
from collections.abc import Callable, Iterable, Iterator, Sequence
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
# Parts of a fleet that get the clusters of the others, and rounds of their forming; fewer of a large one, to save time.
_PARTS, _FEW_PARTS, _MANY_GROUPS = 5, 2, 200
_ROUNDS, _FEW_ROUNDS = 3, 2
# Most groups of a part that form its clusters; the others join them.
_FORMING_GROUPS = 150
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

    def to(self, dtype: torch.dtype) -> "GroupRows":
        """Return them with features, and so with results, of this type."""
        return self._replace(features_GNJ=self.features_GNJ.to(dtype))


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

    def changes(self, rows: GroupRows, scores: Scores) -> Tensor:
        """Return the step's change of the outputs of each group, (G, N, C), by the regression without its own rows."""
        x_GNJ = rows.features_GNJ
        changes_GNC = x_GNJ @ self.theta_JC.to(x_GNJ.dtype)
        members, own_GJC = self._own_part(rows, scores)
        if own_GJC is not None:
            changes_GNC[members] -= x_GNJ[members] @ own_GJC
        return changes_GNC.mul_(self.step)

    def thetas(self, rows: GroupRows, scores: Scores) -> Tensor:
        """Return the coefficients that make these changes, (G, J, C)."""
        thetas_GJC = self.theta_JC.to(rows.features_GNJ.dtype).repeat(len(rows.groups), 1, 1)
        members, own_GJC = self._own_part(rows, scores)
        if own_GJC is not None:
            thetas_GJC[members] -= own_GJC
        return thetas_GJC.mul_(self.step)

    def _own_part(self, rows: GroupRows, scores: Scores) -> tuple[Tensor, Tensor | None]:
        """Return the groups that are in the regression, and what their rows add to its coefficients."""
        members = self.is_member[rows.groups].nonzero()[:, 0]
        if not len(members):
            return members, None
        dtype, own = rows.features_GNJ.dtype, rows.at(members)
        roots_GN1 = own.weights_GN.sqrt()[..., None].to(dtype)
        scaled_GNJ = own.features_GNJ * roots_GN1
        residuals_GNC = scores.residuals(own.base_GNC, own.y_GNC).to(dtype)
        errors_GNC = roots_GN1 * residuals_GNC - scaled_GNJ @ self.theta_JC.to(dtype)
        influence_GNJ = scaled_GNJ @ self.inverse_JJ.to(dtype)
        hat_GNN = influence_GNJ @ scaled_GNJ.mT
        left_GNC = torch.linalg.solve(torch.eye(hat_GNN.shape[-1], dtype=dtype) - hat_GNN, errors_GNC)
        return members, influence_GNJ.mT @ left_GNC


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

    def changes(self, rows: GroupRows, scores: Scores) -> Tensor:
        """Return what `CommonModel.changes` returns, from the model of each group's part."""
        return self._of_parts(rows, lambda model, own: model.changes(own, scores))

    def thetas(self, rows: GroupRows, scores: Scores) -> Tensor:
        """Return what `CommonModel.thetas` returns, from the model of each group's part."""
        return self._of_parts(rows, lambda model, own: model.thetas(own, scores))

    def _of_parts(self, rows: GroupRows, value: Callable[[CommonModel, GroupRows], Tensor]) -> Tensor:
        parts_G, values, order = self.part_of[rows.groups], [], []
        for part in parts_G.unique().tolist():
            order.append((parts_G == part).nonzero()[:, 0])
            values.append(value(self.models[part], rows.at(order[-1])))
        return torch.cat(values)[torch.cat(order).argsort()]


def fit_mean(stacks: Stacks, scores: Scores, groups: int) -> CommonModel:
    """Return the regression over all groups of the stacks."""
    is_member = torch.zeros(groups, dtype=torch.bool)
    for rows in stacks():
        is_member[rows.groups] = True
    return _choose(stacks, scores, is_member)


def fit_clusters(stacks: Stacks, scores: Scores, groups: int, mean: CommonModel, *, seed: int) -> list[ClusterModel]:
    """Return regressions over clusters of groups; none if there are too few groups.

    A cluster that a group has helped to form fits the group's rows better than new ones, even if they are left out of
    the regression. So the groups are divided into parts, and each gets the clusters that the other parts have formed.
    """
    # Without the groups that are not in the stacks: they have many rows, or failed. Copies, as in `_sketch`.
    used = torch.cat([rows.groups.clone() for rows in stacks()]).sort().values
    if len(used) < MIN_CLUSTERED_GROUPS:
        return []
    parts, rounds = (_FEW_PARTS, _FEW_ROUNDS) if len(used) >= _MANY_GROUPS else (_PARTS, _ROUNDS)
    part_of = torch.full((groups,), -1)
    part_of[used[torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))]] = (
        torch.arange(len(used)) % parts
    )
    points_GS = _sketch(stacks, scores, groups, seed)
    of_parts = [
        _fit_clusters_of(stacks, scores, (part_of >= 0) & (part_of != part), points_GS, mean, rounds)
        for part in range(parts)
    ]
    return [
        ClusterModel([models[min(cluster, len(models) - 1)] for models in of_parts], part_of)
        for cluster in range(max(map(len, of_parts)))
    ]


def _fit_clusters_of(
    stacks: Stacks, scores: Scores, is_used: Tensor, points_GS: Tensor, mean: CommonModel, rounds: int
) -> list[CommonModel]:
    """Return regressions over clusters of the groups that are used."""
    every = -(-int(is_used.sum()) // _FORMING_GROUPS)
    is_forming = torch.zeros_like(is_used)
    is_forming[is_used.nonzero()[::every, 0]] = True
    cluster_of = _initial_clusters(points_GS, is_forming)
    for _ in range(rounds):
        models = _fit_each(stacks, scores, cluster_of, mean.ridge, mean.step)
        assigned = _assign(stacks, scores, models, is_forming)
        if torch.equal(assigned, cluster_of):
            break
        cluster_of = assigned
    if every > 1:
        models = _fit_each(stacks, scores, cluster_of, mean.ridge, mean.step)
        cluster_of = _assign(stacks, scores, models, is_used)
    # Fewer rows than the mean has, and so a smaller ridge.
    return _fit_each(stacks, scores, cluster_of, mean.ridge / 2, mean.step)


def _fit_each(stacks: Stacks, scores: Scores, cluster_of: Tensor, ridge: float, step: float) -> list[CommonModel]:
    """Return a regression over each cluster, (all groups,) int64; groups of cluster -1 are in none."""
    clusters = cluster_of[cluster_of >= 0].unique().tolist()
    return [_fit(stacks, scores, cluster_of == cluster, ridge, step) for cluster in clusters]


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

    def rows_of(groups: Tensor) -> Iterator[GroupRows]:
        # Classes have ridges that float32 can bear.
        rows = _members(stacks, groups)
        return (own.to(torch.float64) for own in rows) if scores.is_regression else iter(rows)

    sums = _Sums.of(rows_of(is_member), scores)
    assert sums is not None
    chosen = torch.zeros_like(is_member)
    chosen[is_member.nonzero()[:_CHOOSING_GROUPS, 0]] = True
    steps = (1.0,) if scores.is_regression else CLASS_STEPS
    best: tuple[float, float, float] | None = None
    for ridge in RIDGES:
        model = sums.model(ridge, 1.0, is_member)
        totals = dict.fromkeys(steps, 0.0)
        for rows in rows_of(chosen):
            change_GNC = model.changes(rows, scores)
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
        # A copy, because a tensor that is kept would keep the mapping of its record, and a file descriptor.
        order.append(rows.groups.clone())
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
    """Return for each group that is used the model with the least loss on its rows, -1 for others.

    Where a group's rows are in a model, they are left out.
    """
    cluster_of = torch.full((len(is_used),), -1)
    for rows in _members(stacks, is_used):
        losses_KG = []
        for model in models:
            losses_GN = scores.losses(rows.base_GNC + model.changes(rows, scores), rows.y_GNC)
            losses_KG.append((losses_GN * rows.weights_GN).sum(1))
        cluster_of[rows.groups] = torch.stack(losses_KG).argmin(0)
    return cluster_of
