"""Rows that are forgotten were never there, or it is said that this cannot be promised."""

# N rows · I in_features · O out_features
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from adapters.errors import IllConditioned, InvalidCombination
from adapters.training.closed_form.refit import forget
from adapters.training.closed_form.solver import solve
from adapters.training.closed_form.statistics import Statistics
from tests.support.dense_oracle import Float64, layer
from tests.unit.adapters.training.closed_form.closed_form_oracle import Problem, dense, numbers, relative

ROWS, GONE = 200, 60


def _problem(x_NI: Float64 | None = None, *, weighted: bool = True) -> Problem:
    x_NI = numbers(ROWS, 8, seed=1) + 2 if x_NI is None else x_NI
    weights_N = np.abs(numbers(ROWS, seed=3)) if weighted else None
    return Problem.of(x_NI, numbers(ROWS, 5, seed=2), weights_N)


def _delta(statistics: Statistics, *, ridge: float, bias: bool, rank: int) -> Float64:
    """(O, I + 1): ΔW and β."""
    return np.column_stack(dense(solve(statistics, rank=rank, scaling=1.0, ridge=ridge, bias=bias)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 5.0])
@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("gone", [1, GONE, ROWS - 20])
def test_forgetting_rows_equals_never_having_seen_them(gone: int, rank: int, ridge: float, bias: bool) -> None:
    problem = _problem()
    rest = forget(problem.statistics(), problem.statistics(slice(0, gone)), ridge=ridge, bias=bias, rank=rank)
    fresh = problem.statistics(slice(gone, ROWS))
    assert rest.rows == ROWS - gone
    given, wanted = (_delta(each, ridge=ridge, bias=bias, rank=rank) for each in (rest, fresh))
    assert relative(given, wanted) < 1e-6


def _zero_columns() -> Float64:
    x_NI = numbers(ROWS, 8, seed=1)
    x_NI[:, [2, 5]] = 0
    return x_NI


def _duplicates() -> Float64:
    x_NI = numbers(ROWS, 8, seed=1)
    x_NI[:, 3], x_NI[:, 6] = x_NI[:, 0], 2 * x_NI[:, 1]
    return x_NI


AWKWARD = {
    "columns of zeros": _zero_columns(),
    "a constant": np.hstack([numbers(ROWS, 7, seed=1), np.full((ROWS, 1), 1000.1)]),
    "duplicates": _duplicates(),
    "flags": np.hstack([np.eye(3)[np.arange(ROWS) % 3], numbers(ROWS, 5, seed=1)]),
    "columns from 1 to a billionth": numbers(ROWS, 8, seed=1) * np.logspace(0, -9, 8),
    "means a thousand times the spread": numbers(ROWS, 8, seed=1) + 1e3,
}


@pytest.mark.parametrize("x_NI", AWKWARD.values(), ids=AWKWARD)
def test_awkward_columns_are_forgotten_too(x_NI: Float64) -> None:
    problem = _problem(x_NI, weighted=False)
    rest = forget(problem.statistics(), problem.statistics(slice(0, GONE)), ridge=0.0, bias=True, rank=3)
    fresh = problem.statistics(slice(GONE, ROWS))
    given, wanted = (_delta(each, ridge=0.0, bias=True, rank=3)[:, :-1] for each in (rest, fresh))
    # In each column's own unit: a column of a billionth has a coefficient of a billion.
    scale_I = np.maximum(np.abs(x_NI).max(0), 1e-12)
    assert relative(given * scale_I, wanted * scale_I) < 1e-6


def test_adding_and_forgetting_many_times_ends_where_it_began() -> None:
    problem = _problem()
    kept = problem.statistics(slice(GONE, ROWS))
    part = problem.statistics(slice(0, GONE))
    again = kept
    for _ in range(20):
        again = forget(again.plus(part), part, ridge=0.0, bias=True, rank=3)
    given, wanted = (_delta(each, ridge=0.0, bias=True, rank=3) for each in (again, kept))
    assert relative(given, wanted) < 1e-6


def test_forgetting_nothing_changes_nothing() -> None:
    statistics = _problem().statistics()
    assert forget(statistics, Statistics.zeros(8, 5), ridge=0.0, bias=True) is statistics


def _one_loud_row() -> Float64:
    x_NI = numbers(ROWS, 8, seed=1)
    x_NI[0] *= 1e9
    return x_NI


def _flag_of_the_gone() -> Float64:
    x_NI = numbers(ROWS, 8, seed=1)
    x_NI[:, 4] = (np.arange(ROWS) < GONE) * np.abs(x_NI[:, 4])
    return x_NI


def _told_apart_by_the_gone() -> Float64:
    """Two columns that are the same in the rows that stay, but for a hundred-thousandth."""
    x_NI = numbers(ROWS, 8, seed=1)
    x_NI[GONE:, 1] = x_NI[GONE:, 0] + 1e-5 * x_NI[GONE:, 1]
    return x_NI


HOPELESS = {
    "a row a billion times as large": _one_loud_row(),
    "a column that only the forgotten rows have": _flag_of_the_gone(),
    "a direction that hardly any other rows have": _told_apart_by_the_gone(),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("x_NI", HOPELESS.values(), ids=HOPELESS)
def test_what_rounding_could_spoil_is_refused_with_what_to_do(x_NI: Float64, bias: bool) -> None:
    problem = _problem(x_NI)
    with pytest.raises(IllConditioned, match="lost in rounding") as caught:
        forget(problem.statistics(), problem.statistics(slice(0, GONE)), ridge=0.0, bias=bias)
    assert "train again" in str(caught.value.expected)
    assert "larger ridge" in str(caught.value.expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_ridge_that_outweighs_the_rounding_lets_it_go_through(bias: bool) -> None:
    problem = _problem(_flag_of_the_gone())
    rest = forget(problem.statistics(), problem.statistics(slice(0, GONE)), ridge=1.0, bias=bias, rank=3)
    fresh = problem.statistics(slice(GONE, ROWS))
    given, wanted = (_delta(each, ridge=1.0, bias=bias, rank=3) for each in (rest, fresh))
    assert relative(given, wanted) < 1e-6


def test_rounding_that_an_earlier_row_left_behind_is_remembered() -> None:
    """Step by step each looks harmless; the loud row's rounding is still in what is left."""
    x_NI = numbers(ROWS, 8, seed=1) * np.logspace(9, 0, ROWS)[:, None]
    problem = _problem(x_NI, weighted=False)
    left = problem.statistics()

    def forget_one_after_the_other() -> None:
        nonlocal left
        for row in range(ROWS - 20):
            left = forget(left, problem.statistics(slice(row, row + 1)), ridge=0.0, bias=False)

    with pytest.raises(IllConditioned, match="lost in rounding"):
        forget_one_after_the_other()
    assert 20 < left.rows < ROWS - 20


def test_a_rank_that_parts_directions_of_the_same_strength_is_refused() -> None:
    """The identity, fifty times: of its four outputs no two are better than two others."""
    x_NI = np.vstack([np.eye(4)] * 50)

    def forgotten(strengths_O: Sequence[float], rank: int | None) -> Statistics:
        y_NO = x_NI * strengths_O
        problem = Problem(layer(torch.zeros(4, 4)), x_NI, y_NO, None, y_NO)
        return forget(problem.statistics(), problem.statistics(slice(0, 40)), ridge=0.0, bias=False, rank=rank)

    with pytest.raises(IllConditioned, match="lost in rounding"):
        forgotten([1, 1, 1, 1], 2)
    with pytest.raises(IllConditioned, match="lost in rounding"):
        forgotten([2, 1 + 2**-23, 1, 1], 3)
    for strengths_O, rank in (([1, 1, 1, 1], 4), ([1, 1, 1, 1], None), ([3, 2, 1, 1], 2), ([1, 1, 0, 0], 3)):
        assert forgotten(strengths_O, rank).rows == 160


def test_whether_a_direction_is_free_must_not_be_left_to_rounding() -> None:
    problem = _problem(_duplicates())
    with pytest.raises(IllConditioned, match="nothing but rounding is left"):
        forget(problem.statistics(), problem.statistics(slice(0, ROWS - 10)), ridge=0.0, bias=True)


@pytest.mark.parametrize("ridge", [0.0, 10.0, 1e9])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_that_were_never_in_it_are_refused(bias: bool, ridge: float) -> None:
    problem = _problem(weighted=False)
    # The base layer answers them exactly: nothing but their inputs gives them away.
    other_NI = (5 * numbers(GONE, 8, seed=9)).astype(np.float32)
    answers_NO = problem.base.forward(torch.from_numpy(other_NI)).double().numpy()
    strangers = Problem(problem.base, other_NI.astype(np.float64), answers_NO, None, 0 * answers_NO).statistics()
    with pytest.raises(IllConditioned, match="never in it"):
        forget(problem.statistics(), strangers, ridge=ridge, bias=bias)


@pytest.mark.parametrize("bias", [False, True])
def test_rows_with_other_targets_than_they_had_are_refused(bias: bool) -> None:
    problem = _problem(weighted=False)
    y_NO = problem.y_NO[:GONE] + 30 * numbers(GONE, 5, seed=9)
    changed = Problem(problem.base, problem.x_NI[:GONE], y_NO, None, problem.r_NO[:GONE]).statistics()
    with pytest.raises(IllConditioned, match="never in it"):
        forget(problem.statistics(), changed, ridge=0.0, bias=bias)


EVERYTHING: dict[str, Callable[[Problem], Statistics]] = {
    "all rows": lambda problem: problem.statistics(),
    "more rows than there are": lambda problem: problem.statistics().plus(problem.statistics(slice(0, 5))),
}


@pytest.mark.parametrize("gone", EVERYTHING.values(), ids=EVERYTHING)
def test_some_rows_must_remain(gone: Callable[[Problem], Statistics]) -> None:
    problem = _problem()
    with pytest.raises(IllConditioned, match=r"no rows would remain: \d+ are to be forgotten of \d+"):
        forget(problem.statistics(), gone(problem), ridge=1.0, bias=True)


def test_rows_of_another_shape_cannot_be_forgotten() -> None:
    with pytest.raises(InvalidCombination, match=r"\(8, 4\)"):
        forget(_problem().statistics(), Statistics.zeros(8, 4), ridge=1.0, bias=True)
