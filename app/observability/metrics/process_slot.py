"""Which process of a role is which: `worker-1`, `trainer-2`, by locks in a folder that they share.

A place belongs to whoever holds the lock on its file, and the kernel gives the lock back when that process ends,
however it ends. So no name has a pid in it (two containers on one volume have the same ones), a process that is started
again takes over where it was, and there are never more places than there were processes at once.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import orjson

from app.observability.metrics.definitions import Definition, Kind
from app.observability.metrics.values import MetricValues

METRICS = "metrics"
"""Folder, in the data folder, of what each process has counted."""
_MOST = 1024


class SlotLock(NamedTuple):
    """What one process holds until it closes the lock, or ends."""

    name: str
    lock: int
    """A file descriptor, which no child process inherits."""


def take_slot_lock(folder: Path, role: str) -> SlotLock | None:
    """The first place of this role that is free; None where very many are taken. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, _MOST):
        lock = _lock(folder / f"{role}-{number}.lock")
        if lock is not None:
            return SlotLock(f"{role}-{number}", lock)
    return None


def clean_slots(folder: Path, role: str) -> None:
    """Forget what processes of this role have left, unless one of them still runs: then all of it goes on.

    For whoever is about to start processes of the role. Raises `OSError`.
    """
    locks: list[int] = []
    try:
        for path in folder.glob(f"{role}-*.lock"):
            lock = _lock(path)
            if lock is None:
                return
            locks.append(lock)
        # Not the locks themselves: whoever waits for one would hold a file that is no longer there.
        for path in [*folder.glob(f"{role}-*.json"), *folder.glob(f"{role}-*.tmp")]:
            path.unlink(missing_ok=True)
    finally:
        for lock in locks:
            os.close(lock)


def _lock(path: Path) -> int | None:
    """The locked file, or None where another process holds it."""
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


DEAD_AFTER_SECONDS = 15.0
"""A process writes every few seconds; one that has not for so long has ended, or stands still."""

_NAME = re.compile(r"[a-z]+-[0-9]+")
"""Of a place; what else lies in the folder is not ours."""

log = logging.getLogger(__name__)


class ProcessMetrics(NamedTuple):
    """What a process has left."""

    name: str
    figures: MetricValues
    """Where it lives no more, only what it has counted."""
    lives: bool


class ProcessSlot:
    """One process's place, from `take` to `give_back`."""

    def __init__(self, folder: Path, place: SlotLock) -> None:
        self.name, self._lock = place
        self._path = folder / f"{self.name}.json"
        self._complained = False

    @classmethod
    def take(cls, folder: Path, role: str) -> "ProcessSlot | None":
        """The first free place of this role; None where the folder does not let us, which is logged."""
        try:
            place = take_slot_lock(folder, role)
        except OSError as error:
            log.warning("this process's metrics are not shared with the others: %s", error)
            return None
        return None if place is None else cls(folder, place)

    def counted(self) -> MetricValues:
        """What was counted in this place before."""
        stored = _read(self._path)
        return MetricValues() if stored is None else stored.figures.only(_is_counted)

    def leave(self, figures: MetricValues, *, ended: bool = False) -> None:
        """Replace what lies here. Where that cannot be done, the first time is logged."""
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
        """Let the next process have the place."""
        os.close(self._lock)


def read_other_slots(folder: Path, own: str | None) -> Iterator[ProcessMetrics]:
    """What lies in every place but our own; a file that cannot be read is none."""
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
    figures: MetricValues


def _read(path: Path) -> _Stored | None:
    """What lies there; what is no metrics is removed: its process writes anew, where it lives."""
    try:
        stored = orjson.loads(path.read_bytes())
        return _Stored(float(stored["written_at"]), MetricValues.from_json(stored))
    except FileNotFoundError:
        return None
    except OSError as error:
        # It may be read again, such as where only too many files were open.
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
    """What a process is, nobody wants to know when it has ended; what it did, stays done."""
    return _is_counted(metric) and "process" not in metric.labels
