"""Process slots: the names `worker-1`, `trainer-2` … of the processes of a role, and the metrics that each one writes.

A slot belongs to the process that holds the lock on its file. The kernel releases the lock when that process ends, so
a restarted process takes over the slot and continues its counters, and there are never more slots than processes that
ran at once. Names have no pid, because two containers on one volume can have the same pids. The metrics are plain files
that are replaced, not mapped: writing to a mapped page on a full disk ends the process.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import orjson

from app.observability.metrics.definitions import Definition, Kind

if TYPE_CHECKING:
    from app.observability.metrics.values import MetricValues

# Folder, in the data folder, of the metrics of all processes.
METRICS = "metrics"
_MOST = 1024


class SlotLock(NamedTuple):
    """Lock of one slot, held until it is closed or the process ends."""

    name: str
    lock: int
    """File descriptor, which child processes do not inherit."""


def take_slot_lock(folder: Path, role: str) -> SlotLock | None:
    """Lock the first free slot of a role; return None if 1,023 are taken. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, _MOST):
        lock = _lock(folder / f"{role}-{number}.lock")
        if lock is not None:
            return SlotLock(f"{role}-{number}", lock)
    return None


def clean_slots(folder: Path, role: str) -> None:
    """Remove the metrics that processes of a role have left, unless one of them still runs.

    Call it before the processes of the role start. Raises `OSError`.
    """
    locks: list[int] = []
    try:
        for path in folder.glob(f"{role}-*.lock"):
            lock = _lock(path)
            if lock is None:
                return
            locks.append(lock)
        # Lock files stay: a process that opened one would lock a file that no longer has a name.
        for path in [*folder.glob(f"{role}-*.json"), *folder.glob(f"{role}-*.tmp")]:
            path.unlink(missing_ok=True)
    finally:
        for lock in locks:
            os.close(lock)


def _lock(path: Path) -> int | None:
    """Return the descriptor of the locked file, or None if another process holds the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


# Age after which the metrics of a process count as those of a dead one: live processes write every few seconds.
DEAD_AFTER_SECONDS = 15.0

# Names of slots. Other files in the folder are ignored.
_NAME = re.compile(r"[a-z]+-[0-9]+")

log = logging.getLogger(__name__)


class ProcessMetrics(NamedTuple):
    """Metrics of one process, as read from its file."""

    name: str
    figures: "MetricValues"
    """Without gauges if the process is dead."""
    lives: bool


class ProcessSlot:
    """Slot of one process, from `take` to `give_back`."""

    def __init__(self, folder: Path, place: SlotLock) -> None:
        self.name, self._lock = place
        self._path = folder / f"{self.name}.json"
        self._complained = False

    @classmethod
    def take(cls, folder: Path, role: str) -> "ProcessSlot | None":
        """Return the first free slot of a role; log a warning and return None if the folder cannot be used."""
        try:
            place = take_slot_lock(folder, role)
        except OSError as error:
            log.warning("this process's metrics are not shared with the others: %s", error)
            return None
        return None if place is None else cls(folder, place)

    def counted(self) -> "MetricValues":
        """Return the counters that an earlier process left in this slot."""
        from app.observability.metrics.values import MetricValues

        stored = _read(self._path)
        return MetricValues() if stored is None else stored.figures.only(_is_counted)

    def leave(self, figures: "MetricValues", *, ended: bool = False) -> None:
        """Write the metrics of this process; log the first failure."""
        written = self._path.with_suffix(".tmp")
        content = {"written_at": 0.0 if ended else time.time(), **figures.to_json()}
        try:
            written.write_bytes(orjson.dumps(content))
            written.replace(self._path)
        except OSError as error:
            with suppress(OSError):
                written.unlink()
            if not self._complained:
                log.warning(
                    "the metrics of this process cannot be written, and those shown elsewhere are old: %s", error
                )
            self._complained = True
        else:
            self._complained = False

    def give_back(self) -> None:
        """Release the slot for another process."""
        os.close(self._lock)


def read_other_slots(folder: Path, own: str | None) -> Iterator[ProcessMetrics]:
    """Yield the metrics of all other slots; skip files that cannot be read."""
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError:
        return
    for path in paths:
        if not _NAME.fullmatch(path.stem) or path.stem == own or (stored := _read(path)) is None:
            continue
        lives = abs(time.time() - stored.written_at) < DEAD_AFTER_SECONDS
        yield ProcessMetrics(path.stem, stored.figures if lives else stored.figures.only(_outlives), lives)


class _Stored(NamedTuple):
    written_at: float
    figures: "MetricValues"


def _read(path: Path) -> _Stored | None:
    """Return the content of a file; remove a malformed one, which a live process writes again."""
    # The supervisor imports this module, and it does without numpy.
    from app.observability.metrics.values import MetricValues

    try:
        stored = orjson.loads(path.read_bytes())
        return _Stored(float(stored["written_at"]), MetricValues.from_json(stored))
    except FileNotFoundError:
        return None
    except OSError as error:
        # The error may be temporary, such as too many open files.
        log.warning("the metrics in %s cannot be read now: %s", path.name, error)
        return None
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        log.warning("what lies in %s is no metrics, and is not counted: %s", path.name, error)
        with suppress(OSError):
            path.unlink()
        return None


def _is_counted(metric: Definition) -> bool:
    return metric.kind is not Kind.GAUGE


def _outlives(metric: Definition) -> bool:
    """Return whether a metric is kept after its process has ended: counters and histograms are, gauges are not."""
    return _is_counted(metric) and "process" not in metric.labels
