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
    # Past a weight that leaves no visible noise, a row would be interpolated: the matrix would be singular.
    size_GN = kernel_GNN.diagonal(dim1=-2, dim2=-1)
    least = 4 * kernel_GNN.shape[-1] * torch.finfo(kernel_GNN.dtype).eps
    noise_GN = noise_GN.maximum(least * size_GN.amax(-1, keepdim=True))
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
        Q_GFMN = torch.linalg.solve(P_GFMM + torch.diag_embed(empty_GFM.to(P_GFMM.dtype)), self._P_GFMN)
        diagonal_GN = P_GNN.diagonal(dim1=-2, dim2=-1)
        removed_GFN = (self._P_GFMN * Q_GFMN).sum(2)
        diagonal_GEN = torch.cat([diagonal_GN[:, None] - removed_GFN, diagonal_GN[:, None]], dim=1)
        # Of a row that a fit lacks nothing but rounding is left.
        has_row_GEN = diagonal_GEN > 100 * torch.finfo(P_GNN.dtype).eps * diagonal_GN[:, None]
        self._has_row_GE1N = has_row_GEN[:, :, None].to(P_GNN.dtype)
        self._inverse_GE1N = torch.where(has_row_GEN, diagonal_GEN.reciprocal(), 0.0)[:, :, None]
        self._Q_GFMN = Q_GFMN
        # Without other rows, nothing changes the residual.
        stays_GFM1 = (empty_GFM & folds.is_row_GSM).to(P_GNN.dtype)[..., None]
        left_GFMN = Q_GFMN.scatter_add(-1, folds.rows_GSM[..., None], stays_GFM1)
        self._left_GTN = left_GFMN.view(G, F * M, N)
        self._shape = G, F, M, N

    def left_out(self, residuals_GCN: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a row's output would change by if it were left out of its own fit.

        The first are the residuals of each row without its fold, (G, C, N). The second are the changes of each row's
        output, its residual less the one without its unit, in each fit, (G, E, C, N). They are 0 for the rows that a
        fit lacks. Classes come before rows, because what follows is summed over them.
        """
        G, F, M, _ = self._shape
        alpha_GCN = residuals_GCN @ self._P_GNN
        left_GCT = residuals_GCN @ self._left_GTN.mT
        left_GFCM = left_GCT.view(G, -1, F, M).transpose(1, 2)
        alpha_GECN = torch.cat([alpha_GCN[:, None] - left_GFCM @ self._P_GFMN, alpha_GCN[:, None]], dim=1)
        index_G1T, is_row_G1T = (part.reshape(G, 1, F * M) for part in self._folds)
        index_GCT = index_G1T.expand_as(left_GCT)
        fold_GCN = torch.zeros_like(residuals_GCN).scatter_add_(-1, index_GCT, left_GCT * is_row_G1T)
        own_GECN = residuals_GCN[:, None] * self._has_row_GE1N
        if self._units is None:
            return fold_GCN, own_GECN.addcmul_(alpha_GECN, self._inverse_GE1N, value=-1)
        return fold_GCN, own_GECN - self._unit_residuals(alpha_GECN) * self._has_row_GE1N

    def _unit_residuals(self, alpha_GECN: Tensor) -> Tensor:
        """Return the residuals of each row without the rows of its unit, in each fit, (G, E, C, N)."""
        units, N = self._units, self._shape[-1]
        assert units is not None
        P_GENN = torch.cat([self._P_GNN[:, None] - self._P_GFMN.mT @ self._Q_GFMN, self._P_GNN[:, None]], dim=1)
        results = []
        for fit in range(P_GENN.shape[1]):
            P_GSDN = units.gather(P_GENN[:, fit])
            columns = units.rows_GSM[:, :, None, :].expand(-1, -1, P_GSDN.shape[2], -1)
            P_GSDD = P_GSDN.gather(-1, columns) * units.is_row_GSM[:, :, None, :]
            empty_GSD = (units.gather(self._has_row_GE1N[:, fit].mT)[..., 0] == 0) | ~units.is_row_GSM
            P_GSDD = torch.where(empty_GSD[..., None] | empty_GSD[..., None, :], 0.0, P_GSDD)
            block = P_GSDD + torch.diag_embed(empty_GSD.to(P_GSDD.dtype))
            results.append(units.scatter(torch.linalg.solve(block, units.gather(alpha_GECN[:, fit].mT)), N).mT)
        return torch.stack(results, dim=1)
