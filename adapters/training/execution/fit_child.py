"""Child process that fits one job at a time, and that can be killed without harm.

Requests arrive on standard input, one JSON object per line; the first names the base layer and the limits of the
process. Frames leave on standard output, one JSON object per line; a frame with `parts` is followed by as many bytes as
their sum: adapters, or statistics.
"""

import ctypes
import json
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from adapters.errors import BaseChanged, BaseNotLoadable, BlobCorrupt, FitFailed, LoraplexError, OutOfMemory
from adapters.lora.adapter import Adapter, from_canonical_bytes
from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.storage.blobs import FolderBlobs, Quarantine
from adapters.training.closed_form.refit import refit
from adapters.training.closed_form.statistics import Statistics
from adapters.training.data_file import TrainingData
from adapters.training.execution.fit_client import FitRequest, says_no_memory
from adapters.training.fit import Fit, Watcher, fit
from adapters.training.fleet import Outcome, fit_fleet
from adapters.training.gradient.stack import History
from adapters.training.gradient.training_loop import CheckpointOptions, Epochs

_SECONDS_BETWEEN_REPORTS = 0.5
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve requests until standard input closes."""
    # A Ctrl-C reaches the whole process group; the trainer handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_the_trainer()
    out = _claim_stdout()
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    first = json.loads(requests.get())
    torch.set_num_threads(first["threads"])
    # Start its threads before there is a limit: a stack that cannot be allocated would end the process.
    torch.ones(2**20).neg_()
    # The limit does not count mapped files, so data may be larger than it.
    resource.setrlimit(resource.RLIMIT_DATA, (first["memory_bytes"], first["memory_bytes"]))
    try:
        base = load_base_layer(**first["base"])
    except BaseNotLoadable as error:
        sys.exit(f"loraplex: {error.detail}")
    _send(out, {"frame": "ready"})
    while True:
        _Fit(json.loads(requests.get()), base, out).serve()


def _die_with_the_trainer() -> None:
    """Let the kernel kill this process with the trainer: a stopped process does not see that standard input closes."""
    # Only Linux has prctl.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _read_requests(requests: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        requests.put(line)
    # The trainer has ended, so nothing can receive the fit.
    os._exit(0)


def _claim_stdout() -> BinaryIO:
    """Return the pipe for frames; anything else that is printed goes to standard error."""
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return frames


class _Fit:
    """Fit of one request, from its data to its last frame."""

    def __init__(self, message: Mapping[str, Any], base: BaseLayer, out: BinaryIO) -> None:
        self._request, self._base, self._out = FitRequest.from_json(message["request"]), base, out
        folder = Path(message["data_folder"])
        self._blobs = FolderBlobs(folder, quarantine=Quarantine(folder, now=time.time))
        self._checkpoint = Path(message["checkpoint"])
        self._latest: dict[str, Any] = {"step": 0, "loss": None, "history": []}
        self._epochs = Epochs() if self._request.times_epochs else None
        self._reported_at = time.monotonic()

    def serve(self) -> None:
        """Fit, and send the result; an error becomes a frame too."""
        try:
            self._fit()
        except LoraplexError as error:
            self._fail(error)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self._fail(OutOfMemory(f"the fit ran out of memory: {error}"))
        except Exception as error:
            traceback.print_exc()
            kind = OutOfMemory if says_no_memory(str(error)) else FitFailed
            self._fail(kind(f"{type(error).__name__}: {str(error)[:300]}"))

    def _fit(self) -> None:
        request, base = self._request, self._base
        if base.fingerprint != request.base:
            # It was loaded when this process started, and the file may have been replaced before the trainer read it.
            raise BaseChanged("the base layer's file has changed", given=base.fingerprint, expected=request.base)
        data = TrainingData.open(self._data_path(request.data))
        spec, feature_space, labels = request.job.spec, request.feature_space, request.job.labels
        if request.statistics is not None:
            statistics = Statistics.from_bytes(self._blobs.read(request.statistics))
            self._finish(refit(base, statistics, data, spec, feature_space=feature_space, labels=labels))
        elif data.groups_N is not None:
            done = frozenset(request.done)
            finished = len(done)

            def progress(_step: int, loss: float) -> None:
                self._report(finished, loss, [])

            for outcomes in fit_fleet(
                base, data, spec, done=done, progress=progress, feature_space=feature_space, labels=labels
            ):
                finished += len(outcomes)
                self._send_outcomes(outcomes)
            _send(self._out, {"frame": "done", "metrics": {}, "history": [], "parts": []})
        else:
            kept = CheckpointOptions(self._checkpoint, request.checkpoint_seconds, self._resumed)
            watcher = Watcher(self._report, self._note, kept, self._epochs)
            present = self._live_adapter()
            result = fit(base, data, spec, feature_space=feature_space, labels=labels, present=present, watcher=watcher)
            self._finish(result)

    def _data_path(self, name: str) -> Path:
        """Return the file of the job's data; raise `FitFailed` if it is missing, as after some restores."""
        try:
            return self._blobs.local(name)
        except BlobCorrupt as error:
            raise FitFailed(error.detail) from None

    def _live_adapter(self) -> Adapter | None:
        """Return the live version that the new adapter is compared with."""
        live = self._request.live
        if live is None:
            return None
        return from_canonical_bytes(self._blobs.read(live.blob, offset=live.offset, length=live.bytes))

    def _report(self, step: int, loss: float, history: History) -> None:
        self._latest.update(step=step, loss=loss, history=history)
        if time.monotonic() - self._reported_at >= _SECONDS_BETWEEN_REPORTS:
            self._reported_at = time.monotonic()
            _send(self._out, {"frame": "progress", **self._latest, **self._timed()})

    def _timed(self) -> dict[str, Any]:
        return {} if self._epochs is None else {"epochs": self._epochs.take()}

    def _note(self, text: str) -> None:
        _send(self._out, {"frame": "note", "text": text})

    def _resumed(self, text: str) -> None:
        _send(self._out, {"frame": "note", "text": text, "resumed": True})

    def _finish(self, done: Fit) -> None:
        parts = [done.adapter.canonical_bytes]
        if done.statistics is not None:
            parts.append(done.statistics.to_bytes())
        _send(
            self._out,
            {
                "frame": "done",
                "metrics": done.evaluation.to_json(),
                "history": done.history,
                "spec": asdict(done.spec),
                **self._timed(),
            },
            parts,
        )

    def _send_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        trained = [(outcome, outcome.adapter) for outcome in outcomes if outcome.adapter is not None]
        failed = [(outcome.position, outcome.error.members()) for outcome in outcomes if outcome.error is not None]
        _send(
            self._out,
            {
                "frame": "outcomes",
                "trained": [(outcome.position, outcome.metrics) for outcome, _ in trained],
                "failed": failed,
            },
            [adapter.canonical_bytes for _, adapter in trained],
        )

    def _fail(self, error: LoraplexError) -> None:
        _send(self._out, {"frame": "error", **self._latest, "error": error.members(), **self._timed()})


def _send(out: BinaryIO, frame: Mapping[str, Any], parts: Sequence[bytes] | None = None) -> None:
    announced = dict(frame) if parts is None else {**frame, "parts": [len(part) for part in parts]}
    out.write(json.dumps(announced).encode() + b"\n" + b"".join(parts or ()))
    out.flush()
