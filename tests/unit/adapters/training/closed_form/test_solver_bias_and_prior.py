"""The closed form with weighted rows, a bias and a prior reaches what is spelled out in numpy."""

# N rows · I in_features · O out_features
import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from adapters.errors import Diverged
from adapters.training.closed_form.solver import Factors, loss_of_factors, solve
from adapters.training.closed_form.statistics import accumulate
from tests.support.dense_oracle import Float64, layer
from tests.unit.adapters.training.closed_form.closed_form_oracle import Problem, dense, numbers, relative


def _weights(rows: int, *, seed: int) -> Float64:
    """From 0 (every fifth) to a few."""
    weights_N: Float64 = np.abs(numbers(rows, seed=seed)) * 2
    weights_N[::5] = 0
    return weights_N


def _problem(rows: int = 60, inputs: int = 8, outputs: int = 5, *, weighted: bool = True, seed: int = 1) -> Problem:
    """Neither inputs nor targets have mean 0."""
    x_NI = numbers(rows, inputs, seed=seed) + 3 * numbers(inputs, seed=seed + 1)
    y_NO = numbers(rows, outputs, seed=seed + 2) + 5
    return Problem.of(x_NI, y_NO, _weights(rows, seed=seed + 3) if weighted else None)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", [1e-3, 2.0, 300.0])
def test_full_rank_is_ridge_regression_with_its_intercept_and_sample_weights(
    ridge: float, bias: bool, weighted: bool
) -> None:
    problem = _problem(weighted=weighted)
    oracle = Ridge(alpha=ridge, fit_intercept=bias, solver="cholesky", tol=0)
    oracle.fit(problem.x_NI, problem.r_NO, sample_weight=problem.w_N)
    delta_OI, beta_O = problem.solved(rank=5, ridge=ridge, bias=bias)
    assert relative(delta_OI, oracle.coef_) < 1e-6
    assert np.abs(beta_O - oracle.intercept_).max() < 1e-5


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rank", "ridge"), [(1, 0.0), (2, 3.0), (3, 40.0)])
def test_it_is_the_minimum_that_a_search_over_factors_finds_and_never_above(
    rank: int, ridge: float, bias: bool, with_prior: bool
) -> None:
    problem = _problem(40, 6, 4)
    prior_OI = numbers(4, 6, seed=9) if with_prior else None
    prior: Float64 | float = 0.0 if prior_OI is None else prior_OI
    delta_OI, beta_O = problem.solved(rank=rank, ridge=ridge, bias=bias, prior_OI=prior_OI)
    wanted_OI, wanted_O = problem.found_by_search(rank=rank, ridge=ridge, bias=bias, prior_OI=prior)
    lowest = problem.loss(wanted_OI, wanted_O, ridge=ridge, prior_OI=prior)
    assert problem.loss(delta_OI, beta_O, ridge=ridge, prior_OI=prior) == pytest.approx(lowest, rel=1e-6)
    assert relative(delta_OI, wanted_OI) < 1e-3


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_columns_whose_mean_is_a_thousand_times_their_spread_reach_the_minimum(rank: int) -> None:
    x_NI = numbers(300, 8, seed=1) + 1e3 * (1 + np.arange(8))
    problem = Problem.of(x_NI, numbers(300, 5, seed=2) + 2 * x_NI[:, :5], _weights(300, seed=3))
    root_N1 = np.sqrt(problem.w_N)[:, None]
    about_NI, about_NO = (
        (each - np.average(each, axis=0, weights=problem.w_N)) * root_N1 for each in (problem.x_NI, problem.r_NO)
    )
    basis_NK = np.linalg.qr(about_NI).Q
    strengths_K = np.linalg.svd(basis_NK.T @ about_NO, compute_uv=False)
    wanted = (about_NO**2).sum() - (strengths_K[:rank] ** 2).sum()
    delta_OI, beta_O = problem.solved(rank=rank, ridge=0.0, bias=True)
    assert problem.loss(delta_OI, beta_O, ridge=0.0) == pytest.approx(wanted, rel=1e-6)


def test_a_bias_equals_a_column_of_ones_that_has_no_ridge() -> None:
    problem, ridge = _problem(), 7.0
    ones_NJ = np.hstack([problem.x_NI, np.ones((60, 1))])
    penalty_JJ = np.diag([ridge] * 8 + [0.0])
    both_JO = np.linalg.solve(ones_NJ.T * problem.w_N @ ones_NJ + penalty_JJ, ones_NJ.T * problem.w_N @ problem.r_NO)
    delta_OI, beta_O = problem.solved(rank=5, ridge=ridge, bias=True)
    assert relative(np.vstack([delta_OI.T, beta_O]), both_JO) < 1e-6


def _one_hot() -> Float64:
    """Six columns: three flags that add up to 1, and a constant among two others."""
    classes = np.random.default_rng(0).integers(0, 3, 40)
    return np.hstack([np.eye(3)[classes], numbers(40, 1, seed=4), np.full((40, 1), 1000.1), numbers(40, 1, seed=5)])


@pytest.mark.parametrize("rank", [2, 5])
def test_columns_that_a_bias_makes_dependent_take_the_minimum_of_least_norm(rank: int) -> None:
    problem = Problem.of(_one_hot(), numbers(40, 5, seed=6))
    about_NI, about_NO = problem.x_NI - problem.x_NI.mean(0), problem.r_NO - problem.r_NO.mean(0)
    inverse_IN = np.linalg.pinv(about_NI, rcond=1e-9)
    right_KO = np.linalg.svd(about_NI @ inverse_IN @ about_NO)[2][:rank]
    wanted_OI = (inverse_IN @ about_NO @ right_KO.T @ right_KO).T
    delta_OI, beta_O = problem.solved(rank=rank, ridge=0.0, bias=True)
    assert np.abs(delta_OI - wanted_OI).max() < 1e-5
    assert np.abs(delta_OI[:, 4]).max() == 0
    assert relative(beta_O, problem.r_NO.mean(0) - wanted_OI @ problem.x_NI.mean(0)) < 1e-6


def _least_squares(problem: Problem) -> tuple[Float64, Float64]:
    """ΔW and β of least norm by numpy, which drops directions that float64 cannot tell from rounding."""
    mean_I, mean_O = (np.average(each, axis=0, weights=problem.w_N) for each in (problem.x_NI, problem.r_NO))
    root_N1 = np.sqrt(problem.w_N)[:, None]
    about_NI: Float64 = (problem.x_NI - mean_I) * root_N1
    about_NO: Float64 = (problem.r_NO - mean_O) * root_N1
    delta_IO: Float64 = np.linalg.lstsq(about_NI, about_NO, rcond=None)[0].astype(np.float64)
    beta_O: Float64 = mean_O - mean_I @ delta_IO
    return delta_IO.T, beta_O


@pytest.mark.parametrize(("weight", "is_constant"), [(1e-20, True), (0.5, False)])
def test_a_column_is_fitted_only_if_rows_that_count_tell_it_from_a_constant(weight: float, is_constant: bool) -> None:
    """One row differs from the others, by as little as float32 can."""
    x_NI = numbers(60, 4, seed=1)
    x_NI[:, 2] = 1000
    x_NI[7, 2] = np.nextafter(np.float32(1000), np.float32(2000))
    weights_N = np.abs(numbers(60, seed=3)) + 0.1
    weights_N[7] = weight
    problem = Problem.of(x_NI, numbers(60, 3, seed=2) + 5, weights_N)
    wanted_OI, wanted_O = _least_squares(problem)
    delta_OI, beta_O = problem.solved(rank=3, ridge=0.0, bias=True)
    # In each column's own unit: what a column of 1000 adds is a coefficient of a thousand times as much.
    given, wanted = (each * problem.x_NI.std(0) for each in (delta_OI, wanted_OI))
    assert relative(given, wanted) < 1e-5
    assert relative(beta_O, wanted_O) < 1e-5
    assert (np.abs(delta_OI[:, 2]).max() == 0) == is_constant


def test_a_weight_of_two_is_a_row_that_is_there_twice_and_of_zero_one_that_is_not() -> None:
    twice = Problem.of(numbers(30, 6, seed=1), numbers(30, 4, seed=2), np.repeat([2.0, 0.0, 1.0], 10))
    rows = [*range(10), *range(10), *range(20, 30)]
    plain = Problem.of(twice.x_NI[rows], twice.y_NO[rows])
    for bias in (False, True):
        given = np.column_stack(twice.solved(rank=2, ridge=0.5, bias=bias))
        assert relative(given, np.column_stack(plain.solved(rank=2, ridge=0.5, bias=bias))) < 1e-6


def test_ten_rows_start_from_the_prior() -> None:
    truth_OI = numbers(6, 2, seed=1) @ numbers(2, 30, seed=2)
    x_NI = numbers(500, 30, seed=3)
    whole = Problem.of(x_NI, x_NI @ truth_OI.T, seed=4)
    # What the base layer answers, and on top of it what the truth adds; the fleet's adapter is near the truth.
    y_NO = (whole.y_NO - whole.r_NO) + x_NI @ truth_OI.T + 0.1 * numbers(500, 6, seed=5)
    few, rest = Problem.of(x_NI[:10], y_NO[:10], seed=4), Problem.of(x_NI[10:], y_NO[10:], seed=4)
    prior_OI = truth_OI + 0.1 * numbers(6, 30, seed=6)
    without = rest.loss(*few.solved(rank=4, ridge=5.0, bias=False), ridge=0.0)
    started = rest.loss(*few.solved(rank=4, ridge=5.0, bias=False, prior_OI=prior_OI), ridge=0.0)
    assert started < without / 10
    full_OI, _ = few.solved(rank=6, ridge=5.0, bias=False, prior_OI=prior_OI)
    gram_II = few.x_NI.T @ few.x_NI + 5 * np.eye(30)
    assert relative(full_OI, np.linalg.solve(gram_II, few.x_NI.T @ few.r_NO + 5 * prior_OI.T).T) < 1e-6


def test_a_ridge_without_bound_ends_at_the_prior() -> None:
    prior_OI = numbers(5, 2, seed=1) @ numbers(2, 8, seed=2)
    delta_OI, _ = _problem().solved(rank=2, ridge=1e12, bias=True, prior_OI=prior_OI)
    assert relative(delta_OI, prior_OI) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 5, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_ridge_the_prior_rules_where_the_rows_leave_it_free(rank: int, bias: bool) -> None:
    """The limit of a ridge that goes to 0: here it is 1e-7, through the singular vectors of X itself."""
    problem, prior_OI, ridge = _problem(5, 12, 9), numbers(9, 12, seed=9), 1e-7
    root_N1 = np.sqrt(problem.w_N)[:, None]
    middle = (np.average(each, axis=0, weights=problem.w_N) * bias for each in (problem.x_NI, problem.r_NO))
    about_NI, about_NO = (
        (each - mean) * root_N1 for each, mean in zip((problem.x_NI, problem.r_NO), middle, strict=True)
    )
    _, lengths_K, right_II = np.linalg.svd(about_NI)
    squares_I = np.zeros(12)
    squares_I[: len(lengths_K)] = np.where(lengths_K > 1e-9 * lengths_K[0], lengths_K**2, 0)
    cross_IO = right_II @ (about_NI.T @ about_NO)
    cross_IO[squares_I == 0] = 0
    turned_IO = (cross_IO + ridge * right_II @ prior_OI.T) / (squares_I + ridge)[:, None]
    keep_KO = np.linalg.svd(np.sqrt(squares_I + ridge)[:, None] * turned_IO)[2][:rank]
    wanted_OI = (right_II.T @ turned_IO @ keep_KO.T @ keep_KO).T
    delta_OI, _ = problem.solved(rank=rank, ridge=0.0, bias=bias, prior_OI=prior_OI)
    assert relative(delta_OI, wanted_OI) < 1e-4
    # Without the prior the rows leave these directions at 0.
    assert relative(problem.solved(rank=rank, ridge=0.0, bias=bias)[0], wanted_OI) > 0.1


@pytest.mark.parametrize("scaling", [0.25, 8.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_bias_factor_is_divided_by_s_and_the_loss_is_that_of_the_rows(scaling: float, bias: bool) -> None:
    problem = _problem()
    factors = solve(problem.statistics(), rank=2, scaling=scaling, ridge=1.0, bias=bias)
    assert (factors.bias_O is not None) == bias
    delta_OI, beta_O = dense(factors, scaling)
    assert relative(delta_OI, problem.solved(rank=2, ridge=1.0, bias=bias)[0]) < 1e-6
    for tensor in (factors.a_OR, factors.b_RI, factors.bias_O):
        assert tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous())
    wanted = problem.loss(delta_OI, beta_O, ridge=0.0) / (problem.w_N.sum() * 5)
    assert loss_of_factors(problem.statistics(), factors, scaling=scaling) == pytest.approx(wanted, rel=1e-12)
    nothing = Factors(torch.zeros(5, 1), torch.zeros(1, 8), None)
    bare = problem.loss(np.zeros((5, 8)), 0.0, ridge=0.0) / (problem.w_N.sum() * 5)
    assert loss_of_factors(problem.statistics(), nothing, scaling=scaling) == pytest.approx(bare, rel=1e-12)


def test_a_loss_of_nothing_is_not_below_zero() -> None:
    truth_OI, x_NI = numbers(3, 4, seed=1), numbers(50, 4, seed=2)
    base = layer(torch.zeros(3, 4))
    statistics = accumulate(base, [(torch.from_numpy(x_NI).float(), torch.from_numpy(x_NI @ truth_OI.T).float(), None)])
    loss = loss_of_factors(statistics, solve(statistics, rank=3, scaling=1.0, ridge=0.0), scaling=1.0)
    assert 0 <= loss < 1e-12


def test_a_minimum_past_float32_is_said_and_not_stored() -> None:
    x_N1 = torch.tensor([[1e-38], [2e-38]])
    statistics = accumulate(layer(torch.zeros(1, 1)), [(x_N1, torch.tensor([[3e38], [3e38]]), None)])
    with pytest.raises(Diverged, match="float32"):
        solve(statistics, rank=1, scaling=1e-4, ridge=0.0)
