"""Immutable files, durable once `write` has returned.

A blob's name is random and says nothing; it is written once, never changed, and belongs to one publish or one
job. A blob that no row refers to is what a crash between the file and the row left, and `sweep` removes it.
"""

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias

from adapters.errors import BlobCorrupt, StorageFull

Content: TypeAlias = bytes | Callable[[BinaryIO], object]
"""Bytes, or what writes them to the file that it is given."""
_FULL = {errno.ENOSPC, errno.EDQUOT}


class BlobStore:
    """The blobs in one folder, which is made where it is missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "blobs"
        self._folder.mkdir(parents=True, exist_ok=True)
        # Every folder above may be as new as this one; of those that we may not read, none is.
        for made in (folder, *folder.absolute().parents):
            with suppress(PermissionError):
                sync_folder(made)
        self._lock_file = folder / "publish.lock"

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Hold this from before a blob is written until the row that refers to it is committed.

        Otherwise another process that starts in between would sweep the blob away: it has no row yet.
        """
        with self._lock_file.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def write(self, content: Content) -> str:
        """Store `content` and return its name; on disk, through power loss, before this returns.

        Raises `StorageFull` and what a writer raises, leaving nothing behind.
        """
        name = uuid.uuid4().hex
        temporary, blob = self._folder / f"{name}.tmp", self.path(name)
        try:
            with temporary.open("xb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(blob)
            sync_folder(self._folder)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                what = "a file" if callable(content) else f"{len(content)} bytes"
                raise StorageFull(f"the disk is full: {what} could not be stored") from None
            raise
        return name

    def read(self, name: str, *, offset: int = 0, length: int = -1) -> bytes:
        """`length` bytes from `offset` on (all, where it is -1); raises `BlobCorrupt` where they are not there."""
        try:
            # No file object: its system calls would each hand the interpreter to whoever waits for it.
            file = os.open(f"{self._folder}/{name}", os.O_RDONLY)
            try:
                content = os.pread(file, os.fstat(file).st_size if length < 0 else length, offset)
            finally:
                os.close(file)
        except FileNotFoundError:
            raise BlobCorrupt(f"the file of a stored adapter or data set is missing: {name}") from None
        if length >= 0 and len(content) != length:
            raise BlobCorrupt(f"the file {name} ends before byte {offset + length}")
        return content

    def read_cached(self, name: str, *, offset: int, length: int) -> bytearray | None:
        """The same where the kernel has these bytes in memory: None rather than wait for the disk.

        None too where the kernel cannot tell: only Linux can, and not on every file system.
        """
        content = bytearray(length)
        try:
            file = os.open(f"{self._folder}/{name}", os.O_RDONLY)
            try:
                read = os.preadv(file, [content], offset, os.RWF_NOWAIT)
            finally:
                os.close(file)
        except (AttributeError, OSError):
            return None
        return content if read == length else None

    def path(self, name: str) -> Path:
        """Where a blob lies."""
        return self._folder / name

    def remove(self, names: Iterable[str]) -> None:
        """Remove blobs whose rows are gone. What is removed already, or was never there, is passed over."""
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def sweep(self, referenced: Iterable[str]) -> int:
        """Remove every file that is not in `referenced`; returns how many. Call it under `sweeping`."""
        kept = set(referenced)
        doomed = [path for path in self._folder.iterdir() if path.name not in kept]
        for path in doomed:
            with suppress(FileNotFoundError):
                path.unlink()
        return len(doomed)

    @contextmanager
    def sweeping(self) -> Iterator[bool]:
        """Yields whether nobody is publishing and nobody can begin to before this ends."""
        with self._lock_file.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: an fsync of a file does not cover the name that leads to it."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
