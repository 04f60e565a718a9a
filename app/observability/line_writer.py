"""Lines to a file descriptor, by a thread: whoever reads a log slowly does not hold up those who are answered."""

import os
import queue
import select
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress

_MOST_WAITING_BYTES = 2**20
_AT_ONCE_BYTES = 2**16
_AT_ONCE_BYTES_PIPE = 4096
"""PIPE_BUF: what is written at once up to this stays in one piece, although other processes write to the same pipe."""


class LineWriter:
    """Writes what it is given in its order; where more than 1 MiB waits to be written, new lines find no room."""

    def __init__(self, descriptor: int = 2, *, most_waiting_bytes: int = _MOST_WAITING_BYTES) -> None:
        self._descriptor = descriptor
        self._most = most_waiting_bytes
        self._waiting = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Sequence[bytes] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, lines: Sequence[bytes]) -> int:
        """Have these written, each of which ends in a line feed; returns how many found no room."""
        with self._lock:
            taken = 0
            while taken < len(lines) and self._waiting + len(lines[taken]) <= self._most:
                self._waiting += len(lines[taken])
                taken += 1
        if taken:
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_on, name="request log", daemon=True)
                self._thread.start()
            self._queue.put(lines[:taken])
        return len(lines) - taken

    def close(self, seconds: float) -> None:
        """Write what waits, for so long at most."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(seconds)
            self._thread = None

    def _write_on(self) -> None:
        is_pipe = stat.S_ISFIFO(os.fstat(self._descriptor).st_mode)
        at_once = _AT_ONCE_BYTES_PIPE if is_pipe else _AT_ONCE_BYTES
        while (lines := self._queue.get()) is not None:
            part = b""
            for line in lines:
                if part and len(part) + len(line) > at_once:
                    self._write(part)
                    part = b""
                part += line
            self._write(part)

    def _write(self, part: bytes) -> None:
        left = part
        with suppress(OSError):  # nobody reads any more
            while left:
                try:
                    left = left[os.write(self._descriptor, left) :]
                except BlockingIOError:
                    select.select([], [self._descriptor], [])
        with self._lock:
            self._waiting -= len(part)
