"""Wilson's interval and the calibration error against scipy and scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve

from adapters.training.evaluation.metrics import BINS, calibration_gaps, effective_rows, f1, wilson


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(1, 10**6), data=st.data())
def test_the_interval_is_scipy_s_for_any_count(rows: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, rows))
    wanted = binomtest(right, rows).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(right / rows, rows) == pytest.approx([wanted.low, wanted.high], abs=1e-9)


def test_the_interval_of_nothing_right_begins_at_0_and_of_all_right_ends_at_1() -> None:
    none, all_ = wilson(0.0, 7), wilson(1.0, 7)
    assert none is not None
    assert all_ is not None
    assert (none[0], all_[1]) == (0.0, 1.0)
    assert none[1] == pytest.approx(1 - all_[0])
    assert 0 < none[1] < 1


def test_no_rows_have_no_interval() -> None:
    assert wilson(None, 0) is None
    assert wilson(0.5, 0) is None


def test_rows_of_equal_weight_count_in_full_and_a_dominant_one_hardly_more_than_alone() -> None:
    assert effective_rows(torch.full((9,), 0.25, dtype=torch.float64)) == 9
    assert effective_rows(torch.tensor([3.0, 0.0, 0.0])) == 1
    assert effective_rows(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(36 / 14)
    assert effective_rows(torch.zeros(3)) == 0


def test_the_calibration_error_is_scikit_learn_s_bins_added_up() -> None:
    draw = np.random.default_rng(0)
    probability_N = draw.uniform(size=400) ** 3
    outcome_N = (draw.uniform(size=400) < probability_N**2).astype(np.float64)
    seen, said = calibration_curve(outcome_N, probability_N, n_bins=BINS, strategy="uniform")
    counts = np.histogram(probability_N, bins=BINS, range=(0, 1))[0]
    wanted = float((np.abs(seen - said) * counts[counts > 0]).sum() / 400)
    gaps = calibration_gaps(torch.from_numpy(probability_N), torch.from_numpy(outcome_N), torch.ones(400).double())
    assert wanted > 0.05
    assert float(gaps.abs().sum() / 400) == pytest.approx(wanted, rel=1e-12)


def test_a_bin_includes_its_upper_end_and_the_first_one_0() -> None:
    edges = torch.tensor([0.0, 1 / 15, 1 / 15 + 1e-12, 5 / 15, 14 / 15, 1.0], dtype=torch.float64)
    gaps = calibration_gaps(edges, torch.full_like(edges, 2.0), torch.ones_like(edges))
    assert gaps.nonzero().view(-1).tolist() == [0, 1, 4, 13, 14]
    assert float(gaps[0]) == pytest.approx(2 + 2 - 1 / 15)


def test_f1_of_what_is_neither_there_nor_predicted_is_0() -> None:
    scores = f1(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 2.0, 0.0]))
    assert scores.tolist() == pytest.approx([0, 2 / 3, 0])
