"""Immutable bytes, durable once `write` has returned.

A blob's name is the catalogue's revision at the time of writing and a random key: `<12 hex digits>-<32 hex digits>`.
(Older releases wrote the key alone.) A blob is written once, never changed, and belongs to one publish or one job.

`Blobs` is the seam; `FolderBlobs` keeps them as files in a folder, and `adapters.storage.object_blobs` in an S3 bucket.
Blobs that no row refers to move to the `adapters.storage.quarantine`.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, TypeAlias

from adapters.errors import BlobCorrupt, LoraplexError, StorageFailed, StorageFull
from adapters.storage.quarantine import Quarantine, unlink

# Bytes, or a function that writes them to a file.
Content: TypeAlias = bytes | Callable[[BinaryIO], object]
# Folder, in the data folder, of the blobs.
BLOBS = "blobs"
# File in that folder that says which catalogue it belongs to (`adapters.storage.store_identity`).
STORE_ID = "store-id"
# Error numbers of a full disk, of a disk that fails, and of a process without file descriptors.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
# EINTR: a file system over a network may interrupt a rename, and Python repeats only reads, writes and syncs.
DISK_FAILED = {errno.EIO, errno.EROFS, errno.EINTR}
_FAILED = DISK_FAILED | {errno.EACCES, errno.EPERM}
NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}
_TEMPORARY = ".tmp"
_NAME = re.compile(r"([0-9a-f]{12})-[0-9a-f]{32}")
BLOB_NAME = re.compile(r"(?:[0-9a-f]{12}-)?[0-9a-f]{32}")

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


class BlobPart(NamedTuple):
    """Bytes within a blob, and their digest."""

    name: str
    offset: int
    length: int
    digest: str


class Blobs(Protocol):
    """The seam between the domain and where blobs are stored: immutable bytes under names.

    Every other module reads and removes blobs through these methods, and builds no path of its own. New blobs are
    written by `adapters.storage.pending_blobs`, which keeps them from sweeps. Safe to use from any thread and from
    several processes. Every method may raise `StorageFailed`, which means that nothing can be said about a blob now.
    """

    @property
    def local_folder(self) -> Path:
        """Folder on this machine with the blobs, or with copies of some of them."""

    def create_folder(self) -> None:
        """Create the local folder if it is missing."""

    def write(self, name: str, content: Content) -> None:
        """Store `content` under a new name; durable before this returns. Raises `StorageFull` and `StorageFailed`.

        After an error, nothing is stored, or a blob that no row refers to.
        """

    def write_file(self, name: str, path: Path) -> None:
        """Store the content of a file as `write` does, without a local copy of what is stored elsewhere."""

    def read(self, name: str, *, offset: int = 0, length: int = -1, digest: str | None = None) -> bytes:
        """Return `length` bytes from `offset` on, or all if it is -1.

        Raises `BlobCorrupt` if they are missing or do not have the `digest`.
        """

    def read_parts(self, parts: Sequence[BlobPart]) -> Iterator[bytes | Exception]:
        """Yield the bytes of each part, in order, or the error that `read` raises for it."""

    def read_cached(self, name: str, *, offset: int, length: int) -> bytearray | None:
        """Return the bytes without waiting for a disk or a network, unverified; None if that is not possible."""

    def local(self, name: str, *, size: int | None = None, digest: str | None = None) -> Path:
        """Return the path of a local file with the blob, to be mapped into memory or read in part.

        Raises `BlobCorrupt` if the blob is missing, not of `size` bytes, or does not have the `digest`.
        """

    def has_digest(self, name: str, digest: str, *, offset: int = 0, length: int | None = None) -> bool:
        """Return whether the stored blob, or `length` bytes of it from `offset` on, is there and has this digest."""

    def stored_copy(self, name: str) -> AbstractContextManager[Path]:
        """Return the path of a file with the bytes that are stored now, for a check; there is none if it is missing."""

    def hold(self, name: str, path: Path) -> bool:
        """Let a file, if there is none yet, keep the bytes of a blob after its removal; return whether it is there.

        Raises `OSError`.
        """

    def remove(self, names: Iterable[str]) -> int:
        """Remove blobs whose rows are gone; return their bytes. What cannot be removed is left to the next sweep."""

    def set_aside(self, names: Iterable[str]) -> None:
        """Move blobs that no row refers to any more into quarantine. Missing ones are skipped."""

    def keep_aside(self, names: Iterable[str]) -> str:
        """Move blobs to where nothing is removed; return that place."""

    def names(self, *, with_temporary: bool = False) -> list[str]:
        """Return the names of the blobs, and of temporary files if `with_temporary` is true."""

    def names_after(self, revision: int) -> list[str]:
        """Return the names of the blobs that were written after a revision of the catalogue."""

    def discard(self, names: Sequence[str]) -> int:
        """Remove temporary files, move blobs into quarantine, and purge it; return how many."""

    def purge(self) -> int:
        """Remove what has been in quarantine for long enough; return the bytes."""

    def read_store_id(self) -> str | None:
        """Return the id of the store that the blobs belong to; None if there is none."""

    def write_store_id(self, store_id: str) -> None:
        """Record, durably, the store that the blobs belong to."""


class FolderBlobs:
    """Blobs that are files in one folder."""

    def __init__(self, folder: Path, *, quarantine: Quarantine) -> None:
        self._data_folder = folder
        self._folder = folder / BLOBS
        self._quarantine = quarantine

    @property
    def local_folder(self) -> Path:
        """The folder of the files."""
        return self._folder

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

    def write_file(self, name: str, path: Path) -> None:
        """Store a copy of a file; raise what `write` raises."""
        with path.open("rb") as source:
            self.write(name, partial(shutil.copyfileobj, source))

    def read(self, name: str, *, offset: int = 0, length: int = -1, digest: str | None = None) -> bytes:
        """Return `length` bytes from `offset` on, or all if it is -1.

        Raises `BlobCorrupt` if they are missing or do not have the `digest`, and `StorageFailed` if the file cannot be
        read now.
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
        check_digest(name, content, digest)
        return content

    def read_parts(self, parts: Sequence[BlobPart]) -> Iterator[bytes | Exception]:
        """Yield the bytes of each part, in order, or the error that `read` raises for it."""
        for name, offset, length, digest in parts:
            try:
                yield self.read(name, offset=offset, length=length, digest=digest)
            except Exception as error:
                yield error

    def read_cached(self, name: str, *, offset: int, length: int) -> bytearray | None:
        """Return the same bytes if the kernel has them in memory; None instead of waiting for the disk.

        The kernel can tell on Linux only, and not on every file system; otherwise the result is None.
        """
        return read_without_waiting(f"{self._folder}/{name}", offset=offset, length=length)

    def local(self, name: str, *, size: int | None = None, digest: str | None = None) -> Path:
        """Return the path of a blob's file, to be mapped into memory or read in part.

        Raises `BlobCorrupt` if it is missing, not a regular file, or not of `size` bytes: reading behind the end of a
        mapped file would end the process. Its digest is only computed if one is given.
        """
        path = self._folder / name
        with _reading(name):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BlobCorrupt(f"the file of a stored adapter or data set is not a regular file: {name}")
        if size is not None and status.st_size != size:
            raise BlobCorrupt(f"the file {name} has {status.st_size} bytes instead of {size}")
        if digest is not None and not self.has_digest(name, digest):
            raise BlobCorrupt(f"the file {name} no longer has the bytes that were stored")
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

    def remove(self, names: Iterable[str]) -> int:
        """Remove blobs whose rows are gone; return their bytes. Missing ones are skipped.

        A blob that cannot be removed is logged and left to the next sweep: the change that it belongs to is stored.
        """
        removed = 0
        for path in map(self._folder.joinpath, names):
            with suppress(OSError):
                size = path.stat().st_size
                removed += size if unlink(path) else 0
        return removed

    def set_aside(self, names: Iterable[str]) -> None:
        """Move blobs that no row refers to any more into quarantine. Missing ones are skipped."""
        self._quarantine.take(self._folder / name for name in names)

    def keep_aside(self, names: Iterable[str]) -> str:
        """Move blobs into a folder of the quarantine that is never removed; return it. Raises `OSError`."""
        return str(self._quarantine.keep(self._folder / name for name in names))

    @contextmanager
    def stored_copy(self, name: str) -> Iterator[Path]:
        """Yield the path of a blob's file, which may be missing."""
        yield self._folder / name

    def hold(self, name: str, path: Path) -> bool:
        """Make a hard link to a blob's file, which has to be on the same file system; return whether it is there.

        Raises `OSError`.
        """
        if not (self._folder / name).is_file():
            return False
        try:
            os.link(self._folder / name, path, follow_symlinks=False)
        except FileExistsError:
            return True
        except FileNotFoundError:
            return False
        return True

    def names(self, *, with_temporary: bool = False) -> list[str]:
        """Return the names of the blobs, and of the temporary files too if `with_temporary` is true."""
        return blob_names(self._folder, with_temporary=with_temporary)

    def names_after(self, revision: int) -> list[str]:
        """Return the names of the blobs that were written after a revision of the catalogue."""
        return [name for name in self.names() if revision_of(name) > revision]

    def purge(self) -> int:
        """Remove the quarantined files whose days are over; return their bytes."""
        return self._quarantine.purge()

    def read_store_id(self) -> str | None:
        """Return the id of the store that the folder belongs to; None if it has none."""
        return read_id(self._folder / STORE_ID)

    def write_store_id(self, store_id: str) -> None:
        """Record, durably, the store that the folder belongs to."""
        write_id(self._folder / STORE_ID, store_id)

    def discard(self, names: Sequence[str]) -> int:
        """Remove temporary files and move blobs into quarantine; return how many.

        Files whose days in quarantine are over are removed first.
        """
        temporary = [name for name in names if name.endswith(_TEMPORARY)]
        # A folder of such a name, or a file that this process may not remove, is not one of ours.
        removed = sum(unlink(self._folder / name, ignored=(IsADirectoryError, PermissionError)) for name in temporary)
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


def read_without_waiting(path: str, *, offset: int, length: int) -> bytearray | None:
    """Return bytes of a file if the kernel has them in memory; None instead of waiting for the disk."""
    content = bytearray(length)
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            read = os.preadv(file, [content], offset, os.RWF_NOWAIT)
        finally:
            os.close(file)
    except (AttributeError, OSError):
        return None
    return content if read == length else None


def check_digest(name: str, content: bytes, digest: str | None) -> None:
    """Raise `BlobCorrupt` if the bytes of a blob do not have a digest; any will do if it is None."""
    if digest is not None and f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
        raise BlobCorrupt(f"the stored bytes of the blob {name} are not those that were published")


def read_id(path: Path) -> str | None:
    """Return the id in a file; None if the file is missing or empty. Raises `OSError`."""
    with suppress(FileNotFoundError):
        return path.read_text(errors="replace").strip() or None
    return None


def write_id(path: Path, store_id: str) -> None:
    """Write an id to a file atomically and durably: after a crash, the file has the new or the old content."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(store_id)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(path.parent)


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
