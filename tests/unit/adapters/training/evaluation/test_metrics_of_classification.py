"""Classes against scikit-learn and scipy, and by hand where they have nothing."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss

from adapters.training.evaluation.metrics import Task, measure, measure_trivial
from tests.unit.adapters.training.evaluation.held_out_rows import Float64, held_out, listed, plain, scalars

ROWS = held_out(Task.CLASSIFICATION)
LOGITS, TRUTH, WEIGHTS = ROWS.outputs_NO, ROWS.targets, ROWS.weights_N
PREDICTED = LOGITS.numpy().argmax(axis=1)


def _calibration_error(logits_NK: Float64, classes_N: Float64) -> float:
    """Guo et al. 2017, section 2: bin by bin, row by row."""
    probability_NK = softmax(logits_NK, axis=1)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row_K, truth in zip(probability_NK, classes_N, strict=True):
        bins.setdefault(int(np.ceil(row_K.max() * 15)), []).append((float(row_K.max()), row_K.argmax() == truth))
    gaps = (abs(sum(right - said for said, right in each)) for each in bins.values())
    return sum(gaps) / len(classes_N)


def test_every_number_is_scikit_learn_s_without_weights() -> None:
    metrics = measure(Task.CLASSIFICATION, LOGITS, TRUTH)
    assert plain(metrics, "accuracy") == pytest.approx(accuracy_score(TRUTH, PREDICTED))
    assert plain(metrics, "macro_f1") == pytest.approx(f1_score(TRUTH, PREDICTED, average="macro", zero_division=0))
    assert metrics["confusion"] == confusion_matrix(TRUTH, PREDICTED, labels=range(4)).tolist()
    right = int((TRUTH.numpy() == PREDICTED).sum())
    interval = binomtest(right, 60).proportion_ci(method="wilson")
    assert listed(metrics, "accuracy_interval") == pytest.approx([interval.low, interval.high])
    assert plain(metrics, "calibration_error") == pytest.approx(_calibration_error(LOGITS.numpy(), TRUTH.numpy()))
    assert (metrics["rows"], metrics["effective_rows"]) == (60, 60)


def test_every_number_is_scikit_learn_s_with_weights() -> None:
    metrics = measure(Task.CLASSIFICATION, LOGITS, TRUTH, weights_N=WEIGHTS)
    assert plain(metrics, "accuracy") == pytest.approx(accuracy_score(TRUTH, PREDICTED, sample_weight=WEIGHTS))
    wanted = f1_score(TRUTH, PREDICTED, average="macro", sample_weight=WEIGHTS, zero_division=0)
    assert plain(metrics, "macro_f1") == pytest.approx(wanted)
    confusion = confusion_matrix(TRUTH, PREDICTED, labels=range(4), sample_weight=WEIGHTS)
    assert listed(metrics, "confusion") == pytest.approx(confusion)
    logits, truth = ROWS.repeated()
    assert plain(metrics, "calibration_error") == pytest.approx(_calibration_error(logits.numpy(), truth.numpy()))


def test_weights_narrow_the_interval_only_as_far_as_rows_tell_something() -> None:
    weights = WEIGHTS.numpy()
    effective = weights.sum() ** 2 / (weights**2).sum()
    metrics = measure(Task.CLASSIFICATION, LOGITS, TRUTH, weights_N=WEIGHTS * 1000)
    assert plain(metrics, "effective_rows") == pytest.approx(effective)
    assert effective < 60
    low, high = listed(metrics, "accuracy_interval")
    p = plain(metrics, "accuracy")
    # The ends of the score interval are the shares q from which p is z standard deviations of q away.
    for q in (low, high):
        assert abs(p - q) == pytest.approx(1.959963984540054 * np.sqrt(q * (1 - q) / effective))
    assert low < p < high


def test_classes_that_are_neither_true_nor_predicted_do_not_lower_macro_f1() -> None:
    logits = torch.tensor([[2.0, 0, 0, 0, 0], [0, 2, 0, 0, 0], [2, 0, 0, 0, 0]], dtype=torch.float64)
    truth = torch.tensor([0, 1, 3])
    wanted = f1_score([0, 1, 3], [0, 1, 0], average="macro", zero_division=0)
    assert plain(measure(Task.CLASSIFICATION, logits, truth), "macro_f1") == pytest.approx(wanted)
    assert wanted == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_a_row_of_weight_0_changes_nothing_but_the_count_of_rows() -> None:
    alone = measure(Task.CLASSIFICATION, LOGITS[:5], TRUTH[:5])
    beside = measure(Task.CLASSIFICATION, LOGITS[:6], TRUTH[:6], weights_N=torch.tensor([1.0, 1, 1, 1, 1, 0]))
    assert scalars(beside) == pytest.approx(scalars(alone))
    assert listed(beside, "accuracy_interval") == pytest.approx(listed(alone, "accuracy_interval"))
    assert beside["confusion"] == alone["confusion"]
    assert (beside["rows"], beside["effective_rows"]) == (6, 5)


def test_one_row_has_a_number_everywhere() -> None:
    metrics = measure(Task.CLASSIFICATION, torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([1]))
    probability = np.exp(1) / (1 + np.exp(1))
    assert (metrics["accuracy"], metrics["macro_f1"], metrics["confusion"]) == (1.0, 1.0, [[0, 0], [0, 1]])
    assert plain(metrics, "calibration_error") == pytest.approx(1 - probability)


def test_a_single_class_is_always_right_and_sure() -> None:
    metrics = measure(Task.CLASSIFICATION, torch.randn(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))
    assert (metrics["accuracy"], metrics["macro_f1"], metrics["calibration_error"]) == (1.0, 1.0, 0.0)
    assert metrics["confusion"] == [[3]]


def test_rows_that_all_weigh_nothing_have_nothing_to_tell() -> None:
    metrics = measure(Task.CLASSIFICATION, LOGITS, TRUTH, weights_N=torch.zeros(60))
    names = ("accuracy", "accuracy_interval", "macro_f1", "calibration_error")
    assert [metrics[name] for name in names] == [None] * 4


def test_logits_of_any_size_are_calibrated_without_overflow() -> None:
    logits = torch.tensor([[1e30, -1e30], [-1e30, 1e30]], dtype=torch.float64)
    assert measure(Task.CLASSIFICATION, logits, torch.tensor([0, 0]))["calibration_error"] == 0.5


@pytest.mark.parametrize(("classes", "told"), [(50, True), (51, False)])
def test_the_confusion_matrix_is_left_out_past_50_classes(classes: int, told: bool) -> None:
    metrics = measure(Task.CLASSIFICATION, torch.eye(classes, dtype=torch.float64), torch.arange(classes))
    assert (metrics["confusion"] is not None) is told
    assert metrics["macro_f1"] == 1.0


def test_the_trivial_classifier_is_scikit_learn_s_with_the_prior() -> None:
    trained_on = [0] * 5 + [1] * 9 + [2] * 6 + [3]
    dummy = DummyClassifier(strategy="prior").fit(np.zeros((21, 1)), trained_on)
    metrics = measure_trivial(Task.CLASSIFICATION, torch.tensor([5, 9, 6, 1]), TRUTH, weights_N=WEIGHTS)
    nothing = np.zeros((60, 1))
    assert plain(metrics, "accuracy") == pytest.approx(dummy.score(nothing, TRUTH, sample_weight=WEIGHTS))
    wanted = log_loss(TRUTH, dummy.predict_proba(nothing), sample_weight=WEIGHTS, labels=range(4))
    assert plain(metrics, "loss") == pytest.approx(wanted)
    said = dummy.predict(nothing)
    assert plain(metrics, "macro_f1") == pytest.approx(
        f1_score(TRUTH, said, average="macro", sample_weight=WEIGHTS, zero_division=0)
    )
    assert plain(metrics, "calibration_error") == pytest.approx(abs(plain(metrics, "accuracy") - 9 / 21))


def test_a_class_that_was_never_trained_on_leaves_the_trivial_loss_undefined() -> None:
    metrics = measure_trivial(Task.CLASSIFICATION, torch.tensor([3, 1, 0]), torch.tensor([0, 2]))
    assert (metrics["loss"], metrics["accuracy"]) == (None, 0.5)
    counts, classes, weights = torch.tensor([3, 1, 0]), torch.tensor([0, 2]), torch.tensor([1, 0])
    unweighted = measure_trivial(Task.CLASSIFICATION, counts, classes, weights_N=weights)
    assert plain(unweighted, "loss") == pytest.approx(-np.log(3 / 4))
