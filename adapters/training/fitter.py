"""A trainer's hold on the process that fits."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

Frame = dict[str, Any]


class FitterDied(Exception):
    """The process ended, or was killed, before it had answered."""


class Fitter:
    """One child process that has torch and the base layer loaded, and fits what it is sent.

    It serves job after job, so that a small one does not pay for the start; after a kill it is started anew.
    """

    def __init__(self, base_arguments: Mapping[str, str], *, threads: int, memory_bytes: int) -> None:
        self._first = json.dumps({"base": dict(base_arguments), "threads": threads, "memory_bytes": memory_bytes})
        self._process: subprocess.Popen[bytes] | None = None
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._ready = False

    def start(self) -> None:
        """Start the process, unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "adapters.training.fit_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        # It takes what answering leaves. Only Linux knows this class, and not in every sandbox.
        with suppress(AttributeError, OSError):
            os.sched_setscheduler(self._process.pid, os.SCHED_IDLE, os.sched_param(0))
        self._frames = queue.SimpleQueue()
        threading.Thread(target=_read_frames, args=(self._process, self._frames), daemon=True).start()
        self._send(self._first)

    def is_ready(self, seconds: float) -> bool:
        """Whether it has loaded torch and the base; it is started where it does not run, and given so long.

        Raises `FitterDied` where it ended instead.
        """
        self.start()
        self._ready = self._ready or self.next_frame(seconds) is not None
        return self._ready

    def begin(self, request: Mapping[str, Any]) -> None:
        """Have it fit, once it is ready; its frames come from `next_frame`. Raises `FitterDied`."""
        while not self.is_ready(1.0):
            pass
        self._send(json.dumps(dict(request)))

    def next_frame(self, seconds: float) -> Frame | None:
        """The next frame, or None where none came in time. Raises `FitterDied`."""
        try:
            frame = self._frames.get(timeout=seconds)
        except queue.Empty:
            return None
        if frame is None:
            raise FitterDied
        return frame

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # A request that it never read is flushed again, into nothing.
                with suppress(BrokenPipeError):
                    pipe.close()
        self._process = None
        self._ready = False

    def _send(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise FitterDied from None


def _read_frames(process: "subprocess.Popen[bytes]", frames: "queue.SimpleQueue[Frame | None]") -> None:
    assert process.stdout is not None
    try:
        for line in process.stdout:
            frame = json.loads(line)
            frame["contents"] = [process.stdout.read(length) for length in frame.get("parts", ())]
            if any(
                len(content) < length for content, length in zip(frame["contents"], frame.get("parts", ()), strict=True)
            ):
                break  # killed in the middle of an adapter
            frames.put(frame)
    except ValueError:
        pass  # killed in the middle of a line, or the pipe was closed under us
    frames.put(None)
