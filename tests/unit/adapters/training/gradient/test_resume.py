"""A training that dies and goes on from its checkpoint ends as one that was never disturbed."""

# N rows
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.training.data_file import TrainingData
from adapters.training.fit import Fit, Watcher, fit
from adapters.training.gradient.stack import History
from adapters.training.gradient.training_loop import CheckpointOptions
from adapters.training.planning.split import Split
from adapters.training.settings import BALANCED, Init, Loss, Method, Schedule, TrainingSpec
from tests.support.dense_oracle import layer

DRAW = torch.Generator().manual_seed(1)
O, I, ROWS = 3, 6, 40
BASE = layer(torch.randn(O, I, generator=DRAW), torch.randn(O, generator=DRAW))
INPUTS = torch.randn(ROWS, I, generator=DRAW)
NUMBERS = TrainingData(INPUTS, torch.randn(ROWS, O, generator=DRAW), weights_N=torch.rand(ROWS, generator=DRAW))
CLASSES = TrainingData(INPUTS, torch.randint(0, O, (ROWS,), generator=DRAW))
SPEC = TrainingSpec(rank=2, alpha=2.0, epochs=6, learning_rate=0.02, batch_size=9)
SPECS = {
    "adamw": SPEC,
    "adamw, bias, clipped, scheduled": replace(
        SPEC, bias=True, clip_norm=0.5, schedule=Schedule.COSINE, warmup_steps=3, weight_decay=0.1
    ),
    "full batches": replace(SPEC, batch_size=None, epochs=25),
    "sgd": replace(SPEC, method=Method.SGD),
    "sgd, momentum": replace(SPEC, method=Method.SGD, momentum=0.9, init=Init.RANDN),
    "early stopping": replace(SPEC, split=Split(fraction=0.3), patience=2, evaluate_every=2, epochs=60),
    "early stopping, balanced": replace(
        SPEC, loss=Loss.CROSS_ENTROPY, class_weights=BALANCED, split=Split(fraction=0.3), patience=3, epochs=60
    ),
    "multiple_negatives": replace(SPEC, loss=Loss.MULTIPLE_NEGATIVES, temperature=0.5, bias=True),
    "a rate is chosen first": replace(SPEC, split=Split(fraction=0.3), try_rates=(0.001, 0.02)),
}


class _Death(BaseException):
    """What no code catches."""


def _data(spec: TrainingSpec) -> TrainingData:
    return CLASSES if spec.loss is Loss.CROSS_ENTROPY else NUMBERS


class Attempts:
    """One training with its checkpoint, that may be tried again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.reported: list[int] = []

    def until(
        self, death: int, spec: TrainingSpec, data: TrainingData | None = None, *, seconds: float = 0.0
    ) -> Fit | None:
        """Train until this step, in which it dies; to the end where it has fewer."""
        self.notes.clear()
        self.reported.clear()

        def report(step: int, _loss: float, _history: History) -> None:
            self.reported.append(step)
            if step == death:
                raise _Death

        kept = CheckpointOptions(self.path, seconds=seconds, note=self.notes.append)
        try:
            return fit(BASE, _data(spec) if data is None else data, spec, watcher=Watcher(report, checkpoint=kept))
        except _Death:
            return None

    def to_the_end(self, spec: TrainingSpec, data: TrainingData | None = None) -> Fit:
        """Train to its end."""
        done = self.until(-1, spec, data)
        assert done is not None
        return done


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path / "checkpoints" / "job.1.safetensors")


def _assert_same(done: Fit, undisturbed: Fit) -> None:
    assert done.adapter.digest == undisturbed.adapter.digest
    assert done.history == undisturbed.history
    assert done.metrics == undisturbed.metrics
    assert done.spec == undisturbed.spec


def _some_steps(of: int, seed: int) -> Sequence[int]:
    return sorted(random.Random(seed).sample(range(1, of), 4))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("seed", [0, 1])
def test_after_any_deaths_it_ends_as_if_it_had_never_died(name: str, seed: int, attempts: Attempts) -> None:
    spec = SPECS[name]
    undisturbed = fit(BASE, _data(spec), spec)
    last = undisturbed.history[-1][0]
    before = 0
    for death in _some_steps(last, seed):
        assert attempts.until(death, spec) is None
        assert attempts.reported == list(range(before + 1, death + 1))
        assert attempts.notes == ([f"continues from the checkpoint at step {before}"] if before else [])
        before = death
    done = attempts.to_the_end(spec)
    assert attempts.reported == list(range(before + 1, last + 1))
    _assert_same(done, undisturbed)


def test_the_best_step_of_an_earlier_attempt_is_restored_by_a_later_one(attempts: Attempts) -> None:
    spec = SPECS["early stopping"]
    told: list[str] = []
    undisturbed = fit(BASE, NUMBERS, spec, watcher=Watcher(note=told.append))
    best, last = int(told[0].split()[-1]), undisturbed.history[-1][0]
    assert 0 < best < last - 1
    assert attempts.until(last - 1, spec) is None
    _assert_same(attempts.to_the_end(spec), undisturbed)


def test_what_was_done_since_the_last_checkpoint_is_done_again(attempts: Attempts) -> None:
    assert attempts.until(5, SPEC) is None
    assert attempts.until(17, SPEC, seconds=3600.0) is None
    done = attempts.to_the_end(SPEC)
    assert attempts.reported[0] == 6
    _assert_same(done, fit(BASE, NUMBERS, SPEC))


OTHERS = {
    "another rate": (replace(SPEC, learning_rate=0.021), NUMBERS),
    "another rank": (replace(SPEC, rank=3, alpha=3.0), NUMBERS),
    "another method": (replace(SPEC, method=Method.SGD), NUMBERS),
    "another batch": (replace(SPEC, batch_size=10), NUMBERS),
    "with a bias": (replace(SPEC, bias=True), NUMBERS),
    "rows held out": (replace(SPEC, split=Split(fraction=0.3), patience=50), NUMBERS),
    "another input": (SPEC, replace(NUMBERS, inputs_NI=INPUTS + torch.eye(ROWS, I))),
    "another target": (SPEC, replace(NUMBERS, targets=NUMBERS.targets + torch.eye(ROWS, O))),
    "other weights": (SPEC, NUMBERS.weighted(torch.ones(ROWS))),
    "no weights": (SPEC, NUMBERS.weighted(None)),
    "fewer rows": (SPEC, NUMBERS.take(torch.arange(ROWS - 1))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_training_is_not_taken_over(name: str, attempts: Attempts) -> None:
    assert attempts.until(11, SPEC) is None
    spec, data = OTHERS[name]
    done = attempts.to_the_end(spec, data)
    assert (attempts.notes, attempts.reported[0]) == ([], 1)
    _assert_same(done, fit(BASE, data, spec))


def test_a_checkpoint_of_other_held_out_rows_is_not_taken_over(attempts: Attempts) -> None:
    spec = replace(SPEC, patience=50)
    held: dict[str, Any] = {"held_inputs_NI": INPUTS[:7], "held_targets": NUMBERS.targets[:7]}
    assert attempts.until(11, spec, replace(NUMBERS, **held)) is None
    assert attempts.until(12, spec, replace(NUMBERS, **held)) is None
    assert attempts.reported == [12]
    other = replace(NUMBERS, **(held | {"held_targets": NUMBERS.targets[1:8]}))
    _assert_same(attempts.to_the_end(spec, other), fit(BASE, other, spec))


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_torn_checkpoint_is_not_taken_over(keep: int, attempts: Attempts) -> None:
    assert attempts.until(11, SPEC) is None
    attempts.path.write_bytes(attempts.path.read_bytes()[:keep])
    done = attempts.to_the_end(SPEC)
    assert attempts.reported[0] == 1
    _assert_same(done, fit(BASE, NUMBERS, SPEC))


def test_the_seconds_of_earlier_attempts_count(attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(10**6))
    monkeypatch.setattr(
        "adapters.training.gradient.training_loop.time", SimpleNamespace(monotonic=lambda: float(next(seconds)))
    )
    spec = replace(SPEC, max_seconds=12.0)
    assert attempts.until(8, spec) is None
    done = attempts.to_the_end(spec)
    assert attempts.reported == [9, 10, 11, 12]
    assert done.history[-1][0] == 12
