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
from datetime import UTC, datetime
from typing import Any

from app.observability.logs import Render
from app.observability.records import FAILED, LogRecord, PredictionRecord
from app.settings import LogRequests

_MOST_WAITING_BYTES = 2**20
_AT_ONCE_BYTES = 2**16
# PIPE_BUF: a write of at most this size is not mixed with those of other processes.
_AT_ONCE_BYTES_PIPE = 4096


class LineWriter:
    """Writes lines to a file descriptor from a thread, in order; drops new lines while more than 1 MiB waits.

    A slow reader of the log does not delay requests.
    """

    def __init__(self, descriptor: int = 2, *, most_waiting_bytes: int = _MOST_WAITING_BYTES) -> None:
        self._descriptor = descriptor
        self._most = most_waiting_bytes
        self._waiting = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Sequence[bytes] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, lines: Sequence[bytes]) -> int:
        """Queue lines, each with a line feed at its end; return how many were dropped."""
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
        """Write the queued lines; give up after a time."""
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
        with suppress(OSError):  # the reader has closed it
            while left:
                try:
                    left = left[os.write(self._descriptor, left) :]
                except BlockingIOError:
                    select.select([], [self._descriptor], [])
        with self._lock:
            self._waiting -= len(part)


# Largest number of lines a second for successful requests, and the same for failed ones. A line costs a fifth of a fast
# answer.
MOST_A_SECOND = 1000
_SECONDS_TO_CLOSE = 1.0
_LOGGER = "app.requests"
_LEVELS = {level: logging.getLevelName(level).lower() for level in (logging.INFO, logging.WARNING, logging.ERROR)}


class RequestLog:
    """Writes the lines of finished requests, many at a time, with a rate limit.

    The limit is a token bucket of `MOST_A_SECOND` lines that is refilled at each flush, ten times a second. So the
    cost of the lines is spread over the second.
    """

    def __init__(
        self,
        render: Render,
        writer: LineWriter,
        *,
        process: str,
        wanted: LogRequests = LogRequests.ALL,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._render, self._writer, self._process, self._clock = render, writer, process, clock
        # Indexed by whether a request failed, as `_room` is.
        self._is_wanted = wanted is LogRequests.ALL, wanted is not LogRequests.NONE
        self._room = [float(MOST_A_SECOND * is_wanted) for is_wanted in self._is_wanted]
        self._left_out = 0
        self._left_out_since = self._flushed = clock()
        self._records: list[LogRecord] = []

    @property
    def has_unreported(self) -> bool:
        """Whether there are dropped lines that no line has reported."""
        return self._left_out > 0

    def reserve_line(self, has_failed: bool, /) -> bool:
        """Return whether a request gets a line; count it as dropped if it only lacks room."""
        if self._room[has_failed] >= 1.0:
            self._room[has_failed] -= 1.0
            return True
        if self._is_wanted[has_failed]:
            self._leave_out(1)
        return False

    def add(self, record: LogRecord) -> None:
        """Write the line of a request with the next flush."""
        self._records.append(record)

    def flush(self) -> None:
        """Write the lines of all records since the last call."""
        now = self._clock()
        for has_failed, is_wanted in enumerate(self._is_wanted):
            more = MOST_A_SECOND * (now - self._flushed) * is_wanted
            self._room[has_failed] = min(MOST_A_SECOND, self._room[has_failed] + more)
        self._flushed = now
        records, self._records = self._records, []
        if records:
            epoch = time.time() - time.perf_counter()
            self._leave_out(self._writer.put([self._line(record, epoch + record.ended) for record in records]))
        if now - self._left_out_since >= 1.0:
            self._report_left_out(now)

    def close(self) -> None:
        """Write all remaining lines."""
        self.flush()
        self._report_left_out(self._clock())
        self._writer.close(_SECONDS_TO_CLOSE)

    def _leave_out(self, requests: int) -> None:
        if requests and not self._left_out:
            self._left_out_since = self._clock()
        self._left_out += requests

    def _report_left_out(self, now: float) -> None:
        if self._left_out:
            first = self._first(time.time(), logging.INFO, "requests left out")
            counts = {"left_out": self._left_out, "seconds": round(now - self._left_out_since, 3)}
            # If this line is dropped too, the next one reports more.
            if not self._writer.put([self._finished(first | counts)]):
                self._left_out = 0

    def _line(self, record: LogRecord, at: float) -> bytes:
        status = record.status
        level = logging.INFO if status < FAILED else logging.WARNING if status < 500 else logging.ERROR
        fields = self._first(at, level, "request")
        fields["request_id"] = record.request_id.decode("latin-1")
        fields["method"] = record.method
        fields["route"] = record.route
        fields["path"] = record.path
        fields["status"] = status
        fields["ms"] = _ms(record.ended - record.began)
        if record.prediction is not None:
            _add_prediction(fields, record.prediction)
        if record.code is not None:
            fields["code"] = record.code
        if record.trace_id is not None:
            fields["trace_id"] = record.trace_id
        return self._finished(fields)

    def _first(self, at: float, level: int, event: str) -> dict[str, Any]:
        return {
            "timestamp": datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds")[:26] + "Z",
            "level": _LEVELS[level],
            "event": event,
            "logger": _LOGGER,
            "process": self._process,
        }

    def _finished(self, fields: dict[str, Any]) -> bytes:
        return self._render(fields) + b"\n"


def _add_prediction(fields: dict[str, Any], prediction: PredictionRecord) -> None:
    """Add the adapter and its version, or the number of adapters of a request with one for each row."""
    if prediction.by_row:
        fields["adapters"] = prediction.adapters
    else:
        reference, version = prediction.reference, prediction.version
        fields["adapter"] = None if reference is None else str(reference)
        if version is not None:
            fields["version"] = version.version
            fields["digest"] = version.digest
    fields["rows"] = prediction.rows
    if prediction.queue_seconds is not None:
        fields["queue_ms"] = _ms(prediction.queue_seconds)
        fields["forward_ms"] = _ms(prediction.forward_seconds)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
