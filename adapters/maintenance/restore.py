"""Restore of a backup into a new, empty data folder.

The archive is not trusted: it may have only the members that a backup has, every digest is checked, and nothing is
written outside the new folder. The folder is complete when it gets its name, so that a crash leaves all or nothing of
it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from adapters.errors import BackupFailed, CatalogNotLoadable, CatalogUnavailable, MigrationFailed, StorageFailed
from adapters.maintenance.backup import DAMAGED, FORMAT, INFO, SUMS, Member, read_members
from adapters.maintenance.doctor import Finding, diagnose
from adapters.maintenance.move import begin_copy, copy_rows
from adapters.maintenance.snapshot import snapshot_of_folder
from adapters.storage.blob_location import BlobLocation
from adapters.storage.blobs import BLOB_NAME, BLOBS, STORE_ID, Blobs, storage_error, sync_folder
from adapters.storage.database import Database
from adapters.storage.store_identity import CATALOG, MIGRATION_LOCK, connected, read_id

if TYPE_CHECKING:
    from adapters.storage.object_blobs import ObjectBlobs

_MAX_INFO_BYTES = 2**24
_MAX_ID_BYTES = 256
# Of one line of the sums.
_MAX_LINE_BYTES = 200
_BUFFER_BYTES = 2**20
_RESTORING = ".restoring"
# Names in a folder that counts as empty.
_IGNORED = {_RESTORING, "lost+found"}


@dataclass(frozen=True, slots=True)
class Restored:
    """Result of a restore."""

    revision: int
    blobs: int
    findings: tuple[Finding, ...]
    """Damage that the data folder had when the backup was made."""


def restore(
    source: Path, folder: Path, location: BlobLocation | None = None, database: Database | None = None
) -> Restored:
    """Create a data folder from a backup. Raises `BackupFailed`, and then nothing was created.

    The folder must be missing or empty. With a `location`, a bucket's prefix of no store, the blobs move there; with a
    `database`, which must be empty, the rows. A restore that failed can be repeated: no service accepts what it left.
    """
    if database is None and location is not None and (store_id := location.open().read_store_id()) is not None:
        raise BackupFailed(f"the bucket belongs to the store {store_id}: restore into a new prefix")
    try:
        with source.open("rb", buffering=_BUFFER_BYTES) as archive, _new_folder(folder) as fresh:
            info, is_damaged = _extract(archive, fresh)
            _check_catalog(fresh, info)
            findings = tuple(diagnose(fresh).findings)
            # Its checks may have left an empty journal and an empty lock.
            for name in (f"{CATALOG}-journal", MIGRATION_LOCK):
                (fresh / name).unlink(missing_ok=True)
            if findings and not is_damaged:
                raise BackupFailed(f"the backup is damaged: {findings[0].subject}: {findings[0].detail}")
            if database is not None:
                _move_rows(fresh, location, database)
            elif location is not None:
                _move_blobs(fresh, replace(location, folder=fresh).open(), info["store_id"])
    except (CatalogNotLoadable, CatalogUnavailable, MigrationFailed, StorageFailed) as error:
        raise BackupFailed(f"the backup cannot be used: {error.detail}") from error
    except OSError as error:
        reason = storage_error(error, what=str(folder)) or error
        raise BackupFailed(f"the backup cannot be restored: {reason}") from error
    return Restored(info["revision"], info["blobs"], findings)


def _move_rows(fresh: Path, location: BlobLocation | None, database: Database) -> None:
    """Copy the rows of a restored folder to a database, and the blobs to a bucket if they belong there."""
    with (
        tempfile.TemporaryDirectory(dir=fresh, prefix="catalog-") as scratch,
        snapshot_of_folder(fresh, Path(scratch)) as snapshot,
    ):
        identity = snapshot.identity(with_references=False)
        assert identity is not None
        assert identity.store_id is not None
        blobs = _open_bucket(replace(location, folder=fresh)) if location is not None else None
        is_complete = begin_copy(database, identity.store_id, blobs)
        if blobs is not None and not is_complete:
            _move_blobs(fresh, blobs, identity.store_id)
        copy_rows(snapshot, database, is_complete=is_complete)
    (fresh / CATALOG).unlink()


def _open_bucket(location: BlobLocation) -> "ObjectBlobs":
    from adapters.storage.object_blobs import ObjectBlobs

    blobs = location.open()
    assert isinstance(blobs, ObjectBlobs)
    return blobs


def _move_blobs(fresh: Path, blobs: Blobs, store_id: str) -> None:
    """Write the blobs of a restored folder to another place, and remove them from the folder."""
    blobs.create_folder()
    for name in BlobLocation(folder=fresh).open().names():
        with (fresh / BLOBS / name).open("rb") as file:
            blobs.write(name, partial(shutil.copyfileobj, file))
    blobs.write_store_id(store_id)
    shutil.rmtree(fresh / BLOBS)
    (fresh / BLOBS).mkdir()


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that becomes `folder`, durably, at the end of the block; remove it after an error."""
    folder = folder.absolute()
    # A mounted folder cannot be replaced: its content moves into it, the catalogue last, because a service refuses to
    # start on blobs without a catalogue.
    is_mount = os.path.ismount(folder)
    fresh = folder / _RESTORING if is_mount else folder.with_name(f".{folder.name}{_RESTORING}")
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= _IGNORED):
        raise BackupFailed(f"{folder} is not an empty folder: restore into a new one")
    # What a restore that was killed has left.
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / BLOBS).mkdir(parents=True)
    try:
        yield fresh
        for path in (fresh / BLOBS, fresh):
            sync_folder(path)
        if is_mount:
            for name in (BLOBS, CATALOG):
                if (fresh / name).exists():
                    (fresh / name).rename(folder / name)
                sync_folder(folder)
            shutil.rmtree(fresh)
        else:
            # It replaces an empty folder, but not one that another process has put something into.
            fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def _extract(archive: BinaryIO, fresh: Path) -> tuple[Mapping[str, Any], bool]:
    """Write the members of a backup, and check their digests.

    Return its `backup.json`, and whether blobs were damaged when it was made.
    """
    sums: dict[str, str] = {}
    info: Mapping[str, Any] | None = None
    listed = None
    for member in read_members(archive):
        name = member.name
        if name in sums or listed is not None or (info is None) != (name == INFO):
            raise BackupFailed(f"it is not a backup: {name!r} is not expected here")
        if name == INFO:
            content, sums[name] = _read(member, _MAX_INFO_BYTES)
            info = _checked_info(content)
        elif name == DAMAGED:
            _, sums[name] = _read(member, _MAX_INFO_BYTES)
        elif name == SUMS:
            listed, _ = _read(member, _MAX_LINE_BYTES * len(sums))
        else:
            sums[name] = _write(member, fresh / _path_of(name))
    if info is None or listed is None:
        raise BackupFailed("it is not a backup, or it is cut off")
    if listed != "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode():
        wrong = [name for name, digest in sums.items() if f"{digest}  {name}\n".encode() not in listed]
        raise BackupFailed(f"the backup is damaged: {wrong[0] if wrong else 'a file'} does not have its digest")
    return info, DAMAGED in sums


def _path_of(name: str) -> str:
    """Return the path of a member in the data folder; raise `BackupFailed` for a member that no backup has."""
    folder, _, file = name.rpartition("/")
    if name == CATALOG or (folder == BLOBS and (file == STORE_ID or BLOB_NAME.fullmatch(file))):
        return name
    raise BackupFailed(f"it has a member that no backup has: {name!r}")


def _write(member: Member, path: Path) -> str:
    """Write a member to a new file, durably; return its SHA-256 in hex."""
    free = shutil.disk_usage(path.parent).free
    if member.bytes > free or (path.name == STORE_ID and member.bytes > _MAX_ID_BYTES):
        raise BackupFailed(f"{member.name} has {member.bytes} bytes, and {free} bytes are free")
    with path.open("xb") as file:
        digest = member.copy_to(file)
        file.flush()
        os.fsync(file.fileno())
    return digest


class _Buffer(list[bytes]):
    """File in memory, which is only written to."""

    write = list.append


def _read(member: Member, most: int) -> tuple[bytes, str]:
    """Return a member's content and its SHA-256 in hex."""
    if member.bytes > most:
        raise BackupFailed(f"it is not a backup: {member.name} has {member.bytes} bytes")
    buffer = _Buffer()
    digest = member.copy_to(buffer)  # type: ignore[arg-type]
    return b"".join(buffer), digest


def _checked_info(content: bytes) -> Mapping[str, Any]:
    """Return the content of `backup.json`, with the members that this module reads."""
    try:
        info = json.loads(content)
        version, types = info["format"], {"store_id": str, "revision": int, "blobs": int}
        if version == FORMAT and all(type(info[name]) is expected for name, expected in types.items()):
            return dict(info)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BackupFailed(f"it is not a backup: {INFO} cannot be read: {error}") from error
    raise BackupFailed(f"it is a backup of the form {version!r}, and this release reads the form {FORMAT}")


def _check_catalog(fresh: Path, info: Mapping[str, Any]) -> None:
    """Raise `BackupFailed` if the catalogue is not that of the blobs, or has what no catalogue of ours has."""
    if not (fresh / CATALOG).is_file():
        raise BackupFailed(f"it is not a backup: it has no {CATALOG}")
    with connected(fresh / CATALOG) as connection:
        # A trigger or a view would run SQL of the archive's author when the service writes or reads.
        connection.execute("PRAGMA trusted_schema=OFF")
        statement = "SELECT name FROM sqlite_master WHERE type NOT IN ('table', 'index') OR sql LIKE 'CREATE VIRTUAL%'"
        if (foreign := connection.execute(statement).fetchone()) is not None:
            raise BackupFailed(f"its catalogue has more than tables and indexes: {str(foreign[0])[:100]}")
        row = connection.execute("SELECT store_id, revision FROM catalog").fetchone()
    if row != (info["store_id"], info["revision"]) or read_id(fresh / BLOBS / STORE_ID) != info["store_id"]:
        raise BackupFailed("its catalogue and its blobs do not belong together")
