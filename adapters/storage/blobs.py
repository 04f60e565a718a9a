"""Immutable files, durable once `write` has returned.

A blob's name is the catalogue's revision at the time of writing and a random key: `<12 hex digits>-<32 hex digits>`.
(Older releases wrote the key alone.) A blob is written once, never changed, and belongs to one publish or one job.

Blobs that no row refers to move to the quarantine, and are removed after some days. A file in it is named `<time of its
move>-<its name in blobs/>`, such as `20261129T154501Z-00000000002a-…`, so that the order of the names is the order of
the moves. To bring a file back, move it to `blobs/` under the rest of its name.
"""

import errno
import hashlib
import logging
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, TypeAlias

from adapters.errors import BlobCorrupt, LoraplexError, StorageFailed, StorageFull

# Bytes, or a function that writes them to a file.
Content: TypeAlias = bytes | Callable[[BinaryIO], object]
# Folder, in the data folder, of the blobs.
BLOBS = "blobs"
# File in that folder that says which catalogue it belongs to (`adapters.storage.store_identity`).
STORE_ID = "store-id"
# Error numbers of a full disk, of a disk that fails, and of a process without file descriptors.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_FAILED = {errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}
_TEMPORARY = ".tmp"
_NAME = re.compile(r"([0-9a-f]{12})-[0-9a-f]{32}")
# Largest part of the file system that quarantined files may take.
SHARE_OF_DISK = 0.05
DEFAULT_DAYS = 7
_TIME = "%Y%m%dT%H%M%SZ"
_TIME_LENGTH = len("20261129T154501Z")
_SECONDS_A_DAY = 86_400
_MAX_NAMES_LOGGED = 5

log = logging.getLogger(__name__)


def revision_of(name: str) -> int:
    """Return the catalogue's revision when the blob of this name was written; 0 if the name does not say."""
    match = _NAME.fullmatch(name)
    return int(match[1], 16) if match else 0


def blob_key(name: str) -> str:
    """Return the random part of the name of a blob or of its temporary file."""
    return name.removesuffix(_TEMPORARY).rpartition("-")[2]


def blob_names(blobs: Path, *, with_temporary: bool = False) -> list[str]:
    """Return the names of the blobs in a folder, and of its temporary files too if `with_temporary` is true.

    There are none if there is no folder.
    """
    with suppress(FileNotFoundError), os.scandir(blobs) as entries:
        return [entry.name for entry in entries if _is_blob(entry, with_temporary=with_temporary)]
    return []


class Quarantine:
    """The quarantine in one data folder. Safe to use from several processes."""

    def __init__(self, folder: Path, *, now: Callable[[], float], days: float = DEFAULT_DAYS) -> None:
        self.folder = folder / "quarantine"
        self._now = now
        self._keep_seconds = days * _SECONDS_A_DAY

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
        kept = self.folder / f"kept-{self._time()}"
        kept.mkdir(parents=True, exist_ok=True)
        for path in paths:
            _move(path, kept / path.name)
        return kept

    def purge(self) -> int:
        """Remove the files whose days are over, and the oldest ones if there are too many bytes; return the bytes."""
        return self._remove(moved_by=self._now() - self._keep_seconds)

    def empty(self) -> int:
        """Remove every file, because the disk is full; return the bytes."""
        return self._remove(moved_by=math.inf)

    def _time(self) -> str:
        return datetime.fromtimestamp(self._now(), UTC).strftime(_TIME)

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
        for name, moved_at, size in entries:
            if moved_at > moved_by and total - removed <= most:
                break
            if not _unlink(self.folder / name):
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
                    moved_at = datetime.strptime(file.name[:_TIME_LENGTH], _TIME).replace(tzinfo=UTC).timestamp()
                    yield file.name, moved_at, file.stat(follow_symlinks=False).st_size


class FolderBlobs:
    """The seam `Blobs`: immutable bytes under names, in one folder.

    Every other module reads and removes blobs through these methods, and builds no path of its own. New blobs are
    written by `adapters.storage.blob_writer`, which keeps them from sweeps.
    """

    def __init__(self, folder: Path, *, quarantine: Quarantine) -> None:
        self._data_folder = folder
        self._folder = folder / BLOBS
        self._quarantine = quarantine

    def create_folder(self) -> None:
        """Create the folder if it is missing, durably."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # Every folder above may be as new as this one. Those that this process may not read are older.
        for path in (self._data_folder, *self._data_folder.absolute().parents):
            with suppress(PermissionError):
                sync_folder(path)

    def write(self, name: str, content: Content) -> None:
        """Store `content` under a new name; on disk, through power loss, before this returns.

        If the disk is full, the quarantine is emptied and `content` is written once more. Raises `StorageFull`,
        `StorageFailed` and what a writer raises, leaving nothing behind.
        """
        try:
            self._write(name, content)
        except StorageFull:
            if not self._quarantine.empty():
                raise
            self._write(name, content)

    def _write(self, name: str, content: Content) -> None:
        temporary, blob = self._folder / f"{name}{_TEMPORARY}", self._folder / name
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
            for path in (temporary, blob):
                # Files that a failing disk keeps are left to the next sweep.
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            what = "a file" if callable(content) else f"a file of {len(content)} bytes"
            if isinstance(error, OSError) and (translated := storage_error(error, what=what)):
                raise translated from error
            raise

    def read(self, name: str, *, offset: int = 0, length: int = -1) -> bytes:
        """Return `length` bytes from `offset` on, or all if it is -1.

        Raises `BlobCorrupt` if they are missing, and `StorageFailed` if the file cannot be read now.
        """
        with _reading(name):
            # No file object: each of its system calls would release the interpreter lock.
            # Non-blocking: a pipe in place of the file must not block the thread.
            file = os.open(f"{self._folder}/{name}", os.O_RDONLY | os.O_NONBLOCK)
            try:
                content = os.pread(file, os.fstat(file).st_size if length < 0 else length, offset)
            finally:
                os.close(file)
        if length >= 0 and len(content) != length:
            raise BlobCorrupt(f"the file {name} ends before byte {offset + length}")
        return content

    def read_cached(self, name: str, *, offset: int, length: int) -> bytearray | None:
        """Return the same bytes if the kernel has them in memory; None instead of waiting for the disk.

        The kernel can tell on Linux only, and not on every file system; otherwise the result is None.
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

    def local(self, name: str, *, size: int | None = None) -> Path:
        """Return the path of a blob's local file, to be mapped into memory or read in part.

        Raises `BlobCorrupt` if it is missing, not a regular file, or not of `size` bytes: reading behind the end of a
        mapped file would end the process. Its digest is not computed, because data may be larger than memory.
        """
        path = self._folder / name
        with _reading(name):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BlobCorrupt(f"the file of a stored adapter or data set is not a regular file: {name}")
        if size is not None and status.st_size != size:
            raise BlobCorrupt(f"the file {name} has {status.st_size} bytes instead of {size}")
        return path

    def has_digest(self, name: str, digest: str, *, offset: int = 0, length: int | None = None) -> bool:
        """Return whether a blob, or `length` bytes of it from `offset` on, is there and has this digest.

        Raises `StorageFailed` if the file cannot be read now, which does not mean that it is corrupt.
        """
        try:
            with _reading(name), self.local(name).open("rb") as file:
                file.seek(offset)
                content = hashlib.file_digest(file, "sha256") if length is None else hashlib.sha256(file.read(length))
                return f"sha256:{content.hexdigest()}" == digest
        except BlobCorrupt:
            return False

    def remove(self, names: Iterable[str]) -> None:
        """Remove blobs whose rows are gone. Missing ones are skipped.

        A blob that cannot be removed is logged and left to the next sweep: the change that it belongs to is stored.
        """
        for name in names:
            _unlink(self._folder / name)

    def set_aside(self, names: Iterable[str]) -> None:
        """Move blobs that no row refers to any more into quarantine. Missing ones are skipped."""
        self._quarantine.take(self._folder / name for name in names)

    def names(self) -> list[str]:
        """Return the names of the blobs and of the temporary files."""
        return blob_names(self._folder, with_temporary=True)

    def discard(self, names: Sequence[str]) -> int:
        """Remove temporary files and move blobs into quarantine; return how many.

        Files whose days in quarantine are over are removed first.
        """
        temporary = [name for name in names if name.endswith(_TEMPORARY)]
        # A folder of such a name, or a file that this process may not remove, is not one of ours.
        removed = sum(_unlink(self._folder / name, ignored=(IsADirectoryError, PermissionError)) for name in temporary)
        self._quarantine.purge()
        blobs = sorted(set(names).difference(temporary))
        return removed + self._quarantine.take(self._folder / name for name in blobs)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Translate the errors of reading a blob: only one that is missing is corrupt.

    Without file descriptors, the `OSError` is raised.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_DESCRIPTORS:
            raise
        detail = f"the file of a stored adapter or data set cannot be read: {name} ({_reason(error)})"
        if error.errno not in _FAILED:
            raise BlobCorrupt(detail) from error
        log.error("%s", detail)
        raise StorageFailed(detail) from error


def storage_error(error: OSError, *, what: str) -> LoraplexError | None:
    """Return the error to raise if a file could not be written; None if the disk is not the reason."""
    if error.errno in DISK_FULL:
        return StorageFull(f"the disk is full: {what} could not be stored")
    if error.errno not in _FAILED:
        return None
    detail = f"{what} cannot be written: nothing was stored ({_reason(error)})"
    log.error("%s", detail)
    return StorageFailed(detail)


def _reason(error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno or 0, 'OSError')}: {error.strerror}"


def _is_blob(entry: "os.DirEntry[str]", *, with_temporary: bool) -> bool:
    """Return whether it is a file that holds content; `lost+found`, for one, is not."""
    # Another process may be writing the id now.
    if entry.name in (STORE_ID, f"{STORE_ID}{_TEMPORARY}"):
        return False
    if entry.name.endswith(_TEMPORARY):
        return with_temporary
    return not entry.name.startswith(".") and entry.is_file(follow_symlinks=False)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: an fsync of a file does not cover the name that leads to it."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


def _unlink(path: Path, *, ignored: tuple[type[OSError], ...] = ()) -> bool:
    """Remove a file, if it is there; log an error that is not `ignored`. Return whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if not isinstance(error, ignored):
            log.warning("the file %s cannot be removed: %s", path, error)
        return False
    return True
