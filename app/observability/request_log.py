"""Request log: one line for each request, with its adapter, status and durations, never its inputs or headers."""

import logging
import os
import queue
import select
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from adapters.clock import rfc3339
from app.observability.logs import Render
from app.observability.records import FAILED, LogRecord
from app.settings import LogRequests

_MAX_WAITING_BYTES = 2**20
_BYTES_PER_WRITE = 2**16
# PIPE_BUF: a write of at most this size to a pipe is not mixed with those of other processes.
_BYTES_PER_WRITE_TO_PIPE = 4096
# Largest number of lines a second for successful requests, and the same for failed ones. A line costs a fifth of a fast
# answer.
MAX_LINES_PER_SECOND = 1000
_SECONDS_TO_CLOSE = 1.0
_LOGGER = "app.requests"
_LEVELS = {level: logging.getLevelName(level).lower() for level in (logging.INFO, logging.WARNING, logging.ERROR)}


class LineWriter:
    """Writes lines to a file descriptor from a thread, in order; drops new lines while more than 1 MiB waits.

    A slow reader of the log does not delay requests.
    """

    def __init__(self, descriptor: int = 2, *, max_waiting_bytes: int = _MAX_WAITING_BYTES) -> None:
        self._descriptor = descriptor
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Sequence[bytes] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, lines: Sequence[bytes]) -> int:
        """Queue lines, each with a line feed at its end; return how many were dropped."""
        with self._lock:
            taken = 0
            while taken < len(lines) and self._waiting_bytes + len(lines[taken]) <= self._max_waiting_bytes:
                self._waiting_bytes += len(lines[taken])
                taken += 1
        if taken:
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_on, name="request log", daemon=True)
                self._thread.start()
            self._queue.put(lines[:taken])
        return len(lines) - taken

    def close(self, seconds: float) -> None:
        """Write the queued lines; give up after a time."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(seconds)
            self._thread = None

    def _write_on(self) -> None:
        is_pipe = stat.S_ISFIFO(os.fstat(self._descriptor).st_mode)
        max_bytes = _BYTES_PER_WRITE_TO_PIPE if is_pipe else _BYTES_PER_WRITE
        while (lines := self._queue.get()) is not None:
            part = b""
            for line in lines:
                if part and len(part) + len(line) > max_bytes:
                    self._write(part)
                    part = b""
                part += line
            self._write(part)

    def _write(self, part: bytes) -> None:
        left = part
        with suppress(OSError):  # the reader has closed it
            while left:
                try:
                    left = left[os.write(self._descriptor, left) :]
                except BlockingIOError:
                    select.select([], [self._descriptor], [])
        with self._lock:
            self._waiting_bytes -= len(part)


class RequestLog:
    """Writes the lines of finished requests, many at a time, with a rate limit.

    The limit is a token bucket of `MAX_LINES_PER_SECOND` lines that is refilled at each flush, ten times a second. So
    the cost of the lines is spread over the second.
    """

    def __init__(
        self,
        render: Render,
        writer: LineWriter,
        *,
        process: str,
        log_requests: LogRequests = LogRequests.ALL,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._render, self._writer, self._process, self._clock = render, writer, process, clock
        # Indexed by whether a request failed, as `_tokens` is.
        self._is_logged = log_requests is LogRequests.ALL, log_requests is not LogRequests.NONE
        self._tokens = [float(MAX_LINES_PER_SECOND * is_logged) for is_logged in self._is_logged]
        self._dropped = 0
        self._dropped_since = self._flushed_at = clock()
        self._records: list[LogRecord] = []

    @property
    def has_unreported(self) -> bool:
        """Whether there are dropped lines that no line has reported."""
        return self._dropped > 0

    def reserve_line(self, has_failed: bool, /) -> bool:
        """Return whether a request gets a line; count it as dropped if only the rate limit prevents it."""
        if self._tokens[has_failed] >= 1.0:
            self._tokens[has_failed] -= 1.0
            return True
        if self._is_logged[has_failed]:
            self._drop(1)
        return False

    def add(self, record: LogRecord) -> None:
        """Write the line of a request with the next flush."""
        self._records.append(record)

    def flush(self) -> None:
        """Write the lines of all records since the last call."""
        now = self._clock()
        for has_failed, is_logged in enumerate(self._is_logged):
            refill = MAX_LINES_PER_SECOND * (now - self._flushed_at) * is_logged
            self._tokens[has_failed] = min(MAX_LINES_PER_SECOND, self._tokens[has_failed] + refill)
        self._flushed_at = now
        records, self._records = self._records, []
        if records:
            epoch = time.time() - time.perf_counter()
            self._drop(self._writer.put([self._request_line(record, epoch + record.ended) for record in records]))
        if now - self._dropped_since >= 1.0:
            self._report_dropped(now)

    def close(self) -> None:
        """Write all remaining lines."""
        self.flush()
        self._report_dropped(self._clock())
        self._writer.close(_SECONDS_TO_CLOSE)

    def _drop(self, requests: int) -> None:
        if requests and not self._dropped:
            self._dropped_since = self._clock()
        self._dropped += requests

    def _report_dropped(self, now: float) -> None:
        if self._dropped:
            counts = {"left_out": self._dropped, "seconds": round(now - self._dropped_since, 3)}
            # If this line is dropped too, the next one reports more.
            if not self._writer.put([self._line(time.time(), logging.INFO, "requests left out", counts)]):
                self._dropped = 0

    def _request_line(self, record: LogRecord, at: float) -> bytes:
        status, prediction = record.status, record.prediction
        fields: dict[str, Any] = {
            "request_id": record.request_id.decode("latin-1"),
            "method": record.method,
            "route": record.route,
            "path": record.path,
            "status": status,
            "ms": _ms(record.ended - record.began),
        }
        if prediction is not None:
            fields |= prediction.members()
            if prediction.queue_seconds is not None:
                fields["queue_ms"] = _ms(prediction.queue_seconds)
                fields["forward_ms"] = _ms(prediction.forward_seconds)
        if record.code is not None:
            fields["code"] = record.code
        if record.trace_id is not None:
            fields["trace_id"] = record.trace_id
        level = logging.INFO if status < FAILED else logging.WARNING if status < 500 else logging.ERROR
        return self._line(at, level, "request", fields)

    def _line(self, at: float, level: int, event: str, fields: dict[str, Any]) -> bytes:
        line = {
            "timestamp": rfc3339(at),
            "level": _LEVELS[level],
            "event": event,
            "logger": _LOGGER,
            "process": self._process,
        }
        return self._render(line | fields) + b"\n"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
