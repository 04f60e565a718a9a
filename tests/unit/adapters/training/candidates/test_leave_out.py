"""Leave-out residuals against ridge regressions that are fitted again without the rows."""

# G groups · N rows · J features · C outputs
import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.training.candidates.leave_out import LeaveOut, Sets, precision

RIDGE = 0.7
FOLDS = 3


@pytest.fixture
def groups() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features, residuals, weights and folds of two groups; the second has a padded row."""
    generator = torch.Generator().manual_seed(0)
    phi_GNJ = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    residuals_GNC = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    weights_GN = torch.rand(2, 7, generator=generator, dtype=torch.float64) + 0.5
    weights_GN[1, 6] = 0
    folds_GN = torch.tensor([[0, 1, 2, 0, 1, 2, 0], [0, 1, 1, 0, 2, 2, -1]])
    return phi_GNJ, residuals_GNC, weights_GN, folds_GN


def predict(phi: Tensor, residuals: Tensor, weights: Tensor, at: Tensor, *, free_intercept: bool) -> np.ndarray:
    """Return the prediction of a weighted ridge regression that numpy fits."""
    x, y, w = phi.numpy(), residuals.numpy(), weights.numpy()[:, None]
    x_mean, y_mean = (0.0, 0.0) if not free_intercept else ((w * x).sum(0) / w.sum(), (w * y).sum(0) / w.sum())
    x, y = x - x_mean, y - y_mean
    theta = np.linalg.solve(x.T @ (w * x) + RIDGE * np.eye(x.shape[1]), x.T @ (w * y))
    result: np.ndarray = y_mean + (at.numpy() - x_mean) @ theta
    return result


@pytest.mark.parametrize("free_intercept", [False, True])
@pytest.mark.parametrize("has_units", [False, True])
def test_refits(groups: tuple[Tensor, Tensor, Tensor, Tensor], *, free_intercept: bool, has_units: bool) -> None:
    phi_GNJ, residuals_GNC, weights_GN, folds_GN = groups
    # Rows 0 and 3 leave together, and so do 2 and 5: each pair is in one fold.
    units_GN = torch.tensor([[0, 1, 2, 0, 3, 2, 4], [0, 1, 2, 0, 3, 4, -1]]) if has_units else None
    P_GNN = precision(phi_GNJ @ phi_GNJ.mT, RIDGE, weights_GN, free_intercept=free_intercept)
    units = None if units_GN is None else Sets.of(units_GN, 5)
    leave_out = LeaveOut(P_GNN, Sets.of(folds_GN, FOLDS), units)
    fold_GCN, change_GECN = leave_out.left_out(residuals_GNC.mT)
    fold_GNC, unit_GENC = fold_GCN.mT, residuals_GNC[:, None] - change_GECN.mT
    for group in range(2):
        rows = [row for row in range(7) if weights_GN[group, row] > 0]
        for row in rows:
            rest = [other for other in rows if folds_GN[group, other] != folds_GN[group, row]]
            left = _residual(groups, group, row, rest, free_intercept=free_intercept)
            assert np.abs(fold_GNC[group, row].numpy() - left).max() < 1e-10
            own = {row} if units_GN is None else {r for r in rows if units_GN[group, r] == units_GN[group, row]}
            for fit in range(FOLDS + 1):
                if fit == folds_GN[group, row]:
                    continue
                rest = [other for other in rows if other not in own and folds_GN[group, other] != fit]
                left = _residual(groups, group, row, rest, free_intercept=free_intercept)
                assert np.abs(unit_GENC[group, fit, row].numpy() - left).max() < 1e-8


def _residual(
    groups: tuple[Tensor, Tensor, Tensor, Tensor], group: int, row: int, rest: list[int], *, free_intercept: bool
) -> np.ndarray:
    phi_NJ, residuals_NC, weights_N = (part[group] for part in groups[:3])
    predicted = predict(phi_NJ[rest], residuals_NC[rest], weights_N[rest], phi_NJ[row], free_intercept=free_intercept)
    result: np.ndarray = residuals_NC[row].numpy() - predicted
    return result


def test_one_row_learns_nothing_from_itself() -> None:
    weights_GN, residuals_GNC = torch.ones(1, 1).double(), torch.full((1, 1, 2), 3.0).double()
    P_GNN = precision(torch.ones(1, 1, 1).double(), RIDGE, weights_GN, free_intercept=True)
    leave_out = LeaveOut(P_GNN, Sets.of(torch.zeros(1, 1, dtype=torch.int64), FOLDS), None)
    fold_GCN, change_GECN = leave_out.left_out(residuals_GNC.mT)
    assert torch.equal(fold_GCN, residuals_GNC.mT)
    assert not change_GECN[:, -1].any()
