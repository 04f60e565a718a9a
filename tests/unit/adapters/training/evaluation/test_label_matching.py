"""A live version whose labels are in another order, or others, is measured by what it answers."""

# N rows · K held-out rows · O out_features · C classes · L labels of the live version
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import Tensor

from adapters.lora.adapter import Adapter
from adapters.training.evaluation.evaluate import why_unmatched
from adapters.training.evaluation.judgement import LiveVersion
from adapters.training.fit import fit
from adapters.training.settings import Loss
from tests.support.dense_oracle import Float64, random_adapter
from tests.unit.adapters.training.held_out_oracle import (
    BASE,
    CLASSES,
    LABELS,
    SPEC,
    WEIGHTS,
    I,
    O,
    answers_of,
    data_of,
    sides,
)

Names = tuple[str | int, ...]
LIVE = random_adapter(O, I, 3, alpha=0.7, bias=True, seed=8)
TRAINED: Names = ("ant", "bee", "cow")
UNLIKELY = -np.log(np.finfo(np.float64).eps)
OF_CLASSES = replace(SPEC, loss=Loss.CROSS_ENTROPY, classes=3)
OF_SETS = replace(SPEC, loss=Loss.BINARY_CROSS_ENTROPY, classes=3)


def _logits(live: Names, held_K: Tensor, adapter: Adapter) -> Float64:
    """(K, L): the outputs that have a label."""
    return answers_of(held_K, adapter).numpy()[:, : len(live)]


def _said(live: Names, logits_KL: Float64) -> list[str]:
    return [str(live[place]) for place in logits_KL.argmax(1)]


def _class_loss(live: Names, logits_KL: Float64, truth: Sequence[str | int], smoothing: float) -> Float64:
    """(K,): the smoothed cross-entropy over the version's own labels; of a label that it lacks, the least likely."""
    log_p_KL = logits_KL - np.log(np.exp(logits_KL).sum(1, keepdims=True))
    losses = [
        -(1 - smoothing) * log_p[live.index(label)] - smoothing * log_p.mean() if label in live else UNLIKELY
        for label, log_p in zip(truth, log_p_KL, strict=True)
    ]
    return np.array(losses)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize(
    "live",
    [
        ("cow", "ant", "bee"),
        ("cow", "elk", "ant", "bee"),
        ("bee", "ant"),
        ("elk", "cow", "fox"),
        ("ant", "bee", "cow"),
        ("ant", "bee", "cow", "elk"),
    ],
)
def test_classes_are_matched_by_label(live: Names, smoothing: float, weighted: bool) -> None:
    adapter = replace(LIVE, labels=live)
    spec = replace(OF_CLASSES, label_smoothing=smoothing)
    done = fit(BASE, data_of(spec, weighted), spec, labels=TRAINED, live=LiveVersion(adapter))
    held_K = sides()[1]
    truth = [str(TRAINED[number]) for number in CLASSES[held_K].tolist()]
    logits_KL = _logits(live, held_K, adapter)
    said = _said(live, logits_KL)
    weights_K = WEIGHTS[held_K].double().numpy() if weighted else np.ones(len(held_K))
    found = done.metrics["held_out"]["live"]
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, said, sample_weight=weights_K))
    kept = [(wanted, given, weight) for wanted, given, weight in zip(truth, said, weights_K, strict=True) if weight > 0]
    wanted, given, own = zip(*kept, strict=True)
    macro = f1_score(wanted, given, sample_weight=own, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(macro)
    names = [*TRAINED, *(name for name in live if name not in TRAINED)]
    theirs = confusion_matrix(truth, said, labels=names, sample_weight=weights_K)
    np.testing.assert_allclose(found["confusion"], theirs, rtol=1e-6)
    loss = np.average(_class_loss(live, logits_KL, truth, smoothing), weights=weights_K)
    assert found["loss"] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("live", [("cow", "ant", "bee"), ("cow", "elk", "ant", "bee"), ("bee", "ant"), ("fox", "cow")])
def test_sets_of_labels_are_matched_by_label(live: Names) -> None:
    adapter = replace(LIVE, labels=live)
    done = fit(BASE, data_of(OF_SETS, False), OF_SETS, labels=TRAINED, live=LiveVersion(adapter))
    held_K = sides()[1]
    logits_KL, true_KC = _logits(live, held_K, adapter), LABELS[held_K].double().numpy()
    least = np.finfo(np.float64).eps
    p_KC = np.stack(
        [
            1 / (1 + np.exp(-logits_KL[:, live.index(name)])) if name in live else np.full(len(held_K), least)
            for name in TRAINED
        ],
        axis=1,
    )
    found = done.metrics["held_out"]["live"]
    said_KC = p_KC > 0.5
    assert found["exact_match"] == pytest.approx((said_KC == (true_KC > 0.5)).all(1).mean())
    macro = f1_score(true_KC > 0.5, said_KC, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(macro)
    loss = -(true_KC * np.log(p_KC) + (1 - true_KC) * np.log(1 - p_KC)).mean()
    assert found["loss"] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize(("live", "trained"), [(None, (0, 1, 2)), ((2, 0, 1), (0, 1, 2)), ((0, 1, 2), None)])
def test_an_output_without_a_label_is_called_by_its_number(live: Names | None, trained: Names | None) -> None:
    adapter = replace(LIVE, labels=live)
    spec = OF_CLASSES if trained is not None else replace(OF_CLASSES, classes=None)
    found = fit(BASE, data_of(spec, False), spec, labels=trained, live=LiveVersion(adapter)).metrics["held_out"]["live"]
    names, held_K = live or tuple(range(O)), sides()[1]
    said = _said(names, _logits(names, held_K, adapter))
    truth = [str(number) for number in CLASSES[held_K].tolist()]
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, said))


@pytest.mark.parametrize("loss", [Loss.MSE, Loss.HUBER, Loss.COSINE, Loss.MULTIPLE_NEGATIVES])
def test_numbers_stay_in_their_order(loss: Loss) -> None:
    spec = replace(SPEC, loss=loss)
    found: list[dict[str, Any]] = [
        fit(BASE, data_of(spec, False), spec, live=LiveVersion(replace(LIVE, labels=live))).metrics["held_out"]["live"]
        for live in (None, ("cow", "ant", "bee"))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("live", "live_loss", "trained", "loss", "why"),
    [
        (("a", "b"), None, ("b", "a"), Loss.CROSS_ENTROPY, None),
        (("a", "b"), "cross_entropy", ("b", "c"), Loss.CROSS_ENTROPY, None),
        (("a", "b"), None, ("c", "d"), Loss.CROSS_ENTROPY, "none of the labels"),
        ((1, 0), None, ("1", "0"), Loss.CROSS_ENTROPY, "none of the labels"),
        (None, None, ("a", "b"), Loss.CROSS_ENTROPY, "no labels, and this training has"),
        (None, None, (1, 0), Loss.CROSS_ENTROPY, "no labels, and this training has"),
        (None, None, (0, 1), Loss.CROSS_ENTROPY, None),
        (("a", "b"), None, None, Loss.CROSS_ENTROPY, "labels, and this training has none"),
        ((0, 1), None, None, Loss.BINARY_CROSS_ENTROPY, None),
        (None, "cross_entropy", None, Loss.CROSS_ENTROPY, None),
        (None, "mse", None, Loss.CROSS_ENTROPY, None),
        (("a", "b"), "binary_cross_entropy", ("a", "b"), Loss.CROSS_ENTROPY, "trained with binary_cross_entropy"),
        (("a", "b"), "cross_entropy", ("a", "b"), Loss.BINARY_CROSS_ENTROPY, "trained with cross_entropy"),
        (("a", "b"), None, None, Loss.MSE, None),
    ],
)
def test_what_cannot_be_matched_says_why(
    live: Names | None, live_loss: str | None, trained: Names | None, loss: Loss, why: str | None
) -> None:
    found = why_unmatched(live, live_loss, trained, loss)
    assert found is None if why is None else why in (found or "")
