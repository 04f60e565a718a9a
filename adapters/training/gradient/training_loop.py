"""The loop of gradient descent: step by step to the end, with checkpoints, limits and the best step restored."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData
from adapters.training.gradient.checkpoint import load_checkpoint, save_checkpoint
from adapters.training.gradient.early_stopping import EarlyStopping
from adapters.training.gradient.stack import History, ReportStep, Stack, StackEntry, TrainedFactors
from adapters.training.settings import TrainingSpec

SECONDS_BETWEEN_CHECKPOINTS = 5.0
_IDENTITY_ROWS = 1024


class HeldOut(NamedTuple):
    """What early stopping looks at: rows of a table for each task."""

    data: TrainingData
    rows: Sequence[Tensor]


class CheckpointOptions(NamedTuple):
    """Where checkpoints go, and how often."""

    path: Path
    seconds: float = SECONDS_BETWEEN_CHECKPOINTS
    note: Callable[[str], None] = lambda _text: None
    """Told where a training goes on."""


def run_training_loop(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    tasks: Sequence[StackEntry],
    *,
    report: ReportStep,
    held_out: HeldOut | None = None,
    kept: CheckpointOptions | None = None,
) -> tuple[list[TrainedFactors], History]:
    """Train every task to its end; one that diverges has its error, and the others go on.

    With `held_out` the best step of each is restored. With `kept`, for one task alone, it goes on from the checkpoint
    that is there, where that is of the same training.
    """
    stack = Stack(base, data, spec, tasks)
    stopping = None if held_out is None else EarlyStopping(base, held_out.data, spec, stack, held_out.rows)
    of = "" if kept is None else _identity(base, spec, stack, data, tasks[0].rows_K, held_out)
    spent = 0.0 if kept is None else _resume(stack, stopping, kept, of)
    began = saved = time.monotonic()
    while stack.live:
        loss = stack.advance()
        now = time.monotonic()
        if spec.max_seconds is not None and spent + now - began >= spec.max_seconds:
            stack.end_all()
        if stopping is not None:
            stopping.look(stack)
        if kept is not None and now - saved >= kept.seconds and not any(map(stack.has_ended, stack.live)):
            saved = now
            _save(stack, stopping, kept, of, spent + now - began)
        stack.drop()
        if not stack.live and stack.history[-1:] != [(stack.step, loss)]:
            stack.history.append((stack.step, loss))
        report(stack.step, loss, stack.history)
    return stack.result(), stack.history


def _identity(
    base: BaseLayer, spec: TrainingSpec, stack: Stack, data: TrainingData, rows_K: Tensor, held_out: HeldOut | None
) -> str:
    """Of which training a checkpoint is: base, spec and start, and the rows, of which very many are only sampled."""
    seen = hashlib.sha256(json.dumps([base.fingerprint, asdict(spec)]).encode())
    seen.update(stack.factors_GP.cpu().numpy().tobytes())
    sides = [(data, rows_K)] if held_out is None else [(data, rows_K), (held_out.data, held_out.rows[0])]
    for table, some_K in sides:
        sample = table.take(some_K[:: max(1, len(some_K) // _IDENTITY_ROWS)])
        for tensor in (some_K.new_tensor(len(some_K)), sample.inputs_NI, sample.targets, sample.weights_N):
            if tensor is not None:
                seen.update(tensor.cpu().numpy().tobytes())
    return seen.hexdigest()


def _save(stack: Stack, stopping: EarlyStopping | None, kept: CheckpointOptions, of: str, spent: float) -> None:
    draws = stack.draws_of_one()
    tensors = {"factors": stack.factors_GP, "generator": draws.generator.get_state(), "order": draws.order_K}
    tensors |= {f"moment_{number}": moment for number, moment in enumerate(stack.optimizer.state)}
    about: dict[str, Any] = {"step": stack.step, "history": stack.history, "spent": spent}
    if stopping is not None:
        tensors["best"] = stopping.best_GP
        about |= {"best_step": stopping.best_step, "best_loss": stopping.best_loss, "without": stopping.without}
    save_checkpoint(kept.path, {name: tensor.cpu() for name, tensor in tensors.items()}, about, of=of)


def _resume(stack: Stack, stopping: EarlyStopping | None, kept: CheckpointOptions, of: str) -> float:
    """Take over what an earlier attempt had reached; the seconds that it had spent."""
    found = load_checkpoint(kept.path, of=of)
    if found is None:
        return 0.0
    tensors, about = found
    draws = stack.draws_of_one()
    stack.factors_GP.copy_(tensors["factors"])
    for number, moment in enumerate(stack.optimizer.state):
        moment.copy_(tensors[f"moment_{number}"])
    draws.generator.set_state(tensors["generator"].to(torch.uint8))
    draws.order_K = tensors["order"]
    stack.step, stack.history = about["step"], [(int(step), float(loss)) for step, loss in about["history"]]
    if stopping is not None:
        stopping.best_GP.copy_(tensors["best"])
        stopping.best_step, stopping.best_loss = about["best_step"], about["best_loss"]
        stopping.without = about["without"]
    kept.note(f"goes on from the checkpoint at step {stack.step}")
    return float(about["spent"])
