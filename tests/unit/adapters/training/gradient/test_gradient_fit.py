"""Gradient descent against the same steps taken by hand in float64."""

# N rows · I in_features · O out_features · R rank
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from adapters.errors import Diverged
from adapters.lora.adapter import Adapter, scaling_of
from adapters.training.data_file import TrainingData
from adapters.training.fit import Fit, Watcher, fit
from adapters.training.planning.split import Split
from adapters.training.settings import Init, Loss, Method, TrainingSpec
from tests.support.dense_oracle import Float64, layer, random_adapter, relative_error

GENERATOR = torch.Generator().manual_seed(0)
BASE = layer(torch.randn(3, 5, generator=GENERATOR), torch.randn(3, generator=GENERATOR))
ROWS = 23
INPUTS = torch.randn(ROWS, 5, generator=GENERATOR)
NUMBERS = TrainingData(INPUTS, torch.randn(ROWS, 3, generator=GENERATOR))
CLASSES = TrainingData(INPUTS, torch.randint(0, 3, (ROWS,), generator=GENERATOR))
START = random_adapter(3, 5, 2, seed=4)
SPEC = TrainingSpec(rank=2, alpha=3.0, epochs=4, batch_size=None, learning_rate=0.05)

Slope = Callable[[Float64, np.ndarray[Any, Any]], tuple[float, Float64]]


def _fit(data: TrainingData, spec: TrainingSpec) -> Fit:
    return fit(BASE, data, spec)


def _mse(y_NO: Float64, targets_NO: Float64) -> tuple[float, Float64]:
    return float(((y_NO - targets_NO) ** 2).mean()), 2 * (y_NO - targets_NO) / y_NO.size


def _cross_entropy(y_NO: Float64, classes_N: Float64) -> tuple[float, Float64]:
    odds_NO = np.exp(y_NO - y_NO.max(axis=1, keepdims=True))
    odds_NO /= odds_NO.sum(axis=1, keepdims=True)
    truth_NO = np.eye(y_NO.shape[1])[classes_N.astype(int)]
    return float(-np.log((odds_NO * truth_NO).sum(axis=1)).mean()), (odds_NO - truth_NO) / len(y_NO)


class Sgd:
    def __init__(self, rate: float) -> None:
        self._rate = rate

    def step(self, value: Float64, slope: Float64) -> None:
        value -= self._rate * slope


class Adam:
    """Kingma & Ba 2015, algorithm 1; without weight decay AdamW is no other."""

    def __init__(self, rate: float) -> None:
        self._rate, self._first, self._second, self._steps = rate, np.zeros(1), np.zeros(1), 0

    def step(self, value: Float64, slope: Float64) -> None:
        self._steps += 1
        self._first = 0.9 * self._first + 0.1 * slope
        self._second = 0.999 * self._second + 0.001 * slope**2
        first, second = self._first / (1 - 0.9**self._steps), self._second / (1 - 0.999**self._steps)
        value -= self._rate * first / (np.sqrt(second) + 1e-8)


def _by_hand(
    data: TrainingData, spec: TrainingSpec, batches: list[list[int]], start: tuple[Float64, Float64]
) -> tuple[Float64, Float64, list[float]]:
    """A, B and the loss of each step before its update."""
    slope_of: Slope = _mse if spec.loss is Loss.MSE else _cross_entropy
    optimizer = Adam if spec.method is Method.ADAMW else Sgd
    s = scaling_of(spec.alpha, spec.rank, rslora=spec.rslora)
    x_NI, targets = data.inputs_NI.double().numpy(), data.targets.double().numpy()
    assert BASE.bias_O is not None
    base_NO = x_NI @ BASE.weight_OI.double().numpy().T + BASE.bias_O.double().numpy()
    a_OR, b_RI = (factor.copy() for factor in start)
    steps_a, steps_b = optimizer(spec.learning_rate), optimizer(spec.learning_rate)
    losses = []
    for rows in batches:
        y_NO = base_NO[rows] + s * x_NI[rows] @ b_RI.T @ a_OR.T
        loss, slope_NO = slope_of(y_NO, targets[rows])
        losses.append(loss)
        slope_OI = s * slope_NO.T @ x_NI[rows]
        gradient_a, gradient_b = slope_OI @ b_RI.T, a_OR.T @ slope_OI
        steps_a.step(a_OR, gradient_a)
        steps_b.step(b_RI, gradient_b)
    return a_OR, b_RI, losses


def _given(start: Adapter) -> tuple[Float64, Float64]:
    return start.a_OR.double().numpy(), start.b_RI.double().numpy()


@pytest.mark.parametrize("method", [Method.ADAMW, Method.SGD])
@pytest.mark.parametrize("loss", [Loss.MSE, Loss.CROSS_ENTROPY])
@pytest.mark.parametrize("rslora", [False, True])
def test_full_batches_take_the_steps_that_a_hand_takes(method: Method, loss: Loss, rslora: bool) -> None:
    numbers = NUMBERS if loss is Loss.MSE else CLASSES
    data = replace(numbers, start_OR=START.a_OR, start_RI=START.b_RI)
    spec = replace(SPEC, method=method, loss=loss, init=Init.FACTORS, rslora=rslora, epochs=12)
    a_OR, b_RI, losses = _by_hand(data, spec, [list(range(ROWS))] * 12, _given(START))
    done = _fit(data, spec)
    assert [step for step, _ in done.history] == list(range(1, 13))
    np.testing.assert_allclose([loss for _, loss in done.history], losses, rtol=1e-5)
    assert relative_error(done.adapter.a_OR.double().numpy(), a_OR) < 1e-4
    assert relative_error(done.adapter.b_RI.double().numpy(), b_RI) < 1e-4


@pytest.mark.parametrize("init", [Init.ZERO_DELTA, Init.RANDN])
def test_one_generator_is_drawn_from_for_the_split_the_start_and_each_epoch_s_order(init: Init) -> None:
    spec = replace(SPEC, method=Method.SGD, init=init, batch_size=4, split=Split(fraction=0.3), seed=11, epochs=3)
    generator = torch.Generator().manual_seed(11)
    kept = sorted(torch.randperm(ROWS, generator=generator)[7:].tolist())
    if init is Init.RANDN:
        a_OR, b_RI = torch.randn(3, 2, generator=generator), torch.randn(2, 5, generator=generator)
    else:
        a_OR, b_RI = torch.zeros(3, 2), torch.rand(2, 5, generator=generator) * 2 / math.sqrt(5) - 1 / math.sqrt(5)
    batches = []
    for _ in range(3):
        order = [kept[position] for position in torch.randperm(len(kept), generator=generator).tolist()]
        batches += [order[begin : begin + 4] for begin in range(0, 16, 4)]
    wanted_a, wanted_b, losses = _by_hand(NUMBERS, spec, batches, (a_OR.double().numpy(), b_RI.double().numpy()))
    done = _fit(NUMBERS, spec)
    np.testing.assert_allclose([loss for _, loss in done.history], losses, rtol=1e-5)
    assert relative_error(done.adapter.a_OR.double().numpy(), wanted_a) < 1e-4
    assert relative_error(done.adapter.b_RI.double().numpy(), wanted_b) < 1e-4


def test_a_last_short_batch_is_kept() -> None:
    assert ROWS % 5
    done = _fit(NUMBERS, replace(SPEC, batch_size=5, epochs=2))
    assert len(done.history) == 2 * 5


@pytest.mark.parametrize("batch_size", [ROWS, ROWS + 1, 10**9])
def test_a_batch_of_all_rows_is_the_full_batch(batch_size: int) -> None:
    assert _fit(NUMBERS, replace(SPEC, batch_size=batch_size)).adapter.digest == _fit(NUMBERS, SPEC).adapter.digest


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, batch_size=4, split=Split(), init=Init.RANDN)])
def test_the_same_training_twice_is_the_same_to_the_last_bit(spec: TrainingSpec) -> None:
    first, second = _fit(NUMBERS, spec), _fit(NUMBERS, spec)
    assert first.adapter.digest == second.adapter.digest
    assert (first.history, first.metrics) == (second.history, second.metrics)
    assert _fit(NUMBERS, replace(spec, seed=1)).adapter.digest != first.adapter.digest


@pytest.mark.parametrize(("epochs", "every"), [(1000, 1), (2500, 3)])
def test_the_history_has_every_step_up_to_1000_and_then_every_so_many_and_the_last(epochs: int, every: int) -> None:
    one = TrainingData(torch.ones(1, 5), torch.zeros(1, 3))
    done = _fit(one, replace(SPEC, epochs=epochs, method=Method.SGD, learning_rate=1e-3))
    wanted = [step for step in range(1, epochs + 1) if step % every == 0 or step == epochs]
    assert [step for step, _ in done.history] == wanted


def test_every_step_is_reported_as_it_happens() -> None:
    steps: list[tuple[int, float]] = []
    done = fit(BASE, NUMBERS, SPEC, watcher=Watcher(lambda step, loss, _: steps.append((step, loss))))
    assert steps == done.history


def test_a_first_loss_past_float32_ends_it_at_step_1() -> None:
    data = TrainingData(torch.full((2, 5), 1e25), torch.zeros(2, 3))
    with pytest.raises(Diverged) as caught:
        _fit(data, replace(SPEC, method=Method.SGD))
    assert caught.value.step == 1


def test_steps_that_grow_end_it_where_a_hand_sees_them_overflow() -> None:
    spec = replace(SPEC, method=Method.SGD, init=Init.FACTORS, learning_rate=30.0, epochs=50)
    data = replace(NUMBERS, start_OR=START.a_OR, start_RI=START.b_RI)
    largest = float(np.finfo(np.float32).max)
    with np.errstate(over="ignore", invalid="ignore"):
        first = next(
            step
            for step in range(1, 50)
            if not all(
                np.abs(part).max() < largest for part in _by_hand(data, spec, [list(range(ROWS))] * step, _given(START))
            )
        )
    with pytest.raises(Diverged) as caught:
        _fit(data, spec)
    assert caught.value.step == first


def test_the_base_and_the_data_are_only_read() -> None:
    assert BASE.bias_O is not None
    data = replace(NUMBERS, start_OR=START.a_OR, start_RI=START.b_RI)
    watched = [BASE.weight_OI, BASE.bias_O, data.inputs_NI, data.targets, START.a_OR, START.b_RI]
    before = [tensor.clone() for tensor in watched]
    for method in Method:
        _fit(data, replace(SPEC, init=Init.FACTORS, method=method, batch_size=4))
    assert all(map(torch.equal, before, watched))
