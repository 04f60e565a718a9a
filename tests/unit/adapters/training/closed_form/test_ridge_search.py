"""Ridge and rank are chosen by the loss of held-out rows, as if every pair had been trained and measured."""

# N rows · I in_features · O out_features
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from adapters.training.closed_form.ridge_search import LOSS_TOLERANCE, RidgeChoice, default_ridges, search_ridge
from adapters.training.closed_form.statistics import Statistics
from tests.support.dense_oracle import Float64
from tests.unit.adapters.training.closed_form.closed_form_oracle import Problem, numbers

RANKS = [1, 2, 3, 5, 9]


def _problem(inputs: int, outputs: int, *, rows: int = 60, seed: int = 1) -> Problem:
    """ΔW of rank 2 beneath noise; neither inputs nor targets have mean 0; weighted."""
    truth_OI = numbers(outputs, 2, seed=seed) @ numbers(2, inputs, seed=seed + 1)
    x_NI = numbers(rows, inputs, seed=seed + 2) + numbers(inputs, seed=seed + 3)
    bare = Problem.of(x_NI, np.zeros((rows, outputs)), seed=9)
    y_NO = x_NI @ truth_OI.T - bare.r_NO + 2 * numbers(rows, outputs, seed=seed + 4) + 4
    return Problem.of(x_NI, y_NO, np.abs(numbers(rows, seed=seed + 5)), seed=9)


def _part(problem: Problem, rows: slice) -> Problem:
    assert problem.weights_N is not None
    return Problem(problem.base, problem.x_NI[rows], problem.y_NO[rows], problem.weights_N[rows], problem.r_NO[rows])


def _searched(
    training: Problem, held: Problem, ranks: Sequence[int], ridges: Sequence[float], **how: Any
) -> RidgeChoice:
    return search_ridge(training.statistics(), held.statistics(), ranks=ranks, ridges=ridges, **how)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 5), (4, 9)])
def test_every_entry_of_the_table_is_what_training_and_measuring_that_pair_gives(
    inputs: int, outputs: int, bias: bool, with_prior: bool
) -> None:
    problem = _problem(inputs, outputs)
    training, held = _part(problem, slice(0, 40)), _part(problem, slice(40, 60))
    prior_OI = numbers(outputs, inputs, seed=30) if with_prior else None
    ridges = [0.0, 1e-12, 1e-3, 1.0, 30.0, 1e4]
    choice = _searched(
        training, held, RANKS, ridges, bias=bias, prior_OI=None if prior_OI is None else torch.from_numpy(prior_OI)
    )
    assert [(each.ridge, each.rank) for each in choice.table] == [(ridge, rank) for ridge in ridges for rank in RANKS]
    for ridge, rank, loss in choice.table:
        delta_OI, beta_O = training.solved(rank=rank, ridge=ridge, bias=bias, prior_OI=prior_OI)
        wanted = held.loss(delta_OI, beta_O, ridge=0.0) / (held.w_N.sum() * outputs)
        assert loss == pytest.approx(wanted, rel=1e-5)


def test_with_fewer_rows_than_columns_the_table_is_right_too() -> None:
    problem = _problem(20, 6, rows=40)
    training, held = _part(problem, slice(0, 12)), _part(problem, slice(12, 40))
    for ridge, rank, loss in _searched(training, held, [1, 6], [0.0, 1e-2, 5.0]).table:
        delta_OI, beta_O = training.solved(rank=rank, ridge=ridge, bias=False)
        assert loss == pytest.approx(held.loss(delta_OI, beta_O, ridge=0.0) / (held.w_N.sum() * 6), rel=1e-5)


@pytest.mark.parametrize("ridge", [1e-21, 1e-12])
def test_columns_from_1_to_a_billionth_have_a_table_that_is_right(ridge: float) -> None:
    problem = _problem(8, 5)
    scale_I = np.random.default_rng(3).permutation(np.logspace(0, -9, 8))
    problem = Problem.of(problem.x_NI * scale_I, problem.y_NO, problem.weights_N, seed=9)
    training, held = _part(problem, slice(0, 40)), _part(problem, slice(40, 60))
    for _, rank, loss in _searched(training, held, [1, 3, 5], [ridge]).table:
        delta_OI, beta_O = training.solved(rank=rank, ridge=ridge, bias=False)
        assert loss == pytest.approx(held.loss(delta_OI, beta_O, ridge=0.0) / (held.w_N.sum() * 5), rel=1e-5)


def test_the_smallest_rank_within_a_hair_of_the_least_loss_is_chosen() -> None:
    problem = _problem(8, 6, rows=4000)
    training, held = _part(problem, slice(0, 3000)), _part(problem, slice(3000, 4000))
    choice = _searched(training, held, [1, 2, 3, 4, 6], [0.0, 1.0, 10.0], bias=True)
    least = min(each.loss for each in choice.table)
    assert choice.rank == 2
    assert choice.loss <= least * (1 + LOSS_TOLERANCE)
    assert min(each.loss for each in choice.table if each.rank == 1) > least * (1 + LOSS_TOLERANCE)
    assert choice.loss == min(each.loss for each in choice.table if each.rank == 2)


def test_of_equal_losses_the_larger_ridge_and_the_smaller_rank_are_chosen() -> None:
    x_NI = numbers(20, 4, seed=1)
    bare = Problem.of(x_NI, np.zeros((20, 3)))
    # The base layer answers the training rows exactly: every pair ends in ΔW = 0.
    training = Problem.of(x_NI, -bare.r_NO)
    exact = Problem(training.base, training.x_NI, training.y_NO, None, np.zeros((20, 3)))
    silent = Statistics.zeros(4, 3).plus(exact.statistics())
    silent.cross_IO.zero_()
    silent.mean_O.zero_()
    choice = search_ridge(silent, _problem(4, 3).statistics(), ranks=[3, 1, 2], ridges=[0.1, 10.0, 1.0])
    assert (choice.ridge, choice.rank) == (10.0, 1)


def test_noise_wants_a_large_ridge_and_no_noise_wants_none() -> None:
    x_NI, truth_OI = numbers(60, 10, seed=1), numbers(4, 10, seed=2)
    bare = Problem.of(x_NI, np.zeros((60, 4)))

    def chosen(noise: float) -> float:
        problem = Problem.of(x_NI, x_NI @ truth_OI.T - bare.r_NO + noise * numbers(60, 4, seed=3))
        training = problem.statistics(slice(0, 30))
        ridges = default_ridges(training, bias=False)
        return search_ridge(training, problem.statistics(slice(30, 60)), ranks=[4], ridges=ridges).ridge

    assert chosen(0.0) == 0
    assert chosen(20.0) > 30


def _gram_mean(x_NI: Float64) -> float:
    return float((x_NI**2).sum(0).mean())


def test_the_default_ridges_go_with_the_scale_of_the_inputs_and_begin_at_zero_where_that_is_safe() -> None:
    x_NI = numbers(50, 6, seed=1)
    small, large = (Problem.of(scale * x_NI, numbers(50, 3, seed=2)) for scale in (1.0, 1000.0))
    ridges = default_ridges(small.statistics(), bias=False)
    assert ridges[0] == 0
    assert ridges[1] == pytest.approx(1e-5 * _gram_mean(x_NI), rel=1e-9)
    assert ridges[-1] == pytest.approx(100 * _gram_mean(x_NI), rel=1e-9)
    assert default_ridges(large.statistics(), bias=False) == pytest.approx([1e6 * ridge for ridge in ridges], rel=1e-6)
    few = Problem.of(x_NI[:4], numbers(4, 3, seed=2))
    assert min(default_ridges(few.statistics(), bias=False)) > 0
    assert min(default_ridges(Problem.of(np.zeros((4, 6)), numbers(4, 3, seed=2)).statistics(), bias=True)) > 0
