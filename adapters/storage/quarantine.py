"""Quarantine: files that no row refers to, which are removed after some days.

A file in it is named `<time of its move>-<its name in blobs/>`, such as `20261129T154501Z-00000000002a-…`, so that the
order of the names is the order of the moves. To bring a file back, move it to `blobs/` under the rest of its name.
"""

import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

# Largest part of the file system that quarantined files may take.
SHARE_OF_DISK = 0.05
DEFAULT_DAYS = 7
SECONDS_A_DAY = 86_400
_TIME = "%Y%m%dT%H%M%SZ"
_TIME_LENGTH = len("20261129T154501Z")
_MAX_NAMES_LOGGED = 5

log = logging.getLogger(__name__)


def time_prefix(seconds: float) -> str:
    """Return the time of a move, as names in the quarantine begin with it."""
    return datetime.fromtimestamp(seconds, UTC).strftime(_TIME)


def moved_at(name: str) -> float:
    """Return the time in the name of a quarantined file, in seconds since the epoch; raise `ValueError`."""
    return datetime.strptime(name[:_TIME_LENGTH], _TIME).replace(tzinfo=UTC).timestamp()


class Quarantine:
    """The quarantine in one data folder. Safe to use from several processes."""

    def __init__(self, folder: Path, *, now: Callable[[], float], days: float = DEFAULT_DAYS) -> None:
        self.folder = folder / "quarantine"
        self._now = now
        self._keep_seconds = days * SECONDS_A_DAY

    def take(self, paths: Iterable[Path]) -> int:
        """Move files here, then remove the oldest ones if there are too many bytes; return how many were moved."""
        moved = [path.name for path in paths if self._move(path, self.folder / f"{self._time()}-{path.name}")]
        if moved:
            names = ", ".join(moved[:_MAX_NAMES_LOGGED]) + (", …" if len(moved) > _MAX_NAMES_LOGGED else "")
            log.warning("moved %d files that no row refers to into %s: %s", len(moved), self.folder, names)
            self._remove(moved_by=-math.inf)
        return len(moved)

    def keep(self, paths: Iterable[Path]) -> Path:
        """Move files into a folder of their own in here, which is never removed; return it. Raises `OSError`."""
        kept = self.new_kept_folder()
        for path in paths:
            _move(path, kept / path.name)
        return kept

    def new_kept_folder(self) -> Path:
        """Create a folder in here whose files are never removed; return it. Raises `OSError`."""
        kept = self.folder / f"kept-{self._time()}"
        kept.mkdir(parents=True, exist_ok=True)
        return kept

    def purge(self) -> int:
        """Remove the files whose days are over, and the oldest ones if there are too many bytes; return the bytes."""
        return self._remove(moved_by=self._now() - self._keep_seconds)

    def empty(self) -> int:
        """Remove every file, because the disk is full; return the bytes."""
        return self._remove(moved_by=math.inf)

    def _time(self) -> str:
        return time_prefix(self._now())

    def _move(self, path: Path, target: Path) -> bool:
        try:
            self.folder.mkdir(exist_ok=True)
            _move(path, target)
        except OSError as error:
            # A full disk, for example, is no reason not to start: the next sweep tries again.
            if not isinstance(error, FileNotFoundError):
                log.warning("%s cannot be moved into %s: %s", path, self.folder, error)
            return False
        return True

    def _remove(self, *, moved_by: float) -> int:
        """Remove files that were moved by a time, and the oldest while there are too many bytes; return the bytes."""
        entries = sorted(self._entries())
        disk = os.statvfs(self.folder.parent)
        total, most = sum(size for _, _, size in entries), SHARE_OF_DISK * disk.f_frsize * disk.f_blocks
        count = removed = 0
        for name, time_of_move, size in entries:
            if time_of_move > moved_by and total - removed <= most:
                break
            if not unlink(self.folder / name):
                continue
            count, removed = count + 1, removed + size
        if count:
            log.warning("removed the %d oldest files in %s, of %d bytes", count, self.folder, removed)
        return removed

    def _entries(self) -> Iterator[tuple[str, float, int]]:
        """Yield the name, the time of the move and the bytes of each file."""
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.folder) as files:
            for file in files:
                # Entries of other programs are left alone.
                with suppress(ValueError, FileNotFoundError):
                    if not file.is_file(follow_symlinks=False):
                        continue
                    yield file.name, moved_at(file.name), file.stat(follow_symlinks=False).st_size


def _move(path: Path, target: Path) -> None:
    """Move a file, also to another file system: `blobs/` may be a mount of its own."""
    try:
        path.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    else:
        return
    try:
        shutil.copyfile(path, target)
        with target.open("rb") as copy:
            os.fsync(copy.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


def unlink(path: Path, *, ignored: tuple[type[OSError], ...] = ()) -> bool:
    """Remove a file, if it is there; log an error that is not `ignored`. Return whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if not isinstance(error, ignored):
            log.warning("the file %s cannot be removed: %s", path, error)
        return False
    return True
