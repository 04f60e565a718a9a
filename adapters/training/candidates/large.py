"""Candidates for an adapter with many rows: sums of features, and a fifth of the training rows to choose by."""

# N rows of a chunk · J features · C outputs of the task · R rank
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adapters.training.candidates.features import FeatureMap
from adapters.training.candidates.scores import Scores
from adapters.training.candidates.small import Combination, Composed, Start

if TYPE_CHECKING:
    from adapters.training.candidates.task import FitTask

RANKS = (1, 2, 4, 8, 16, 32, 64)
# Relative increase of the loss up to which a smaller rank is preferred.
_LOSS_TOLERANCE = 1e-3


class Chunk(NamedTuple):
    """Rows that are read together."""

    x_NI: Tensor
    starts: Sequence[Tensor]
    """Outputs (N, C) that each candidate starts from."""
    y_NC: Tensor
    weights_N: Tensor


@dataclass(slots=True, eq=False)
class _Sums:
    """Weighted sums of one kind of features, and of their products with the residuals of each start."""

    weight: float
    mean_J: Tensor
    gram_JJ: Tensor
    residual_means: list[Tensor]
    crosses: list[Tensor]

    @classmethod
    def of(cls, features: FeatureMap, chunks: Iterator[Chunk], scores: Scores) -> "_Sums":
        sums: _Sums | None = None
        for chunk in chunks:
            phi_NJ, w_N1 = features(chunk.x_NI), chunk.weights_N[:, None]
            weighted_NJ = w_N1 * phi_NJ
            residuals = [scores.residuals(z_NC, chunk.y_NC) for z_NC in chunk.starts]
            part = cls(
                float(chunk.weights_N.sum()),
                weighted_NJ.sum(0),
                weighted_NJ.T @ phi_NJ,
                [(w_N1 * residuals_NC).sum(0) for residuals_NC in residuals],
                [weighted_NJ.T @ residuals_NC for residuals_NC in residuals],
            )
            sums = part if sums is None else sums._plus(part)
        assert sums is not None
        return sums

    def _plus(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.weight + other.weight,
            self.mean_J + other.mean_J,
            self.gram_JJ + other.gram_JJ,
            [mine + theirs for mine, theirs in zip(self.residual_means, other.residual_means, strict=True)],
            [mine + theirs for mine, theirs in zip(self.crosses, other.crosses, strict=True)],
        )

    def solve(
        self, ridges: Sequence[float], starts: Sequence[int], *, free_intercept: bool
    ) -> Iterator[tuple[float, int, Tensor, Tensor]]:
        """Yield ridge, start, coefficients (J, C) and intercept (C,) of each regression."""
        gram_JJ, mean_J = self.gram_JJ, self.mean_J / self.weight
        if free_intercept:
            gram_JJ = gram_JJ - self.weight * mean_J[:, None] * mean_J
        values_J, vectors_JJ = torch.linalg.eigh(gram_JJ)
        values_J = values_J.clamp_min(0)
        for start in starts:
            residual_C, cross_JC = self.residual_means[start] / self.weight, self.crosses[start]
            if free_intercept:
                cross_JC = cross_JC - self.weight * mean_J[:, None] * residual_C
            rotated_JC = vectors_JJ.T @ cross_JC
            for ridge in ridges:
                theta_JC = vectors_JJ @ (rotated_JC / (values_J + ridge)[:, None])
                intercept_C = residual_C - mean_J @ theta_JC if free_intercept else torch.zeros_like(residual_C)
                yield ridge, start, theta_JC, intercept_C


class Scored(NamedTuple):
    """Combination with its mean loss on the rows that choose."""

    combination: Combination
    loss: float
    rank: int


class Reader(NamedTuple):
    """Rows to train on and rows to test on; each call reads them again."""

    training: Callable[[], Iterator[Chunk]]
    testing: Callable[[], Iterator[Chunk]]


def search(
    reader: Reader, maps: Sequence[FeatureMap], combinations: Sequence[Combination], loss_scales: Sequence[float],
    scores: Scores, *, max_rank: int,
) -> list[Scored]:  # fmt: skip
    """Return all combinations with their losses on the rows to test on; the best has the smallest good rank."""
    losses: dict[Combination, float] = {}
    testing_chunks = list(reader.testing())
    weight = sum(float(chunk.weights_N.sum()) for chunk in testing_chunks)
    updates: dict[tuple[int, float, int], tuple[Tensor, Tensor]] = {}
    for combination in combinations:
        if combination.features is None:
            (start,) = combination.starts[:1]
            losses[combination] = (
                sum(
                    float(scores.losses(loss_scales[start] * chunk.starts[start], chunk.y_NC) @ chunk.weights_N)
                    for chunk in testing_chunks
                )
                / weight
            )
    for features, feature_map in enumerate(maps):
        own = [combination for combination in combinations if combination.features == features]
        if not own:
            continue
        sums = _Sums.of(feature_map, reader.training(), scores)
        ridges = sorted({combination.ridge for combination in own})
        starts = sorted({combination.starts[0] for combination in own})
        testing = [(chunk, feature_map(chunk.x_NI)) for chunk in testing_chunks]
        for ridge, start, theta_JC, intercept_C in sums.solve(
            ridges, starts, free_intercept=feature_map.free_intercept
        ):
            if max_rank < min(theta_JC.shape):
                theta_JC = _bounded(theta_JC, max_rank, has_constant=feature_map.constant is not None)
            updates[features, ridge, start] = theta_JC, intercept_C
            changes = [phi_NJ @ theta_JC + intercept_C for _, phi_NJ in testing]
            for step in sorted({combination.step for combination in own}):
                total = 0.0
                for (chunk, _), change_NC in zip(testing, changes, strict=True):
                    z_NC = loss_scales[start] * (chunk.starts[start] + step * change_NC)
                    total += float(scores.losses(z_NC, chunk.y_NC) @ chunk.weights_N)
                losses[Combination((start,), features, ridge, step)] = total / weight
    scored = [Scored(combination, losses[combination], max_rank) for combination in combinations]
    best = min(scored, key=lambda one: one.loss)
    if best.combination.features is not None:
        (first, *_), of, ridge, _ = best.combination
        assert of is not None
        theta_JC, intercept_C = updates[of, ridge, first]
        rank, loss = _choose_rank(
            testing_chunks, maps, best, theta_JC, intercept_C, loss_scales, scores, max_rank, weight
        )
        scored[scored.index(best)] = Scored(best.combination, loss, rank)
    return scored


def _bounded(theta_JC: Tensor, rank: int, *, has_constant: bool) -> Tensor:
    """Return the best approximation of this rank of all coefficients but that of the constant."""
    slope_JC = theta_JC[:-1] if has_constant else theta_JC
    basis_CR = torch.linalg.eigh(slope_JC.T @ slope_JC)[1][:, -rank:]
    slope_JC = slope_JC @ basis_CR @ basis_CR.T
    return torch.cat([slope_JC, theta_JC[-1:]]) if has_constant else slope_JC


def _choose_rank(
    testing: Sequence[Chunk], maps: Sequence[FeatureMap], best: Scored, theta_JC: Tensor, intercept_C: Tensor,
    loss_scales: Sequence[float], scores: Scores, max_rank: int, weight: float,
) -> tuple[int, float]:  # fmt: skip
    """Return the smallest rank that is about as good as the best, and its loss."""
    (start, *_), features, _, step = best.combination
    assert features is not None
    feature_map = maps[features]
    has_constant = feature_map.constant is not None
    slope_JC = theta_JC[:-1] if has_constant else theta_JC
    _, vectors_CC = torch.linalg.eigh(slope_JC.T @ slope_JC)
    vectors_CC = vectors_CC.flip(1)
    full = min(max_rank, len(vectors_CC))
    by_rank = {}
    for rank in [*(rank for rank in RANKS if rank < full), full]:
        basis_CR = vectors_CC[:, :rank]
        total = 0.0
        for chunk in testing:
            phi_NJ = feature_map(chunk.x_NI)
            slope_NC = (phi_NJ[:, :-1] if has_constant else phi_NJ) @ slope_JC @ basis_CR @ basis_CR.T
            constant_C = phi_NJ[0, -1] * theta_JC[-1] if has_constant else intercept_C
            z_NC = loss_scales[start] * (chunk.starts[start] + step * (slope_NC + constant_C))
            total += float(scores.losses(z_NC, chunk.y_NC) @ chunk.weights_N)
        by_rank[rank] = total / weight
    least = min(by_rank.values())
    rank = min(rank for rank, loss in by_rank.items() if loss <= least + abs(least) * _LOSS_TOLERANCE)
    return rank, by_rank[rank]


def compose(
    chunks: Callable[[], Iterator[Chunk]], maps: Sequence[FeatureMap], best: Scored, starts: Sequence[Start],
    task: "FitTask",
) -> Composed:  # fmt: skip
    """Return the update of the best combination, fitted to all training rows, at its rank."""
    (number, *_), features, ridge, step = best.combination
    C, I = task.outputs, task.base.in_features
    delta_CI, bias_C = torch.zeros(C, I, dtype=torch.float64), None
    if features is not None:
        feature_map = maps[features]
        only = (chunk._replace(starts=[chunk.starts[number]]) for chunk in chunks())
        sums = _Sums.of(feature_map, only, task.scores)
        ((_, _, theta_JC, intercept_C),) = sums.solve([ridge], [0], free_intercept=feature_map.free_intercept)
        intercept = step * intercept_C if feature_map.free_intercept else None
        delta_CI, bias_C = feature_map.update(step * theta_JC, intercept)
    return starts[number].from_base(delta_CI, bias_C, task.base).bounded(best.rank)
