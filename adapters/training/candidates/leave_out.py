"""Leave-out residuals of ridge regressions in kernel form, for stacks of groups, without fitting again.

With V = K + ridge·diag(1/w), the coefficients of a fit to residuals r are α = P·r, where P = V⁻¹, or its projection if
there is an intercept without a penalty. If the rows of a set S had been left out, their residuals would have been

    e_S = (P_SS)⁻¹·(P·r)_S

which is e / (1 - h) for one row and (I - H_SS)⁻¹·e_S for several (Cook & Weisberg 1982, section 2.2). The matrix P of
the other rows is the Schur complement of P_SS, so that rows can be left out of a fit that already lacks a fold. This
holds at a fixed ridge, and without a bound on the rank.
"""

# G groups · N rows, padded · F folds · M rows of a fold, padded · S sets · D rows of a set, padded · C outputs
# E = F + 1: the fits without each fold, and then the fit to all rows
from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-30


class Sets(NamedTuple):
    """Disjoint sets of rows of each group, padded."""

    rows_GSM: Tensor
    """int64: indices of rows; 0 where it is padded."""
    is_row_GSM: Tensor
    """bool."""

    @classmethod
    def of(cls, code_GN: Tensor, sets: int) -> "Sets":
        """Return the sets of the rows with codes 0 to `sets` - 1, (G, N) int64; a row with code -1 is in none."""
        is_in_GSN = code_GN[:, None, :] == torch.arange(sets)[:, None]
        largest = max(1, int(is_in_GSN.sum(-1).max()))
        # A stable sort moves the rows of the set to the front, in order.
        order_GSN = torch.argsort(~is_in_GSN, dim=-1, stable=True)[..., :largest]
        is_row_GSM = is_in_GSN.gather(-1, order_GSN)
        return cls(torch.where(is_row_GSM, order_GSN, 0), is_row_GSM)

    def gather(self, values_GNX: Tensor) -> Tensor:
        """Return the values of the rows of each set, (G, N, X) -> (G, S, M, X); 0 where it is padded."""
        G, S, M = self.rows_GSM.shape
        index = self.rows_GSM.reshape(G, S * M, 1).expand(-1, -1, values_GNX.shape[-1])
        return values_GNX.gather(1, index).view(G, S, M, -1) * self.is_row_GSM[..., None]

    def scatter(self, values_GSMX: Tensor, rows: int) -> Tensor:
        """Return values of sets in the order of the rows, (G, S, M, X) -> (G, N, X); 0 for rows in no set."""
        G, S, M, X = values_GSMX.shape
        index = self.rows_GSM.reshape(G, S * M, 1).expand(-1, -1, X)
        values = (values_GSMX * self.is_row_GSM[..., None]).reshape(G, S * M, X)
        return values.new_zeros(G, rows, X).scatter_add_(1, index, values)


def precision(kernel_GNN: Tensor, ridge: float, weights_GN: Tensor, *, free_intercept: bool) -> Tensor:
    """Return P (G, N, N) for kernel matrices and row weights; rows of weight 0, as in padding, have no influence.

    free_intercept: whether a constant without a penalty is fitted too.
    """
    counts_GN = weights_GN > 0
    counts_GNN = counts_GN[:, :, None] & counts_GN[:, None, :]
    noise_GN = torch.where(counts_GN, ridge / weights_GN.clamp_min(_TINY), 1.0)
    factor_GNN = torch.linalg.cholesky(kernel_GNN * counts_GNN + torch.diag_embed(noise_GN))
    P_GNN = torch.cholesky_inverse(factor_GNN) * counts_GNN
    if free_intercept:
        sums_GN = P_GNN.sum(-1)
        total_G = sums_GN.sum(-1).clamp_min(_TINY)
        P_GNN = P_GNN - sums_GN[:, :, None] * sums_GN[:, None, :] / total_G[:, None, None]
    return P_GNN


class LeaveOut:
    """Residuals of the rows of each fold without the fold, and of each unit without the unit, with and without folds.

    units: sets of rows that leave together, such as duplicates; None if each row leaves alone.
    """

    def __init__(self, P_GNN: Tensor, folds: Sets, units: Sets | None) -> None:
        self._P_GNN, self._folds, self._units = P_GNN, folds, units
        G, F, M = folds.rows_GSM.shape
        N = P_GNN.shape[-1]
        self._P_GFMN = folds.gather(P_GNN)
        columns = folds.rows_GSM[:, :, None, :].expand(-1, -1, M, -1)
        P_GFMM = self._P_GFMN.gather(-1, columns) * folds.is_row_GSM[:, :, None, :]
        # Rows without weight have an empty P; 1 on the diagonal leaves their residuals as they are.
        empty_GFM = P_GFMM.diagonal(dim1=-2, dim2=-1) <= 0
        self._empty_GFM1 = empty_GFM[..., None]
        self._Q_GFMN = torch.linalg.solve(P_GFMM + torch.diag_embed(empty_GFM.to(P_GFMM.dtype)), self._P_GFMN)
        diagonal_GN = P_GNN.diagonal(dim1=-2, dim2=-1)
        removed_GFN = (self._P_GFMN * self._Q_GFMN).sum(2)
        diagonal_GEN = torch.cat([diagonal_GN[:, None] - removed_GFN, diagonal_GN[:, None]], dim=1)
        # Of a row that a fit lacks nothing but rounding is left.
        self._diagonal_GEN = torch.where(
            diagonal_GEN > 100 * torch.finfo(P_GNN.dtype).eps * diagonal_GN[:, None], diagonal_GEN, torch.inf
        )
        self._shape = G, F, M, N

    def coefficients(self, residuals_GNC: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residuals of each row without its fold, (G, N, C), and α of each fit, (G, E, N, C).

        The rows of the fold that a fit lacks have coefficients of 0 in it.
        """
        G, F, M, N = self._shape
        alpha_GNC = self._P_GNN @ residuals_GNC
        left_GFMC = (self._Q_GFMN.reshape(G, F * M, N) @ residuals_GNC).view(G, F, M, -1)
        # Without other rows, nothing changes the residual.
        left_GFMC = torch.where(self._empty_GFM1, self._folds.gather(residuals_GNC), left_GFMC)
        change_GFNC = self._P_GFMN.mT @ left_GFMC
        alpha_GENC = torch.cat([alpha_GNC[:, None] - change_GFNC, alpha_GNC[:, None]], dim=1)
        return self._folds.scatter(left_GFMC, N), alpha_GENC

    def unit_residuals(self, alpha_GENC: Tensor, residuals_GNC: Tensor) -> Tensor:
        """Return the residuals of each row without its unit, in each fit, (G, E, N, C)."""
        lacks_GEN1 = self._diagonal_GEN.isinf()[..., None]
        if self._units is None:
            return torch.where(lacks_GEN1, residuals_GNC[:, None], alpha_GENC / self._diagonal_GEN[..., None])
        units, N = self._units, self._shape[-1]
        P_GENN = torch.cat([self._P_GNN[:, None] - self._P_GFMN.mT @ self._Q_GFMN, self._P_GNN[:, None]], dim=1)
        results = []
        for fit in range(P_GENN.shape[1]):
            P_GSDN = units.gather(P_GENN[:, fit])
            columns = units.rows_GSM[:, :, None, :].expand(-1, -1, P_GSDN.shape[2], -1)
            P_GSDD = P_GSDN.gather(-1, columns) * units.is_row_GSM[:, :, None, :]
            lacks_GN1 = self._diagonal_GEN[:, fit, :, None].isinf().to(alpha_GENC.dtype)
            empty_GSD = (units.gather(lacks_GN1)[..., 0] > 0) | ~units.is_row_GSM
            P_GSDD = torch.where(empty_GSD[..., None] | empty_GSD[..., None, :], 0.0, P_GSDD)
            block = P_GSDD + torch.diag_embed(empty_GSD.to(P_GSDD.dtype))
            results.append(units.scatter(torch.linalg.solve(block, units.gather(alpha_GENC[:, fit])), N))
        return torch.where(lacks_GEN1, residuals_GNC[:, None], torch.stack(results, dim=1))
