"""Writing blobs, so that a sweep never takes one before a row refers to it.

Before a file is written, its key (the random part of its name) has a committed row in `pending_blobs`. The transaction
that stores a row which refers to the file deletes the pending row. Every file that a publish needs is therefore pending
or referenced at each moment, and a file that is neither was left by a crash or by a change that failed.

Pending rows cost no commit of their own: the transaction that deletes one inserts the next, which this process keeps
for its next file. Only a process that has none left, such as at its first write, commits a few.

A row names its owner, which is one `BlobWriter`. The owner holds the lock of a file in `writers/` from before its first
row until it ends, however it ends. A row whose owner's lock is free is stale, and a sweep deletes it. A lock, unlike a
process id, is right between containers that share a folder. If a live owner's row is deleted all the same, the publish
that needs the row fails and stores nothing.
"""

import fcntl
import os
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.errors import CatalogBusy, LoraplexError
from adapters.storage.blobs import Content, FolderBlobs, blob_key, storage_error
from adapters.storage.database import SqliteDatabase
from adapters.storage.schema import batched, catalog, dataset_versions, jobs, pending_blobs, versions

# Folder, in the data folder, of the owners' lock files.
WRITERS = "writers"
_LOCK_SUFFIX = ".lock"
_KEYS_AT_ONCE = 8
_KEY = pending_blobs.c.key
_REPLACE = sa.update(pending_blobs).where(sa.bindparam("used") == _KEY).values(key=sa.bindparam("next_key"))
_REFERENCES = (versions.c.file, versions.c.statistics, dataset_versions.c.file, jobs.c.data_file)


class Upload:
    """The blobs of one change: each is written, then published by the transaction of the change."""

    def __init__(self, new_name: Callable[[], str], blobs: FolderBlobs) -> None:
        self._new_name = new_name
        self._blobs = blobs
        # Names of the blobs that were written, or begun.
        self.names: list[str] = []
        # Key that took the place of each published blob's key.
        self.next_keys: dict[str, str] = {}
        # Whether a pending row was gone.
        self.is_lost = False

    def write(self, content: Content) -> str:
        """Store `content` durably and return its name. Raises what `FolderBlobs.write` and the database raise."""
        self.names.append(self._new_name())
        self._blobs.write(self.names[-1], content)
        return self.names[-1]

    def publish(self, connection: Connection, names: Iterable[str] | None = None) -> None:
        """Delete the pending rows of blobs, all by default, in the transaction whose rows refer to them.

        Raises `CatalogBusy` if a row is gone, because a sweep may have taken the file.
        """
        for name in self.names if names is None else names:
            self.next_keys[name] = uuid.uuid4().hex
            keys = {"used": blob_key(name), "next_key": self.next_keys[name]}
            if connection.execute(_REPLACE, keys).rowcount != 1:
                self.is_lost = True
                raise CatalogBusy(f"the pending row of the file {name} was deleted while it was written; try again")


class BlobWriter:
    """Writes blobs under pending rows, and sweeps the blobs that are neither pending nor referenced.

    Safe to use from any thread and, on one folder, from several processes.
    """

    def __init__(self, database: SqliteDatabase, blobs: FolderBlobs, folder: Path) -> None:
        self.blobs = blobs
        self._database = database
        self._folder = folder / WRITERS
        self._owner = uuid.uuid4().hex
        # A descriptor, closed with this object: an open file object would warn about it.
        self._release: weakref.finalize[[int], BlobWriter] | None = None
        self._reserving = threading.Lock()
        self._free_keys: deque[str] = deque()
        self._abandoned: list[str] = []
        self._watch = database.catalog_watch()
        self._watching = threading.Lock()
        with database.read() as connection:
            self._revision = int(connection.scalars(sa.select(catalog.c.revision)).one())

    @contextmanager
    def upload(self) -> Iterator[Upload]:
        """Hold blobs until the transaction of their change has ended; it has to be the last step of this block.

        At the end, blobs that were not published are removed. If an error does not say that nothing was stored, the
        blobs are left to a sweep.
        """
        upload = Upload(self._new_name, self.blobs)
        try:
            yield upload
        except BaseException as error:
            self._give_up(upload, is_refused=isinstance(error, LoraplexError) and not error.outcome_unknown)
            raise
        # The transaction has committed, so the keys that it reserved are pending.
        unpublished = [name for name in upload.names if name not in upload.next_keys]
        self.blobs.remove(unpublished)
        self._free_keys.extend([*upload.next_keys.values(), *map(blob_key, unpublished)])

    def sweep(self) -> int:
        """Move the blobs that are neither pending nor referenced into quarantine, and remove temporary files.

        Return the number of both. The writes of other processes go on meanwhile: the files are listed first, so the
        pending row of each was committed before the rows are read.
        """
        names = self.blobs.names()
        self.delete_stale_rows()
        unreferenced: list[str] = []
        # A part at a time, so that no read keeps a writer waiting for long.
        for part in batched(names):
            statement = sa.select(_KEY).where(_KEY.in_(map(blob_key, part)))
            with self._database.read() as connection:
                pending, referenced = set(connection.scalars(statement)), _referenced(connection, part)
            unreferenced += [name for name in part if name not in referenced and blob_key(name) not in pending]
        return self.blobs.discard(unreferenced)

    def delete_stale_rows(self) -> None:
        """Delete the pending rows whose owners have ended, and those that this process gave up."""
        with self._database.read() as connection:
            owners = connection.scalars(sa.select(pending_blobs.c.owner).distinct()).all()
        # After the rows: an owner's lock is held before its first row is committed.
        live = self.live_owners()
        stale = [owner for owner in owners if owner not in live]
        abandoned, self._abandoned = self._abandoned, []
        if not stale and not abandoned:
            return
        with self._database.write() as connection:
            for column, values in ((_KEY, abandoned), (pending_blobs.c.owner, stale)):
                for part in batched(values):
                    connection.execute(sa.delete(pending_blobs).where(column.in_(part)))

    def live_owners(self) -> set[str]:
        """Return the owners whose locks are held, in this process and others; remove the files of the others."""
        live = set()
        # Not `glob`, which takes a file in place of the folder for an empty folder.
        with suppress(FileNotFoundError):
            for path in map(self._folder.joinpath, os.listdir(self._folder)):
                if path.suffix == _LOCK_SUFFIX and _is_locked(path):
                    live.add(path.stem)
                elif path.suffix == _LOCK_SUFFIX:
                    path.unlink(missing_ok=True)
        return live

    def close(self) -> None:
        """End this owner: its pending rows are stale from now on."""
        self._watch.close()
        if self._release is not None:
            (self._folder / f"{self._owner}{_LOCK_SUFFIX}").unlink(missing_ok=True)
            self._release()

    def _new_name(self) -> str:
        """Return the name for a new blob, whose key has a committed pending row."""
        # If the catalogue is locked at this moment, take the last revision seen: a write does not wait for it.
        with self._watching, suppress(CatalogBusy):
            self._revision = self._watch.revision()
        return f"{self._revision:012x}-{self._take_key()}"

    def _take_key(self) -> str:
        with suppress(IndexError):
            return self._free_keys.popleft()
        with self._reserving:
            # Another thread may have reserved some meanwhile.
            with suppress(IndexError):
                return self._free_keys.popleft()
            self._hold_lock()
            key, *others = keys = [uuid.uuid4().hex for _ in range(_KEYS_AT_ONCE)]
            try:
                with self._database.write() as connection:
                    connection.execute(sa.insert(pending_blobs), [{"key": key, "owner": self._owner} for key in keys])
            except LoraplexError as error:
                if not error.outcome_unknown:
                    raise
                # Of the change itself, nothing has been stored.
                raise type(error)(f"{error.detail} This was before the change: nothing was stored") from error
            self._free_keys.extend(others)
            return key

    def _hold_lock(self) -> None:
        """Make the lock file of this owner and lock it, if that was not done before. Raises `StorageFailed`."""
        if self._release is not None:
            return
        path = self._folder / f"{self._owner}{_LOCK_SUFFIX}"
        # Lock it before it has the name that sweeps look for: else one could take it for abandoned.
        fresh = path.with_suffix(".new")
        try:
            self._folder.mkdir(exist_ok=True)
            lock = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._release = weakref.finalize(self, os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fresh.rename(path)
        except OSError as error:
            if self._release is not None:
                self._release()
                self._release = None
            fresh.unlink(missing_ok=True)
            if translated := storage_error(error, what=f"the file {WRITERS}/{path.name}"):
                raise translated from error
            raise

    def _give_up(self, upload: Upload, *, is_refused: bool) -> None:
        """Remove the blobs of a change that was refused; leave those of a change that may be stored to a sweep."""
        keys = [blob_key(name) for name in upload.names]
        if is_refused:
            self.blobs.remove(upload.names)
        if upload.is_lost:
            # Whoever deleted one row may have deleted all.
            self._free_keys.clear()
        elif is_refused:
            self._free_keys.extend(keys)
        else:
            self._abandoned += keys


def _referenced(connection: Connection, names: Sequence[str]) -> set[str]:
    """Return those of the blobs of these names that rows of any table refer to."""
    return {name for column in _REFERENCES for name in connection.scalars(sa.select(column).where(column.in_(names)))}


def _is_locked(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
