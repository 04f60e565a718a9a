"""Choice of ridge and rank by held-out loss, with one decomposition for all pairs."""

# I in_features · O out_features · K columns of the longest path
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.training.closed_form.solver import reduced_rank, spectrum, sums_for
from adapters.training.closed_form.statistics import Statistics, Sums

# Relative increase of the loss up to which a smaller rank is preferred.
LOSS_TOLERANCE = 1e-3
# Difference, relative to the base layer's loss, below which losses are equal.
_ROUNDING = 1e-12
# Ridges below this share of the largest eigenvalue are solved one by one, at unit diagonal, because the shared
# decomposition is exact only to rounding of that eigenvalue.
_MIN_SHARED_RIDGE = 1e-9
_WELL_CONDITIONED = 1e-8


class Candidate(NamedTuple):
    """Pair of ridge and rank, with its held-out loss."""

    ridge: float
    rank: int
    loss: float
    """Weighted mean of the squared error over all elements of the held-out rows."""


@dataclass(frozen=True, slots=True)
class RidgeChoice:
    """Chosen pair, and all candidates in the given order of ridges, then ranks."""

    ridge: float
    rank: int
    loss: float
    table: tuple[Candidate, ...]


def default_ridges(statistics: Statistics, *, bias: bool) -> list[float]:
    """Return two ridges per decade, from 1e-5 to 100 times the mean diagonal, and 0 if that is well conditioned."""
    gram_II = sums_for(statistics, bias=bias).gram_II
    middle = float(gram_II.diagonal().mean()) or 1.0
    ridges = [middle * 10 ** (half / 2) for half in range(-10, 5)]
    values_I = spectrum(gram_II, gram_II.new_zeros(())).values_I
    return [0.0, *ridges] if float(values_I[0]) > _WELL_CONDITIONED * float(values_I[-1]) else ridges


def search_ridge(
    training: Statistics,
    held_out: Statistics,
    *,
    ranks: Sequence[int],
    ridges: Sequence[float],
    bias: bool = False,
    prior_OI: Tensor | None = None,
) -> RidgeChoice:
    """Return the ridge and the rank with the least held-out loss after training on `training` alone.

    Both statistics have rows, and neither list is empty. The smallest rank whose loss is within `LOSS_TOLERANCE` of the
    least is chosen; of that rank, the ridge with the least loss; of equal losses, the larger ridge. Each loss is that
    of the float64 minimum, before its factors are rounded.
    """
    sums = sums_for(training, bias=bias)
    held = held_out.about(training.mean_I, training.mean_O) if bias else held_out.about_zero()
    values_I, vectors_II = torch.linalg.eigh(sums.gram_II)
    values_I = values_I.clamp(min=0.0)
    # In the basis of the eigenvectors.
    held = Sums(vectors_II.T @ held.gram_II @ vectors_II, vectors_II.T @ held.cross_IO, held.square)
    cross_IO = vectors_II.T @ sums.cross_IO
    prior_IO = 0.0 if prior_OI is None else vectors_II.T @ prior_OI.to(cross_IO).T
    longest = min(max(ranks), *cross_IO.shape)
    elements = held_out.weight * held_out.out_features
    table = []
    for ridge in ridges:
        if ridge > 0 and ridge >= _MIN_SHARED_RIDGE * float(values_I[-1]):
            p_IK, v_OK = _leading_columns(values_I + ridge, cross_IO + ridge * prior_IO, longest)
        else:
            solution_GIO, basis_GOK = reduced_rank(
                sums.gram_II[None], sums.cross_IO[None], ridge=ridge, rank=longest, prior_OI=prior_OI
            )
            v_OK = basis_GOK[0]
            p_IK = vectors_II.T @ (solution_GIO[0] @ v_OK)
        losses_K = (_squared_errors(held, p_IK, v_OK) / elements).tolist()
        table += [Candidate(ridge, rank, losses_K[min(rank, longest) - 1]) for rank in ranks]
    return _choose(table, bare=float(held.square) / elements)


def cross_validate_ridge(
    parts: Sequence[Statistics],
    *,
    ranks: Sequence[int],
    ridges: Sequence[float],
    bias: bool = False,
    prior_OI: Tensor | None = None,
) -> RidgeChoice:
    """Return the choice by cross-validation: each of two or more parts is held out in turn (Stone 1974).

    The loss of a pair is the mean over the rows of all parts. Each part has rows.
    """
    tables = []
    for index, held_out in enumerate(parts):
        others = reduce(Statistics.plus, (part for other, part in enumerate(parts) if other != index))
        tables.append(search_ridge(others, held_out, ranks=ranks, ridges=ridges, bias=bias, prior_OI=prior_OI).table)
    total = sum(part.weight for part in parts)
    shares = [part.weight / total for part in parts]
    table = [
        Candidate(same[0].ridge, same[0].rank, sum(share * fold.loss for share, fold in zip(shares, same, strict=True)))
        for same in zip(*tables, strict=True)
    ]
    return _choose(table, bare=sum(part.square for part in parts) / (total * parts[0].out_features))


def _squared_errors(held: Sums, p_IK: Tensor, v_OK: Tensor) -> Tensor:
    """Return the squared errors of ΔWᵀ = Σ p·vᵀ over the first 1, 2, … K columns, (K,). V is orthonormal."""
    gained_K = 2 * (held.cross_IO.T @ p_IK * v_OK).sum(0) - (p_IK * (held.gram_II @ p_IK)).sum(0)
    return (held.square - gained_K.cumsum(0)).clamp(min=0.0)


def _leading_columns(values_I: Tensor, cross_IO: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return P = M·V (I, K) and V (O, K) for G = diag(values), from the smaller of the two squares of G^½·M."""
    roots_I1 = values_I.rsqrt()[:, None]
    whitened_IO = roots_I1 * cross_IO
    if cross_IO.shape[1] <= cross_IO.shape[0]:
        v_OK = torch.linalg.eigh(whitened_IO.T @ whitened_IO).eigenvectors.flip(1)[:, :most]
    else:
        strengths_K, left_IK = (t.flip(-1)[..., :most] for t in torch.linalg.eigh(whitened_IO @ whitened_IO.T))
        sound_K = strengths_K > len(strengths_K) * torch.finfo(strengths_K.dtype).eps * strengths_K[0]
        v_OK = (whitened_IO.T @ left_IK) * torch.where(sound_K, strengths_K.clamp(min=0.0).rsqrt(), 0.0)
    return roots_I1 * (whitened_IO @ v_OK), v_OK


def _choose(table: Sequence[Candidate], *, bare: float) -> RidgeChoice:
    least = min(candidate.loss for candidate in table)
    near = [candidate for candidate in table if candidate.loss <= least * (1 + LOSS_TOLERANCE) + _ROUNDING * bare]
    rank = min(candidate.rank for candidate in near)
    of_rank = [candidate for candidate in near if candidate.rank == rank]
    lowest = min(candidate.loss for candidate in of_rank)
    # Of one rank, the largest is that with the largest ridge.
    best = max(candidate for candidate in of_rank if candidate.loss <= lowest + _ROUNDING * bare)
    return RidgeChoice(*best, tuple(table))
