"""Cache of blobs on the local disk, bounded in bytes and shared by the processes on one folder.

A blob is in one of three files:

- `<name>`: the whole blob. Its digest was compared when it came, and it was synced before it got this name.
- `<name>.part`: a sparse file with the parts that were read, at their offsets. A part that is missing is a hole of
  zeros, and a process that was killed may have left half of one, so that each part is compared with its digest.
- `<name>.tmp`: a blob that is on its way. A process holds its lock. A file without one was left behind by a kill.

Files are evicted in the order of their last use. Everything here may be deleted at any time.
"""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from adapters.storage.blobs import DISK_FULL, read_without_waiting

_PART, _TEMPORARY = ".part", ".tmp"
# A whole file that was used within this time is not evicted: its path may be about to be opened.
_SECONDS_IN_USE = 60.0
# A use within this time of the last one is not recorded.
_SECONDS_BETWEEN_USES = 10.0
# After an eviction, and between two evictions, as shares of the bound. Each process counts only what it adds itself.
_SHARE_KEPT = 0.9
_SHARE_ADDED = 0.01
_SECTOR_BYTES = 512

log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    used_at: float
    bytes: int
    path: Path


class BlobCache:
    """Files of one folder with blobs and parts of blobs. Safe to use from any thread and from several processes."""

    def __init__(self, folder: Path, *, budget_bytes: int) -> None:
        self.folder = folder
        self._budget = budget_bytes
        self._added = 0
        self._adding = threading.Lock()

    def create_folder(self) -> None:
        """Create the folder if it is missing, and evict what an earlier run has left beyond the bound."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._evict(self._budget)

    def read(self, name: str, *, offset: int, length: int) -> bytes | None:
        """Return bytes that may be those of a part, to be compared with its digest; None if there are none."""
        for path in self._paths(name):
            with suppress(OSError):
                file = os.open(path, os.O_RDONLY)
                try:
                    _record_use(file)
                    content = os.pread(file, length, offset)
                finally:
                    os.close(file)
                if len(content) == length:
                    return content
        return None

    def read_without_waiting(self, name: str, *, offset: int, length: int) -> bytearray | None:
        """Return the same bytes if the kernel has them in memory; None instead of waiting for the disk."""
        for path in self._paths(name):
            if (content := read_without_waiting(path, offset=offset, length=length)) is not None:
                return content
        return None

    def add_part(self, name: str, content: bytes, *, offset: int) -> None:
        """Keep a part of a blob. An error of the disk is no reason to fail: the part is not kept."""
        try:
            file = os.open(f"{self.folder}/{name}{_PART}", os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(file, content, offset)
            finally:
                os.close(file)
        except OSError as error:
            self._make_room_after(error)
        self._count(len(content))

    def whole(self, name: str) -> Path | None:
        """Return the path of a whole blob, which is not evicted for a minute; None if it is not in the cache."""
        path = self.folder / name
        with suppress(FileNotFoundError):
            os.utime(path)
            return path
        return None

    @contextmanager
    def filling(self, name: str) -> Iterator[BinaryIO | None]:
        """Yield a new, empty file, which becomes the whole blob at the end of the block; remove it after an error.

        Waits for another process or thread that fills the same one, and yields None if the blob is there then.
        """
        temporary, path = self.folder / f"{name}{_TEMPORARY}", self.folder / name
        with _locked(temporary) as file:
            if self.whole(name) is not None:
                temporary.unlink(missing_ok=True)
                yield None
                return
            try:
                file.truncate(0)
                yield file
                file.flush()
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
                temporary.rename(path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        with suppress(OSError):
            (self.folder / f"{name}{_PART}").unlink(missing_ok=True)
        self._count(size)

    def drop(self, name: str) -> None:
        """Remove what there is of a blob."""
        for path in self._paths(name):
            with suppress(OSError):
                os.unlink(path)

    def empty(self) -> bool:
        """Remove all that is not in use, because the disk is full; return whether that was anything."""
        return self._evict(0)

    def _paths(self, name: str) -> tuple[str, str]:
        return f"{self.folder}/{name}", f"{self.folder}/{name}{_PART}"

    def _make_room_after(self, error: OSError) -> None:
        log.warning("a blob is not cached in %s: %s", self.folder, error.strerror)
        if error.errno in DISK_FULL:
            self.empty()

    def _count(self, added: int) -> None:
        """Count bytes that were added, and evict from time to time."""
        with self._adding:
            self._added += added
            is_due = self._added > _SHARE_ADDED * self._budget
            if is_due:
                self._added = 0
        if is_due:
            self._evict(self._budget)

    def _evict(self, budget: float) -> bool:
        """If there are more bytes than the bound, remove the files that were not used for longest."""
        entries = sorted(self._entries())
        total, removed = sum(entry.bytes for entry in entries), 0
        if total <= budget:
            return False
        now = time.time()
        for entry in entries:
            if total - removed <= _SHARE_KEPT * budget:
                break
            is_whole = entry.path.suffix not in (_PART, _TEMPORARY)
            if entry.path.suffix == _TEMPORARY and not _is_abandoned(entry.path):
                continue
            if is_whole and 0 <= now - entry.used_at < _SECONDS_IN_USE:
                continue
            with suppress(OSError):
                entry.path.unlink(missing_ok=True)
                removed += entry.bytes
        return removed > 0

    def _entries(self) -> Iterator[_Entry]:
        with suppress(FileNotFoundError), os.scandir(self.folder) as files:
            for file in files:
                with suppress(FileNotFoundError):
                    status = file.stat(follow_symlinks=False)
                    yield _Entry(status.st_mtime, status.st_blocks * _SECTOR_BYTES, Path(file.path))


def _record_use(file: int) -> None:
    """Let a file count as used now; most uses cost no write."""
    if abs(time.time() - os.fstat(file).st_mtime) > _SECONDS_BETWEEN_USES:
        os.utime(file)


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing, created if it is missing, and hold its lock."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The process that had the lock before has renamed or removed the file, which is not the one of this name.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    yield file
                    return


def _is_abandoned(path: Path) -> bool:
    """Return whether no process holds the lock of a file."""
    with suppress(OSError):
        file = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        finally:
            os.close(file)
    return False
