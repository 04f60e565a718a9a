"""Many groups are solved together as each would be alone."""

# N rows · I in_features · O out_features · G groups
import numpy as np
import pytest
import torch

from adapters.errors import Diverged
from adapters.training.closed_form.solver import Factors, solve, solve_stack
from tests.unit.adapters.training.closed_form.closed_form_oracle import Problem, dense, numbers, relative, stacked

INPUTS, OUTPUTS, RANK, SCALING = 6, 4, 3, 0.5


def _groups() -> list[Problem]:
    """Many rows, few, one; a column of zeros; targets of rank 1; and weights."""
    drawn = [
        Problem.of(numbers(rows, INPUTS, seed=rows) + 1, numbers(rows, OUTPUTS, seed=rows + 1), seed=7)
        for rows in (50, 30, 4, 1)
    ]
    x_NI = numbers(40, INPUTS, seed=90)
    x_NI[:, 2] = 0
    base_NO = drawn[0].base.forward(torch.from_numpy(x_NI).float()).double().numpy()
    plain_NO = base_NO + np.outer(x_NI[:, 0], numbers(OUTPUTS, seed=91))
    weights_N = np.abs(numbers(40, seed=93))
    noisy = Problem.of(x_NI + numbers(40, INPUTS, seed=94), numbers(40, OUTPUTS, seed=92), weights_N, seed=7)
    return [*drawn, Problem.of(x_NI, plain_NO, seed=7), noisy]


def _of(factors: Factors, group: int) -> Factors:
    return Factors(factors.a_OR[group], factors.b_RI[group], None if factors.bias_O is None else factors.bias_O[group])


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 2.0])
def test_each_group_is_what_it_is_alone(ridge: float, bias: bool, with_prior: bool) -> None:
    groups = [problem.statistics() for problem in _groups()]
    prior_OI = torch.from_numpy(numbers(OUTPUTS, INPUTS, seed=99)) if with_prior else None
    together, errors = solve_stack(
        stacked(groups), rank=RANK, scaling=SCALING, ridge=ridge, bias=bias, prior_OI=prior_OI
    )
    assert errors == [None] * len(groups)
    assert together.a_OR.shape == (len(groups), OUTPUTS, RANK)
    assert together.b_RI.shape == (len(groups), RANK, INPUTS)
    assert (together.bias_O is not None) == bias
    for group, statistics in enumerate(groups):
        alone = solve(statistics, rank=RANK, scaling=SCALING, ridge=ridge, bias=bias, prior_OI=prior_OI)
        for given, wanted in zip(dense(_of(together, group), SCALING), dense(alone, SCALING), strict=True):
            np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-5)


def test_each_group_reaches_its_own_minimum() -> None:
    problems = _groups()
    statistics = stacked([problem.statistics() for problem in problems])
    together, _ = solve_stack(statistics, rank=OUTPUTS, scaling=SCALING, ridge=0.0)
    for group, problem in enumerate(problems):
        root_N1 = np.sqrt(problem.w_N)[:, None]
        oracle = np.linalg.pinv(root_N1 * problem.x_NI) @ (root_N1 * problem.r_NO)
        assert relative(dense(_of(together, group), SCALING)[0], oracle.T) < 1e-5


def test_each_group_may_have_its_own_ridge_and_prior() -> None:
    problems = _groups()[:3]
    priors_GOI = torch.from_numpy(numbers(3, OUTPUTS, INPUTS, seed=5))
    ridges = [0.5, 0.0, 80.0]
    together, _ = solve_stack(
        stacked([problem.statistics() for problem in problems]),
        rank=RANK,
        scaling=SCALING,
        ridge=torch.tensor(ridges, dtype=torch.float64),
        prior_OI=priors_GOI,
    )
    for group, (problem, ridge) in enumerate(zip(problems, ridges, strict=True)):
        wanted = problem.solved(rank=RANK, ridge=ridge, bias=False, prior_OI=priors_GOI[group].numpy())
        assert relative(dense(_of(together, group), SCALING)[0], wanted[0]) < 1e-5


def test_a_group_that_fails_leaves_the_others_as_they_are() -> None:
    groups = [problem.statistics() for problem in _groups()[:3]]
    base = _groups()[0].base
    far = Problem(base, 1e-30 * numbers(9, INPUTS, seed=1), 3e37 * numbers(9, OUTPUTS, seed=2), None, np.zeros((9, 4)))
    broken = stacked([groups[0]])[0]
    broken.gram_II.fill_(float("nan"))
    stack = stacked([groups[0], broken, groups[1], far.statistics(), groups[2]])
    together, errors = solve_stack(stack, rank=RANK, scaling=1e-15, ridge=0.0, bias=True)
    assert [None if error is None else type(error) for error in errors] == [None, Diverged, None, Diverged, None]
    for place, group in ((0, 0), (2, 1), (4, 2)):
        alone = solve(groups[group], rank=RANK, scaling=1e-15, ridge=0.0, bias=True)
        assert relative(dense(_of(together, place), 1e-15)[0], dense(alone, 1e-15)[0]) < 1e-5
    assert float(together.a_OR[[1, 3]].abs().max()) == float(together.b_RI[[1, 3]].abs().max()) == 0
