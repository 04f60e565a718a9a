"""The best step on the way is what is kept: checked against the held-out loss of every step of a training by hand."""

# N rows · K rows of a batch · I in_features · O out_features
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from adapters.training.data_file import TrainingData
from adapters.training.gradient.sampling import Sampler, StackEntry
from adapters.training.gradient.stack import TrainedFactors
from adapters.training.gradient.training_loop import HeldOut, run_training_loop
from adapters.training.settings import Loss, TrainingSpec
from tests.support.dense_oracle import layer
from tests.unit.adapters.training.loss_oracle import (
    Descended,
    descend_by_hand,
    losses_of_rows,
    mean_of_rows,
    outputs_by_hand,
)

O, I, ROWS, HELD = 3, 8, 14, 11
BATCH, EPOCHS = 5, 50
DRAW = torch.Generator().manual_seed(2)
BASE = layer(torch.randn(O, I, generator=DRAW), torch.randn(O, generator=DRAW))
TRUTH = torch.randn(I, O, generator=DRAW)


def _rows(count: int) -> TrainingData:
    """Much noise: what is learned of few rows soon harms the others."""
    inputs_NI = torch.randn(count, I, generator=DRAW)
    targets_NO = BASE.weight_OI @ inputs_NI.T
    targets_NO = targets_NO.T + 0.4 * inputs_NI @ TRUTH + 1.5 * torch.randn(count, O, generator=DRAW)
    return TrainingData(inputs_NI, targets_NO, weights_N=torch.rand(count, generator=DRAW) + 0.5)


DATA, HELD_OUT = _rows(ROWS), _rows(HELD)
EACH = torch.arange(HELD)
CLASSES = {side: replace(side, targets=side.targets.argmax(dim=1)) for side in (DATA, HELD_OUT)}
SPEC = TrainingSpec(rank=2, alpha=2.0, learning_rate=0.03, epochs=EPOCHS, batch_size=BATCH, patience=4, bias=True)
SPECS = {
    "each epoch": SPEC,
    "each step": replace(SPEC, evaluate_every=1),
    "every seven steps": replace(SPEC, evaluate_every=7),
    "patience 1": replace(SPEC, patience=1),
    "never out of patience": replace(SPEC, patience=10**6),
    "only what is much better": replace(SPEC, min_delta=0.1),
    "cross_entropy": replace(SPEC, loss=Loss.CROSS_ENTROPY, evaluate_every=2),
    "cosine": replace(SPEC, loss=Loss.COSINE),
    "multiple_negatives": replace(SPEC, loss=Loss.MULTIPLE_NEGATIVES, temperature=0.5, batch_size=None),
    "the start is the best": replace(SPEC, learning_rate=2.0, max_steps=30),
    "cut short between evaluations": replace(SPEC, evaluate_every=7, max_steps=10),
}


def _train(spec: TrainingSpec, held_K: Tensor | None = EACH) -> tuple[TrainedFactors, list[int]]:
    """What it ends with, and the steps of its history; with None nothing is held out."""
    data, held = (CLASSES[DATA], CLASSES[HELD_OUT]) if spec.loss is Loss.CROSS_ENTROPY else (DATA, HELD_OUT)
    sampler = Sampler(spec, ROWS)
    task = StackEntry(sampler, torch.arange(ROWS), sampler.draw_factors(BASE))
    held_out = None if held_K is None else HeldOut(held, [held_K])
    (trained,), history = run_training_loop(BASE, data, spec, [task], report=lambda *_: None, held_out=held_out)
    return trained, [step for step, _ in history]


@cache
def _by_hand(spec: TrainingSpec) -> Descended:
    """All steps that there could be."""
    sampler = Sampler(spec, ROWS)
    start = sampler.draw_factors(BASE)
    data = CLASSES[DATA] if spec.loss is Loss.CROSS_ENTROPY else DATA
    batches = [sampler.batch_rows(step) for step in range(1, sampler.steps + 1)]
    return descend_by_hand(BASE, data, spec, start, batches)


def _held_loss(spec: TrainingSpec, factors: list[Tensor]) -> float:
    held = CLASSES[HELD_OUT] if spec.loss is Loss.CROSS_ENTROPY else HELD_OUT
    assert held.weights_N is not None
    y_KO = outputs_by_hand(BASE, held.inputs_NI, factors, spec.scaling)
    targets = held.targets if spec.loss is Loss.CROSS_ENTROPY else held.targets.double()
    return float(mean_of_rows(losses_of_rows(spec, y_KO, targets), held.weights_N.double()))


def _best_by_hand(spec: TrainingSpec, done: Descended) -> tuple[int, int]:
    """The best step, and the one at which patience is lost or the training ends."""
    every = spec.evaluate_every or -(-ROWS // (spec.batch_size or ROWS))
    last = len(done.losses)
    best, best_step, without = _held_loss(spec, done.factors[0]), 0, 0
    for step in range(1, last + 1):
        if step % every and step != last:
            continue
        loss = _held_loss(spec, done.factors[step])
        if loss < best - spec.min_delta:
            best, best_step, without = loss, step, 0
        else:
            without += 1
        if spec.patience is not None and without >= spec.patience:
            return best_step, step
    return best_step, last


@pytest.mark.parametrize("name", SPECS)
def test_the_best_step_is_restored_and_patience_lost_where_a_hand_loses_it(name: str) -> None:
    spec = SPECS[name]
    by_hand = _by_hand(spec)
    best, last = _best_by_hand(spec, by_hand)
    trained, history = _train(spec)
    assert (trained.step, trained.steps) == (best, last)
    assert history == list(range(1, last + 1))
    for ours, wanted in zip(trained.factors, by_hand.factors[best], strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)


def test_these_trainings_stop_in_different_ways() -> None:
    ends = {name: _best_by_hand(spec, _by_hand(spec)) for name, spec in SPECS.items()}
    assert ends["the start is the best"][0] == 0
    assert 0 < ends["each step"][0] < ends["each step"][1] < ends["never out of patience"][1]
    assert ends["never out of patience"][1] == EPOCHS * 3
    assert ends["only what is much better"][0] < ends["each epoch"][0]
    assert ends["cut short between evaluations"][0] == ends["cut short between evaluations"][1] == 10


def test_without_rows_to_look_at_the_last_step_is_what_is_kept() -> None:
    trained, history = _train(replace(SPEC, max_steps=10), None)
    assert (trained.step, trained.steps, history[-1]) == (10, 10, 10)


def test_where_the_last_step_is_not_one_of_every_so_many_the_history_has_it_all_the_same() -> None:
    _, history = _train(replace(SPEC, epochs=1000, evaluate_every=1))
    trained, _ = _train(replace(SPEC, evaluate_every=1))
    assert trained.steps % 3
    assert history == [*range(3, trained.steps, 3), trained.steps]


@pytest.mark.parametrize("name", ["each epoch", "each step", "never out of patience", "cross_entropy"])
def test_so_many_held_out_rows_that_they_are_looked_at_in_parts_choose_the_same_step(name: str) -> None:
    trained, _ = _train(SPECS[name], EACH.repeat_interleave(1700))
    assert (trained.step, trained.steps) == _best_by_hand(SPECS[name], _by_hand(SPECS[name]))


def _clock(monkeypatch: pytest.MonkeyPatch, seconds: Iterator[float]) -> None:
    monkeypatch.setattr(
        "adapters.training.gradient.training_loop.time", SimpleNamespace(monotonic=lambda: next(seconds))
    )


@pytest.mark.parametrize(("max_seconds", "steps"), [(1e-9, 1), (7.0, 7), (7.5, 8), (10**6, 150)])
def test_it_ends_with_the_step_in_which_its_time_is_up(
    monkeypatch: pytest.MonkeyPatch, max_seconds: float, steps: int
) -> None:
    _clock(monkeypatch, iter(float(second) for second in range(1000)))
    trained, history = _train(replace(SPEC, max_seconds=max_seconds), None)
    assert (trained.step, trained.steps, history[-1]) == (steps, steps, steps)
    monkeypatch.undo()
    wanted, _ = _train(replace(SPEC, max_steps=steps), None)
    assert trained.factors.a_OR.equal(wanted.factors.a_OR)


@pytest.mark.parametrize("seconds", [1, 2, 40])
def test_where_time_is_up_between_evaluations_that_step_is_looked_at_too(
    monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    _clock(monkeypatch, iter(float(second) for second in range(1000)))
    spec = replace(SPEC, patience=10**6, evaluate_every=9)
    trained, _ = _train(replace(spec, max_seconds=float(seconds)))
    cut = replace(spec, max_steps=seconds)
    assert (trained.step, trained.steps) == _best_by_hand(cut, _by_hand(cut))
    assert trained.step > 0
