"""A trainer's hold on the process that fits."""

import json
import logging
import math
import os
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapters.child_process import StoppedClock, command

Frame = dict[str, Any]
_NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "MemoryError",
    "Thread creation failed",
    "Out of memory",
)
"""What the CPU allocator, C++, Python and libgomp say where an allocation fails: in words, and some then abort."""
_LAST_LINES = 20

log = logging.getLogger(__name__)


class FitterDied(Exception):
    """The process ended, or was killed, before it had answered."""

    def __init__(self, *, out_of_memory: bool = False) -> None:
        super().__init__()
        self.out_of_memory = out_of_memory
        """Whether its last words were that an allocation had failed."""


class Fitter:
    """One child process that has torch and the base layer loaded, and fits what it is sent.

    It serves job after job, so that a small one does not pay for the start; after a kill it is started anew.
    """

    def __init__(
        self,
        base_arguments: Mapping[str, str],
        *,
        data_folder: Path,
        threads: int,
        memory_bytes: int,
        stopped_seconds: float = math.inf,
    ) -> None:
        """A process that has been stopped (SIGSTOP) for more than `stopped_seconds` is killed."""
        self._first = json.dumps({"base": dict(base_arguments), "threads": threads, "memory_bytes": memory_bytes})
        self.data_folder = data_folder
        self._stopped_seconds = stopped_seconds
        self._stopped = StoppedClock()
        self._process: subprocess.Popen[bytes] | None = None
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._ready = False
        self._words: deque[bytes] = deque(maxlen=_LAST_LINES)
        self._listener: threading.Thread | None = None

    def start(self) -> "subprocess.Popen[bytes]":
        """The process; it is started where it does not run."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.kill()
        self._process = subprocess.Popen(
            command("adapters.training.execution.fit_child"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        # Where the machine or the container runs out of memory, the kernel ends this process and none that serves.
        with suppress(OSError):
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000")
        self._frames, self._words = queue.SimpleQueue(), deque(maxlen=_LAST_LINES)
        self._stopped = StoppedClock()
        threading.Thread(target=_read_frames, args=(self._process, self._frames), daemon=True).start()
        self._listener = threading.Thread(target=_pass_on, args=(self._process, self._words), daemon=True)
        self._listener.start()
        self._send(self._first)
        return self._process

    def is_ready(self, seconds: float) -> bool:
        """Whether it has loaded torch and the base; it is started where it does not run, and given so long.

        Raises `FitterDied` where it ended instead.
        """
        process = self.start()
        if not self._ready and self.next_frame(seconds) is not None:
            _give_way(process.pid)
            self._ready = True
        return self._ready

    def begin(self, request: Mapping[str, Any], *, checkpoint: Path = Path()) -> None:
        """Have it fit, once it is ready; its frames come from `next_frame`. Raises `FitterDied`."""
        while not self.is_ready(1.0):
            pass
        paths = {"data_folder": str(self.data_folder), "checkpoint": str(checkpoint)}
        self._send(json.dumps({"request": dict(request), **paths}))

    def next_frame(self, seconds: float) -> Frame | None:
        """The next frame, or None where none came in time. Raises `FitterDied`."""
        try:
            frame = self._frames.get(timeout=seconds)
        except queue.Empty:
            self._end_if_stopped()
            return None
        if frame is None:
            raise self._death()
        return frame

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                # A request that it never read is flushed again, into nothing.
                with suppress(BrokenPipeError):
                    pipe.close()
        self._process = None
        self._ready = False

    def _end_if_stopped(self) -> None:
        """Kill a process that stands still; the next frame is its death."""
        if self._process is not None and self._stopped.seconds(self._process.pid) > self._stopped_seconds:
            log.error("the process that fits has been stopped for more than %g s and is killed", self._stopped_seconds)
            self._process.kill()
            self._stopped = StoppedClock()

    def _send(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _death(self) -> FitterDied:
        assert self._listener is not None
        self._listener.join(1.0)
        return FitterDied(out_of_memory=any(says_no_memory(line.decode(errors="replace")) for line in self._words))


def _give_way(process: int) -> None:
    """Let all threads of a process have what answering leaves.

    Not before it has loaded what it needs: on busy cores that would take minutes, in which no job begins.
    """
    # Only Linux knows this class, and not in every sandbox.
    with suppress(AttributeError, OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with suppress(ProcessLookupError):  # a thread that has ended meanwhile
                os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))


def says_no_memory(text: str) -> bool:
    """Whether an error means that an allocation failed: torch and what it calls say so in words only."""
    return any(words in text for words in _NO_MEMORY)


def _pass_on(process: "subprocess.Popen[bytes]", words: "deque[bytes]") -> None:
    """What it says on standard error goes into our log, and its newest lines are kept."""
    assert process.stderr is not None
    with suppress(ValueError, OSError):  # closed, by `kill` or from outside
        for line in process.stderr:
            words.append(line)
            log.warning("the process that fits says: %s", line.decode(errors="replace").rstrip())


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
