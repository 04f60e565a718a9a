"""Suspects against fits without the row by scikit-learn, and against the self-confidence of a model of folds."""

# N rows · I in_features · C classes
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.gaussian_process.kernels import RBF
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import cross_val_predict

from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.training.candidates.scores import Scores
from adapters.training.candidates.suspects import (
    MAX_SUSPECTS,
    RIDGE,
    STEP,
    find_suspects,
    gaussian_kernel,
    left_out_outputs,
    units_of,
)
from adapters.training.candidates.task import FitTask
from adapters.training.data_file import TrainingData
from adapters.training.settings import Loss, TrainingSpec

CLASSES = TrainingSpec(rank=8, alpha=8.0, loss=Loss.CROSS_ENTROPY)


@pytest.fixture(scope="module")
def base() -> BaseLayer:
    """Return the digits layer of the package."""
    return load_base_layer("digits", device="cpu")


def task_of(base: BaseLayer, inputs_NI: np.ndarray, classes_N: np.ndarray) -> FitTask:
    """Return the task of one adapter."""
    data = TrainingData(torch.from_numpy(inputs_NI.astype(np.float32)), torch.from_numpy(classes_N))
    return FitTask(base, data, CLASSES, Scores(Loss.CROSS_ENTROPY), None, None, {})


def digits_with_errors(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return inputs, labels of which a tenth is wrong, and which ones are."""
    inputs_NI, classes_N = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    own_N = generator.permutation(len(classes_N))[:rows]
    labels_N, is_wrong_N = classes_N[own_N].astype(np.int64), np.arange(rows) < rows // 10
    labels_N[is_wrong_N] = (labels_N[is_wrong_N] + generator.integers(1, 10, rows // 10)) % 10
    return inputs_NI[own_N] / 16, labels_N, is_wrong_N


def test_the_left_out_outputs_are_those_of_fits_without_the_row() -> None:
    generator = np.random.default_rng(0)
    x_NI, z_NC, y_NC = generator.normal(size=(24, 3)), generator.normal(size=(24, 4)), np.eye(4)[np.arange(24) % 4]
    weights_N, keys_N = generator.uniform(0.5, 2, 24), np.arange(24)
    keys_N[[7, 15]], keys_N[9] = 2, 4
    probability_NC = np.exp(z_NC) / np.exp(z_NC).sum(1, keepdims=True)
    width = float(np.sqrt((euclidean_distances(x_NI) ** 2).mean() / 4))
    kernel_NN = RBF(width)(x_NI)
    expected_NC = z_NC.copy()
    for row in range(24):
        rest = keys_N != keys_N[row]
        fit = KernelRidge(alpha=RIDGE, kernel="precomputed")
        fit.fit(kernel_NN[np.ix_(rest, rest)], (y_NC - probability_NC)[rest], sample_weight=weights_N[rest])
        expected_NC[row] += STEP * fit.predict(kernel_NN[row : row + 1, rest])[0]
    z, y, weights = map(torch.from_numpy, (z_NC, y_NC, weights_N))
    kernel, units = gaussian_kernel(torch.from_numpy(x_NI)), units_of(torch.from_numpy(keys_N))
    (outputs_NC,) = left_out_outputs(kernel, [z], y, weights, units)
    assert np.abs(outputs_NC.numpy() - expected_NC).max() < 1e-8


@pytest.mark.parametrize("has_base", [False, True])
def test_wrong_labels_are_found_as_well_as_by_models_of_folds(base: BaseLayer, *, has_base: bool) -> None:
    inputs_NI, labels_N, is_wrong_N = digits_with_errors(400, seed=1)
    if not has_base:
        base = replace(base, weight_OI=torch.zeros_like(base.weight_OI), weight_norm=0.0)
    suspects = find_suspects(task_of(base, inputs_NI, labels_N), torch.arange(400))
    assert len(suspects) == MAX_SUSPECTS
    score_N = np.full(400, -1.0)
    score_N[[suspect["row"] for suspect in suspects]] = [suspect["score"] for suspect in suspects]
    model = LogisticRegression(C=10, max_iter=1_000)
    of_folds_NC = cross_val_predict(model, inputs_NI, labels_N, cv=5, method="predict_proba")
    area = roc_auc_score(is_wrong_N, score_N)
    assert area > max(0.98, roc_auc_score(is_wrong_N, -of_folds_NC[np.arange(400), labels_N]) - 0.01)


def test_a_class_that_no_row_has_is_not_suggested(base: BaseLayer) -> None:
    inputs_NI, classes_N = load_digits(n_class=4, return_X_y=True)
    labels_N = classes_N.astype(np.int64)[:60]
    labels_N[labels_N == 3] = 1
    suspects = find_suspects(task_of(base, inputs_NI[:60] / 16, labels_N), torch.arange(60))
    assert {suspect["suggested"] for suspect in suspects} <= {0, 1, 2}
    one_class = task_of(base, inputs_NI[:60] / 16, np.zeros(60, np.int64))
    assert find_suspects(one_class, torch.arange(60)) == []


def test_a_row_that_does_not_count_is_contradicted_too(base: BaseLayer) -> None:
    inputs_NI, labels_N, is_wrong_N = digits_with_errors(100, seed=2)
    task = task_of(base, inputs_NI, labels_N)
    weights_N = torch.from_numpy(~is_wrong_N).float()
    suspects = find_suspects(replace(task, data=replace(task.data, weights_N=weights_N)), torch.arange(100))
    assert sum(bool(is_wrong_N[suspect["row"]]) for suspect in suspects[:10]) >= 9


@pytest.mark.timing
def test_the_suspects_of_400_rows_take_at_most_half_a_second() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI, inputs_NI = torch.randn(20, 384, generator=generator), torch.randn(400, 384, generator=generator)
    base = BaseLayer(weight_OI, None, "random", fingerprint="random", weight_norm=float(weight_OI.norm()))
    task = task_of(base, inputs_NI.numpy(), np.arange(400) % 20)
    begin = time.process_time()
    find_suspects(task, torch.arange(400))
    assert time.process_time() - begin < 0.5
