"""The best adapter of a rank under squared error, from one decomposition.

Reduced-rank regression (Izenman 1975, section 2), with a ridge (Mukherjee & Zhu 2011, section 2). Over all ΔW of at
most that rank and, where a bias is asked for, all β, the adapter minimises

    Σ w·‖x·ΔWᵀ + β − r‖² + ridge·‖ΔW − ΔW₀‖²_F,    r = y − x·Wᵀ − b

where ΔW₀ is the prior's, or 0. β has no ridge: minimising over it is centring x and r at their weighted means.
"""

# I in_features · O out_features · R rank · K directions kept · F directions free · G groups · … leading dimensions
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.errors import Diverged
from adapters.training.closed_form.statistics import Statistics, Sums

_MIN_CUTOFF_SIZE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """What an adapter has, float32 and contiguous on the CPU; in a stack each with G in front."""

    a_OR: Tensor
    b_RI: Tensor
    bias_O: Tensor | None


class Spectrum(NamedTuple):
    """The eigenvectors of G = Σ + ridge·1 once it has a unit diagonal."""

    scale_I: Tensor
    """1 / √diagonal."""
    values_I: Tensor
    vectors_II: Tensor
    kept_I: Tensor
    """Which of them are more than rounding. Along the others X does not vary: they are free."""


def solve(
    statistics: Statistics,
    *,
    rank: int,
    scaling: float,
    ridge: float,
    bias: bool = False,
    prior_OI: Tensor | None = None,
) -> Factors:
    """The factors with s·A·B = ΔW and s·bias = β of the minimum.

    Where several ΔW are minima, the one that is nearest to ΔW₀ is taken: the limit of a ridge that goes to 0. Float64
    inside. Rank that the minimum does not need is padded with zeros. Raises `Diverged` where statistics or factors
    are past what their dtype holds.
    """
    stack = Statistics.stack([statistics])
    factors, (error,) = solve_stack(stack, rank=rank, scaling=scaling, ridge=ridge, bias=bias, prior_OI=prior_OI)
    if error is not None:
        raise error
    return Factors(factors.a_OR[0], factors.b_RI[0], None if factors.bias_O is None else factors.bias_O[0])


def solve_stack(
    statistics: Statistics,
    *,
    rank: int,
    scaling: float,
    ridge: float | Tensor,
    bias: bool = False,
    prior_OI: Tensor | None = None,
) -> tuple[Factors, list[Diverged | None]]:
    """`solve` for each group of a stack, together: A (G, O, R), B (G, R, I) and bias (G, O); and each group's error.

    ridge: one, or (G,). prior_OI: (O, I) for all of them, or (G, O, I). The factors of a group with an error are 0.
    """
    sums = sums_for(statistics, bias=bias)
    sound_G = torch.isfinite(sums.gram_II).all(-1).all(-1) & torch.isfinite(sums.cross_IO).all(-1).all(-1)
    gram_GII, cross_GIO = (torch.where(sound_G[:, None, None], each, 0.0) for each in sums[:2])
    ridge_G = torch.as_tensor(ridge, dtype=torch.float64, device=gram_GII.device).expand(len(gram_GII))
    prior_GIO = None
    if prior_OI is not None:
        prior_GIO = prior_OI.to(cross_GIO).mT.expand_as(cross_GIO)
    solution_GIO, basis_GOR = reduced_rank(gram_GII, cross_GIO, ridge_G=ridge_G, rank=rank, prior_GIO=prior_GIO)
    a_GOR, b_GRI = _balanced_factors(solution_GIO, basis_GOR, scaling=scaling)
    bias_GO = None
    if bias:
        # From the factors as they are stored: what their rounding did at the mean is made good.
        shift_GR = (b_GRI.double() @ statistics.mean_I[..., None]).squeeze(-1)
        fitted_GO = scaling * (a_GOR.double() @ shift_GR[..., None]).squeeze(-1)
        bias_GO = ((statistics.mean_O - fitted_GO) / scaling).float()
    parts = [each for each in (a_GOR, b_GRI, bias_GO) if each is not None]
    for each in parts:
        sound_G = sound_G & torch.isfinite(each).flatten(1).all(1)
    for each in parts:
        each[~sound_G] = 0.0
    stored = [each.cpu().contiguous() for each in parts]
    factors = Factors(stored[0], stored[1], stored[2] if bias else None)
    return factors, [None if sound else _overflow_error() for sound in sound_G.tolist()]


def loss_of_factors(statistics: Statistics, factors: Factors, *, scaling: float) -> float:
    """The weighted mean of the squared error over all elements; the ridge is no part of it.

    From sums: what is below 1e-15 of the bare base's loss is rounding.
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
    """The sums that the minimum depends on: about the means where there is a bias, else about zero."""
    if not bias:
        return statistics.about_zero()
    varies_I = ~statistics.constant()
    return Sums(
        statistics.gram_II * (varies_I[..., None] & varies_I[..., None, :]),
        statistics.cross_IO * varies_I[..., None],
        statistics.spread,
    )


def spectrum(gram_II: Tensor, ridge: Tensor) -> Spectrum:
    """Of (…, I, I) and (…)."""
    gram_II = gram_II + ridge[..., None, None] * torch.eye(
        gram_II.shape[-1], dtype=gram_II.dtype, device=gram_II.device
    )
    # Unit diagonal first: columns of X that differ by 1e9 in scale would drown each other in the spectrum.
    diagonal_I = gram_II.diagonal(dim1=-2, dim2=-1)
    scale_I = torch.where(diagonal_I > 0, diagonal_I, 1.0).rsqrt()
    values_I, vectors_II = torch.linalg.eigh(scale_I[..., None] * gram_II * scale_I[..., None, :])
    return Spectrum(scale_I, values_I, vectors_II, values_I > eigenvalue_cutoff(values_I))


def eigenvalue_cutoff(values_I: Tensor) -> Tensor:
    """(…, 1): eigenvalues up to this are rounding: of the decomposition, n·ε·λmax, or of columns that differ by no
    more than float32 does, whose squares are some 16·ε.
    """
    return max(values_I.shape[-1], _MIN_CUTOFF_SIZE) * torch.finfo(values_I.dtype).eps * values_I[..., -1:]


def reduced_rank(
    gram_GII: Tensor, cross_GIO: Tensor, *, ridge_G: Tensor, rank: int, prior_GIO: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The full-rank minimiser M (G, I, O) and an orthonormal basis V (G, O, R), its last columns 0 where fewer are
    needed, such that ΔWᵀ = M·V·Vᵀ is the minimiser of that rank.

    With G = XᵀX + ridge·1 and M = G⁻¹(XᵀR + ridge·ΔW₀ᵀ) the loss is a constant plus ‖G^½·(ΔWᵀ − M)‖², so V spans the
    leading right singular vectors of G^½·M (Eckart & Young 1936).
    """
    if prior_GIO is not None:
        cross_GIO = cross_GIO + ridge_G[:, None, None] * prior_GIO
    found = spectrum(gram_GII, ridge_G)
    full_G = found.kept_I.all(-1)
    if bool(full_G.all()):
        return _full_rank_basis(found, cross_GIO, rank)
    solution_GIO = torch.empty_like(cross_GIO)
    basis_GOR = cross_GIO.new_zeros(len(cross_GIO), cross_GIO.shape[-1], rank)
    if bool(full_G.any()):
        some = Spectrum(*(each[full_G] for each in found))
        solution_GIO[full_G], basis_GOR[full_G] = _full_rank_basis(some, cross_GIO[full_G], rank)
    for group in torch.nonzero(~full_G).flatten().tolist():
        one = Spectrum(*(each[group] for each in found))
        prior_IO = None if prior_GIO is None else prior_GIO[group]
        solution_GIO[group], basis_OK = _minimum_norm_basis(one, cross_GIO[group], rank, prior_IO)
        basis_GOR[group, :, : basis_OK.shape[1]] = basis_OK
    return solution_GIO, basis_GOR


def _full_rank_basis(found: Spectrum, cross_GIO: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    directions_GII = (found.scale_I[..., None] * found.vectors_II) * found.values_I.rsqrt()[..., None, :]
    whitened_GIO = directions_GII.mT @ cross_GIO
    right_GKO = torch.linalg.svd(whitened_GIO, full_matrices=False).Vh[:, :rank]
    return directions_GII @ whitened_GIO, functional.pad(right_GKO, (0, 0, 0, rank - right_GKO.shape[1])).mT


def _minimum_norm_basis(found: Spectrum, cross_IO: Tensor, rank: int, prior_IO: Tensor | None) -> tuple[Tensor, Tensor]:
    """For one group, which its rows and the ridge leave free along some directions: there the solution is the prior's.

    For a ridge that goes to 0 the basis is that of the rows as far as they have one, and after that the prior's.
    """
    kept_I = found.kept_I
    directions_IK = (found.scale_I[:, None] * found.vectors_II[:, kept_I]) * found.values_I[kept_I].rsqrt()
    whitened_KO = directions_IK.T @ cross_IO
    right_KO = _right_singular(whitened_KO, rank)
    solution_IO = directions_IK @ whitened_KO
    free_IF = torch.linalg.qr(functional.normalize(found.scale_I[:, None] * found.vectors_II[:, ~kept_I], dim=0)).Q
    solution_IO = solution_IO - free_IF @ (free_IF.T @ solution_IO)
    if prior_IO is None:
        return solution_IO, right_KO.T
    free_FO = free_IF.T @ prior_IO
    rest_FO = free_FO - (free_FO @ right_KO.T) @ right_KO
    more_KO = _right_singular(rest_FO, rank - right_KO.shape[0], of=free_FO)
    return solution_IO + free_IF @ free_FO, torch.cat([right_KO, more_KO]).T


def _right_singular(matrix_KO: Tensor, most: int, of: Tensor | None = None) -> Tensor:
    """The leading right singular vectors, (≤ most, O), those of rounding left out: relative to `of` if given."""
    if 0 in matrix_KO.shape:
        return matrix_KO[:0]
    _, strengths_K, right_KO = torch.linalg.svd(matrix_KO, full_matrices=False)
    largest = strengths_K[0] if of is None else torch.linalg.matrix_norm(of)
    cut = max(matrix_KO.shape) * torch.finfo(matrix_KO.dtype).eps * largest
    strong_KO: Tensor = right_KO[strengths_K > cut]
    return strong_KO[:most]


def _balanced_factors(solution_GIO: Tensor, basis_GOR: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """Balanced: column k of A and row k of B get the same norm, and the sign that makes A's largest entry positive."""
    right_GIR = solution_GIO @ basis_GOR
    norms_GR = torch.linalg.vector_norm(right_GIR, dim=-2)
    share_GR = (norms_GR / scaling).sqrt()
    signs_GR = basis_GOR.gather(-2, basis_GOR.abs().argmax(dim=-2, keepdim=True)).sign().squeeze(-2)
    weights_G1R = (share_GR * signs_GR)[..., None, :]
    a_GOR = basis_GOR * weights_G1R
    b_GIR = functional.normalize(right_GIR, dim=-2, eps=0.0).nan_to_num() * weights_G1R
    return a_GOR.float(), b_GIR.mT.float()


def _overflow_error() -> Diverged:
    return Diverged(
        "the minimum has factors past what float32 holds",
        step=1,
        expected="inputs and targets of smaller magnitude, or a ridge",
    )
