"""Backup of a data folder in use: one tar file with a consistent catalogue and every blob that it refers to.

| member | content |
|---|---|
| `backup.json` | form of the backup, store id, revision, number and bytes of the blobs |
| `catalog.sqlite3` | the catalogue in one read transaction, without pending blobs; from PostgreSQL too |
| `blobs/store-id`, `blobs/<name>` | the blobs that it refers to |
| `DAMAGED` | the blobs that were missing or damaged when the backup was made, if there were any |
| `SHA256SUMS` | the SHA-256 of each of these, in the form of `sha256sum` |

Every tar program reads it. `read_members` accepts less than such programs do: no links, no folders, and no extended
headers, whose sizes a hostile file could choose.

Blobs never change, but a deletion may remove one before it is copied. Hard links in `blobs/.backup`, or copies of the
objects in a bucket, keep the bytes until the backup has ended.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from adapters.errors import BackupFailed, CatalogNotLoadable
from adapters.maintenance.blob_checks import Damage, damage_of, read_parts, referenced_files
from adapters.maintenance.catalog_reader import CatalogReader, opened_reader
from adapters.maintenance.snapshot import copy_database, remove_pending
from adapters.storage.blob_location import BlobLocation
from adapters.storage.blobs import BLOB_NAME, BLOBS, STORE_ID, Blobs, storage_error, sync_folder
from adapters.storage.database import Database
from adapters.storage.schema import batched
from adapters.storage.store_identity import CATALOG, catalog_bytes, check_integrity, check_store, connected

FORMAT = 1
INFO, DAMAGED, SUMS = "backup.json", "DAMAGED", "SHA256SUMS"
_LOCK = "backup.lock"
_HELD = ".backup"
_MOST_SNAPSHOTS = 20
_BLOCK_BYTES = 512
_CHUNK_BYTES = 2**20
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


@dataclass(frozen=True, slots=True)
class Backup:
    """Result of a backup."""

    revision: int
    blobs: int
    bytes: int
    """Size of the file."""
    damages: tuple[Damage, ...]
    """Blobs that are missing or damaged in the data folder, and therefore in the backup."""


def back_up(folder: Path, target: Path, blobs: Blobs | None = None, database: Database | None = None) -> Backup:
    """Write a backup of a data folder to a file, durably and atomically: after a crash, `target` is as it was.

    The catalogue and the blobs are in the folder by default. The backup has everything that was acknowledged before
    this call. Raises `BackupFailed`, `CatalogNotLoadable` if the catalogue is damaged or does not belong to the blobs,
    and `StorageFailed` if a bucket does not answer. Damaged blobs do not stop it, but then an existing file is not
    replaced.
    """
    blobs = blobs or BlobLocation(folder=folder).open()
    if target.resolve().is_relative_to(folder.resolve()):
        raise BackupFailed(f"{target} is inside the data folder")
    if database is None and catalog_bytes(folder) == 0:
        raise CatalogNotLoadable(f"{folder} has no catalogue {CATALOG}: there is nothing to back up")
    check_store(folder, database, blobs=blobs)
    partial = target.with_name(f"{target.name}.partial")
    with _held_blobs(folder, blobs) as held, _written(partial, target) as archive:
        missing = _take_snapshot(folder, database, blobs, held)
        check_integrity(held / CATALOG)
        with opened_reader(held) as catalog:
            backup = _write(archive, catalog, held, missing)
        if backup.damages and target.exists():
            raise BackupFailed(f"{target} was not replaced, because {len(backup.damages)} blobs are missing or damaged")
    return backup


def remove_abandoned_links(folder: Path, blobs: Blobs) -> None:
    """Remove the hard links, or the copies, that a backup left behind, unless one is running."""
    with suppress(BackupFailed), _lock(folder):
        shutil.rmtree(blobs.local_folder / _HELD, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the lock of the one backup that may run. Raises `BackupFailed`."""
    with (folder / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupFailed("another backup of this data folder is running") from None
        yield


@contextmanager
def _held_blobs(folder: Path, blobs: Blobs) -> Iterator[Path]:
    """Create the folder of hard links or copies, and remove it at the end."""
    held = blobs.local_folder / _HELD
    with _lock(folder):
        shutil.rmtree(held, ignore_errors=True)
        held.mkdir(parents=True)
        try:
            yield held
        finally:
            shutil.rmtree(held, ignore_errors=True)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextmanager
def _written(partial: Path, target: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name when its content is durable, and is removed after an error."""
    try:
        # Only the owner may read the adapters of all tenants.
        partial.unlink(missing_ok=True)
        with open(partial, "xb", opener=_open_private) as archive:
            yield archive
            archive.flush()
            os.fsync(archive.fileno())
        partial.rename(target)
        sync_folder(target.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = storage_error(error, what=str(target)) or error
            raise BackupFailed(f"the backup cannot be written: {reason}") from error
        raise


def _take_snapshot(folder: Path, database: Database | None, blobs: Blobs, held: Path) -> set[str]:
    """Copy the catalogue, and link the blobs that it refers to; return those that are missing.

    A blob that is deleted between the two steps is missing in this copy, and the next one does not refer to it. One
    that is missing in two copies in succession is lost.
    """
    missing: set[str] | None = None
    for _ in range(_MOST_SNAPSHOTS):
        if database is None:
            with connected(folder / CATALOG) as live, closing(sqlite3.connect(held / CATALOG)) as copy:
                live.backup(copy)
            remove_pending(held / CATALOG)
        else:
            copy_database(database, held / CATALOG)
        with opened_reader(held) as catalog:
            before, missing = missing, _hold(blobs, held, referenced_files(catalog))
        if not missing or missing == before:
            return missing
    raise BackupFailed("blobs are deleted faster than they can be linked; try again")


def _hold(blobs: Blobs, held: Path, names: Iterable[str]) -> set[str]:
    """Link or copy blobs; return those that are missing."""
    missing = set()
    for name in names:
        try:
            if not (BLOB_NAME.fullmatch(name) and blobs.hold(name, held / name)):
                missing.add(name)
        except OSError as error:
            raise BackupFailed(f"the blob {name} cannot be linked or copied: {error.strerror}") from error
    return missing


def _write(archive: BinaryIO, catalog: CatalogReader, held: Path, missing: set[str]) -> Backup:
    """Write the members of a backup."""
    names = sorted(set(referenced_files(catalog)) - missing)
    ((store_id, revision),) = catalog.rows("SELECT store_id, revision FROM catalog")
    sizes = {name: (held / name).stat().st_size for name in (CATALOG, *names)}
    info = {
        "format": FORMAT,
        "store_id": store_id,
        "revision": revision,
        "blobs": len(names),
        "bytes": sum(sizes.values()),
    }
    sums: dict[str, str] = {}
    _add_bytes(archive, sums, INFO, json.dumps(info, indent=1).encode())
    with (held / CATALOG).open("rb") as file:
        sums[CATALOG] = write_member(archive, CATALOG, file, sizes[CATALOG])
    _add_bytes(archive, sums, f"{BLOBS}/{STORE_ID}", str(store_id).encode())
    damages: list[Damage] = []
    for some in batched([*names, *sorted(missing)]):
        for name, parts in read_parts(catalog, some).items():
            damages += damage_of(held / name, parts)
            if name not in missing:
                with (held / name).open("rb") as file:
                    sums[f"{BLOBS}/{name}"] = write_member(archive, f"{BLOBS}/{name}", file, sizes[name])
    if damages:
        lines = (f"{damage.part}: {damage.detail}\n" for damage in damages)
        _add_bytes(archive, sums, DAMAGED, "".join(lines).encode())
    _add_bytes(archive, {}, SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode())
    write_end(archive)
    return Backup(revision, len(names), archive.tell(), tuple(damages))


def _add_bytes(archive: BinaryIO, sums: dict[str, str], name: str, content: bytes) -> None:
    sums[name] = write_member(archive, name, io.BytesIO(content), len(content))


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    bytes: int
    copy_to: Callable[[BinaryIO], str]
    """Write the content to a file; return its SHA-256 in hex. It is called once, before the next member is read."""


def write_member(archive: BinaryIO, name: str, source: BinaryIO, size: int) -> str:
    """Append `size` bytes of a file; return their SHA-256 in hex. Raises `BackupFailed` if there are fewer."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o600
    # Its numbers have no limit, and names of up to 100 characters need no extended header.
    archive.write(header.tobuf(tarfile.GNU_FORMAT))
    digest = _copy(source, archive, size)
    archive.write(bytes(-size % _BLOCK_BYTES))
    return digest


def write_end(archive: BinaryIO) -> None:
    """Append the end of an archive."""
    archive.write(bytes(2 * _BLOCK_BYTES))


def read_members(archive: BinaryIO) -> Iterator[Member]:
    """Yield the files of an archive; raise `BackupFailed` if it has anything else or is cut off."""
    while True:
        block = archive.read(_BLOCK_BYTES)
        if block == bytes(_BLOCK_BYTES):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
            raise BackupFailed(f"it is not a backup, or it is cut off or damaged: {error}") from error
        if header.type not in _REGULAR or header.size < 0:
            raise BackupFailed(f"it has a member that no backup has: {header.name[:100]!r}")
        yield Member(header.name, header.size, lambda target, size=header.size: _copy(archive, target, size))  # type: ignore[misc]
        archive.read(-header.size % _BLOCK_BYTES)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> str:
    digest, left = hashlib.sha256(), size
    while left:
        chunk = source.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise BackupFailed("a file ends early")
        digest.update(chunk)
        target.write(chunk)
        left -= len(chunk)
    return digest.hexdigest()
