"""Labels against scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, f1_score, log_loss

from adapters.training.evaluation.metrics import Task, measure, measure_trivial
from tests.unit.adapters.training.evaluation.held_out_rows import held_out, listed, plain

ROWS = held_out(Task.MULTILABEL)
LOGITS, TARGETS, WEIGHTS = ROWS.outputs_NO, ROWS.targets, ROWS.weights_N
SAID = expit(LOGITS.numpy()) > 0.5


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_every_number_is_scikit_learn_s(weights: torch.Tensor | None) -> None:
    metrics = measure(Task.MULTILABEL, LOGITS, TARGETS, weights_N=weights)
    truth = TARGETS.numpy().astype(int)
    assert plain(metrics, "exact_match") == pytest.approx(accuracy_score(truth, SAID, sample_weight=weights))
    for average in ("micro", "macro"):
        wanted = f1_score(truth, SAID, average=average, sample_weight=weights, zero_division=0)
        assert plain(metrics, f"{average}_f1") == pytest.approx(wanted)
    low, high = listed(metrics, "exact_match_interval")
    assert 0 < low < plain(metrics, "exact_match") < high < 1


def test_the_calibration_error_is_that_of_all_decisions_together() -> None:
    logits, targets = ROWS.repeated()
    probability, outcome = expit(logits.numpy()).ravel(), targets.numpy().ravel()
    seen, said = calibration_curve(outcome, probability, n_bins=15, strategy="uniform")
    counts = np.histogram(probability, bins=15, range=(0, 1))[0]
    wanted = (np.abs(seen - said) * counts[counts > 0]).sum() / counts.sum()
    assert plain(measure(Task.MULTILABEL, LOGITS, TARGETS, weights_N=WEIGHTS), "calibration_error") == pytest.approx(
        wanted
    )


def test_a_label_that_is_nowhere_counts_in_macro_f1_as_0_and_in_micro_f1_not_at_all() -> None:
    logits = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    metrics = measure(Task.MULTILABEL, logits, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert (metrics["macro_f1"], metrics["micro_f1"], metrics["exact_match"]) == (0.5, 1.0, 1.0)


def test_a_probability_of_one_half_says_no_and_a_target_of_one_half_means_no() -> None:
    metrics = measure(Task.MULTILABEL, torch.zeros(1, 2), torch.tensor([[0.5, 0.0]]))
    assert metrics["exact_match"] == 1.0
    assert metrics["micro_f1"] == 0.0


def test_targets_between_0_and_1_are_what_probabilities_should_be() -> None:
    targets = torch.tensor([[0.3, 0.9]], dtype=torch.float64)
    assert plain(measure(Task.MULTILABEL, targets.logit(), targets), "calibration_error") == pytest.approx(0, abs=1e-15)


def test_one_label_has_the_f1_of_its_positive_class() -> None:
    metrics = measure(Task.MULTILABEL, LOGITS[:, :1], TARGETS[:, :1])
    assert plain(metrics, "macro_f1") == pytest.approx(f1_score(TARGETS[:, 0], SAID[:, 0]))
    assert metrics["macro_f1"] == metrics["micro_f1"]


def test_rows_that_all_weigh_nothing_have_no_share_that_matches() -> None:
    metrics = measure(Task.MULTILABEL, LOGITS, TARGETS, weights_N=torch.zeros(60))
    assert [metrics[name] for name in ("exact_match", "exact_match_interval", "calibration_error")] == [None] * 3


def test_the_trivial_baseline_answers_with_the_rates() -> None:
    rates = torch.tensor([0.9, 0.2, 0.5, 0.6], dtype=torch.float64)
    metrics = measure_trivial(Task.MULTILABEL, rates, TARGETS, weights_N=WEIGHTS)
    each = [
        log_loss(TARGETS[:, label], np.full(60, float(rate)), sample_weight=WEIGHTS, labels=[0, 1])
        for label, rate in enumerate(rates)
    ]
    assert plain(metrics, "loss") == pytest.approx(np.mean(each))
    said = np.tile([1, 0, 0, 1], (60, 1))
    wanted = f1_score(TARGETS.numpy().astype(int), said, average="micro", sample_weight=WEIGHTS)
    assert plain(metrics, "micro_f1") == pytest.approx(wanted)


def test_a_rate_of_0_or_1_costs_nothing_while_it_holds_and_leaves_the_loss_undefined_once_it_does_not() -> None:
    rates = torch.tensor([1.0, 0.0])
    weights = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    held = measure_trivial(Task.MULTILABEL, rates, torch.tensor([[1.0, 0.0]] * 3), weights_N=weights)
    assert (held["loss"], held["exact_match"], held["calibration_error"]) == (0.0, 1.0, 0.0)
    broken = measure_trivial(Task.MULTILABEL, rates, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert (broken["loss"], broken["exact_match"], broken["calibration_error"]) == (None, 0.5, 0.25)
