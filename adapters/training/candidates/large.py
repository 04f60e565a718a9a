"""Candidates for an adapter with many rows: sums of features, and a fifth of the training rows to choose by."""

# N rows of a chunk · J features · C outputs of the task · R rank
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adapters.training.candidates.composed import Composed
from adapters.training.candidates.features import FeatureMap
from adapters.training.candidates.scores import Scores
from adapters.training.candidates.small import Combination, Start

if TYPE_CHECKING:
    from adapters.training.candidates.task import FitTask

RANKS = (1, 2, 4, 8, 16, 32, 64)
# Step of a combination that repeats it until the loss is at its minimum.
CONVERGED = math.inf
# Ridges to try with it, and the most numbers of features that it keeps in memory.
_CONVERGED_RIDGES = (1.0, 0.1, 0.01, 0.001)
_MAX_FEATURES = 2**25
_ITERATIONS = 60
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
    updates: dict[tuple[int, float, int, bool], tuple[Tensor, Tensor]] = {}
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
            theta_JC = _at_rank(theta_JC, max_rank, feature_map)
            updates[features, ridge, start, False] = theta_JC, intercept_C
            changes = [phi_NJ @ theta_JC + intercept_C for _, phi_NJ in testing]
            for step in sorted({combination.step for combination in own}):
                total = 0.0
                for (chunk, _), change_NC in zip(testing, changes, strict=True):
                    z_NC = loss_scales[start] * (chunk.starts[start] + step * change_NC)
                    total += float(scores.losses(z_NC, chunk.y_NC) @ chunk.weights_N)
                losses[Combination((start,), features, ridge, step)] = total / weight
    if not scores.is_regression:
        for combination, theta_JC, loss in _converged(
            reader, testing_chunks, maps, combinations, loss_scales, scores, max_rank
        ):
            of, start = combination.features, combination.starts[0]
            assert of is not None
            updates[of, combination.ridge, start, True] = theta_JC, torch.zeros(theta_JC.shape[1]).double()
            losses[combination] = loss / weight
    scored = [Scored(combination, loss, max_rank) for combination, loss in losses.items()]
    best = min(scored, key=lambda one: one.loss)
    if best.combination.features is not None:
        (first, *_), of, ridge, step = best.combination
        assert of is not None
        theta_JC, intercept_C = updates[of, ridge, first, step == CONVERGED]
        rank, loss = _choose_rank(
            testing_chunks, maps, best, theta_JC, intercept_C, loss_scales, scores, max_rank, weight
        )
        scored[scored.index(best)] = Scored(best.combination, loss, rank)
    return scored


def _converged(
    reader: Reader, testing: Sequence[Chunk], maps: Sequence[FeatureMap], combinations: Sequence[Combination],
    loss_scales: Sequence[float], scores: Scores, max_rank: int,
) -> Iterator[tuple[Combination, Tensor, float]]:  # fmt: skip
    """Yield combinations that are fitted to the minimum, with their coefficients and summed losses."""
    pairs = sorted({
        (combination.features, combination.starts[0])
        for combination in combinations
        if combination.features is not None and loss_scales[combination.starts[0]] == 1
    })  # fmt: skip
    for features, start in pairs:
        feature_map, theta_JC = maps[features], None
        rows = _in_memory(reader.training, feature_map, start)
        if rows is None:
            return
        for ridge in _CONVERGED_RIDGES:
            theta_JC = minimize(*rows, ridge, scores, theta_JC)
            bounded_JC = _at_rank(theta_JC, max_rank, feature_map)
            total = 0.0
            for chunk in testing:
                outputs_NC = chunk.starts[start] + feature_map(chunk.x_NI) @ bounded_JC
                total += float(scores.losses(outputs_NC, chunk.y_NC) @ chunk.weights_N)
            yield Combination((start,), features, ridge, CONVERGED), bounded_JC, total


def _in_memory(
    chunks: Callable[[], Iterator[Chunk]], feature_map: FeatureMap, start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return features, start outputs, targets and weights of all rows; None if they are too many."""
    parts, numbers = [], 0
    for chunk in chunks():
        phi_NJ = feature_map(chunk.x_NI)
        numbers += phi_NJ.numel()
        if numbers > _MAX_FEATURES:
            return None
        parts.append((phi_NJ, chunk.starts[start], chunk.y_NC, chunk.weights_N))
    phi, starts, y, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    return phi, starts, y, weights


def minimize(
    phi_NJ: Tensor, start_NC: Tensor, y_NC: Tensor, weights_N: Tensor, ridge: float, scores: Scores,
    theta_JC: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the coefficients (J, C) with the least sum of losses plus ridge/2·‖θ‖², by L-BFGS from those given."""
    parameters = torch.zeros(phi_NJ.shape[1], start_NC.shape[1], dtype=torch.float64) if theta_JC is None else theta_JC
    parameters = parameters.clone().requires_grad_()
    # The mean over labels has a small gradient; the ridge is for the sum.
    outputs = start_NC.shape[1] if scores.is_shares else 1
    optimizer = torch.optim.LBFGS([parameters], max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses_N = scores.losses(start_NC + phi_NJ @ parameters, y_NC)
        loss = outputs * (losses_N @ weights_N) + ridge / 2 * parameters.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return parameters.detach()


def _at_rank(theta_JC: Tensor, rank: int, feature_map: FeatureMap) -> Tensor:
    """Return the best approximation of this rank of all coefficients but that of the constant."""
    has_constant = feature_map.constant is not None
    slope_JC = theta_JC[:-1] if has_constant else theta_JC
    if rank >= min(slope_JC.shape):
        return theta_JC
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
    step, feature_map = 1.0 if step == CONVERGED else step, maps[features]
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
        if step == CONVERGED:
            rows = _in_memory(chunks, feature_map, number)
            assert rows is not None
            theta_JC = _at_rank(minimize(*rows, ridge, task.scores), best.rank, feature_map)
            return starts[number].from_base(*feature_map.update(theta_JC, None), task.base)
        only = (chunk._replace(starts=[chunk.starts[number]]) for chunk in chunks())
        sums = _Sums.of(feature_map, only, task.scores)
        ((_, _, theta_JC, intercept_C),) = sums.solve([ridge], [0], free_intercept=feature_map.free_intercept)
        intercept = step * intercept_C if feature_map.free_intercept else None
        theta_JC = _at_rank(step * theta_JC, best.rank, feature_map)
        delta_CI, bias_C = feature_map.update(theta_JC, intercept)
    return starts[number].from_base(delta_CI, bias_C, task.base)


def left_out(
    chunks: Callable[[], Iterator[Chunk]], maps: Sequence[FeatureMap], best: Scored, starts: Sequence[Start],
    scores: Scores,
) -> Tensor:  # fmt: skip
    """Return the outputs (N, C) of all rows, each by the fit of one step without the row: e / (1 - h)."""
    (number, *_), features, ridge, step = best.combination
    scale = starts[number].loss_scale
    if features is None:
        return torch.cat([scale * chunk.starts[number] for chunk in chunks()])
    feature_map = maps[features]
    sums = _Sums.of(feature_map, (chunk._replace(starts=[chunk.starts[number]]) for chunk in chunks()), scores)
    identity_JJ = torch.eye(len(sums.gram_JJ), dtype=torch.float64)
    inverse_JJ = torch.cholesky_inverse(torch.linalg.cholesky(sums.gram_JJ + ridge * identity_JJ))
    theta_JC, outputs = inverse_JJ @ sums.crosses[0], []
    for chunk in chunks():
        z_NC, phi_NJ = chunk.starts[number], feature_map(chunk.x_NI)
        leverage_N = chunk.weights_N * (phi_NJ @ inverse_JJ * phi_NJ).sum(1)
        residuals_NC = scores.residuals(z_NC, chunk.y_NC)
        left_NC = (residuals_NC - phi_NJ @ theta_JC) / (1 - leverage_N).clamp_min(1e-12)[:, None]
        outputs.append(scale * (z_NC + step * (residuals_NC - left_NC)))
    return torch.cat(outputs)
