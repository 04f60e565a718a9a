"""What a fit tells of itself: every number against the answers of the adapter that it returns, in float64."""

# N rows · K rows of one side · I in_features · O out_features · C classes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error
from sklearn.utils.class_weight import compute_sample_weight
from torch import Tensor

from adapters.adapter import Adapter
from adapters.errors import Diverged, OutOfRange
from adapters.training.data import TrainingData
from adapters.training.fit import Fit, Watcher, fit
from adapters.training.spec import BALANCED, Loss, Method, TrainingSpec
from adapters.training.split import By, Split
from adapters.training.statistics import gather
from tests.adapters.dense import Float64, answer, layer, random_adapter
from tests.adapters.training.losses_by_hand import losses_of_rows, mean_of_rows

O, I, ROWS = 4, 6, 50
DRAW = torch.Generator().manual_seed(0)
BASE = layer(torch.randn(O, I, generator=DRAW), torch.randn(O, generator=DRAW))
INPUTS = torch.randn(ROWS, I, generator=DRAW)
NUMBERS = INPUTS @ BASE.weight_OI.T + torch.randn(ROWS, O, generator=DRAW)
NUMBERS[::7] = NUMBERS[0]
WEIGHTS = torch.rand(ROWS, generator=DRAW) * 2
WEIGHTS[::9] = 0
CLASSES = torch.cat([torch.zeros(30), torch.ones(12), torch.full((8,), 2.0)]).long()[
    torch.randperm(ROWS, generator=DRAW)
]
LABELS = torch.randint(0, 2, (ROWS, 3), generator=DRAW).float()
LIVE = random_adapter(O, I, 3, alpha=0.7, bias=True, seed=8)
SPLIT = Split(fraction=0.4)
SPEC = TrainingSpec(rank=2, alpha=3.0, epochs=3, batch_size=8, learning_rate=0.02, bias=True, split=SPLIT, seed=6)
SPECS = {
    "mse": SPEC,
    "closed form": replace(SPEC, method=Method.CLOSED_FORM, ridge=2.0),
    "huber": replace(SPEC, loss=Loss.HUBER, huber_delta=0.5),
    "cosine": replace(SPEC, loss=Loss.COSINE),
    "cross_entropy": replace(SPEC, loss=Loss.CROSS_ENTROPY),
    "cross_entropy, 3 of 4": replace(SPEC, loss=Loss.CROSS_ENTROPY, classes=3, label_smoothing=0.2),
    "binary_cross_entropy, 3 of 4": replace(SPEC, loss=Loss.BINARY_CROSS_ENTROPY, classes=3),
    "multiple_negatives": replace(SPEC, loss=Loss.MULTIPLE_NEGATIVES, temperature=0.5),
}
TARGETS = {Loss.CROSS_ENTROPY: CLASSES, Loss.BINARY_CROSS_ENTROPY: LABELS}
WHO = {"": "adapter", "base_": "base"}


def _data(spec: TrainingSpec, weighted: bool) -> TrainingData:
    return TrainingData(INPUTS, TARGETS.get(spec.loss, NUMBERS), weights_N=WEIGHTS if weighted else None)


def _held_apart(data: TrainingData) -> TrainingData:
    """The same rows, those that the split would hold out as a table of their own."""
    training, held = (data.take(rows_K) for rows_K in _sides())
    return replace(training, held_inputs_NI=held.inputs_NI, held_targets=held.targets, held_weights_N=held.weights_N)


def _sides() -> tuple[Tensor, Tensor]:
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(SPEC.seed))
    return order[20:].sort().values, order[:20].sort().values


def _answers(rows_K: Tensor, adapter: Adapter | None) -> Tensor:
    return torch.from_numpy(answer(BASE, INPUTS[rows_K], adapter))


def _loss(spec: TrainingSpec, rows_K: Tensor, adapter: Adapter | None, weights_N: Tensor | None) -> float:
    """The weighted mean over these rows; among negatives in batches of them as they stand."""
    y_KO, targets = _answers(rows_K, adapter), TARGETS.get(spec.loss, NUMBERS)[rows_K]
    targets = targets.double() if targets.is_floating_point() else targets
    size = 8 if spec.loss is Loss.MULTIPLE_NEGATIVES else len(rows_K)
    losses_K = torch.cat(
        [losses_of_rows(spec, *each) for each in zip(y_KO.split(size), targets.split(size), strict=True)]
    )
    return float(mean_of_rows(losses_K, None if weights_N is None else weights_N[rows_K].double()))


def _with_class_weights(given: str | tuple[float, ...], training_K: Tensor, weighted: bool) -> Tensor:
    """What each row counts: its own weight, times its class's, n / (k·n_c) of the training rows where balanced."""
    own_N = WEIGHTS if weighted else torch.ones(ROWS)
    if isinstance(given, tuple):
        return own_N * torch.tensor(given)[CLASSES]
    of_class = [
        float(own_N[training_K].sum()) / 3 / float(own_N[training_K][CLASSES[training_K] == c].sum()) for c in range(3)
    ]
    return own_N * torch.tensor(of_class)[CLASSES]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_losses_of_both_sides_are_those_of_the_adapter_that_is_returned_and_of_the_bare_base(
    name: str, weighted: bool, apart: bool
) -> None:
    spec, data = SPECS[name], _data(SPECS[name], weighted)
    done = fit(BASE, _held_apart(data), replace(spec, split=None)) if apart else fit(BASE, data, spec)
    weights_N = WEIGHTS if weighted else None
    for side, rows_K in zip(("train", "validation"), _sides(), strict=True):
        for who, adapter in (("", done.adapter), ("base_", None)):
            wanted = _loss(spec, rows_K, adapter, weights_N)
            assert done.metrics[f"{who}{side}_loss"] == pytest.approx(wanted, rel=1e-9)
    assert done.metrics["held_out"]["rows"] == 20
    assert {who: done.metrics["held_out"][who]["loss"] for who in ("adapter", "base")} == {
        "adapter": done.metrics["validation_loss"],
        "base": done.metrics["base_validation_loss"],
    }
    assert "live" not in done.metrics["held_out"]


@pytest.mark.parametrize("name", SPECS)
def test_without_rows_held_out_there_is_nothing_to_say_of_them(name: str) -> None:
    spec = replace(SPECS[name], split=None)
    done = fit(BASE, _data(spec, False), spec)
    assert done.metrics["validation_loss"] is None
    assert done.metrics["base_validation_loss"] is None
    assert "held_out" not in done.metrics
    all_rows = torch.arange(ROWS)
    assert done.metrics["train_loss"] == pytest.approx(_loss(spec, all_rows, done.adapter, None), rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("given", [BALANCED, (0.01, 1.0, 50.0)])
def test_class_weights_are_the_loss_s_alone(given: str | tuple[float, ...], apart: bool, weighted: bool) -> None:
    spec = replace(SPECS["cross_entropy, 3 of 4"], class_weights=given)
    data = _data(spec, weighted)
    done = (
        fit(BASE, _held_apart(data), replace(spec, split=None), present=LIVE)
        if apart
        else fit(BASE, data, spec, present=LIVE)
    )
    training_K, held_K = _sides()
    counted_N = _with_class_weights(given, training_K, weighted)
    if given == BALANCED and not weighted:
        theirs = compute_sample_weight("balanced", CLASSES[training_K].numpy())
        np.testing.assert_allclose(counted_N[training_K].numpy(), theirs, rtol=1e-6)
    for side, rows_K in (("train", training_K), ("validation", held_K)):
        own_K = (WEIGHTS if weighted else torch.ones(ROWS))[rows_K].numpy()
        for who, adapter in (("", done.adapter), ("base_", None)):
            wanted = _loss(spec, rows_K, adapter, counted_N)
            assert done.metrics[f"{who}{side}_loss"] == pytest.approx(wanted, rel=1e-6)
            said_K = _answers(rows_K, adapter)[:, :3].argmax(1)
            right = accuracy_score(CLASSES[rows_K], said_K, sample_weight=own_K)
            assert done.metrics[f"{who}{side}_accuracy"] == pytest.approx(right, rel=1e-9)
    held_out = done.metrics["held_out"]
    own_K = (WEIGHTS if weighted else torch.ones(ROWS))[held_K].numpy()
    for who, adapter in (("adapter", done.adapter), ("base", None), ("live", LIVE)):
        said_K = _answers(held_K, adapter)[:, :3].argmax(1)
        assert held_out[who]["accuracy"] == pytest.approx(accuracy_score(CLASSES[held_K], said_K, sample_weight=own_K))
        counted = own_K > 0
        macro = f1_score(
            CLASSES[held_K][counted], said_K[counted], sample_weight=own_K[counted], average="macro", zero_division=0
        )
        assert held_out[who]["macro_f1"] == pytest.approx(macro)
        assert held_out[who]["loss"] == pytest.approx(_loss(spec, held_K, adapter, counted_N), rel=1e-6)
    most_frequent = np.bincount(CLASSES[training_K], (WEIGHTS if weighted else torch.ones(ROWS))[training_K]).argmax()
    share = accuracy_score(CLASSES[held_K], np.full(20, most_frequent), sample_weight=own_K)
    assert held_out["trivial"]["accuracy"] == pytest.approx(share)


def _headline(spec: TrainingSpec, held_K: Tensor, outputs_KO: Tensor, own_K: Float64) -> tuple[str, float]:
    """The number that people read first."""
    if spec.loss is Loss.BINARY_CROSS_ENTROPY:
        said = (outputs_KO[:, :3] > 0).int().numpy()
        true = LABELS[held_K].int().numpy()
        return "macro_f1", f1_score(true, said, average="macro", sample_weight=own_K, zero_division=0)
    if spec.loss is Loss.MULTIPLE_NEGATIVES:
        wanted_KO, searched_MO = NUMBERS[held_K].double(), torch.unique(NUMBERS[held_K], dim=0).double()
        cosines_KM = torch.nn.functional.cosine_similarity(outputs_KO[:, None], searched_MO[None], dim=2)
        right_K = (searched_MO[cosines_KM.argmax(1)] == wanted_KO).all(1)
        return "recall_at_1", float(np.average(right_K.numpy(), weights=own_K))
    squared = mean_squared_error(NUMBERS[held_K].double().numpy(), outputs_KO.numpy(), sample_weight=own_K)
    return "rmse", float(np.sqrt(squared))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [name for name in SPECS if not name.startswith("cross_entropy")])
def test_adapter_base_and_live_are_measured_on_the_same_held_out_rows(name: str, weighted: bool) -> None:
    spec = SPECS[name]
    done = fit(BASE, _data(spec, weighted), spec, present=LIVE)
    _, held_K = _sides()
    own_K = (WEIGHTS if weighted else torch.ones(ROWS))[held_K].double().numpy()
    for who, adapter in (("adapter", done.adapter), ("base", None), ("live", LIVE)):
        metric, wanted = _headline(spec, held_K, _answers(held_K, adapter), own_K)
        assert done.metrics["held_out"][who][metric] == pytest.approx(wanted, rel=1e-9)
        loss = _loss(spec, held_K, adapter, WEIGHTS if weighted else None)
        assert done.metrics["held_out"][who]["loss"] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_the_trivial_baseline_of_numbers_is_the_mean_of_the_training_rows(apart: bool, weighted: bool) -> None:
    data = _data(SPEC, weighted)
    done = fit(BASE, _held_apart(data), replace(SPEC, split=None)) if apart else fit(BASE, data, SPEC)
    training_K, held_K = _sides()
    own_N = (WEIGHTS if weighted else torch.ones(ROWS)).double().numpy()
    mean_O = np.average(NUMBERS[training_K].double().numpy(), axis=0, weights=own_N[training_K])
    squared = mean_squared_error(
        NUMBERS[held_K].double().numpy(), np.tile(mean_O, (20, 1)), sample_weight=own_N[held_K]
    )
    assert done.metrics["held_out"]["trivial"]["rmse"] == pytest.approx(np.sqrt(squared), rel=1e-9)


def test_documents_to_search_are_those_that_came_with_the_data() -> None:
    spec = SPECS["multiple_negatives"]
    data = _data(spec, False)
    alone = fit(BASE, data, spec).metrics["held_out"]["adapter"]
    among = fit(BASE, replace(data, corpus_MO=NUMBERS), spec).metrics["held_out"]["adapter"]
    assert alone["documents"] == len(torch.unique(NUMBERS[_sides()[1]], dim=0))
    assert among["documents"] == len(torch.unique(NUMBERS, dim=0))


def _told(spec: TrainingSpec, **meaning: Any) -> tuple[Fit, list[str], list[tuple[int, float]]]:
    notes: list[str] = []
    reports: list[tuple[int, float]] = []
    watcher = Watcher(lambda step, loss, _history: reports.append((step, loss)), notes.append)
    return fit(BASE, _data(spec, False), spec, watcher=watcher, **meaning), notes, reports


def test_a_closed_form_has_two_lines_of_history_the_bare_loss_and_the_one_that_is_reached() -> None:
    done, notes, reports = _told(SPECS["closed form"])
    assert done.history == [(0, done.metrics["base_train_loss"]), (1, done.metrics["train_loss"])]
    assert (notes, reports) == ([], done.history[1:])


def test_it_is_told_where_the_factors_are_not_those_of_the_last_step() -> None:
    assert _told(SPEC)[1] == []
    assert _told(replace(SPEC, max_steps=5))[1] == []
    assert _told(replace(SPEC, max_seconds=1e-9))[1] == ["took 1 of 12 steps; the factors are those of step 1"]
    _, (note,), reports = _told(replace(SPEC, patience=1, learning_rate=3.0))
    assert note == f"took {len(reports)} of 12 steps; the factors are those of step 0"


def test_labels_feature_space_and_scaling_go_into_the_adapter() -> None:
    spec = replace(SPEC, rslora=True, alpha=5.0)
    adapter = _told(spec, feature_space="minilm@1", labels=["a", "b"])[0].adapter
    assert (adapter.feature_space, adapter.labels, adapter.alpha, adapter.rslora) == ("minilm@1", ("a", "b"), 5.0, True)
    assert adapter.scaling == pytest.approx(5.0 / 2**0.5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_statistics_that_are_kept_are_those_of_the_rows_that_were_trained_on(weighted: bool) -> None:
    spec = replace(SPECS["closed form"], keep_statistics=True)
    data = _data(spec, weighted)
    kept = fit(BASE, data, spec).statistics
    assert kept is not None
    training = data.take(_sides()[0])
    wanted = gather(BASE, [(training.inputs_NI, training.targets, training.weights_N)])
    torch.testing.assert_close(kept.gram_II, wanted.gram_II, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept.cross_IO, wanted.cross_IO, rtol=1e-12, atol=1e-12)
    assert kept.rows == int((training.weights_N > 0).sum() if training.weights_N is not None else 30)
    assert fit(BASE, data, replace(spec, keep_statistics=False)).statistics is None


@pytest.mark.parametrize("by", [By.GROUP, By.TIME, By.COLUMN])
def test_a_split_by_a_key_holds_out_the_rows_that_it_says(by: By) -> None:
    key_N = {By.GROUP: torch.arange(ROWS) // 5, By.TIME: -torch.arange(ROWS), By.COLUMN: torch.arange(ROWS) % 2}[by]
    split = Split(by=by, fraction=0.4)
    spec = replace(SPEC, split=split)
    done = fit(BASE, replace(_data(spec, False), key_N=key_N), spec)
    training_K, held_K = split.sides(ROWS, torch.Generator().manual_seed(spec.seed), key_N=key_N)
    assert done.metrics["held_out"]["rows"] == len(held_K)
    assert done.metrics["validation_loss"] == pytest.approx(_loss(spec, held_K, done.adapter, None), rel=1e-9)
    assert done.metrics["train_loss"] == pytest.approx(_loss(spec, training_K, done.adapter, None), rel=1e-9)


def test_a_split_that_leaves_a_side_empty_is_refused_before_anything_is_trained() -> None:
    spec = replace(SPEC, split=Split(by=By.GROUP))
    with pytest.raises(OutOfRange):
        fit(BASE, replace(_data(spec, False), key_N=torch.zeros(ROWS).long()), spec)


def test_a_live_version_of_another_shape_of_rank_is_measured_with_its_own_scaling() -> None:
    live = replace(LIVE, alpha=12.0, rslora=True)
    held_out = fit(BASE, _data(SPEC, False), SPEC, present=live).metrics["held_out"]
    assert held_out["live"]["loss"] == pytest.approx(_loss(SPEC, _sides()[1], live, None), rel=1e-9)


def test_a_training_whose_end_is_not_finite_has_diverged() -> None:
    with pytest.raises(Diverged):
        fit(BASE, _data(SPEC, False), replace(SPEC, method=Method.SGD, learning_rate=1e30))
