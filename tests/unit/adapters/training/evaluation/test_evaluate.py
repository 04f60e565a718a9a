"""What a fit says of held-out rows: of the adapter, the base, the live version and the trivial baseline."""

# N rows · K rows of one side · O out_features · C classes
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error
from sklearn.utils.class_weight import compute_sample_weight
from torch import Tensor

from adapters.training.evaluation.judgement import LiveVersion
from adapters.training.fit import fit
from adapters.training.settings import BALANCED, Loss, TrainingSpec
from tests.support.dense_oracle import Float64, random_adapter
from tests.unit.adapters.training.held_out_oracle import (
    BASE,
    CLASSES,
    LABELS,
    NUMBERS,
    ROWS,
    SPEC,
    SPECS,
    WEIGHTS,
    I,
    O,
    answers_of,
    data_of,
    held_apart,
    loss_of,
    sides,
)

LIVE = random_adapter(O, I, 3, alpha=0.7, bias=True, seed=8)


def _with_class_weights(given: str | tuple[float, ...], training_K: Tensor, weighted: bool) -> Tensor:
    """What each row counts: its own weight, times its class's, n / (k·n_c) of the training rows where balanced."""
    own_N = WEIGHTS if weighted else torch.ones(ROWS)
    if isinstance(given, tuple):
        return own_N * torch.tensor(given)[CLASSES]
    of_class = [
        float(own_N[training_K].sum()) / 3 / float(own_N[training_K][CLASSES[training_K] == c].sum()) for c in range(3)
    ]
    return own_N * torch.tensor(of_class)[CLASSES]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("given", [BALANCED, (0.01, 1.0, 50.0)])
def test_class_weights_are_the_loss_s_alone(given: str | tuple[float, ...], apart: bool, weighted: bool) -> None:
    spec = replace(SPECS["cross_entropy, 3 of 4"], class_weights=given)
    data = data_of(spec, weighted)
    done = (
        fit(BASE, held_apart(data), replace(spec, split=None), live=LiveVersion(LIVE))
        if apart
        else fit(BASE, data, spec, live=LiveVersion(LIVE))
    )
    training_K, held_K = sides()
    counted_N = _with_class_weights(given, training_K, weighted)
    if given == BALANCED and not weighted:
        theirs = compute_sample_weight("balanced", CLASSES[training_K].numpy())
        np.testing.assert_allclose(counted_N[training_K].numpy(), theirs, rtol=1e-6)
    for side, rows_K in (("train", training_K), ("validation", held_K)):
        own_K = (WEIGHTS if weighted else torch.ones(ROWS))[rows_K].numpy()
        for who, adapter in (("", done.adapter), ("base_", None)):
            wanted = loss_of(spec, rows_K, adapter, counted_N)
            assert done.metrics[f"{who}{side}_loss"] == pytest.approx(wanted, rel=1e-6)
            said_K = answers_of(rows_K, adapter)[:, :3].argmax(1)
            right = accuracy_score(CLASSES[rows_K], said_K, sample_weight=own_K)
            assert done.metrics[f"{who}{side}_accuracy"] == pytest.approx(right, rel=1e-9)
    held_out = done.metrics["held_out"]
    own_K = (WEIGHTS if weighted else torch.ones(ROWS))[held_K].numpy()
    for who, adapter in (("adapter", done.adapter), ("base", None), ("live", LIVE)):
        said_K = answers_of(held_K, adapter)[:, :3].argmax(1)
        assert held_out[who]["accuracy"] == pytest.approx(accuracy_score(CLASSES[held_K], said_K, sample_weight=own_K))
        counted = own_K > 0
        macro = f1_score(
            CLASSES[held_K][counted], said_K[counted], sample_weight=own_K[counted], average="macro", zero_division=0
        )
        assert held_out[who]["macro_f1"] == pytest.approx(macro)
        assert held_out[who]["loss"] == pytest.approx(loss_of(spec, held_K, adapter, counted_N), rel=1e-6)
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
    done = fit(BASE, data_of(spec, weighted), spec, live=LiveVersion(LIVE))
    _, held_K = sides()
    own_K = (WEIGHTS if weighted else torch.ones(ROWS))[held_K].double().numpy()
    for who, adapter in (("adapter", done.adapter), ("base", None), ("live", LIVE)):
        metric, wanted = _headline(spec, held_K, answers_of(held_K, adapter), own_K)
        assert done.metrics["held_out"][who][metric] == pytest.approx(wanted, rel=1e-9)
        loss = loss_of(spec, held_K, adapter, WEIGHTS if weighted else None)
        assert done.metrics["held_out"][who]["loss"] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_the_trivial_baseline_of_numbers_is_the_mean_of_the_training_rows(apart: bool, weighted: bool) -> None:
    data = data_of(SPEC, weighted)
    done = fit(BASE, held_apart(data), replace(SPEC, split=None)) if apart else fit(BASE, data, SPEC)
    training_K, held_K = sides()
    own_N = (WEIGHTS if weighted else torch.ones(ROWS)).double().numpy()
    mean_O = np.average(NUMBERS[training_K].double().numpy(), axis=0, weights=own_N[training_K])
    squared = mean_squared_error(
        NUMBERS[held_K].double().numpy(), np.tile(mean_O, (20, 1)), sample_weight=own_N[held_K]
    )
    assert done.metrics["held_out"]["trivial"]["rmse"] == pytest.approx(np.sqrt(squared), rel=1e-9)


def test_documents_to_search_are_those_that_came_with_the_data() -> None:
    spec = SPECS["multiple_negatives"]
    data = data_of(spec, False)
    alone = fit(BASE, data, spec).metrics["held_out"]["adapter"]
    among = fit(BASE, replace(data, corpus_MO=NUMBERS), spec).metrics["held_out"]["adapter"]
    assert alone["documents"] == len(torch.unique(NUMBERS[sides()[1]], dim=0))
    assert among["documents"] == len(torch.unique(NUMBERS, dim=0))


def test_a_live_version_of_another_shape_of_rank_is_measured_with_its_own_scaling() -> None:
    live = replace(LIVE, alpha=12.0, rslora=True)
    held_out = fit(BASE, data_of(SPEC, False), SPEC, live=LiveVersion(live)).metrics["held_out"]
    assert held_out["live"]["loss"] == pytest.approx(loss_of(SPEC, sides()[1], live, None), rel=1e-9)
