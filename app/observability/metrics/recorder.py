"""Metrics recorder of one process: a method for each metric, which takes all values since the last call."""

import os
import resource
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from app.observability.metrics import definitions as d
from app.observability.metrics.definitions import CPU_SECONDS, OPEN_FDS, RESIDENT_MEMORY, START_TIME
from app.observability.metrics.process_slot import ProcessMetrics, ProcessSlot, read_other_slots
from app.observability.metrics.values import MetricValues
from app.observability.records import OTHER

_PROC = Path("/proc")
# Fields of /proc/self/stat (proc(5)), counted from the one after the command's name.
_STARTED_AFTER_BOOT, _RESIDENT_PAGES = 19, 21


def note_process(figures: MetricValues, process: str) -> None:
    """Set the memory, processor time, open files and start time of this process, as far as they can be read."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures.put(CPU_SECONDS, used.ru_utime + used.ru_stime, process)
    with suppress(OSError, ValueError, IndexError):
        fields = (_PROC / "self/stat").read_text().rpartition(")")[2].split()
        figures.put(RESIDENT_MEMORY, int(fields[_RESIDENT_PAGES]) * resource.getpagesize(), process)
        figures.put(OPEN_FDS, len(os.listdir(_PROC / "self/fd")), process)
        started = int(fields[_STARTED_AFTER_BOOT]) / os.sysconf("SC_CLK_TCK")
        figures.put(START_TIME, _booted() + started, process)


def _booted() -> float:
    lines = (_PROC / "stat").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("btime ")))


_SECONDS_BETWEEN_WRITES = 1.0
# A process without new values writes every fifth time, to show that it is alive.
_WRITES_BETWEEN_PROOFS = 5
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_MOST_ROUTES = 200


class Metrics:
    """Metrics of one process. Every method may be called from any thread, and none raises an error of the disk.

    Counters take the amount since the last call, gauges the current value. A list costs little more than one number,
    so callers with many values collect them and call about once a second.
    """

    def __init__(
        self, process: str = "worker-1", *, folder: Path | None = None, slot: ProcessSlot | None = None
    ) -> None:
        # Name of the process, such as `worker-2`.
        self.process = process
        self._folder, self._slot = folder, slot
        self._figures = MetricValues() if slot is None else slot.counted()
        self._routes: set[str] = set()
        self._collector: Callable[[], None] | None = None
        self._changed = False
        self._write_lock = threading.Lock()
        self._closed = threading.Event()
        self._start()
        self._writer: threading.Thread | None = None
        if slot is not None:
            self._write()
            self._writer = threading.Thread(target=self._write_on, name="metrics", daemon=True)
            self._writer.start()

    @classmethod
    def open(cls, folder: Path | None, role: str) -> "Metrics":
        """Open the metrics of this process, a `worker` or a `trainer`.

        With a folder, the process takes the first free slot of its role (`worker-1` …) and continues its counters.
        Without one, or if it cannot be written, the metrics are not shared with other processes.
        """
        slot = None if folder is None else ProcessSlot.take(folder, role)
        return cls(f"{role}-1" if slot is None else slot.name, folder=folder, slot=slot)

    def close(self) -> None:
        """Write the final values, and release the slot."""
        self._closed.set()
        if self._writer is not None:
            self._writer.join()
        if self._slot is not None:
            self.collect()
            with self._write_lock:
                self._slot.leave(self._figures, ended=True)
                self._slot.give_back()
                self._slot = None

    # --- workers

    def record_requests(self, route: str, method: str, status: int, seconds: Sequence[float]) -> None:
        """Record the durations of requests to a route, given by its template such as `/adapters/{name}`."""
        if route not in self._routes:
            route = route if len(self._routes) < _MOST_ROUTES else OTHER
            self._routes.add(route)
        self._count(d.REQUESTS, len(seconds), route, method if method in _METHODS else OTHER, str(status))
        self._observe(d.REQUEST_SECONDS, seconds, route)

    def record_queue_seconds(self, seconds: Sequence[float]) -> None:
        """Record how long requests waited for their first batch."""
        self._observe(d.QUEUE_SECONDS, seconds)

    def record_batches(self, rows: Sequence[int], adapters: Sequence[int], seconds: Sequence[float]) -> None:
        """Record the rows, distinct adapters and duration of each batch."""
        self._observe(d.BATCH_ROWS, rows)
        self._observe(d.BATCH_ADAPTERS, adapters)
        self._observe(d.FORWARD_SECONDS, seconds)

    def record_fallbacks(self, counts: Mapping[str, int]) -> None:
        """Count requests that the fast path left to ASGI, by reason."""
        for reason, requests in counts.items():
            self._count(d.FAST_PATH_FALLBACKS, requests, str(reason))

    def set_queue_rows(self, rows: int, limit: int) -> None:
        """Set the rows in the queue, and their limit."""
        self._put(d.QUEUE_ROWS, rows)
        self._put(d.QUEUE_ROWS_LIMIT, limit)

    def record_cache(
        self, *, hits: int, misses: int, loads: int, evictions: int, resident_bytes: int, resident_adapters: int
    ) -> None:
        """Record the counts of the adapter cache since the last call, and its size now."""
        self._count(d.RESIDENCY_HITS, hits)
        self._count(d.RESIDENCY_MISSES, misses)
        self._count(d.RESIDENCY_LOADS, loads)
        self._count(d.RESIDENCY_EVICTIONS, evictions)
        self._put(d.RESIDENT_BYTES, resident_bytes)
        self._put(d.RESIDENT_ADAPTERS, resident_adapters)

    def record_publish(self, seconds: float, adapters: int, *, source: str = "upload") -> None:
        """Record a publish of some adapters; `source` is `upload` or `job`."""
        self._observe(d.PUBLISH_SECONDS, [seconds], source)
        self._count(d.PUBLISHED, adapters, source)

    # --- trainers

    def record_training(self, method: str, status: str, seconds: float) -> None:
        """Record a job that has ended on this trainer, and the time since it was claimed."""
        self._observe(d.TRAINING_SECONDS, [seconds], method, status)

    def record_fit_death(self) -> None:
        """Count a fit process that died."""
        self._count(d.FITS_DIED, 1)

    def record_resume(self) -> None:
        """Count a training that resumed from a checkpoint."""
        self._count(d.RESUMED, 1)

    # --- scrapes

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
        own = None if self._slot is None else self._slot.name
        others = () if self._folder is None else read_other_slots(self._folder, own)
        return [ProcessMetrics(self.process, self._figures, True), *others]

    def _start(self) -> None:
        # Alerts on an increase cannot tell a counter that does not exist yet from one that is not exported.
        residency = d.RESIDENCY_HITS, d.RESIDENCY_MISSES, d.RESIDENCY_LOADS, d.RESIDENCY_EVICTIONS
        for metric in (*residency, d.FITS_DIED, d.RESUMED):
            self._count(metric, 0)
        for source in ("upload", "job"):
            self._count(d.PUBLISHED, 0, source)
        self._count(d.STARTS, 1, self.process)
        note_process(self._figures, self.process)

    def _count(self, metric: d.Definition, amount: float, *labels: str) -> None:
        self._changed |= self._figures.add(metric, amount, *labels)

    def _put(self, metric: d.Definition, value: float, *labels: str) -> None:
        self._changed |= self._figures.put(metric, value, *labels)

    def _observe(self, metric: d.Definition, values: Sequence[float], *labels: str) -> None:
        if values:
            self._figures.observe(metric, values, *labels)
            self._changed = True

    def _write_on(self) -> None:
        quiet = 0
        while not self._closed.wait(_SECONDS_BETWEEN_WRITES):
            quiet = 0 if self._changed else quiet + 1
            if self._changed or quiet >= _WRITES_BETWEEN_PROOFS:
                quiet = 0
                self._write()

    def _write(self) -> None:
        note_process(self._figures, self.process)
        with self._write_lock:
            if self._slot is not None:
                self._changed = False
                self._slot.leave(self._figures)
