"""Training loop of gradient descent, with checkpoints, a time limit and early stopping."""

import hashlib
import json
import math
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
from adapters.training.gradient.sampling import StackEntry
from adapters.training.gradient.stack import History, ReportStep, Stack, TrainedFactors
from adapters.training.settings import TrainingSpec

SECONDS_BETWEEN_CHECKPOINTS = 5.0
# Most epochs of one training that are recorded. Of more epochs, every k-th is recorded.
MAX_RECORDED_EPOCHS = 200
_IDENTITY_ROWS = 1024
# Settings that a loop does not read. A checkpoint of a release without them is still that of the same training.
_SETTINGS_OF_AUTO = ("candidates", "try_bias", "try_steps")


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


class Epoch(NamedTuple):
    """Times of one epoch, or of the rest of one after a training was resumed."""

    number: int
    """Counts from 1."""
    began: float
    """Seconds since 1970."""
    ended: float
    every: int
    """Number of epochs that this record stands for; 1 if each epoch is recorded."""
    loss: float
    """Loss of its last step."""


class Epochs:
    """Recorder of the times of epochs."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._ended: list[Epoch] = []

    def timing(self, report: ReportStep, *, steps: int, steps_an_epoch: int) -> ReportStep:
        """Return `report` with a record of each epoch that ends. Call this when the first step begins."""
        every = math.ceil(math.ceil(steps / steps_an_epoch) / MAX_RECORDED_EPOCHS)
        began = self._now()

        def record(step: int, loss: float, history: History) -> None:
            nonlocal began
            if step % steps_an_epoch == 0 or step == steps:
                number, ended = math.ceil(step / steps_an_epoch), self._now()
                if number % every == 0:
                    self._ended.append(Epoch(number, began, ended, every, loss))
                began = ended
            report(step, loss, history)

        return record

    def take(self) -> list[Epoch]:
        """Return the epochs that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended


def run_training_loop(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    entries: Sequence[StackEntry],
    *,
    report: ReportStep,
    held_out: HeldOut | None = None,
    checkpoint: CheckpointOptions | None = None,
) -> tuple[list[TrainedFactors], History]:
    """Train every entry to its end; return their results and the history. One that diverges does not stop the others.

    With `held_out`, the best step of each is restored. With `checkpoint`, for one entry alone, the training resumes
    from the checkpoint of the same training, if there is one.
    """
    stack = Stack(base, data, spec, entries)
    stopping = None if held_out is None else EarlyStopping(base, held_out.data, spec, stack, held_out.rows)
    of = "" if checkpoint is None else _identity(base, spec, stack, data, held_out)
    spent = 0.0 if checkpoint is None else _resume(stack, stopping, checkpoint, of)
    began = saved = time.monotonic()
    while stack.live:
        loss = stack.advance()
        now = time.monotonic()
        if spec.max_seconds is not None and spent + now - began >= spec.max_seconds:
            stack.end_all()
        if stopping is not None:
            stopping.evaluate(stack)
        if checkpoint is not None and now - saved >= checkpoint.seconds and not stack.some_ended:
            saved = now
            _save(stack, stopping, checkpoint, of, spent + now - began)
        stack.drop()
        if not stack.live and stack.history[-1:] != [(stack.step, loss)]:
            stack.history.append((stack.step, loss))
        report(stack.step, loss, stack.history)
    return [stack.trained[entry] for entry in range(len(entries))], stack.history


def _identity(base: BaseLayer, spec: TrainingSpec, stack: Stack, data: TrainingData, held_out: HeldOut | None) -> str:
    """Return a hash that identifies a training: base, spec, initial factors and rows (a sample, if they are many)."""
    settings = {name: value for name, value in asdict(spec).items() if name not in _SETTINGS_OF_AUTO}
    digest = hashlib.sha256(json.dumps([base.fingerprint, settings]).encode())
    digest.update(stack.factors_GP.cpu().numpy().tobytes())
    parts = [(data, stack.entries[0].rows_K)] + ([] if held_out is None else [(held_out.data, held_out.rows[0])])
    for table, part_K in parts:
        sample = table.take(part_K[:: max(1, len(part_K) // _IDENTITY_ROWS)])
        for tensor in (part_K.new_tensor(len(part_K)), sample.inputs_NI, sample.targets, sample.weights_N):
            if tensor is not None:
                digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _state(stack: Stack, stopping: EarlyStopping | None) -> dict[str, Tensor]:
    """Return the tensors of a training that a checkpoint stores; all are updated in place when one is loaded."""
    tensors = {"factors": stack.factors_GP, "order": stack.entries[0].sampler.order_K}
    tensors |= {f"moment_{number}": moment for number, moment in enumerate(stack.optimizer.state)}
    return tensors if stopping is None else tensors | {"best": stopping.best_GP}


def _save(stack: Stack, stopping: EarlyStopping | None, checkpoint: CheckpointOptions, of: str, spent: float) -> None:
    tensors = {name: tensor.cpu() for name, tensor in _state(stack, stopping).items()}
    tensors["generator"] = stack.entries[0].sampler.generator.get_state()
    metadata: dict[str, Any] = {"step": stack.step, "history": stack.history, "spent": spent}
    if stopping is not None:
        metadata |= {"best_step": stopping.best_step, "best_loss": stopping.best_loss, "without": stopping.without}
    save_checkpoint(checkpoint.path, tensors, metadata, of=of)


def _resume(stack: Stack, stopping: EarlyStopping | None, checkpoint: CheckpointOptions, of: str) -> float:
    """Restore the state of an earlier attempt, and return the seconds that it took; 0 without a checkpoint."""
    loaded = load_checkpoint(checkpoint.path, of=of)
    if loaded is None:
        return 0.0
    tensors, metadata = loaded
    for name, tensor in _state(stack, stopping).items():
        tensor.copy_(tensors[name])
    stack.entries[0].sampler.generator.set_state(tensors["generator"].to(torch.uint8))
    stack.step, stack.history = metadata["step"], [(int(step), float(loss)) for step, loss in metadata["history"]]
    if stopping is not None:
        stopping.best_step, stopping.best_loss = metadata["best_step"], metadata["best_loss"]
        stopping.without = metadata["without"]
    checkpoint.note(f"continues from the checkpoint at step {stack.step}")
    return float(metadata["spent"])
