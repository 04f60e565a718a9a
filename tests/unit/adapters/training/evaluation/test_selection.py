"""What decides where a request leaves rank, ridge or learning rate open."""

# N rows · I in_features · O out_features
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from adapters.lora.base_layer import load_base_layer
from adapters.training.closed_form.ridge_search import cross_validate_ridge
from adapters.training.closed_form.statistics import accumulate
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.selection import TRIAL_STEPS, TrialLoss, choose_rate_and_rank
from adapters.training.fit import Watcher, fit
from adapters.training.settings import Loss, Method, TrainingSpec

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
SPEC = TrainingSpec(rank=8, alpha=8.0, alpha_is_rank=True, loss=Loss.CROSS_ENTROPY, epochs=5000, patience=3)
DRAW = torch.Generator().manual_seed(4)
X, NOISE = torch.randn(45, 6, generator=DRAW), torch.randn(45, 3, generator=DRAW)
Y = X @ torch.randn(6, 3, generator=DRAW) + 3 * NOISE + 5
WEIGHTS = torch.rand(45, generator=DRAW) + 0.5


def _choose(losses: dict[float, float], *, error: float) -> tuple[float, list[str]]:
    told: list[str] = []
    spec = replace(SPEC, try_rates=tuple(losses))
    chosen = choose_rate_and_rank(spec, lambda trial: TrialLoss(losses[trial.learning_rate], error), note=told.append)
    assert chosen.try_rates == ()
    return chosen.learning_rate, told


def test_of_rates_that_the_held_out_rows_cannot_tell_apart_the_smallest_is_taken() -> None:
    losses = dict(zip(RATES, (0.9, 0.42, 0.40, 0.39, 0.8), strict=True))
    assert _choose(losses, error=0.0)[0] == 0.03
    assert _choose(losses, error=0.015)[0] == 0.01
    rate, told = _choose(losses, error=0.035)
    assert rate == 0.003
    assert told == [
        "learning_rate 0.003: the smallest whose held-out loss after 200 steps is within a standard error, 0.035, of "
        "the least (0.001: 0.9, 0.003: 0.42, 0.01: 0.4, 0.03: 0.39, 0.1: 0.8)"
    ]


def test_where_every_rate_diverges_the_smallest_is_taken() -> None:
    assert _choose(dict.fromkeys(RATES, math.inf), error=0.0)[0] == 0.001


def test_a_trial_is_short_and_goes_to_its_end_whatever_stops_the_training() -> None:
    seen: list[TrainingSpec] = []

    def trial(spec: TrainingSpec) -> TrialLoss:
        seen.append(spec)
        return TrialLoss(1.0 / spec.rank, 0.0)

    spec = replace(SPEC, try_rates=RATES, try_ranks=(1, 2, 8), max_seconds=5)
    chosen = choose_rate_and_rank(spec, trial, note=lambda _text: None)
    assert [each.rank for each in seen] == [8] * 5 + [1, 2, 8]
    assert {(each.max_steps, each.patience, each.max_seconds) for each in seen} == {(TRIAL_STEPS, None, None)}
    assert [each.alpha for each in seen[5:]] == [1.0, 2.0, 8.0]
    assert chosen == replace(spec, learning_rate=0.001, try_rates=(), try_ranks=())


def test_parts_in_turn_are_the_cross_validation_that_scikit_learns_ridge_gives() -> None:
    base = load_base_layer("zeros:6,3", device="cpu")
    places = np.array_split(np.arange(45), 7)
    parts = [accumulate(base, [(X[rows], Y[rows], WEIGHTS[rows])]) for rows in places]
    ridges = [0.0, 1.0, 10.0, 100.0]
    found = cross_validate_ridge(parts, ranks=(3,), ridges=ridges, bias=True)
    x_NI, y_NO, weights_N = X.double().numpy(), Y.double().numpy(), WEIGHTS.double().numpy()
    for ridge, candidate in zip(ridges, found.table, strict=True):
        errors_N = np.empty(45)
        for held in places:
            rest = np.setdiff1d(np.arange(45), held)
            model = Ridge(alpha=ridge).fit(x_NI[rest], y_NO[rest], sample_weight=weights_N[rest])
            errors_N[held] = ((model.predict(x_NI[held]) - y_NO[held]) ** 2).mean(axis=1)
        assert candidate.loss == pytest.approx(np.average(errors_N, weights=weights_N), rel=1e-9)
    assert found.loss == min(candidate.loss for candidate in found.table)
    assert found.ridge > 0


def test_what_the_parts_choose_is_trained_on_all_rows_and_rows_that_do_not_count_are_in_none() -> None:
    base = load_base_layer("zeros:6,3", device="cpu")
    spec = TrainingSpec(rank=3, alpha=3.0, method=Method.CLOSED_FORM, bias=True, try_ridges=True)
    told: list[str] = []
    data = TrainingData(X, Y, weights_N=torch.ones(45))
    done = fit(base, data, spec, watcher=Watcher(note=told.append))
    with_dead_rows = TrainingData(
        torch.cat([X, 100 * X[:5]]), torch.cat([Y, -Y[:5]]), weights_N=torch.cat([torch.ones(45), torch.zeros(5)])
    )
    assert fit(base, with_dead_rows, spec).adapter.digest == done.adapter.digest
    assert done.metrics["validation_loss"] is None
    assert "loss of each tenth of the rows, held out in turn" in told[0]
    reference = Ridge(alpha=done.spec.ridge).fit(X.double().numpy(), Y.double().numpy())
    np.testing.assert_allclose(
        (done.adapter.a_OR @ done.adapter.b_RI).double().numpy() * done.adapter.scaling, reference.coef_, atol=1e-5
    )
