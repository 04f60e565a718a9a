"""Immutable files, durable once `write` has returned.

A blob's name is the catalogue's revision at the time of writing and a random part: `<12 hex digits>-<32 hex digits>`.
(Older releases wrote the random part alone.) A blob is written once, never changed, and belongs to one publish or one
job. A blob that no row refers to is what a crash between the file and the row left, and `sweep` moves it into
quarantine.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias

from adapters.errors import BlobCorrupt, LoraplexError, StorageFailed, StorageFull
from adapters.storage.quarantine import Quarantine

Content: TypeAlias = bytes | Callable[[BinaryIO], object]
"""Bytes, or what writes them to the file that it is given."""
BLOBS = "blobs"
"""Folder, in the data folder, of the blobs."""
STORE_ID = "store-id"
"""File in that folder that says which catalogue it belongs to (`adapters.storage.store_identity`)."""
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_FAILED = {errno.EIO, errno.EROFS, *_FORBIDDEN}
_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}
_TEMPORARY = ".tmp"
_NAME = re.compile(r"([0-9a-f]{12})-[0-9a-f]{32}")

log = logging.getLogger(__name__)


def revision_of(name: str) -> int:
    """Return the catalogue's revision when the blob of this name was written; 0 if the name does not say."""
    match = _NAME.fullmatch(name)
    return int(match[1], 16) if match else 0


def blob_names(blobs: Path) -> list[str]:
    """Return the names of the blobs in a folder, without temporary files; none if there is no such folder."""
    with suppress(FileNotFoundError), os.scandir(blobs) as entries:
        return [entry.name for entry in entries if _is_blob(entry)]
    return []


class FolderBlobs:
    """Store of the blobs in one folder, which is created if it is missing.

    `revision` returns the catalogue's revision now.
    """

    def __init__(self, folder: Path, *, revision: Callable[[], int], quarantine: Quarantine) -> None:
        self._folder = folder / BLOBS
        self._revision = revision
        self._quarantine = quarantine
        self._folder.mkdir(parents=True, exist_ok=True)
        # Every folder above may be as new as this one; of those that we may not read, none is.
        for made in (folder, *folder.absolute().parents):
            with suppress(PermissionError):
                sync_folder(made)
        self._lock_file = folder / "publish.lock"

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Hold this from before a blob is written until the row that refers to it is committed.

        Otherwise another process that starts in between would sweep the blob away: it has no row yet. Raises
        `StorageFailed`.
        """
        try:
            lock = self._lock_file.open("a")
        except OSError as error:
            if ours := _as_ours(error, what=f"the file {self._lock_file.name}"):
                raise ours from error
            raise
        with lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def write(self, content: Content) -> str:
        """Store `content` and return its name; on disk, through power loss, before this returns.

        If the disk is full, the quarantine is emptied and `content` is written once more. Raises `StorageFull`,
        `StorageFailed` and what a writer raises, leaving nothing behind.
        """
        try:
            return self._write(content)
        except StorageFull:
            if not self._quarantine.empty():
                raise
            return self._write(content)

    def _write(self, content: Content) -> str:
        name = f"{self._revision():012x}-{uuid.uuid4().hex}"
        temporary, blob = self._folder / f"{name}{_TEMPORARY}", self.path(name)
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
                # What a failing disk does not let us remove is left to the next sweep.
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            what = "a file" if callable(content) else f"a file of {len(content)} bytes"
            if isinstance(error, OSError) and (ours := _as_ours(error, what=what)):
                raise ours from error
            raise
        return name

    def read(self, name: str, *, offset: int = 0, length: int = -1) -> bytes:
        """Return `length` bytes from `offset` on (all if it is -1); raise `BlobCorrupt` if they are not there.

        Raises `StorageFailed` if this process may not read the file.
        """
        try:
            # No file object: its system calls would each hand the interpreter to whoever waits for it.
            # Non-blocking: a pipe in place of the file must not hold the thread.
            file = os.open(f"{self._folder}/{name}", os.O_RDONLY | os.O_NONBLOCK)
            try:
                content = os.pread(file, os.fstat(file).st_size if length < 0 else length, offset)
            finally:
                os.close(file)
        except FileNotFoundError:
            raise BlobCorrupt(f"the file of a stored adapter or data set is missing: {name}") from None
        except OSError as error:
            if error.errno in _FORBIDDEN:
                detail = f"the file of a stored adapter or data set cannot be read: {name} ({_reason(error)})"
                log.error("%s", detail)
                raise StorageFailed(detail) from error
            if error.errno in _NO_DESCRIPTORS:
                raise
            raise BlobCorrupt(f"the file of a stored adapter or data set cannot be read: {name}") from error
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

    def is_whole(self, name: str, digest: str) -> bool:
        """Return whether a blob is there and its bytes have this digest."""
        if not self.path(name).is_file():
            return False
        try:
            with self.path(name).open("rb") as file:
                return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == digest
        except OSError:
            return False

    def path(self, name: str) -> Path:
        """Where a blob lies."""
        return self._folder / name

    def remove(self, names: Iterable[str]) -> None:
        """Remove blobs whose rows are gone. Missing ones are skipped.

        A blob that cannot be removed is logged and left to the next sweep: the change that it belongs to is stored.
        """
        for name in names:
            try:
                self.path(name).unlink(missing_ok=True)
            except OSError as error:
                log.warning("the blob %s cannot be removed: %s", name, error)

    def set_aside(self, names: Iterable[str]) -> None:
        """Move blobs that no row refers to any more into quarantine. Missing ones are skipped."""
        self._quarantine.take(self.path(name) for name in names)

    def sweep(self, referenced: Iterable[str]) -> int:
        """Remove temporary files, and move blobs that are not in `referenced` into quarantine; return how many.

        Call it under `sweeping`. Files whose days in quarantine are over are removed first.
        """
        # Another process may be writing the id now.
        kept = {*referenced, STORE_ID, f"{STORE_ID}{_TEMPORARY}"}
        with os.scandir(self._folder) as entries:
            present = [entry for entry in entries if entry.name not in kept]
        temporary = [entry.path for entry in present if entry.name.endswith(_TEMPORARY)]
        for path in temporary:
            # A folder of that name is not one of ours.
            with suppress(FileNotFoundError, IsADirectoryError, PermissionError):
                os.unlink(path)
        self._quarantine.purge()
        return len(temporary) + self._quarantine.take(Path(entry.path) for entry in present if _is_blob(entry))

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


def _as_ours(error: OSError, *, what: str) -> LoraplexError | None:
    """Return what to raise if a file could not be written; None if the disk is not the reason."""
    if error.errno in _FULL:
        return StorageFull(f"the disk is full: {what} could not be stored")
    if error.errno not in _FAILED:
        return None
    detail = f"{what} cannot be written: nothing was stored ({_reason(error)})"
    log.error("%s", detail)
    return StorageFailed(detail)


def _reason(error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno or 0, 'OSError')}: {error.strerror}"


def _is_blob(entry: "os.DirEntry[str]") -> bool:
    """Return whether it is a file that holds content; `lost+found`, for one, is not."""
    is_ours = entry.name != STORE_ID and not entry.name.endswith(_TEMPORARY) and not entry.name.startswith(".")
    return is_ours and entry.is_file(follow_symlinks=False)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: an fsync of a file does not cover the name that leads to it."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
