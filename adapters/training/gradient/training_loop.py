"""Training loop of gradient descent, with checkpoints, a time limit and early stopping."""

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
    """Held-out rows for early stopping: a table, and the indices of each entry's rows."""

    data: TrainingData
    rows: Sequence[Tensor]


class CheckpointOptions(NamedTuple):
    """Path and interval of the checkpoints of a training."""

    path: Path
    seconds: float = SECONDS_BETWEEN_CHECKPOINTS
    note: Callable[[str], None] = lambda _text: None
    """Callback with a message if a training resumes from a checkpoint."""


def run_training_loop(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    tasks: Sequence[StackEntry],
    *,
    report: ReportStep,
    held_out: HeldOut | None = None,
    checkpoint: CheckpointOptions | None = None,
) -> tuple[list[TrainedFactors], History]:
    """Train every entry to its end; return their results and the history. One that diverges does not stop the others.

    With `held_out`, the best step of each is restored. With `checkpoint`, for one entry alone, the training resumes
    from the checkpoint of the same training, if there is one.
    """
    stack = Stack(base, data, spec, tasks)
    stopping = None if held_out is None else EarlyStopping(base, held_out.data, spec, stack, held_out.rows)
    of = "" if checkpoint is None else _identity(base, spec, stack, data, tasks[0].rows_K, held_out)
    spent = 0.0 if checkpoint is None else _resume(stack, stopping, checkpoint, of)
    began = saved = time.monotonic()
    while stack.live:
        loss = stack.advance()
        now = time.monotonic()
        if spec.max_seconds is not None and spent + now - began >= spec.max_seconds:
            stack.end_all()
        if stopping is not None:
            stopping.evaluate(stack)
        if checkpoint is not None and now - saved >= checkpoint.seconds and not any(map(stack.has_ended, stack.live)):
            saved = now
            _save(stack, stopping, checkpoint, of, spent + now - began)
        stack.drop()
        if not stack.live and stack.history[-1:] != [(stack.step, loss)]:
            stack.history.append((stack.step, loss))
        report(stack.step, loss, stack.history)
    return stack.result(), stack.history


def _identity(
    base: BaseLayer, spec: TrainingSpec, stack: Stack, data: TrainingData, rows_K: Tensor, held_out: HeldOut | None
) -> str:
    """Return a hash that identifies a training: base, spec, initial factors and rows (a sample, if they are many)."""
    digest = hashlib.sha256(json.dumps([base.fingerprint, asdict(spec)]).encode())
    digest.update(stack.factors_GP.cpu().numpy().tobytes())
    parts = [(data, rows_K)] if held_out is None else [(data, rows_K), (held_out.data, held_out.rows[0])]
    for table, part_K in parts:
        sample = table.take(part_K[:: max(1, len(part_K) // _IDENTITY_ROWS)])
        for tensor in (part_K.new_tensor(len(part_K)), sample.inputs_NI, sample.targets, sample.weights_N):
            if tensor is not None:
                digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _save(stack: Stack, stopping: EarlyStopping | None, checkpoint: CheckpointOptions, of: str, spent: float) -> None:
    sampler = stack.single_sampler()
    tensors = {"factors": stack.factors_GP, "generator": sampler.generator.get_state(), "order": sampler.order_K}
    tensors |= {f"moment_{number}": moment for number, moment in enumerate(stack.optimizer.state)}
    metadata: dict[str, Any] = {"step": stack.step, "history": stack.history, "spent": spent}
    if stopping is not None:
        tensors["best"] = stopping.best_GP
        metadata |= {"best_step": stopping.best_step, "best_loss": stopping.best_loss, "without": stopping.without}
    save_checkpoint(checkpoint.path, {name: tensor.cpu() for name, tensor in tensors.items()}, metadata, of=of)


def _resume(stack: Stack, stopping: EarlyStopping | None, checkpoint: CheckpointOptions, of: str) -> float:
    """Restore the state of an earlier attempt, and return the seconds that it took; 0 without a checkpoint."""
    loaded = load_checkpoint(checkpoint.path, of=of)
    if loaded is None:
        return 0.0
    tensors, metadata = loaded
    sampler = stack.single_sampler()
    stack.factors_GP.copy_(tensors["factors"])
    for number, moment in enumerate(stack.optimizer.state):
        moment.copy_(tensors[f"moment_{number}"])
    sampler.generator.set_state(tensors["generator"].to(torch.uint8))
    sampler.order_K = tensors["order"]
    stack.step, stack.history = metadata["step"], [(int(step), float(loss)) for step, loss in metadata["history"]]
    if stopping is not None:
        stopping.best_GP.copy_(tensors["best"])
        stopping.best_step, stopping.best_loss = metadata["best_step"], metadata["best_loss"]
        stopping.without = metadata["without"]
    checkpoint.note(f"goes on from the checkpoint at step {stack.step}")
    return float(metadata["spent"])
