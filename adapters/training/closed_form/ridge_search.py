"""Ridge and rank by the loss of rows that were held out: every pair of them from one decomposition."""

# I in_features · O out_features · K columns of the longest path
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.training.closed_form.solver import reduced_rank, spectrum, sums_for
from adapters.training.closed_form.statistics import Statistics

LOSS_TOLERANCE = 1e-3
"""How much worse than the best, relatively, the loss of a smaller rank may be to be preferred."""
_ROUNDING = 1e-12
"""Relative to the bare base's loss: losses that differ by less are the same."""
_MIN_SHARED_RIDGE = 1e-9
"""Ridges below this share of the largest eigenvalue are solved one by one, at unit diagonal: the shared decomposition
is only exact to rounding of that eigenvalue."""
_WELL_CONDITIONED = 1e-8


class Candidate(NamedTuple):
    """One pair and what it comes to."""

    ridge: float
    rank: int
    loss: float
    """The held-out rows' weighted mean of the squared error over all elements."""


@dataclass(frozen=True, slots=True)
class RidgeChoice:
    """The pair that is chosen, and all that were tried: by ridge, then rank, as they were given."""

    ridge: float
    rank: int
    loss: float
    table: tuple[Candidate, ...]


class _HeldOutSums(NamedTuple):
    """The held-out rows' sums about the point where training centres, in the eigenvectors of the training rows."""

    gram_II: Tensor
    cross_IO: Tensor
    square: Tensor

    def path(self, p_IK: Tensor, v_OK: Tensor) -> Tensor:
        """(K,): the squared error of ΔWᵀ = Σ p·vᵀ over the first 1, 2, … K columns; V's are orthonormal."""
        gained_K = 2 * (self.cross_IO.T @ p_IK * v_OK).sum(0) - (p_IK * (self.gram_II @ p_IK)).sum(0)
        return (self.square - gained_K.cumsum(0)).clamp(min=0.0)


def default_ridges(statistics: Statistics, *, bias: bool) -> list[float]:
    """Two a decade, from 1e-5 to 100 times the mean of the columns' sums of squares; and 0 where that is safe."""
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
    turned = _HeldOutSums(vectors_II.T @ held.gram_II @ vectors_II, vectors_II.T @ held.cross_IO, held.square)
    cross_IO = vectors_II.T @ sums.cross_IO
    given_IO = None if prior_OI is None else prior_OI.to(cross_IO).T
    prior_IO = torch.zeros_like(cross_IO) if given_IO is None else vectors_II.T @ given_IO
    longest = min(max(ranks), *cross_IO.shape)
    elements = held_out.weight * held_out.out_features
    table = []
    for ridge in ridges:
        if ridge > 0 and ridge >= _MIN_SHARED_RIDGE * float(values_I[-1]):
            p_IK, v_OK = _leading_columns(values_I + ridge, cross_IO + ridge * prior_IO, longest)
        else:
            solution_GIO, basis_GOK = reduced_rank(
                sums.gram_II[None],
                sums.cross_IO[None],
                ridge_G=sums.gram_II.new_tensor([ridge]),
                rank=longest,
                prior_GIO=None if given_IO is None else given_IO[None],
            )
            v_OK = basis_GOK[0]
            p_IK = vectors_II.T @ (solution_GIO[0] @ v_OK)
        losses_K = (turned.path(p_IK, v_OK) / elements).tolist()
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
    """As `search_ridge`, with each of two or more parts held out in turn from what the others train (Stone 1974).

    A pair's loss is the mean over the rows of all parts. Each part has rows.
    """
    tables = []
    for turn, held_out in enumerate(parts):
        others = reduce(Statistics.plus, (part for place, part in enumerate(parts) if place != turn))
        tables.append(search_ridge(others, held_out, ranks=ranks, ridges=ridges, bias=bias, prior_OI=prior_OI).table)
    total = sum(part.weight for part in parts)
    shares = [part.weight / total for part in parts]
    table = [
        Candidate(same[0].ridge, same[0].rank, sum(share * each.loss for share, each in zip(shares, same, strict=True)))
        for same in zip(*tables, strict=True)
    ]
    return _choose(table, bare=sum(part.square for part in parts) / (total * parts[0].out_features))


def _leading_columns(values_I: Tensor, cross_IO: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """P = M·V (I, K) and V (O, K) for G = diag(values): V from the smaller of the two squares of G^½·M."""
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
    near = [each for each in table if each.loss <= least * (1 + LOSS_TOLERANCE) + _ROUNDING * bare]
    rank = min(candidate.rank for candidate in near)
    of_rank = [candidate for candidate in near if candidate.rank == rank]
    lowest = min(candidate.loss for candidate in of_rank)
    best = max((each for each in of_rank if each.loss <= lowest + _ROUNDING * bare), key=lambda each: each.ridge)
    return RidgeChoice(best.ridge, best.rank, best.loss, tuple(table))
