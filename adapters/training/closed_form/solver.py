"""Closed-form solver: the best adapter of a rank under squared error, from one decomposition.

This is reduced-rank regression (Izenman 1975, section 2) with a ridge (Mukherjee & Zhu 2011, section 2). Over all ΔW of
at most that rank and, with a bias, over all β, the adapter minimises

    Σ w·‖x·ΔWᵀ + β − r‖² + ridge·‖ΔW − ΔW₀‖²_F,    r = y − x·Wᵀ − b

where ΔW₀ is the prior, or 0. β has no ridge, so minimising over it means centring x and r at their weighted means.
"""

# I in_features · O out_features · R rank · K directions kept · F directions free · G groups · … leading dimensions
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.errors import Diverged
from adapters.training.closed_form.statistics import Statistics, Sums

_MIN_CUTOFF_SIZE = 64


class Factors(NamedTuple):
    """Factors of an adapter; of a stack, with leading dimension G."""

    a_OR: Tensor
    b_RI: Tensor
    bias_O: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Factors":
        """Return the factors after the same change to each tensor."""
        return Factors(change(self.a_OR), change(self.b_RI), None if self.bias_O is None else change(self.bias_O))

    def at(self, index: int | slice) -> "Factors":
        """Return the factors of one adapter of a stack, or of a slice of them."""
        return self.map(itemgetter(index))


class Spectrum(NamedTuple):
    """Eigendecomposition of G = Σ + ridge·1, scaled to unit diagonal."""

    scale_I: Tensor
    """1 / √diagonal."""
    values_I: Tensor
    vectors_II: Tensor
    kept_I: Tensor
    """Whether each eigenvalue is more than rounding. X does not vary along the other directions: they are free."""

    def kept(self) -> "Spectrum":
        """Return the part of one group's spectrum that is more than rounding."""
        return Spectrum(self.scale_I, self.values_I[self.kept_I], self.vectors_II[:, self.kept_I], self.kept_I)

    def whitening(self) -> Tensor:
        """Return columns in which G is the identity, (…, I, K); the values must be more than rounding."""
        return (self.scale_I[..., None] * self.vectors_II) * self.values_I.rsqrt()[..., None, :]


def solve(
    statistics: Statistics,
    *,
    rank: int,
    scaling: float,
    ridge: float,
    bias: bool = False,
    prior_OI: Tensor | None = None,
) -> Factors:
    """Return the factors of the minimum, with s·A·B = ΔW and s·bias = β.

    If several ΔW are minima, the result is the one nearest to ΔW₀, which is the limit of a ridge that goes to 0. It is
    computed in float64. Rank that the minimum does not need is padded with zeros. Raises `Diverged` if statistics or
    factors overflow.
    """
    factors, (error,) = solve_stack(
        statistics[None], rank=rank, scaling=scaling, ridge=ridge, bias=bias, prior_OI=prior_OI
    )
    if error is not None:
        raise error
    return factors.at(0)


def solve_stack(
    statistics: Statistics,
    *,
    rank: int,
    scaling: float,
    ridge: float | Tensor,
    bias: bool = False,
    prior_OI: Tensor | None = None,
) -> tuple[Factors, list[Diverged | None]]:
    """Return the factors of each group of a stack, A (G, O, R), B (G, R, I) and bias (G, O), and each group's error.

    ridge: one for all groups, or (G,). prior_OI: (O, I) for all groups, or (G, O, I). The factors of a group with an
    error are 0. `solve` has the details.
    """
    sums = sums_for(statistics, bias=bias)
    sound_G = torch.isfinite(sums.gram_II).all(-1).all(-1) & torch.isfinite(sums.cross_IO).all(-1).all(-1)
    gram_GII, cross_GIO = (torch.where(sound_G[:, None, None], sum_GIJ, 0.0) for sum_GIJ in sums[:2])
    solution_GIO, basis_GOR = reduced_rank(gram_GII, cross_GIO, ridge=ridge, rank=rank, prior_OI=prior_OI)
    a_GOR, b_GRI = balanced_factors(solution_GIO, basis_GOR, scaling=scaling)
    bias_GO = None
    if bias:
        # From the rounded factors, so that the bias corrects the effect of their rounding at the mean.
        shift_GR = (b_GRI.double() @ statistics.mean_I[..., None]).squeeze(-1)
        fitted_GO = scaling * (a_GOR.double() @ shift_GR[..., None]).squeeze(-1)
        bias_GO = ((statistics.mean_O - fitted_GO) / scaling).float()
    parts = [factor for factor in (a_GOR, b_GRI, bias_GO) if factor is not None]
    for factor in parts:
        sound_G = sound_G & torch.isfinite(factor).flatten(1).all(1)
    for factor in parts:
        factor[~sound_G] = 0.0
    factors = Factors(a_GOR, b_GRI, bias_GO).map(lambda part: part.cpu().contiguous())
    expected = "inputs and targets of smaller magnitude, or a ridge"
    return factors, [
        None if sound else Diverged("the minimum has factors past what float32 holds", step=1, expected=expected)
        for sound in sound_G.tolist()
    ]


def loss_of_factors(statistics: Statistics, factors: Factors, *, scaling: float) -> float:
    """Return the weighted mean of the squared error over all elements, without the ridge term.

    It is computed from the sums, so anything below 1e-15 of the base layer's loss is rounding.
    """
    a_OR, b_RI = scaling * factors.a_OR.to(statistics.mean_O), factors.b_RI.to(statistics.mean_I)
    offset_O = statistics.mean_O - a_OR @ (b_RI @ statistics.mean_I)
    if factors.bias_O is not None:
        offset_O = offset_O - scaling * factors.bias_O.to(offset_O)
    fitted = ((b_RI @ statistics.gram_II @ b_RI.T) * (a_OR.T @ a_OR)).sum()
    met = ((b_RI @ statistics.cross_IO) * a_OR.T).sum()
    error = statistics.spread - 2 * met + fitted + statistics.total * offset_O.square().sum()
    return max(0.0, float(error)) / (statistics.weight * statistics.out_features)


def sums_for(statistics: Statistics, *, bias: bool) -> Sums:
    """Return the sums that the minimum depends on: about the means with a bias, else about zero."""
    if not bias:
        return statistics.about_zero()
    varies_I = ~statistics.constant()
    return Sums(
        statistics.gram_II * (varies_I[..., None] & varies_I[..., None, :]),
        statistics.cross_IO * varies_I[..., None],
        statistics.spread,
    )


def spectrum(gram_II: Tensor, ridge: Tensor) -> Spectrum:
    """Return the spectrum of gram + ridge·1, for (…, I, I) and a ridge for all or (…)."""
    gram_II = gram_II + ridge[..., None, None] * torch.eye(gram_II.shape[-1], dtype=ridge.dtype, device=ridge.device)
    # Scaled to unit diagonal, because columns of X may differ by 1e9 in scale, and the small ones would be lost.
    diagonal_I = gram_II.diagonal(dim1=-2, dim2=-1)
    scale_I = torch.where(diagonal_I > 0, diagonal_I, 1.0).rsqrt()
    values_I, vectors_II = torch.linalg.eigh(scale_I[..., None] * gram_II * scale_I[..., None, :])
    return Spectrum(scale_I, values_I, vectors_II, values_I > eigenvalue_cutoff(values_I))


def eigenvalue_cutoff(values_I: Tensor) -> Tensor:
    """Return the largest eigenvalue that counts as rounding, (…, 1).

    Rounding of the decomposition is n·ε·λmax. Columns that differ by no more than float32 rounding have squared
    differences of about 16·ε.
    """
    return max(values_I.shape[-1], _MIN_CUTOFF_SIZE) * torch.finfo(values_I.dtype).eps * values_I[..., -1:]


def reduced_rank(
    gram_GII: Tensor, cross_GIO: Tensor, *, ridge: float | Tensor, rank: int, prior_OI: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the full-rank minimiser M (G, I, O) and an orthonormal basis V (G, O, R).

    ridge and prior_OI: for all groups, or with leading dimension G.

    ΔWᵀ = M·V·Vᵀ is the minimiser of the given rank. The last columns of V are 0 if fewer are needed.

    With G = XᵀX + ridge·1 and M = G⁻¹(XᵀR + ridge·ΔW₀ᵀ) the loss is a constant plus ‖G^½·(ΔWᵀ − M)‖², so V spans the
    leading right singular vectors of G^½·M (Eckart & Young 1936).
    """
    ridge = torch.as_tensor(ridge, dtype=gram_GII.dtype, device=gram_GII.device)
    prior_GIO = None
    if prior_OI is not None:
        prior_GIO = prior_OI.to(cross_GIO).mT.expand_as(cross_GIO)
        cross_GIO = cross_GIO + ridge[..., None, None] * prior_GIO
    decomposition = spectrum(gram_GII, ridge)
    full_G = decomposition.kept_I.all(-1)
    if bool(full_G.all()):
        return _full_rank_basis(decomposition, cross_GIO, rank)
    solution_GIO = torch.empty_like(cross_GIO)
    basis_GOR = cross_GIO.new_zeros(len(cross_GIO), cross_GIO.shape[-1], rank)
    if bool(full_G.any()):
        full = Spectrum(*(part[full_G] for part in decomposition))
        solution_GIO[full_G], basis_GOR[full_G] = _full_rank_basis(full, cross_GIO[full_G], rank)
    for group in torch.nonzero(~full_G).flatten().tolist():
        single = Spectrum(*(part[group] for part in decomposition))
        prior_IO = None if prior_GIO is None else prior_GIO[group]
        solution_GIO[group], basis_OK = _minimum_norm_basis(single, cross_GIO[group], rank, prior_IO)
        basis_GOR[group, :, : basis_OK.shape[1]] = basis_OK
    return solution_GIO, basis_GOR


def _full_rank_basis(decomposition: Spectrum, cross_GIO: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    directions_GII = decomposition.whitening()
    whitened_GIO = directions_GII.mT @ cross_GIO
    right_GKO = torch.linalg.svd(whitened_GIO, full_matrices=False).Vh[:, :rank]
    return directions_GII @ whitened_GIO, functional.pad(right_GKO, (0, 0, 0, rank - right_GKO.shape[1])).mT


def _minimum_norm_basis(
    decomposition: Spectrum, cross_IO: Tensor, rank: int, prior_IO: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return solution and basis of one group whose rows and ridge leave some directions free.

    Along free directions, the solution is the prior. As the limit of a ridge that goes to 0, the basis consists of the
    directions of the rows first, and then of those of the prior.
    """
    directions_IK = decomposition.kept().whitening()
    whitened_KO = directions_IK.T @ cross_IO
    right_KO = _right_singular(whitened_KO, rank)
    solution_IO = directions_IK @ whitened_KO
    free_IF = decomposition.scale_I[:, None] * decomposition.vectors_II[:, ~decomposition.kept_I]
    free_IF = torch.linalg.qr(functional.normalize(free_IF, dim=0)).Q
    solution_IO = solution_IO - free_IF @ (free_IF.T @ solution_IO)
    if prior_IO is None:
        return solution_IO, right_KO.T
    free_FO = free_IF.T @ prior_IO
    rest_FO = free_FO - (free_FO @ right_KO.T) @ right_KO
    more_KO = _right_singular(rest_FO, rank - right_KO.shape[0], of=free_FO)
    return solution_IO + free_IF @ free_FO, torch.cat([right_KO, more_KO]).T


def _right_singular(matrix_KO: Tensor, most: int, of: Tensor | None = None) -> Tensor:
    """Return the leading right singular vectors, (≤ most, O), above rounding (relative to `of` if it is given)."""
    if 0 in matrix_KO.shape:
        return matrix_KO[:0]
    _, strengths_K, right_KO = torch.linalg.svd(matrix_KO, full_matrices=False)
    largest = strengths_K[0] if of is None else torch.linalg.matrix_norm(of)
    cut = max(matrix_KO.shape) * torch.finfo(matrix_KO.dtype).eps * largest
    strong_KO: Tensor = right_KO[strengths_K > cut]
    return strong_KO[:most]


def balanced_factors(solution_GIO: Tensor, basis_GOR: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """Return balanced factors: column k of A and row k of B have equal norms, and A's largest entry is positive."""
    right_GIR = solution_GIO @ basis_GOR
    norms_GR = torch.linalg.vector_norm(right_GIR, dim=-2)
    share_GR = (norms_GR / scaling).sqrt()
    signs_GR = basis_GOR.gather(-2, basis_GOR.abs().argmax(dim=-2, keepdim=True)).sign().squeeze(-2)
    weights_G1R = (share_GR * signs_GR)[..., None, :]
    a_GOR = basis_GOR * weights_G1R
    b_GIR = functional.normalize(right_GIR, dim=-2, eps=0.0).nan_to_num() * weights_G1R
    return a_GOR.float(), b_GIR.mT.float()
