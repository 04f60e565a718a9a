"""Blobs in an S3 bucket, with a cache on the local disk.

| object | content |
|---|---|
| `blobs/<name>` | a blob; its user metadata has the SHA-256 of its bytes |
| `quarantine/<time>-<name>` | a blob that no row refers to, removed after some days |
| `kept/<time>/<name>` | a blob that is never removed |
| `checkpoints/<job>.<fence>` | the latest checkpoint of a claim of a job; the only objects that are replaced |
| `store-id` | the store that the blobs belong to |

An upload is atomic: an object is there as a whole or not at all, so that there are no temporary objects. It is
create-only: a name is random, and never written twice. Bytes that come from the bucket are compared with their digest
before they are used or kept.
"""

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ParamSpec

from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from adapters.errors import BlobCorrupt, LoraplexError, StorageFailed, StorageFull
from adapters.storage.blob_cache import BlobCache
from adapters.storage.blobs import BLOBS, STORE_ID, BlobPart, Content, check_digest, revision_of, storage_error
from adapters.storage.quarantine import SECONDS_A_DAY, moved_at, time_prefix

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

# User metadata with the SHA-256 of an object, in hex.
_DIGEST = "sha256"
_QUARANTINE, _KEPT, _CHECKPOINTS = "quarantine", "kept", "checkpoints"
# A larger object is uploaded in parts. S3 has at most 10,000 of them.
_SINGLE_PUT_BYTES = 64 * 2**20
_MIN_PART_BYTES, _MOST_PARTS, _PARTS_AT_ONCE = 16 * 2**20, 9_000, 4
_CHUNK_BYTES = 2**20
# Requests of a few KB, which callers wait for; downloads of any size, which may last as long as they make progress; and
# uploads, whose progress cannot be observed.
_QUICK: "ClientConfig" = {"timeout": timedelta(seconds=5), "connect_timeout": timedelta(seconds=2)}
_LONG: "ClientConfig" = {**_QUICK, "timeout": timedelta(hours=6), "read_timeout": timedelta(seconds=20)}
_UPLOAD: "ClientConfig" = {**_QUICK, "timeout": timedelta(minutes=10)}
_RETRIES: "RetryConfig" = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=5),
    "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1), "base": 2},
}
_QUICK_PUT_BYTES = 2**20
# Parts of a blob that are closer to each other are fetched together, because a request takes longer than these bytes.
_MOST_BYTES_BETWEEN = 2**17
_DOWNLOADS = 3
_BEHIND_THE_END = "416 Range Not Satisfiable"
_NO_BUCKET = "NoSuchBucket"
_MOST_CHARACTERS_LOGGED = 300

P = ParamSpec("P")

log = logging.getLogger(__name__)


class ObjectBlobs:
    """Blobs that are objects in a bucket: an implementation of the seam `Blobs`."""

    def __init__(self, url: str, cache: BlobCache, *, now: Callable[[], float], quarantine_days: float) -> None:
        """Connect to nothing yet. `url` is `s3://bucket/prefix`; credentials come from the `AWS_*` variables."""
        self.url = url.rstrip("/")
        # A plain HTTP endpoint is one that AWS_ENDPOINT_URL names.
        self._quick, self._long, self._uploads = (
            S3Store.from_url(
                self.url,
                config={"checksum_algorithm": "SHA256"},
                client_options={"allow_http": True, **timeouts},
                retry_config=_RETRIES,
            )
            for timeouts in (_QUICK, _LONG, _UPLOAD)
        )
        self._cache = cache
        self._now = now
        self._keep_seconds = quarantine_days * SECONDS_A_DAY

    @property
    def local_folder(self) -> Path:
        """The folder of the cache."""
        return self._cache.folder

    def create_folder(self) -> None:
        """Create the folder of the cache if it is missing."""
        self._cache.create_folder()

    def write(self, name: str, content: Content) -> None:
        """Store `content` under a new name, and keep a copy in the cache.

        If the local disk is full, the cache is emptied and `content` is written once more. Raises `StorageFull`,
        `StorageFailed` and what a writer raises. An object that was stored all the same is left to a sweep.
        """
        try:
            self._write(name, content)
        except StorageFull:
            if not self._cache.empty():
                raise
            self._write(name, content)

    def _write(self, name: str, content: Content) -> None:
        try:
            with self._cache.filling(name) as file:
                if file is None:
                    raise StorageFailed(f"the blob {name} was written before")
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                self.write_file(name, Path(file.name))
        except OSError as error:
            if translated := storage_error(error, what="a temporary file"):
                raise translated from error
            raise

    def write_file(self, name: str, path: Path) -> None:
        """Upload a file under a new name, and let the server compare the SHA-256 of what it receives."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size, attributes = path.stat().st_size, {_DIGEST: digest}
        try:
            with _asking(f"the blob {name}"):
                if size > _SINGLE_PUT_BYTES:
                    # In parts, no PUT is create-only. The name is new, because its key is random.
                    self._uploads.put(
                        _key(name),
                        path,
                        attributes=attributes,
                        use_multipart=True,
                        chunk_size=max(_MIN_PART_BYTES, size // _MOST_PARTS),
                        max_concurrency=_PARTS_AT_ONCE,
                    )
                    return
                store = self._quick if size <= _QUICK_PUT_BYTES else self._uploads
                store.put(_key(name), path.read_bytes(), attributes=attributes, mode="create")
        except StorageFailed as error:
            if not isinstance(error.__cause__, AlreadyExistsError):
                raise
            # The object is ours if the answer to the first of several attempts was lost.
            with _asking(f"the blob {name}"):
                found = self._quick.get(_key(name), options={"head": True})
            if (found.attributes.get(_DIGEST), found.meta["size"]) != (digest, size):
                raise StorageFailed(f"the blob {name} exists with other bytes") from error

    def read(self, name: str, *, offset: int = 0, length: int = -1, digest: str | None = None) -> bytes:
        """Return `length` bytes from `offset` on, or all if it is -1.

        Without a `digest`, the whole blob is fetched and compared with the digest of the object. Raises `BlobCorrupt`
        if the bytes are missing or others, and `StorageFailed` if the bucket does not answer.
        """
        if length < 0 or digest is None:
            content = self.local(name, digest=digest if length < 0 and offset == 0 else None).read_bytes()
            piece = content[offset:] if length < 0 else content[offset : offset + length]
            if len(piece) < length:
                raise BlobCorrupt(f"the blob {name} ends before byte {offset + length}")
            check_digest(name, piece, digest)
            return piece
        part = BlobPart(name, offset, length, digest)
        cached = self._cached(part)
        return self._take(part, self._fetch(part)) if cached is None else cached

    def read_parts(self, parts: Sequence[BlobPart]) -> Iterator[bytes | Exception]:
        """Yield the bytes of each part, in order, or the error that `read` raises for it.

        The parts that are not in the cache are fetched at the same time, and neighbours in one request.
        """
        contents = {part: self._cached(part) for part in parts}
        missing = sorted(part for part, content in contents.items() if content is None)
        fetched = asyncio.run(self._fetch_spans(list(_spans(missing)))) if missing else {}
        for part in parts:
            content = contents[part]
            yield fetched[part] if content is None else content

    async def _fetch_spans(self, spans: Sequence[Sequence[BlobPart]]) -> dict[BlobPart, bytes | LoraplexError]:
        return dict(chain.from_iterable(await asyncio.gather(*map(self._fetch_span, spans))))

    async def _fetch_span(self, parts: Sequence[BlobPart]) -> list[tuple[BlobPart, bytes | LoraplexError]]:
        """Fetch neighbouring parts of a blob in one request; return each with its bytes or its error."""
        name, start = parts[0].name, parts[0].offset
        try:
            with _asking(f"the blob {name}"):
                # Not `get_ranges_async`: obstore 0.12 panics if one of the ranges is behind the end of the object.
                span = await self._quick.get_range_async(_key(name), start=start, length=_end(parts) - start)
        except LoraplexError as error:
            return [(part, error) for part in parts]
        view = memoryview(span)
        pieces = [(part, bytes(view[part.offset - start :][: part.length])) for part in parts]
        return [(part, _outcome(self._take, part, piece)) for part, piece in pieces]

    def _fetch(self, part: BlobPart) -> bytes:
        with _asking(f"the blob {part.name}"):
            return bytes(self._quick.get_range(_key(part.name), start=part.offset, length=part.length))

    def _take(self, part: BlobPart, content: bytes) -> bytes:
        """Return bytes that came from the bucket, compared with their digest, and keep them in the cache."""
        if len(content) != part.length:
            raise BlobCorrupt(f"the blob {part.name} ends before byte {part.offset + part.length}")
        check_digest(part.name, content, part.digest)
        self._cache.add_part(part.name, content, offset=part.offset)
        return content

    def _cached(self, part: BlobPart) -> bytes | None:
        content = self._cache.read(part.name, offset=part.offset, length=part.length)
        with suppress(BlobCorrupt):
            if content is not None:
                check_digest(part.name, content, part.digest)
                return content
        return None

    def read_cached(self, name: str, *, offset: int, length: int) -> bytearray | None:
        """Return bytes of the cache if the kernel has them in memory; they are unverified, and may be missing zeros."""
        return self._cache.read_without_waiting(name, offset=offset, length=length)

    def local(self, name: str, *, size: int | None = None, digest: str | None = None) -> Path:
        """Return the path of a blob in the cache, fetched once for all processes of this machine.

        Open it within a minute; what is open or mapped stays readable when the cache evicts it. Raises `BlobCorrupt` if
        the blob is missing, not of `size` bytes, or has other bytes than were stored.
        """
        path = self._cache.whole(name)
        if path is not None and _is_as_expected(path, size=size, digest=digest):
            return path
        if path is not None:
            log.warning("the cached file %s is damaged: it is fetched again", path)
            self._cache.drop(name)
        path = self._download(name)
        if not _is_as_expected(path, size=size, digest=digest):
            self._cache.drop(name)
            raise BlobCorrupt(f"the blob {name} no longer has the bytes that were stored")
        return path

    def _download(self, name: str) -> Path:
        """Fetch a blob into the cache, unless another process does; return its path."""
        for attempt in range(1, _DOWNLOADS + 1):
            try:
                self._fill(name)
            except StorageFull:
                if attempt == _DOWNLOADS or not self._cache.empty():
                    raise
            except StorageFailed:
                if attempt == _DOWNLOADS:
                    raise
            else:
                break
        return self._cache.folder / name

    def _fill(self, name: str) -> None:
        """Fetch a blob into the cache, unless it is there when the lock of its file is free."""
        try:
            with self._cache.filling(name) as file:
                if file is not None:
                    self._copy_object(_key(name), file)
        except OSError as error:
            raise storage_error(error, what=f"the blob {name}") or error from error

    def _copy_object(self, key: str, file: BinaryIO) -> None:
        """Write an object to a file, and compare it with the digest in its metadata."""
        digest = hashlib.sha256()
        with _asking(f"the object {key}"):
            result = self._long.get(key)
            for chunk in result.stream(min_chunk_size=_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        if result.attributes.get(_DIGEST) != digest.hexdigest():
            raise BlobCorrupt(f"the object {key} does not have the bytes that were stored")

    def has_digest(self, name: str, digest: str, *, offset: int = 0, length: int | None = None) -> bool:
        """Return whether the object, or a part of it, is in the bucket and has this digest; the cache is not asked."""
        content = hashlib.sha256()
        try:
            with _asking(f"the blob {name}"):
                if length is None:
                    for chunk in self._long.get(_key(name)).stream(min_chunk_size=_CHUNK_BYTES):
                        content.update(chunk)
                else:
                    content.update(self._quick.get_range(_key(name), start=offset, length=length))
        except BlobCorrupt:
            return False
        return f"sha256:{content.hexdigest()}" == digest

    @contextmanager
    def stored_copy(self, name: str) -> Iterator[Path]:
        """Fetch the object as it is now into a temporary file, and yield its path; there is none if it is missing."""
        path = self._cache.folder / f"{name}-{uuid.uuid4().hex}.tmp"
        try:
            self._cache.folder.mkdir(parents=True, exist_ok=True)
            self.hold(name, path)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def hold(self, name: str, path: Path) -> bool:
        """Copy an object to a file, unless there is one; return whether it is there. Raises `OSError`."""
        if path.exists():
            return True
        try:
            with _asking(f"the blob {name}", missing=False):
                chunks = self._long.get(_key(name)).stream(min_chunk_size=_CHUNK_BYTES)
        except FileNotFoundError:
            return False
        try:
            with path.open("xb") as file, _asking(f"the blob {name}"):
                for chunk in chunks:
                    file.write(chunk)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return True

    def remove(self, names: Iterable[str]) -> int:
        """Remove blobs whose rows are gone; return their bytes. What cannot be removed is left to the next sweep."""
        removed = 0
        for name in names:
            self._cache.drop(name)
            with _logged(f"the blob {name} cannot be removed"), suppress(FileNotFoundError):
                size = self._quick.head(_key(name))["size"]
                self._quick.delete(_key(name))
                removed += size
        return removed

    def set_aside(self, names: Iterable[str]) -> None:
        """Move blobs that no row refers to any more into quarantine. Missing ones are skipped."""
        self._move(names, f"{_QUARANTINE}/{time_prefix(self._now())}-")

    def keep_aside(self, names: Iterable[str]) -> str:
        """Move blobs to where nothing is removed; return the URL of that place."""
        target = f"{_KEPT}/{time_prefix(self._now())}/"
        self._move(names, target)
        return f"{self.url}/{target}"

    def _move(self, names: Iterable[str], target: str) -> int:
        moved = 0
        for name in names:
            self._cache.drop(name)
            with _logged(f"the blob {name} cannot be moved to {target}"), suppress(FileNotFoundError):
                self._uploads.copy(_key(name), f"{target}{name}")
                self._quick.delete(_key(name))
                moved += 1
        if moved:
            log.warning("moved %d blobs that no row refers to to %s/%s", moved, self.url, target)
        return moved

    def names(self, *, with_temporary: bool = False) -> list[str]:  # noqa: ARG002 - a bucket has no temporary objects
        """Return the names of the blobs."""
        return self._list(BLOBS)

    def names_after(self, revision: int) -> list[str]:
        """Return the names of the blobs that were written after a revision of the catalogue."""
        # Names are ordered by their revision in 12 hex digits, and "g" follows them.
        names = self._list(BLOBS, offset=f"{revision:012x}-g")
        return [name for name in names if revision_of(name) > revision]

    def _list(self, folder: str, *, offset: str | None = None) -> list[str]:
        start = None if offset is None else f"{folder}/{offset}"
        with _asking("the list of blobs"):
            chunks = self._long.list(f"{folder}/", offset=start)
            return [entry["path"].removeprefix(f"{folder}/") for chunk in chunks for entry in chunk]

    def discard(self, names: Sequence[str]) -> int:
        """Move blobs into quarantine, and purge it; return how many were moved."""
        self.purge()
        return self._move(sorted(names), f"{_QUARANTINE}/{time_prefix(self._now())}-")

    def purge(self) -> int:
        """Remove the quarantined blobs whose days are over; return their bytes."""
        removed, until = 0, self._now() - self._keep_seconds
        with _logged("the quarantine cannot be purged"):
            for chunk in self._long.list(f"{_QUARANTINE}/"):
                for entry in chunk:
                    # Objects of other programs are left alone.
                    with suppress(ValueError):
                        if moved_at(entry["path"].removeprefix(f"{_QUARANTINE}/")) <= until:
                            self._quick.delete(entry["path"])
                            removed += entry["size"]
        return removed

    def read_store_id(self) -> str | None:
        """Return the id of the store that the bucket's prefix belongs to; None if it has none."""
        with suppress(FileNotFoundError), _asking("the store id", missing=False):
            return bytes(self._quick.get(STORE_ID).bytes()).decode(errors="replace").strip() or None
        return None

    def write_store_id(self, store_id: str) -> None:
        """Record the store that the bucket's prefix belongs to."""
        # Of two services that take an empty prefix at the same time, one fails.
        is_new = self.read_store_id() is None
        with _asking("the store id"):
            self._quick.put(STORE_ID, store_id.encode(), mode="create" if is_new else "overwrite")

    def put_checkpoint(self, name: str, path: Path) -> None:
        """Store the content of a file as a checkpoint, or replace one. Raises `StorageFailed`."""
        with path.open("rb") as file:
            attributes = {_DIGEST: hashlib.file_digest(file, "sha256").hexdigest()}
            file.seek(0)
            with _asking(f"the checkpoint {name}"):
                self._uploads.put(f"{_CHECKPOINTS}/{name}", file, attributes=attributes)

    def fetch_checkpoint(self, name: str, path: Path) -> None:
        """Replace a file by a checkpoint. Raises `BlobCorrupt` and `StorageFailed`."""
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            self._copy_object(f"{_CHECKPOINTS}/{name}", file)
        temporary.replace(path)

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints. Raises `StorageFailed`."""
        return self._list(_CHECKPOINTS)

    def remove_checkpoints(self, names: Iterable[str]) -> None:
        """Remove checkpoints. Raises `StorageFailed`."""
        with _asking("the checkpoints"):
            for name in names:
                self._quick.delete(f"{_CHECKPOINTS}/{name}")


def _key(name: str) -> str:
    return f"{BLOBS}/{name}"


def _end(parts: Sequence[BlobPart]) -> int:
    return max(part.offset + part.length for part in parts)


def _spans(parts: Iterable[BlobPart]) -> Iterator[list[BlobPart]]:
    """Yield sorted parts in groups that one request fetches, because they are close to each other in one blob."""
    span: list[BlobPart] = []
    for part in parts:
        if span and (part.name != span[0].name or part.offset - _end(span) > _MOST_BYTES_BETWEEN):
            yield span
            span = []
        span.append(part)
    if span:
        yield span


def _is_as_expected(path: Path, *, size: int | None, digest: str | None) -> bool:
    """Return whether a file is there, with this size and this digest."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        if size is not None and path.stat().st_size != size:
            return False
        return digest is None or f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == digest
    return False


def _outcome(function: Callable[P, bytes], *args: P.args, **kwargs: P.kwargs) -> bytes | LoraplexError:
    try:
        return function(*args, **kwargs)
    except LoraplexError as error:
        return error


@contextmanager
def _asking(what: str, *, missing: bool = True) -> Iterator[None]:
    """Translate the errors of the bucket: only an object that is missing or too short is corrupt.

    With `missing=False`, a missing object raises `FileNotFoundError`. The answers of the server are only logged,
    because the detail of an error reaches clients.
    """
    try:
        yield
    except FileNotFoundError as error:
        # S3 answers 404 also if the bucket itself does not exist.
        if _NO_BUCKET in str(error):
            raise _failure(what, error) from error
        if not missing:
            raise
        raise BlobCorrupt(f"{what} is missing in the bucket") from error
    except AlreadyExistsError as error:
        raise StorageFailed(f"{what} exists in the bucket already") from error
    except BaseError as error:
        if _BEHIND_THE_END in str(error):
            raise BlobCorrupt(f"{what} is shorter than its row says") from error
        raise _failure(what, error) from error


def _failure(what: str, error: Exception) -> StorageFailed:
    """Log what the bucket answered, and return the error for clients."""
    log.error("%s: %s", what, " ".join(str(error).split())[:_MOST_CHARACTERS_LOGGED])
    reason = "does not exist" if _NO_BUCKET in str(error) else "does not answer as it should"
    return StorageFailed(f"{what} cannot be read or written now: the bucket {reason}")


@contextmanager
def _logged(failure: str) -> Iterator[None]:
    """Log that the bucket could not do something that is tried again later."""
    try:
        yield
    except BaseError as error:
        log.warning("%s: %s", failure, " ".join(str(error).split())[:_MOST_CHARACTERS_LOGGED])
