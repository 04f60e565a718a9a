"""Metrics recorder: the metrics of this process, which it shares with the others in a file."""

import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import orjson

from app.observability.metrics import definitions as d
from app.observability.metrics.metric_values import MetricValues
from app.observability.metrics.other_processes import OtherProcesses, ProcessMetrics
from app.observability.metrics.process_slot import take_slot
from app.observability.records import LIMIT_CODES, OTHER

_PROC = Path("/proc")
# Fields of /proc/self/stat (proc(5)), counted from the one after the command's name.
_STARTED_AFTER_BOOT, _RESIDENT_PAGES = 19, 21
_SECONDS_BETWEEN_WRITES = 1.0
# A process without new values writes every fifth time, to show that it is alive.
_WRITES_BETWEEN_PROOFS = 5
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_MAX_ROUTES = 200
# Counters that begin at 0: an alert cannot tell a counter that does not exist yet from one that nothing exports.
_ZEROS = (
    *((metric, ()) for metric in (*d.RESIDENCY_COUNTERS, d.FITS_DIED, d.RESUMED)),
    *((d.PUBLISHED, (source,)) for source in ("upload", "job")),
    *((d.LIMITED, (code,)) for code in LIMIT_CODES),
)

log = logging.getLogger(__name__)


class Metrics(MetricValues):
    """Metrics of this process. No method raises an error of the disk.

    Counters take the amount since the last call, gauges the current value. Callers with many values collect them and
    call about once a second.
    """

    def __init__(self, folder: Path | None, role: str) -> None:
        """Take the first free slot of a role, `worker` or `trainer`, and continue its counters.

        Without a folder, or if it cannot be written, the metrics are not shared with other processes.
        """
        self._slot = None if folder is None else take_slot(folder, role)
        self._other_processes = OtherProcesses(folder)
        super().__init__([] if self._slot is None else self._other_processes.counted(self._slot.file).items())
        # Name of the process, such as `worker-2`.
        self.process = f"{role}-1" if self._slot is None else self._slot.name
        self._routes: set[str] = set()
        self._collector: Callable[[], None] | None = None
        self._has_failed_to_write = False
        self._write_lock = threading.RLock()
        self._closed = threading.Event()
        self._writer = threading.Thread(target=self._write_on, name="metrics", daemon=True)
        for metric, labels in _ZEROS:
            self.add(metric, 0, *labels)
        self.add(d.STARTS, 1, self.process)
        self._write()
        if self._slot is not None:
            self._writer.start()

    def close(self) -> None:
        """Write the final values, and release the slot."""
        self._closed.set()
        if self._slot is None:
            return
        self._writer.join()
        self.collect()
        # One hold of the lock: a scrape in between would write that this process is alive.
        with self._write_lock:
            self._write(has_ended=True)
            self._slot.release()
            self._slot = None

    def record_requests(self, route: str, method: str, status: int, seconds: Sequence[float]) -> None:
        """Record the durations of requests to a route, given by its template such as `/adapters/{name}`."""
        if route not in self._routes:
            route = route if len(self._routes) < _MAX_ROUTES else OTHER
            self._routes.add(route)
        self.add(d.REQUESTS, len(seconds), route, method if method in _METHODS else OTHER, str(status))
        self.observe(d.REQUEST_SECONDS, seconds, route)

    def record_publish(self, seconds: float, adapters: int, *, source: str = "upload") -> None:
        """Record a publish of some adapters; `source` is `upload` or `job`."""
        self.observe(d.PUBLISH_SECONDS, [seconds], source)
        self.add(d.PUBLISHED, adapters, source)

    def set_collector(self, collector: Callable[[], None]) -> None:
        """Set the callback that passes on values before a scrape. It is called on the event loop."""
        self._collector = collector

    def collect(self) -> None:
        """Run the callback immediately."""
        if self._collector is not None:
            self._collector()

    def all_processes(self) -> list[ProcessMetrics]:
        """Return the metrics of every process, this one first. Reads files: call it in a thread."""
        # Written first, so that no later scrape shows a lower counter, even if this process dies now.
        self._write()
        own = None if self._slot is None else self._slot.file
        return [ProcessMetrics(self.process, self, True), *self._other_processes.list(own=own)]

    def _write_on(self) -> None:
        quiet = 0
        while not self._closed.wait(_SECONDS_BETWEEN_WRITES):
            quiet = 0 if self.changed else quiet + 1
            if self.changed or quiet >= _WRITES_BETWEEN_PROOFS:
                quiet = 0
                self._write()

    def _write(self, *, has_ended: bool = False) -> None:
        """Write the file, if there is one; log the first failure in a row."""
        _note_process(self, self.process)
        with self._write_lock:
            if self._slot is None:
                return
            self.changed = False
            temporary = self._slot.file.with_suffix(".tmp")
            content = {"written_at": 0.0 if has_ended else time.time(), **self.to_json()}
            try:
                temporary.write_bytes(orjson.dumps(content))
                temporary.replace(self._slot.file)
            except OSError as error:
                with suppress(OSError):
                    temporary.unlink()
                if not self._has_failed_to_write:
                    log.warning("the metrics of this process cannot be written, and others show old ones: %s", error)
                self._has_failed_to_write = True
            else:
                self._has_failed_to_write = False


def _note_process(values: MetricValues, process: str) -> None:
    """Set the memory, processor time, open files and start time of this process, as far as they can be read."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    values.put(d.CPU_SECONDS, used.ru_utime + used.ru_stime, process)
    with suppress(OSError, ValueError, IndexError, StopIteration):
        fields = (_PROC / "self/stat").read_text().rpartition(")")[2].split()
        values.put(d.RESIDENT_MEMORY, int(fields[_RESIDENT_PAGES]) * resource.getpagesize(), process)
        values.put(d.OPEN_FDS, len(os.listdir(_PROC / "self/fd")), process)
        lines = (_PROC / "stat").read_text().splitlines()
        booted = next(float(line.split()[1]) for line in lines if line.startswith("btime "))
        values.put(d.START_TIME, booted + int(fields[_STARTED_AFTER_BOOT]) / os.sysconf("SC_CLK_TCK"), process)
