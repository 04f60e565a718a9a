"""Versions are compared on the same rows, by label, as scikit-learn measures what they answer."""

# N rows · I in_features · O out_features · C classes · L labels of a version
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, mean_squared_error, precision_recall_fscore_support

from adapters.lora.adapter import Adapter
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.comparison import ComparedVersion, compare_versions
from adapters.training.evaluation.metrics import wilson
from adapters.training.settings import Loss, TrainingSpec
from tests.support.dense_oracle import Float64, answer, layer, random_adapter

O, I, ROWS = 5, 6, 80
DRAW = torch.Generator().manual_seed(3)
BASE = layer(torch.randn(O, I, generator=DRAW), torch.randn(O, generator=DRAW))
INPUTS = torch.randn(ROWS, I, generator=DRAW)
CLASSES = torch.randint(0, 3, (ROWS,), generator=DRAW)
NUMBERS = torch.randn(ROWS, O, generator=DRAW)
SETS = torch.randint(0, 2, (ROWS, 3), generator=DRAW).float()
WEIGHTS = torch.rand(ROWS, generator=DRAW) * 2
WEIGHTS[::9] = 0
NAMES = ("ant", "bee", "cow")
OF_CLASSES = TrainingSpec(rank=1, alpha=1.0, loss=Loss.CROSS_ENTROPY, classes=3)
OF_SETS = replace(OF_CLASSES, loss=Loss.BINARY_CROSS_ENTROPY)
OF_NUMBERS = TrainingSpec(rank=1, alpha=1.0, loss=Loss.MSE)
ONE, OTHER = (random_adapter(O, I, 2, alpha=0.6, bias=True, seed=seed) for seed in (1, 2))


def _version(name: str, adapter: Adapter, labels: Sequence[str | int] | None = None, **about: Any) -> ComparedVersion:
    return ComparedVersion(reference=f"{name}@1", adapter=adapter, labels=labels, **about)


def _compare(
    spec: TrainingSpec,
    targets: torch.Tensor,
    *versions: ComparedVersion,
    labels: Sequence[str | int] | None,
    weighted: bool = False,
) -> Any:
    data = TrainingData(INPUTS, targets, weights_N=WEIGHTS if weighted else None)
    result = compare_versions(BASE, data, spec, iter(versions), labels=labels)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    return result


def _said(labels: Sequence[str], adapter: Adapter | None) -> list[str]:
    return [labels[place] for place in answer(BASE, INPUTS, adapter)[:, : len(labels)].argmax(1)]


def _mean_and_error(values_N: NDArray[Any], weights_N: Float64) -> tuple[float, float]:
    """Of equal weights, the textbook's s/√n; otherwise with Kish's number of rows."""
    mean = float(np.average(values_N, weights=weights_N))
    rows = weights_N.sum() ** 2 / (weights_N**2).sum()
    return mean, float(np.sqrt(np.average((values_N - mean) ** 2, weights=weights_N) / (rows - 1)))


@pytest.mark.parametrize("weighted", [False, True])
def test_classes_are_measured_as_scikit_learn_measures_the_answers(weighted: bool) -> None:
    shapes = [("cow", "ant", "bee"), ("cow", "elk", "ant", "bee"), ("bee", "fox", "ant"), NAMES]
    adapters = [ONE, OTHER, ONE, None]
    versions = [
        ComparedVersion(reference=None if adapter is None else f"v@{place}", adapter=adapter, labels=shape)
        for place, (shape, adapter) in enumerate(zip(shapes, adapters, strict=True), 1)
    ]
    result = _compare(OF_CLASSES, CLASSES, *versions, labels=NAMES, weighted=weighted)
    assert (result["metric"], result["rows"]) == ("accuracy", ROWS)
    assert [entry["adapter"] for entry in result["adapters"]] == ["v@1", "v@2", "v@3", None]
    weights_N = WEIGHTS.double().numpy() if weighted else np.ones(ROWS)
    truth = np.array(NAMES)[CLASSES.numpy()]
    counted = weights_N > 0
    first = np.array(_said(shapes[0], adapters[0])) == truth
    for entry, shape, adapter in zip(result["adapters"], shapes, adapters, strict=True):
        said = np.array(_said(shape, adapter))
        assert entry["figure"] == pytest.approx(accuracy_score(truth, said, sample_weight=weights_N))
        assert entry["metrics"]["accuracy"] == pytest.approx(entry["figure"])
        rows = weights_N.sum() ** 2 / (weights_N**2).sum()
        assert entry["interval"] == pytest.approx(wilson(entry["figure"], rows))
        names = [figures["label"] for figures in entry["classes"]]
        assert sorted(names) == sorted({*truth[counted], *said[counted]})
        precision, recall, f1, support = precision_recall_fscore_support(
            truth[counted], said[counted], labels=names, sample_weight=weights_N[counted], zero_division=np.nan
        )
        for number, figures in enumerate(entry["classes"]):
            wanted = {"precision": precision[number], "recall": recall[number]}
            found = {name: np.nan if figures[name] is None else figures[name] for name in wanted}
            assert found == pytest.approx(wanted, nan_ok=True)
            assert figures["f1"] == pytest.approx(f1[number])
            assert figures["rows"] == pytest.approx(support[number])
        theirs = confusion_matrix(truth, said, labels=names, sample_weight=weights_N)
        np.testing.assert_allclose(entry["confusion"], theirs, rtol=1e-6)
        if entry is result["adapters"][0]:
            assert (entry["gain"], entry["gain_error"]) == (None, None)
        else:
            gains = (said == truth).astype(float) - first
            assert (entry["gain"], entry["gain_error"]) == pytest.approx(_mean_and_error(gains, weights_N))
    lacking = result["adapters"][2]
    assert (lacking["missing_labels"], lacking["missing_rows"]) == (["cow"], int((truth == "cow").sum()))


def test_outputs_without_labels_are_called_by_their_numbers() -> None:
    labels = (0, 2, 4)
    truth = np.array(labels)[CLASSES.numpy()]
    (entry,) = _compare(OF_CLASSES, CLASSES, ComparedVersion(reference=None), labels=labels)["adapters"]
    said = answer(BASE, INPUTS, None).argmax(1)
    assert entry["figure"] == pytest.approx(accuracy_score(truth, said))
    names = [figures["label"] for figures in entry["classes"]]
    np.testing.assert_array_equal(entry["confusion"], confusion_matrix(truth, said, labels=names))


@pytest.mark.parametrize("weighted", [False, True])
def test_sets_of_labels_are_measured_label_by_label(weighted: bool) -> None:
    shapes = [("cow", "ant", "bee"), ("cow", "elk", "ant")]
    versions = [_version("v", ONE, shapes[0]), _version("w", OTHER, shapes[1])]
    result = _compare(OF_SETS, SETS, *versions, labels=NAMES, weighted=weighted)
    weights_N = WEIGHTS.double().numpy() if weighted else np.ones(ROWS)
    truth, right = SETS.numpy() > 0.5, []
    for entry, shape, adapter in zip(result["adapters"], shapes, (ONE, OTHER), strict=True):
        logits = answer(BASE, INPUTS, adapter)
        said = np.stack([logits[:, shape.index(name)] > 0 if name in shape else np.zeros(ROWS) for name in NAMES], 1)
        right.append((said == truth).mean(1))
        assert entry["figure"] == pytest.approx(np.average(right[-1], weights=weights_N))
        names = [figures["label"] for figures in entry["classes"]]
        places = [NAMES.index(name) for name in names]
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth, said, labels=places, sample_weight=weights_N, zero_division=np.nan
        )
        for found, wanted in (("precision", precision), ("recall", recall), ("f1", f1)):
            ours = [np.nan if figures[found] is None else figures[found] for figures in entry["classes"]]
            np.testing.assert_allclose(ours, wanted, rtol=1e-6)
        assert entry["confusion"] is None
    gain = _mean_and_error(right[1] - right[0], weights_N)
    second = result["adapters"][1]
    assert (second["gain"], second["gain_error"]) == pytest.approx(gain)
    assert (second["missing_labels"], second["missing_rows"]) == (["bee"], int(truth[:, 1].sum()))


@pytest.mark.parametrize("weighted", [False, True])
def test_numbers_are_compared_by_squared_error(weighted: bool) -> None:
    versions = [ComparedVersion(reference=None), _version("v", ONE, NAMES), _version("v", ONE, NAMES)]
    result = _compare(OF_NUMBERS, NUMBERS, *versions, labels=None, weighted=weighted)
    weights_N = WEIGHTS.double().numpy() if weighted else np.ones(ROWS)
    errors = [((answer(BASE, INPUTS, adapter) - NUMBERS.numpy()) ** 2).mean(1) for adapter in (None, ONE)]
    base, own, again = result["adapters"]
    for entry, adapter, errors_N in zip((base, own), (None, ONE), errors, strict=True):
        squared = mean_squared_error(NUMBERS.numpy(), answer(BASE, INPUTS, adapter), sample_weight=weights_N)
        assert entry["figure"] == pytest.approx(squared)
        mean, error = _mean_and_error(errors_N, weights_N)
        assert entry["interval"] == pytest.approx([mean - 1.959964 * error, mean + 1.959964 * error], rel=1e-5)
        assert (entry["classes"], entry["confusion"]) == (None, None)
    assert (own["gain"], own["gain_error"]) == pytest.approx(_mean_and_error(errors[0] - errors[1], weights_N))
    assert own == again


def test_what_cannot_be_compared_says_why_and_the_others_are() -> None:
    versions = [
        ComparedVersion(reference=None),
        _version("gone", ONE, problem="it is gone"),
        _version("others", ONE, ("dog", "eel")),
        _version("sets", ONE, NAMES, loss="binary_cross_entropy"),
        _version("fits", ONE, NAMES),
    ]
    result = _compare(OF_CLASSES, CLASSES, *versions, labels=NAMES)
    problems = [entry["problem"] for entry in result["adapters"]]
    assert [problem is None for problem in problems] == [False, False, False, False, True]
    assert problems[1] == "it is gone"
    assert "none of the labels" in problems[2]
    assert "binary_cross_entropy" in problems[3]
    assert all(entry["figure"] is None and entry["metrics"] is None for entry in result["adapters"][:4])
    # The first entry has no figures, so nothing is compared with it.
    assert result["adapters"][4]["figure"] is not None
    assert result["adapters"][4]["gain"] is None


def test_one_row_has_no_error() -> None:
    data = TrainingData(INPUTS[:1], CLASSES[:1])
    versions = [_version("v", ONE, NAMES), _version("w", OTHER, NAMES)]
    result = compare_versions(BASE, data, OF_CLASSES, versions, labels=NAMES)
    entry = result["adapters"][1]
    assert (entry["gain"] in (-1.0, 0.0, 1.0), entry["gain_error"]) == (True, None)
    (alone,) = compare_versions(BASE, TrainingData(INPUTS[:1], NUMBERS[:1]), OF_NUMBERS, versions[:1], labels=None)[
        "adapters"
    ]
    assert alone["interval"] is None


@pytest.mark.parametrize(
    ("classes", "has_matrix", "has_figures"), [(50, True, True), (51, False, True), (1001, False, False)]
)
def test_figures_by_class_are_bounded(classes: int, has_matrix: bool, has_figures: bool) -> None:
    wide = layer(torch.randn(classes, I, generator=torch.Generator().manual_seed(0)))
    rows = torch.arange(classes)
    data = TrainingData(torch.randn(classes, I, generator=torch.Generator().manual_seed(1)), rows)
    spec = replace(OF_CLASSES, classes=None)
    version = ComparedVersion(reference=None)
    (entry,) = compare_versions(wide, data, spec, [version], labels=tuple(range(classes)))["adapters"]
    assert (entry["confusion"] is not None, entry["classes"] is not None) == (has_matrix, has_figures)
