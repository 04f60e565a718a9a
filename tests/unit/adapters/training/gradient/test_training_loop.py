"""Whole trainings, with all that a spec can ask for, against autograd and torch.optim in float64."""

# N rows · I in_features · O out_features · R rank
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.lora.adapter import Adapter
from adapters.training.data_file import TrainingData
from adapters.training.fit import fit
from adapters.training.gradient.optimizer import learning_rate
from adapters.training.settings import Init, Loss, Method, Schedule, TrainingSpec
from tests.support.dense_oracle import layer, random_adapter, relative_error
from tests.unit.adapters.training.loss_oracle import Descended, descend_by_hand

DRAW = torch.Generator().manual_seed(0)
O, I, ROWS = 4, 6, 23
BASE = layer(torch.randn(O, I, generator=DRAW), torch.randn(O, generator=DRAW))
INPUTS = torch.randn(ROWS, I, generator=DRAW)
NUMBERS = torch.randn(ROWS, O, generator=DRAW)
NUMBERS[7] = NUMBERS[11] = NUMBERS[3]
WEIGHTS = torch.rand(ROWS, generator=DRAW) * 3
START = random_adapter(O, I, 2, seed=4)
TARGETS = {
    Loss.CROSS_ENTROPY: torch.randint(0, 3, (ROWS,), generator=DRAW),
    Loss.BINARY_CROSS_ENTROPY: torch.randint(0, 2, (ROWS, O), generator=DRAW).float(),
}
SPEC = TrainingSpec(
    rank=2, alpha=3.0, init=Init.FACTORS, epochs=5, batch_size=6, learning_rate=0.03, seed=5, temperature=0.4
)
ASKED = {
    "adamw": SPEC,
    "adamw, all of it": replace(
        SPEC, bias=True, weight_decay=0.2, clip_norm=0.4, schedule=Schedule.COSINE, warmup_steps=4, rslora=True
    ),
    "sgd": replace(SPEC, method=Method.SGD),
    "sgd, all of it": replace(
        SPEC,
        method=Method.SGD,
        bias=True,
        momentum=0.8,
        weight_decay=0.2,
        clip_norm=0.4,
        schedule=Schedule.LINEAR,
        warmup_steps=4,
    ),
    "cut short in an epoch": replace(SPEC, max_steps=10, schedule=Schedule.LINEAR),
}


def _data(loss: Loss, weights_N: Tensor | None = None) -> TrainingData:
    return TrainingData(INPUTS, TARGETS.get(loss, NUMBERS), START.a_OR, START.b_RI, weights_N)


def _batches(spec: TrainingSpec, rows: int) -> Iterator[Tensor]:
    """A permutation an epoch, from the seed: a start that is given draws nothing."""
    generator = torch.Generator().manual_seed(spec.seed)
    while True:
        yield from torch.randperm(rows, generator=generator).split(spec.batch_size or rows)


def _by_hand(data: TrainingData, spec: TrainingSpec) -> Descended:
    steps = min(spec.epochs * math.ceil(data.rows / (spec.batch_size or data.rows)), spec.max_steps or 10**9)
    batches = list(islice(_batches(spec, data.rows), steps))
    start = (START.a_OR, START.b_RI)
    return descend_by_hand(BASE, data, spec, start, batches, lambda step: learning_rate(spec, step, steps))


def _assert_is(adapter: Adapter, wanted: Descended) -> None:
    a_OR, b_RI, bias_O = (each.numpy() for each in wanted.factors[-1])
    assert relative_error(adapter.a_OR.numpy(), a_OR) < 1e-4
    assert relative_error(adapter.b_RI.numpy(), b_RI) < 1e-4
    if adapter.bias_O is not None:
        assert relative_error(adapter.bias_O.numpy(), bias_O) < 1e-4


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("loss", Loss)
def test_a_training_takes_the_steps_that_torch_takes(loss: Loss, asked: str, weighted: bool) -> None:
    spec = replace(ASKED[asked], loss=loss)
    data = _data(loss, WEIGHTS if weighted else None)
    wanted, done = _by_hand(data, spec), fit(BASE, data, spec)
    assert (done.adapter.bias_O is not None) == spec.bias
    assert [step for step, _ in done.history] == list(range(1, len(wanted.losses) + 1))
    np.testing.assert_allclose([loss for _, loss in done.history], wanted.losses, rtol=1e-4)
    _assert_is(done.adapter, wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [None, 3])
def test_class_weights_multiply_the_rows_own_and_classes_past_the_task_s_are_left_out(
    classes: int | None, smoothing: float
) -> None:
    given_C = (0.5, 3.0, 1.0, 1.0)[:classes]
    spec = replace(SPEC, loss=Loss.CROSS_ENTROPY, classes=classes, class_weights=given_C, label_smoothing=smoothing)
    data = _data(Loss.CROSS_ENTROPY, WEIGHTS)
    weighted = data.weighted(WEIGHTS * torch.tensor(given_C)[data.targets])
    _assert_is(fit(BASE, data, spec).adapter, _by_hand(weighted, spec))


@pytest.mark.parametrize("loss", [each for each in Loss if each is not Loss.MULTIPLE_NEGATIVES])
@pytest.mark.parametrize("batch_size", [None, 40])
def test_in_full_batches_a_row_of_weight_3_is_there_three_times_and_one_of_weight_0_never(
    loss: Loss, batch_size: int | None
) -> None:
    counts_N = torch.arange(ROWS) % 4
    spec = replace(SPEC, loss=loss, batch_size=batch_size, epochs=20)
    data = _data(loss)
    weighted = fit(BASE, data.weighted(counts_N.float()), spec).adapter
    rows_N = torch.arange(ROWS).repeat_interleave(counts_N)
    again = replace(data, inputs_NI=INPUTS[rows_N], targets=data.targets[rows_N])
    repeated = fit(BASE, again, replace(spec, batch_size=None)).adapter
    assert relative_error(weighted.a_OR.numpy(), repeated.a_OR.double().numpy()) < 1e-4
    assert relative_error(weighted.b_RI.numpy(), repeated.b_RI.double().numpy()) < 1e-4


def test_rows_that_all_weigh_the_same_are_rows_that_have_no_weights() -> None:
    data = _data(Loss.MSE)
    with_weights = fit(BASE, data.weighted(torch.full((ROWS,), 2.0)), SPEC).adapter
    without = fit(BASE, data, SPEC).adapter
    assert relative_error(with_weights.a_OR.numpy(), without.a_OR.double().numpy()) < 1e-4


@pytest.mark.parametrize("batch_size", [None, 4200])
@pytest.mark.parametrize("kept_answers", [2**26, 0])
def test_so_many_rows_that_they_are_taken_from_where_they_lie_are_trained_on_alike(
    kept_answers: int, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.training.gradient.batches.MAX_CACHED_OUTPUTS", kept_answers)
    rows = 5000
    inputs_NI = torch.randn(rows, I, generator=DRAW)
    data = TrainingData(inputs_NI, torch.randn(rows, O, generator=DRAW), START.a_OR, START.b_RI)
    spec = replace(SPEC, batch_size=batch_size, epochs=2, bias=True)
    wanted, done = _by_hand(data, spec), fit(BASE, data, spec)
    np.testing.assert_allclose([loss for _, loss in done.history], wanted.losses, rtol=1e-4)
    _assert_is(done.adapter, wanted)


def test_a_trained_bias_starts_at_nothing_and_one_that_is_not_asked_for_is_none() -> None:
    data = _data(Loss.MSE)
    done = fit(BASE, data, replace(SPEC, bias=True, max_steps=1, learning_rate=0.0))
    assert done.adapter.bias_O is not None
    assert not done.adapter.bias_O.any()
    assert fit(BASE, data, SPEC).adapter.bias_O is None
