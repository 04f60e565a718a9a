"""What a spec says by default, how many steps it makes, the rate of each, and what is too many."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from torch.optim import lr_scheduler

from adapters.errors import OutOfRange
from adapters.training.gradient.optimizer import learning_rate
from adapters.training.planning.split import Split, SplitBy
from adapters.training.settings import BALANCED, Candidate, Init, Loss, Method, Schedule, TrainingSpec

SPEC = TrainingSpec(rank=2, alpha=2.0)
Scheduler = Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]


def test_what_is_left_out_is_the_contract_s_default() -> None:
    of_the_contract = {
        "rank": 2,
        "alpha": 2.0,
        "rslora": False,
        "method": "adamw",
        "loss": "mse",
        "epochs": 50,
        "learning_rate": 0.01,
        "batch_size": 64,
        "seed": 0,
        "init": "zero_delta",
        "ridge": 0.0,
    }
    switched_off = {
        "bias": False,
        "split": None,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "clip_norm": None,
        "schedule": "constant",
        "warmup_steps": 0,
        "patience": None,
        "min_delta": 0.0,
        "evaluate_every": None,
        "max_steps": None,
        "max_seconds": None,
        "huber_delta": 1.0,
        "label_smoothing": 0.0,
        "class_weights": None,
        "temperature": 0.05,
        "classes": None,
        "keep_statistics": False,
        "try_ranks": (),
        "try_rates": (),
        "try_ridges": False,
        "alpha_is_rank": False,
        "candidates": (),
        "try_bias": False,
        "try_steps": False,
    }
    assert asdict(SPEC) == of_the_contract | switched_off


@pytest.mark.parametrize("class_weights", [None, BALANCED, (0.5, 2.0)])
@pytest.mark.parametrize("split", [None, Split(by=SplitBy.GROUP, fraction=0.3), Split(stratify=True)])
def test_a_spec_survives_json(class_weights: str | tuple[float, ...] | None, split: Split | None) -> None:
    spec = replace(
        SPEC,
        method=Method.SGD,
        loss=Loss.CROSS_ENTROPY,
        init=Init.RANDN,
        schedule=Schedule.COSINE,
        batch_size=None,
        rslora=True,
        class_weights=class_weights,
        split=split,
        try_ranks=(1, 2),
        try_rates=(0.1, 0.01),
        candidates=(Candidate.BASE, Candidate.ADAMW),
    )
    again = TrainingSpec.from_json(json.loads(json.dumps(asdict(spec))))
    assert again == spec
    assert [type(getattr(again, name)) for name in ("method", "loss", "init", "schedule")] == [
        Method,
        Loss,
        Init,
        Schedule,
    ]
    assert split is None or type(again.split.by if again.split else None) is SplitBy


@pytest.mark.parametrize(
    ("training_rows", "batch_size", "steps"),
    [(64, 64, 3), (65, 64, 6), (100, None, 3), (100, 10**9, 3), (50, 10, 15), (1, 64, 3)],
)
def test_a_step_is_a_batch_and_a_last_short_one_counts(training_rows: int, batch_size: int | None, steps: int) -> None:
    spec = replace(SPEC, epochs=3, batch_size=batch_size)
    assert spec.steps(training_rows) == steps
    assert replace(spec, method=Method.CLOSED_FORM).steps(training_rows) == 1
    assert [replace(spec, max_steps=most).steps(training_rows) for most in (1, steps, steps + 1)] == [1, steps, steps]


def test_ten_million_steps_are_the_most() -> None:
    replace(SPEC, epochs=10_000_000).check_steps(64)
    replace(SPEC, method=Method.CLOSED_FORM, epochs=10_000_000).check_steps(65)
    replace(SPEC, epochs=10_000_000, max_steps=10_000_000).check_steps(65)
    with pytest.raises(OutOfRange) as caught:
        replace(SPEC, epochs=10_000_000).check_steps(65)
    assert caught.value.field == "training.epochs"


def _torch_s(scheduler: Scheduler, rate: float, steps: int) -> list[float]:
    """The learning rates that a scheduler gives so many steps."""
    if steps == 0:
        return []
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    schedule, rates = scheduler(optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


SCHEDULERS: dict[Schedule, Scheduler] = {
    Schedule.CONSTANT: lambda optimizer, steps: lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=steps),
    Schedule.LINEAR: lambda optimizer, steps: lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps
    ),
    Schedule.COSINE: lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
}


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (20, 0), (20, 1), (20, 7), (20, 20), (5, 9)])
def test_rates_are_those_of_torch_s_schedulers_after_a_straight_warm_up(
    schedule: Schedule, steps: int, warmup_steps: int
) -> None:
    spec = replace(SPEC, schedule=schedule, warmup_steps=warmup_steps, learning_rate=0.3)
    rates = [learning_rate(spec, step, steps) for step in range(1, steps + 1)]
    growing = [0.3 * step / warmup_steps for step in range(1, min(warmup_steps, steps) + 1)]
    after = _torch_s(SCHEDULERS[schedule], 0.3, max(0, steps - warmup_steps))
    assert rates == pytest.approx(growing + after, rel=1e-9)
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
