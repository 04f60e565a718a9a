"""The closed form reaches the minimum, and of several minima the one of least norm."""

# N rows · I in_features · O out_features · R rank
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits

from adapters.training.closed_form.solver import solve
from adapters.training.closed_form.statistics import accumulate
from tests.support.dense_oracle import Float64, layer, relative_error


def _numbers(*shape: int, seed: int) -> Float64:
    """Standard normal, and exact in float32."""
    numbers: Float64 = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(np.float64)
    return numbers


class Problem:
    """Rows X, a base layer W with a bias b, and targets Y; `R = Y - X·Wᵀ - b` is what is left to fit."""

    def __init__(self, x_NI: Float64, outputs: int, *, seed: int = 0) -> None:
        rows, inputs = x_NI.shape
        self.x_NI = x_NI.astype(np.float32).astype(np.float64)
        self.base = layer(
            torch.from_numpy(_numbers(outputs, inputs, seed=seed)).float(),
            torch.from_numpy(_numbers(outputs, seed=seed + 1)).float(),
        )
        y_NO = _numbers(rows, outputs, seed=seed + 2)
        self.rows = torch.from_numpy(self.x_NI).float(), torch.from_numpy(y_NO).float()
        assert self.base.bias_O is not None
        self.residual_NO = y_NO - self.x_NI @ self.base.weight_OI.double().numpy().T - self.base.bias_O.double().numpy()

    def factors(self, *, rank: int, scaling: float = 1.0, ridge: float = 0.0) -> tuple[Float64, Float64]:
        factors = solve(accumulate(self.base, [(*self.rows, None)]), rank=rank, scaling=scaling, ridge=ridge)
        a_OR, b_RI = factors.a_OR, factors.b_RI
        assert (a_OR.dtype, b_RI.dtype) == (torch.float32, torch.float32)
        assert (a_OR.shape, b_RI.shape) == ((self.residual_NO.shape[1], rank), (rank, self.x_NI.shape[1]))
        return a_OR.double().numpy(), b_RI.double().numpy()

    def delta(self, *, rank: int, ridge: float = 0.0) -> Float64:
        a_OR, b_RI = self.factors(rank=rank, ridge=ridge)
        product: Float64 = a_OR @ b_RI
        return product

    def loss(self, delta_OI: Float64, *, ridge: float = 0.0) -> float:
        misfit_NO = self.x_NI @ delta_OI.T - self.residual_NO
        return float((misfit_NO**2).sum() + ridge * (delta_OI**2).sum())

    def numerical_minimum(self, *, rank: int, ridge: float, starts: int = 4) -> tuple[float, Float64]:
        """The lowest loss that L-BFGS finds from several starts, and its ΔW."""
        outputs, inputs = self.residual_NO.shape[1], self.x_NI.shape[1]
        cut = outputs * rank

        def split(flat: Float64) -> tuple[Float64, Float64]:
            return flat[:cut].reshape(outputs, rank), flat[cut:].reshape(rank, inputs)

        gram_II = self.x_NI.T @ self.x_NI + ridge * np.eye(inputs)
        cross_OI = self.residual_NO.T @ self.x_NI

        def loss_and_slope(flat: Float64) -> tuple[float, Float64]:
            a_OR, b_RI = split(flat)
            delta_OI = a_OR @ b_RI
            slope_OI = 2 * (delta_OI @ gram_II - cross_OI)
            slope = np.concatenate([(slope_OI @ b_RI.T).ravel(), (a_OR.T @ slope_OI).ravel()])
            return float((delta_OI * (slope_OI / 2 - cross_OI)).sum()), slope

        options = {"maxiter": 1500, "ftol": 1e-16, "gtol": 1e-9}
        found = []
        for start in range(starts):
            begin = _numbers(cut + rank * inputs, seed=100 + start)
            # One thread: on busy cores those of a BLAS wait for each other far longer than they work.
            with threadpool_limits(limits=1):
                end = minimize(loss_and_slope, begin, jac=True, method="L-BFGS-B", options=options)
            a_OR, b_RI = split(end.x)
            found.append((self.loss(a_OR @ b_RI, ridge=ridge), a_OR @ b_RI))
        return min(found, key=lambda pair: pair[0])


@pytest.mark.parametrize(("rank", "ridge"), [(1, 0.0), (2, 0.0), (2, 3.0), (4, 0.5), (5, 20.0)])
def test_a_10_to_6_layer_reaches_the_minimum_that_a_search_finds(rank: int, ridge: float) -> None:
    problem = Problem(_numbers(100, 10, seed=7), 6)
    wanted, delta_OI = problem.numerical_minimum(rank=rank, ridge=ridge)
    reached = problem.delta(rank=rank, ridge=ridge)
    assert problem.loss(reached, ridge=ridge) == pytest.approx(wanted, rel=1e-9)
    assert relative_error(reached, delta_OI) < 1e-4


@pytest.mark.parametrize(("rank", "ridge"), [(3, 4.0), (2, 0.1)])
def test_with_fewer_rows_than_columns_a_ridge_still_reaches_the_minimum(rank: int, ridge: float) -> None:
    problem = Problem(_numbers(8, 12, seed=8), 6)
    wanted, delta_OI = problem.numerical_minimum(rank=rank, ridge=ridge)
    reached = problem.delta(rank=rank, ridge=ridge)
    assert problem.loss(reached, ridge=ridge) == pytest.approx(wanted, rel=1e-7)
    assert relative_error(reached, delta_OI) < 1e-4


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 250.0])
@pytest.mark.parametrize("rows", [9, 80])
def test_full_rank_is_ridge_regression_without_an_intercept(ridge: float, rows: int) -> None:
    problem = Problem(_numbers(rows, 12, seed=3), 5)
    oracle = Ridge(alpha=ridge, fit_intercept=False, solver="svd").fit(problem.x_NI, problem.residual_NO)
    assert relative_error(problem.delta(rank=5, ridge=ridge), oracle.coef_) < 1e-6


def test_full_rank_without_a_ridge_is_least_squares() -> None:
    problem = Problem(_numbers(80, 12, seed=4), 5)
    oracle = np.linalg.lstsq(problem.x_NI, problem.residual_NO)[0]
    assert relative_error(problem.delta(rank=5), oracle.T) < 1e-6


def _with_duplicates() -> Float64:
    x_NI = _numbers(30, 8, seed=5)
    x_NI[:, 3], x_NI[:, 6] = x_NI[:, 0], 2 * x_NI[:, 1]
    return x_NI


def _with_zero_columns() -> Float64:
    x_NI = _with_duplicates()
    x_NI[:, [2, 7]] = 0
    return x_NI


AMBIGUOUS = {
    "fewer rows than columns": _numbers(5, 12, seed=6),
    "one row": _numbers(1, 4, seed=6),
    "duplicate columns": _with_duplicates(),
    "zero columns": _with_zero_columns(),
    "few rows and zero columns": _with_zero_columns()[:4],
    "nothing but zeros": np.zeros((6, 4)),
}


@pytest.mark.parametrize("x_NI", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_of_several_minima_full_rank_takes_the_one_of_least_norm(x_NI: Float64) -> None:
    problem = Problem(x_NI, 6)
    oracle = np.linalg.pinv(problem.x_NI) @ problem.residual_NO
    assert np.abs(problem.delta(rank=6) - oracle.T).max() < 1e-5 * max(1.0, np.abs(oracle).max())


@pytest.mark.parametrize("x_NI", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_of_several_minima_rank_2_takes_the_one_of_least_norm(x_NI: Float64) -> None:
    problem = Problem(x_NI, 6)
    inverse_IN = np.linalg.pinv(problem.x_NI)
    right_KO = np.linalg.svd(problem.x_NI @ inverse_IN @ problem.residual_NO)[2]
    oracle = inverse_IN @ problem.residual_NO @ right_KO[:2].T @ right_KO[:2]
    assert np.abs(problem.delta(rank=2) - oracle.T).max() < 1e-5 * max(1.0, np.abs(oracle).max())


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("order", ["falling", "mixed"])
def test_columns_scaled_from_1_to_a_billionth_still_reach_the_minimum(rank: int, order: str) -> None:
    scale_I = np.logspace(0, -9, 12)
    if order == "mixed":
        np.random.default_rng(0).shuffle(scale_I)
    problem = Problem(_numbers(200, 12, seed=9) * scale_I, 5)
    rescaled_NI = problem.x_NI / scale_I
    fitted_NO = rescaled_NI @ np.linalg.lstsq(rescaled_NI, problem.residual_NO)[0]
    strengths_K = np.linalg.svd(fitted_NO, compute_uv=False)
    wanted = (problem.residual_NO**2).sum() - (strengths_K[:rank] ** 2).sum()
    assert problem.loss(problem.delta(rank=rank)) == pytest.approx(wanted, rel=1e-6)


def test_columns_that_are_nearly_the_same_are_told_apart() -> None:
    once_NI = _numbers(100, 6, seed=1)
    problem = Problem(np.hstack([once_NI, once_NI + 1e-5 * _numbers(100, 6, seed=5)]), 4)
    basis_NK = np.linalg.qr(problem.x_NI).Q
    strengths_K = np.linalg.svd(basis_NK.T @ problem.residual_NO, compute_uv=False)
    wanted = (problem.residual_NO**2).sum() - (strengths_K[:2] ** 2).sum()
    assert problem.loss(problem.delta(rank=2)) == pytest.approx(wanted, rel=1e-6)


def test_duplicate_columns_in_other_units_still_reach_the_minimum() -> None:
    once_NI = _numbers(200, 6, seed=10)
    problem = Problem(np.hstack([once_NI, once_NI]) * 2.0 ** -np.arange(0, 36, 3), 5)
    fitted_NO = once_NI @ np.linalg.lstsq(once_NI, problem.residual_NO)[0]
    strengths_K = np.linalg.svd(fitted_NO, compute_uv=False)
    wanted = (problem.residual_NO**2).sum() - (strengths_K[:2] ** 2).sum()
    assert problem.loss(problem.delta(rank=2)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("scaling", [0.125, 1.0, 3.0, 1e4])
def test_the_factors_are_balanced_and_s_is_divided_out(scaling: float) -> None:
    problem = Problem(_numbers(60, 9, seed=11), 5)
    wanted = problem.delta(rank=3)
    a_OR, b_RI = problem.factors(rank=3, scaling=scaling)
    assert relative_error(scaling * a_OR @ b_RI, wanted) < 1e-6
    np.testing.assert_allclose(np.linalg.norm(a_OR, axis=0), np.linalg.norm(b_RI, axis=1), rtol=1e-6)


def test_rank_that_the_minimum_does_not_need_is_zeros() -> None:
    problem = Problem(_numbers(40, 5, seed=12), 3)
    a_OR, b_RI = problem.factors(rank=7)
    assert np.abs(a_OR[:, 3:]).max() == np.abs(b_RI[3:]).max() == 0
    oracle = np.linalg.lstsq(problem.x_NI, problem.residual_NO)[0]
    assert relative_error(a_OR @ b_RI, oracle.T) < 1e-6


def test_the_base_and_the_rows_are_left_as_they_were() -> None:
    problem = Problem(_numbers(40, 5, seed=13), 3)
    before = [each.clone() for each in (problem.base.weight_OI, *problem.rows)]
    problem.delta(rank=2)
    after = [problem.base.weight_OI, *problem.rows]
    assert all(map(torch.equal, before, after))
