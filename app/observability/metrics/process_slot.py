"""Which process of a role is which: `worker-1`, `trainer-2`, by locks in a folder that they share.

A place belongs to whoever holds the lock on its file, and the kernel gives the lock back when that process ends,
however it ends. So no name has a pid in it (two containers on one volume have the same ones), a process that is started
again takes over where it was, and there are never more places than there were processes at once.
"""

import fcntl
import os
from pathlib import Path
from typing import NamedTuple

METRICS = "metrics"
"""Folder, in the data folder, of what each process has counted."""
_MOST = 1024


class Place(NamedTuple):
    """What one process holds until it closes the lock, or ends."""

    name: str
    lock: int
    """A file descriptor, which no child process inherits."""


def take_place(folder: Path, role: str) -> Place | None:
    """The first place of this role that is free; None where very many are taken. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, _MOST):
        lock = _lock(folder / f"{role}-{number}.lock")
        if lock is not None:
            return Place(f"{role}-{number}", lock)
    return None


def clean_places(folder: Path, role: str) -> None:
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
