"""The process that fits: one job at a time, on its own, so that it can be killed without harm.

Requests come in on standard input, one JSON object a line; the first says which base layer. Frames go out on
standard output, one JSON object a line, the frame `done` followed by as many bytes as it says: the adapter.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from adapters.base_layer import BaseLayer, load_base_layer
from adapters.errors import BaseChanged, BaseNotLoadable, FitFailed, LoraplexError, OutOfMemory
from adapters.training.data import TrainingData
from adapters.training.fit import fit
from adapters.training.gradient import History
from adapters.training.spec import TrainingSpec

_SECONDS_BETWEEN_REPORTS = 0.5


def main() -> None:
    """Serve requests until standard input closes."""
    torch.set_num_threads(1)
    # A Ctrl-C reaches the whole group of processes: it is the trainer's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = _claim_stdout()
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    try:
        base = load_base_layer(**json.loads(requests.get()))
    except BaseNotLoadable as error:
        sys.exit(f"loraplex: {error.detail}")
    _send(out, {"frame": "ready"})
    while True:
        _serve(json.loads(requests.get()), base, out)


def _read_requests(requests: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        requests.put(line)
    # The trainer is gone, or wants no more: whatever is being fitted is for nobody.
    os._exit(0)


def _claim_stdout() -> BinaryIO:
    """Keep the pipe for frames alone: whatever else is printed goes to standard error."""
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return frames


def _serve(request: Mapping[str, Any], base: BaseLayer, out: BinaryIO) -> None:
    last = time.monotonic()
    latest: dict[str, Any] = {"step": 0, "loss": None, "history": []}

    def report(step: int, loss: float, history: History) -> None:
        nonlocal last
        latest.update(step=step, loss=loss, history=history)
        if time.monotonic() - last >= _SECONDS_BETWEEN_REPORTS:
            last = time.monotonic()
            _send(out, {"frame": "progress", **latest})

    try:
        if base.fingerprint != request["base"]:
            # It was loaded when this process started: the file may have been replaced after the trainer read it.
            raise BaseChanged("the base layer's file has changed", given=base.fingerprint, expected=request["base"])
        data = TrainingData.from_bytes(Path(request["data_path"]).read_bytes())
        spec = TrainingSpec.from_json(request["spec"])
        result = fit(base, data, spec, feature_space=request["feature_space"], report=report)
    except LoraplexError as error:
        _send(out, {"frame": "error", **latest, "error": error.members()})
    except (MemoryError, torch.OutOfMemoryError) as error:
        _send(out, {"frame": "error", **latest, "error": OutOfMemory(f"the fit ran out of memory: {error}").members()})
    except Exception as error:
        traceback.print_exc()
        # The CPU allocator says so in words only.
        kind = OutOfMemory if "can't allocate memory" in str(error) else FitFailed
        _send(out, {"frame": "error", **latest, "error": kind(f"{type(error).__name__}: {str(error)[:300]}").members()})
    else:
        content = result.adapter.canonical_bytes
        frame = {"frame": "done", "metrics": result.metrics, "history": result.history, "bytes": len(content)}
        _send(out, frame, content)


def _send(out: BinaryIO, frame: Mapping[str, Any], content: bytes = b"") -> None:
    out.write(json.dumps(frame).encode() + b"\n" + content)
    out.flush()


if __name__ == "__main__":
    main()
