"""Process slots: the names `worker-1`, `trainer-2` … of the processes of a role, each with a file for its metrics.

A slot belongs to the process that holds the lock on its lock file. The kernel releases the lock when that process ends,
so a restarted process takes over the slot and continues its counters, and there are never more slots than processes
that ran at once. Names have no pid, because two containers on one volume can have the same pids.

Nothing here imports numpy, because the supervisor does without it.
"""

import fcntl
import logging
import os
from pathlib import Path
from typing import NamedTuple

# Folder, in the data folder, of the metrics of all processes.
METRICS = "metrics"
_MAX_SLOTS = 1023

log = logging.getLogger(__name__)


class ProcessSlot(NamedTuple):
    """Slot of this process, held until `release` or until the process ends."""

    name: str
    file: Path
    """For the metrics of the process."""
    lock: int
    """File descriptor, which child processes do not inherit."""

    def release(self) -> None:
        """Leave the slot, with its file, to another process."""
        os.close(self.lock)


def take_slot(folder: Path, role: str) -> ProcessSlot | None:
    """Lock the first free slot of a role; log a warning and return None if the folder cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, _MAX_SLOTS + 1):
            name = f"{role}-{number}"
            if (lock := _lock(folder / f"{name}.lock")) is not None:
                return ProcessSlot(name, folder / f"{name}.json", lock)
    except OSError as error:
        log.warning("this process's metrics are not shared with the others: %s", error)
    return None


def clean_slots(folder: Path, role: str) -> None:
    """Remove the metrics that processes of a role have left, unless one of them still runs.

    Call it before the processes of the role start. Raises `OSError`.
    """
    locks: list[int] = []
    try:
        for path in folder.glob(f"{role}-*.lock"):
            if (lock := _lock(path)) is None:
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
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor
