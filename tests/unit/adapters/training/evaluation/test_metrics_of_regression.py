"""Numbers against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyRegressor
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.metrics.pairwise import cosine_similarity

from adapters.training.evaluation.metrics import Task, measure, measure_trivial
from tests.unit.adapters.training.evaluation.held_out_rows import held_out, listed, plain

ROWS = held_out(Task.REGRESSION)
OUTPUTS, TARGETS, WEIGHTS = ROWS.outputs_NO, ROWS.targets, ROWS.weights_N


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_every_number_is_scikit_learn_s(weights: torch.Tensor | None) -> None:
    metrics = measure(Task.REGRESSION, OUTPUTS, TARGETS, weights_N=weights)
    for name, score in (("r2", r2_score), ("mae", mean_absolute_error), ("rmse", root_mean_squared_error)):
        each = score(TARGETS, OUTPUTS, sample_weight=weights, multioutput="raw_values")
        assert listed(metrics, f"{name}_per_output") == pytest.approx(each)
        if name != "rmse":
            assert plain(metrics, f"{name}_mean") == pytest.approx(each.mean())
    overall = root_mean_squared_error(
        TARGETS.flatten(), OUTPUTS.flatten(), sample_weight=None if weights is None else weights.repeat_interleave(4)
    )
    assert plain(metrics, "rmse") == pytest.approx(overall)
    cosines = cosine_similarity(OUTPUTS, TARGETS).diagonal()
    assert plain(metrics, "cosine") == pytest.approx(np.average(cosines, weights=weights))


def test_targets_far_from_0_lose_no_digits_of_r2() -> None:
    far = measure(Task.REGRESSION, OUTPUTS + 1e9, TARGETS + 1e9)
    near = r2_score(TARGETS, OUTPUTS, multioutput="raw_values")
    assert listed(far, "r2_per_output") == pytest.approx(near, rel=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_constant_target_has_no_r2_whether_it_is_met_or_not(offset: float) -> None:
    targets = torch.cat([torch.full((60, 1), 0.1, dtype=torch.float64), TARGETS[:, :1]], dim=1)
    outputs = torch.cat([targets[:, :1] + offset, OUTPUTS[:, :1]], dim=1)
    metrics = measure(Task.REGRESSION, outputs, targets, weights_N=WEIGHTS / 7)
    wanted = r2_score(TARGETS[:, 0], OUTPUTS[:, 0], sample_weight=WEIGHTS)
    assert metrics["r2_per_output"] == [None, pytest.approx(wanted)]
    assert plain(metrics, "r2_mean") == pytest.approx(wanted)
    assert listed(metrics, "mae_per_output")[0] == pytest.approx(offset)


def test_a_target_that_varies_only_in_rows_of_weight_0_is_constant() -> None:
    targets, weights = torch.full((46, 1), 123.456, dtype=torch.float64), torch.full((46,), 0.1, dtype=torch.float64)
    targets[0], weights[0] = 9, 0
    # The mean of these is not 123.456 to the last digit: what is left is no spread.
    assert float(weights @ targets / weights.sum()) != 123.456
    metrics = measure(Task.REGRESSION, torch.zeros(46, 1), targets, weights_N=weights)
    assert metrics["r2_per_output"] == [None]
    assert metrics["r2_mean"] is None
    assert plain(metrics, "rmse") == pytest.approx(123.456)


def test_one_row_has_errors_and_no_r2() -> None:
    metrics = measure(Task.REGRESSION, torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
    assert (metrics["r2_mean"], metrics["r2_per_output"]) == (None, [None, None])
    assert (metrics["mae_mean"], metrics["rmse"]) == (1.0, 1.0)
    assert plain(metrics, "cosine") == pytest.approx(24 / 25)


def test_the_cosine_with_a_zero_vector_is_0() -> None:
    outputs = torch.tensor([[0.0, 0], [1, 0], [0, 0], [3, 4]])
    targets = torch.tensor([[1.0, 2], [0, 0], [0, 0], [30, 40]])
    assert plain(measure(Task.REGRESSION, outputs, targets), "cosine") == pytest.approx(1 / 4)


def test_the_cosine_of_tiny_vectors_is_that_of_their_directions() -> None:
    metrics = measure(Task.REGRESSION, torch.tensor([[3e-30, 4e-30]]), torch.tensor([[4e-30, 3e-30]]))
    assert plain(metrics, "cosine") == pytest.approx(24 / 25)


@pytest.mark.parametrize(("outputs", "told"), [(1000, True), (1001, False)])
def test_past_1000_outputs_only_their_means_are_told(outputs: int, told: bool) -> None:
    rows = held_out(Task.REGRESSION, rows=3, outputs=outputs)
    metrics = measure(Task.REGRESSION, rows.outputs_NO, rows.targets)
    for name in ("r2_per_output", "mae_per_output", "rmse_per_output"):
        assert (metrics[name] is not None) is told
    assert plain(metrics, "r2_mean") == pytest.approx(r2_score(rows.targets, rows.outputs_NO))


def test_rows_that_all_weigh_nothing_have_nothing_to_tell() -> None:
    metrics = measure(Task.REGRESSION, OUTPUTS, TARGETS, weights_N=torch.zeros(60))
    assert [metrics[name] for name in ("r2_mean", "mae_mean", "rmse", "cosine")] == [None] * 4


def test_what_is_too_large_to_square_is_undefined_and_not_infinite() -> None:
    metrics = measure(Task.REGRESSION, torch.tensor([[1e200], [0.0]], dtype=torch.float64), torch.zeros(2, 1))
    assert (metrics["rmse"], metrics["mae_mean"]) == (None, 5e199)


def test_the_trivial_baseline_is_scikit_learn_s_with_the_mean() -> None:
    trained_on = np.array([[1.0, 2, 3, 4], [2, 2, 0, 4], [6, 2, 3, 4]])
    said = DummyRegressor(strategy="mean").fit(np.zeros((3, 1)), trained_on).predict(np.zeros((60, 1)))
    metrics = measure_trivial(Task.REGRESSION, torch.tensor([3.0, 2, 2, 4]), TARGETS, weights_N=WEIGHTS)
    assert plain(metrics, "r2_mean") == pytest.approx(r2_score(TARGETS, said, sample_weight=WEIGHTS))
    assert plain(metrics, "mae_mean") == pytest.approx(mean_absolute_error(TARGETS, said, sample_weight=WEIGHTS))
    assert "loss" not in metrics
