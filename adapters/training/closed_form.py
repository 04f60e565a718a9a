"""The best adapter of a rank under squared error, from one decomposition.

Reduced-rank regression (Izenman 1975, section 2), with a ridge (Mukherjee & Zhu 2011, section 2): the adapter
minimises `‖X·ΔWᵀ − R‖²_F + ridge·‖ΔW‖²_F` over all ΔW of at most that rank, where R = Y − X·Wᵀ − b.
"""

# N rows · I in_features · O out_features · R rank · K directions kept
import torch
from torch import Tensor
from torch.nn import functional

from adapters.base_layer import BaseLayer
from adapters.errors import Diverged
from adapters.training.data import TrainingData

_CHUNK_ROWS = 8192


def fit_closed_form(
    base: BaseLayer, data: TrainingData, *, rank: int, scaling: float, ridge: float
) -> tuple[Tensor, Tensor]:
    """A (O, R) and B (R, I), float32, with s·A·B = ΔW; the one of least norm where several are best.

    Float64 inside. Rank that the minimum does not need is padded with zeros. Raises `Diverged` where the
    minimum is past float32.
    """
    gram_II, cross_IO = _statistics(base, data)
    solution_IO, basis_OK = reduced_rank(gram_II, cross_IO, ridge=ridge, rank=rank)
    return _as_factors(solution_IO, basis_OK, rank=rank, scaling=scaling)


def reduced_rank(gram_II: Tensor, cross_IO: Tensor, *, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
    """From XᵀX and XᵀR: the full-rank minimiser M (I, O) of least norm and an orthonormal basis V (O, K), K ≤
    rank, such that ΔWᵀ = M·V·Vᵀ is the minimiser of that rank.

    With G = XᵀX + ridge·1 the loss is a constant plus ‖G^½·(ΔWᵀ − M)‖², so V spans the leading right singular
    vectors of G^½·M (Eckart & Young 1936).
    """
    gram_II = gram_II + ridge * torch.eye(gram_II.shape[0], dtype=gram_II.dtype, device=gram_II.device)
    # Unit diagonal first: columns of X that differ by 1e9 in scale would drown each other in the spectrum.
    diagonal_I = gram_II.diagonal()
    scale_I = torch.where(diagonal_I > 0, diagonal_I, 1.0).rsqrt()
    values_I, vectors_II = torch.linalg.eigh(scale_I[:, None] * gram_II * scale_I)
    cut = values_I.shape[0] * torch.finfo(values_I.dtype).eps * values_I[-1]
    kept = values_I > cut
    directions_IK = (scale_I[:, None] * vectors_II[:, kept]) * values_I[kept].rsqrt()
    whitened_KO = directions_IK.T @ cross_IO
    right_KO = torch.linalg.svd(whitened_KO, full_matrices=False).Vh
    solution_IO = directions_IK @ whitened_KO
    if not bool(kept.all()):
        # Free directions of X: move along them to the solution of least norm.
        free_IK = torch.linalg.qr(functional.normalize(scale_I[:, None] * vectors_II[:, ~kept], dim=0)).Q
        solution_IO = solution_IO - free_IK @ (free_IK.T @ solution_IO)
    return solution_IO, right_KO[:rank].T


def _statistics(base: BaseLayer, data: TrainingData) -> tuple[Tensor, Tensor]:
    """XᵀX (I, I) and XᵀR (I, O) in float64, a chunk of rows at a time."""
    weight_OI = base.weight_OI.double()
    bias_O = None if base.bias_O is None else base.bias_O.double()
    gram_II = torch.zeros(base.in_features, base.in_features, dtype=torch.float64, device=base.device)
    cross_IO = torch.zeros(base.in_features, base.out_features, dtype=torch.float64, device=base.device)
    for begin in range(0, data.rows, _CHUNK_ROWS):
        x_NI = data.inputs_NI[begin : begin + _CHUNK_ROWS].double()
        residual_NO = data.targets[begin : begin + _CHUNK_ROWS].double() - functional.linear(x_NI, weight_OI, bias_O)
        gram_II += x_NI.T @ x_NI
        cross_IO += x_NI.T @ residual_NO
    return gram_II, cross_IO


def _as_factors(solution_IO: Tensor, basis_OK: Tensor, *, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Balanced: column k of A and row k of B get the same norm, and the sign that makes A's largest entry positive."""
    right_IK = solution_IO @ basis_OK
    norms_K = torch.linalg.vector_norm(right_IK, dim=0)
    share_K = (norms_K / scaling).sqrt()
    signs_K = basis_OK.gather(0, basis_OK.abs().argmax(dim=0, keepdim=True)).sign()[0]
    a_OK = basis_OK * (share_K * signs_K)
    b_KI = (functional.normalize(right_IK, dim=0, eps=0.0).nan_to_num() * (share_K * signs_K)).T
    missing = rank - a_OK.shape[1]
    a_OR = functional.pad(a_OK, (0, missing)).float().contiguous()
    b_RI = functional.pad(b_KI, (0, 0, 0, missing)).float().contiguous()
    if not bool(torch.isfinite(a_OR).all() and torch.isfinite(b_RI).all()):
        raise Diverged(
            "the minimum has factors past what float32 holds",
            step=1,
            expected="inputs and targets of smaller magnitude, or a ridge",
        )
    return a_OR, b_RI
