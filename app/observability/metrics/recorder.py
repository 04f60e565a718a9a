"""Metrics recorder: the values of one process, which it shares with the others in a file, and the sum over processes.

The files are replaced, not mapped: writing to a mapped page on a full disk ends the process.
"""

# B buckets of a histogram
import logging
import os
import re
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from app.observability.metrics import definitions as d
from app.observability.metrics.definitions import DEFINITIONS, Definition, Kind
from app.observability.metrics.process_slot import take_slot
from app.observability.records import OTHER

# Values of the labels, in the order of the definition.
Labels = tuple[str, ...]
Key = tuple[Definition, Labels]
# A number, or (B + 1,) float64 for a histogram: the observations in each bucket, then the sum of all.
Value = float | NDArray[np.float64]

_PROC = Path("/proc")
# Fields of /proc/self/stat (proc(5)), counted from the one after the command's name.
_STARTED_AFTER_BOOT, _RESIDENT_PAGES = 19, 21
_SECONDS_BETWEEN_WRITES = 1.0
# A process without new values writes every fifth time, to show that it is alive.
_WRITES_BETWEEN_PROOFS = 5
# Age after which the metrics of a process count as those of a dead one.
DEAD_AFTER_SECONDS = 15.0
# Names of slots. Other files in the folder are ignored.
_SLOT_NAME = re.compile(r"[a-z]+-[0-9]+")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_MAX_ROUTES = 200
# Counters that begin at 0: an alert cannot tell a counter that does not exist yet from one that nothing exports.
_ZEROS = (
    *((metric, ()) for metric in (*d.RESIDENCY_COUNTERS, d.FITS_DIED, d.RESUMED)),
    *((d.PUBLISHED, (source,)) for source in ("upload", "job")),
)

log = logging.getLogger(__name__)


class MetricValues:
    """Values by metric and labels. Every method may be called from any thread."""

    def __init__(self, values: Iterable[tuple[Key, Value]] = ()) -> None:
        self._values = dict(values)
        self._lock = threading.Lock()
        # Whether a value has changed since this was last set to False.
        self.changed = False

    def add(self, metric: Definition, amount: Value, *labels: str) -> None:
        """Increase a counter or a histogram."""
        with self._lock:
            self._values[metric, labels] = self._values.get((metric, labels), 0.0) + amount
        if np.any(amount):
            self.changed = True

    def put(self, metric: Definition, value: float, *labels: str) -> None:
        """Set a gauge, or a counter that is counted elsewhere."""
        with self._lock:
            before, self._values[metric, labels] = self._values.get((metric, labels)), float(value)
        if before != value:
            self.changed = True

    def observe(self, metric: Definition, values: Sequence[float], *labels: str) -> None:
        """Add observations to a histogram. A list costs little more than one, so callers collect them."""
        if values:
            value_N = np.asarray(values, dtype=np.float64)
            buckets = np.searchsorted(np.asarray(metric.bounds), value_N)
            count_B = np.bincount(buckets, minlength=len(metric.bounds) + 1)
            self.add(metric, np.append(count_B, value_N.sum()), *labels)

    def items(self) -> list[tuple[Key, Value]]:
        """Return a copy of all values."""
        with self._lock:
            return list(self._values.items())

    def only(self, condition: Callable[[Definition], bool]) -> "MetricValues":
        """Return the values of the metrics that fulfil a condition."""
        return MetricValues((key, value) for key, value in self.items() if condition(key[0]))

    def to_json(self) -> dict[str, Any]:
        """Return the form that `from_json` reads, in every release: an upgrade must not lose counters."""
        numbers, tallies = [], []
        for (metric, labels), value in self.items():
            *counts, last = np.atleast_1d(value).tolist()
            if metric.shape:
                tallies.append([metric.name, labels, counts, last])
            else:
                numbers.append([metric.name, labels, last])
        return {"numbers": numbers, "tallies": tallies}

    @classmethod
    def from_json(cls, stored: Any) -> "MetricValues":
        """Read the form of `to_json`, without metrics that no longer exist or have changed.

        Raises `ValueError`, `TypeError`, `KeyError` or `OverflowError` if it is malformed.
        """
        values: dict[Key, Value] = {}
        histograms = ([name, labels, [*counts, total]] for name, labels, counts, total in stored["tallies"])
        for name, labels, entry in [*stored["numbers"], *histograms]:
            metric, value = DEFINITIONS.get(name), np.asarray(entry, dtype=np.float64)
            if metric is None or len(labels) != len(metric.labels) or value.shape != metric.shape:
                continue
            values[metric, tuple(map(str, labels))] = value if metric.shape else float(value)
        return cls(values.items())


def sum_values(parts: Iterable[MetricValues]) -> MetricValues:
    """Return the sum of values by metric and labels."""
    whole = MetricValues()
    for part in parts:
        for (metric, labels), value in part.items():
            whole.add(metric, value, *labels)
    return whole


class ProcessMetrics(NamedTuple):
    """Metrics of one process."""

    name: str
    values: MetricValues
    is_alive: bool


class Metrics(MetricValues):
    """Metrics of this process. No method raises an error of the disk.

    Counters take the amount since the last call, gauges the current value. Callers with many values collect them and
    call about once a second.
    """

    def __init__(self, folder: Path | None, role: str) -> None:
        """Take the first free slot of a role, `worker` or `trainer`, and continue its counters.

        Without a folder, or if it cannot be written, the metrics are not shared with other processes.
        """
        self._folder = folder
        self._slot = None if folder is None else take_slot(folder, role)
        # Files that were logged as malformed.
        self._malformed: set[Path] = set()
        stored = None if self._slot is None else self._read(self._slot.file)
        super().__init__([] if stored is None else stored.values.only(_is_counted).items())
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
        return [ProcessMetrics(self.process, self, True), *self._others()]

    def _others(self) -> Iterator[ProcessMetrics]:
        own = None if self._slot is None else self._slot.file
        paths: list[Path] = []
        with suppress(OSError):
            paths = [] if self._folder is None else sorted(self._folder.glob("*.json"))
        for path in paths:
            if path == own or not _SLOT_NAME.fullmatch(path.stem) or (process := self._read(path)) is None:
                continue
            yield process if process.is_alive else process._replace(values=process.values.only(_outlives))

    def _read(self, path: Path) -> ProcessMetrics | None:
        """Return the content of a file. A malformed one stays: a process of another release may have written it."""
        try:
            content = orjson.loads(path.read_bytes())
            is_alive = abs(time.time() - float(content["written_at"])) < DEAD_AFTER_SECONDS
            return ProcessMetrics(path.stem, MetricValues.from_json(content), is_alive)
        except FileNotFoundError:
            pass
        except OSError as error:
            # The error may be temporary, such as too many open files.
            log.warning("the metrics in %s cannot be read now: %s", path.name, error)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if path not in self._malformed:
                log.warning("%s does not hold metrics, and is not counted: %s", path.name, error)
            self._malformed.add(path)
        return None

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


def _is_counted(metric: Definition) -> bool:
    return metric.kind is not Kind.GAUGE


def _outlives(metric: Definition) -> bool:
    """Return whether a metric is kept after its process has ended: counters and histograms are, gauges are not."""
    return _is_counted(metric) and "process" not in metric.labels
