"""Pending-blob rows, which protect a new blob from the sweep until a row refers to it.

Before a file is written, its key (the random part of its name) has a committed row in `pending_blobs`. The transaction
that stores a row which refers to the file deletes the pending row. Every file that a publish needs is therefore pending
or referenced at each moment, and a file that is neither was left by a crash or by a change that failed.

The adapters of a large job are stored before the job, in several transactions. Meanwhile the job's id is pending, and
the transaction that stores the job deletes that row. Without it, a sweep deletes the adapters.

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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.errors import CatalogBusy, LoraplexError
from adapters.storage.blobs import Blobs, Content, blob_key, storage_error
from adapters.storage.database import Database
from adapters.storage.schema import (
    batched,
    catalog,
    dataset_versions,
    job_adapters,
    jobs,
    pending_blobs,
    trashed_versions,
    versions,
)
from adapters.storage.slices import delete_in_slices
from adapters.storage.store_identity import WRITERS
from adapters.storage.turns import Task, take_turn

_LOCK_SUFFIX = ".lock"
# Held by the process that sweeps; has the time when the last sweep began.
_SWEEP_LOCK = "sweep.lock"
_TIME_BYTES = 32
_KEYS_AT_ONCE = 8
_KEY = pending_blobs.c.key
_REPLACE = sa.update(pending_blobs).where(sa.bindparam("used") == _KEY).values(key=sa.bindparam("next_key"))
_REFERENCES = (
    *(versions.c.file, versions.c.statistics, trashed_versions.c.file),
    *(dataset_versions.c.file, jobs.c.data_file),
)


class Upload:
    """The blobs of one change: each is written, then published by the transaction of the change."""

    def __init__(self, new_name: Callable[[], str], blobs: Blobs) -> None:
        self._new_name = new_name
        self._blobs = blobs
        # Names of the blobs that were written, or begun.
        self.names: list[str] = []
        # Key that took the place of each published blob's key.
        self.next_keys: dict[str, str] = {}
        # Whether a pending row was gone.
        self.is_lost = False

    def write(self, content: Content) -> str:
        """Store `content` durably and return its name. Raises what `Blobs.write` and the database raise."""
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

    def __init__(self, database: Database, blobs: Blobs, folder: Path) -> None:
        self.blobs = blobs
        self._database = database
        self._folder = folder / WRITERS
        self._owner = uuid.uuid4().hex
        # A descriptor, closed with this object: an open file object would warn about it.
        self._locks = database.writer_locks()
        self._release: weakref.finalize[[int], BlobWriter] | None = None
        self._reserving = threading.Lock()
        self._free_keys: deque[str] = deque()
        self._abandoned: list[str] = []
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
        names = self.blobs.names(with_temporary=True)
        self.delete_stale_rows()
        unreferenced: list[str] = []
        # A part at a time, so that no read keeps a writer waiting for long.
        for part in batched(names):
            statement = sa.select(_KEY).where(_KEY.in_(map(blob_key, part)))
            with self._database.read() as connection:
                pending, referenced = set(connection.scalars(statement)), _referenced(connection, part)
            unreferenced += [name for name in part if name not in referenced and blob_key(name) not in pending]
        return self.blobs.discard(unreferenced)

    def sweep_since(self, opened_at: float, *, now: Callable[[], float]) -> int:
        """Sweep, unless another process has begun a sweep after `opened_at`; return what `sweep` does.

        Processes that start together on one machine wait for each other, and one of them sweeps. Of processes on
        several machines, one sweeps, and the others do not wait. `now` is the clock of `opened_at`.
        """
        if self._locks is not None:
            return self.sweep_in_turn(seconds=now() - opened_at, now=now)
        lock = os.open(self._folder.parent / _SWEEP_LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            begun_at = now()
            with suppress(ValueError):
                if opened_at < float(os.pread(lock, _TIME_BYTES, 0)) <= begun_at:
                    return 0
            number = self.sweep()
            os.pwrite(lock, f"{begun_at:<{_TIME_BYTES}.6f}".encode(), 0)
            return number
        finally:
            os.close(lock)

    def sweep_in_turn(self, *, seconds: float, now: Callable[[], float]) -> int:
        """Sweep, unless a process of any machine has begun to in the last `seconds`; return what `sweep` does."""
        return self.sweep() if take_turn(self._database, Task.SWEEP, seconds=seconds, now=now) else 0

    def delete_stale_rows(self) -> None:
        """Delete the pending rows whose owners have ended, and those that this process gave up.

        Before the row of a job that was not stored, its adapters are deleted. That takes several transactions, and on
        PostgreSQL a writer that lost its lock may still run: the row first gets an owner that does not exist, so that
        the writer cannot store the job meanwhile.
        """
        abandoned = set(self._abandoned)
        with self._database.read() as connection:
            rows = connection.execute(sa.select(_KEY, pending_blobs.c.owner)).all()
        # After the rows: an owner's lock is held before its first row is committed.
        live = self._live({row.owner for row in rows})
        stale = abandoned.union(row.key for row in rows if row.owner not in live)
        for part in batched(stale):
            trained = job_adapters.c.job
            has_job = sa.exists().where(jobs.c.id == trained)
            with self._database.read() as connection:
                job_ids = connection.scalars(sa.select(trained).where(trained.in_(part), ~has_job).distinct()).all()
            if job_ids:
                with self._database.write() as connection:
                    taken = sa.update(pending_blobs).where(_KEY.in_(job_ids)).values(owner=uuid.uuid4().hex)
                    connection.execute(taken)
                    # A writer may have stored its job before this transaction.
                    job_ids = sorted(set(job_ids).difference(_stored_jobs(connection, job_ids)))
            for job_id in job_ids:
                delete_in_slices(self._database, job_adapters.c.position, job_adapters.c.job == job_id)
            with self._database.write() as connection:
                connection.execute(sa.delete(pending_blobs).where(_KEY.in_(part)))
        self._abandoned = [key for key in self._abandoned if key not in abandoned]

    @contextmanager
    def pending(self, key: str) -> Iterator[Callable[[Connection], None]]:
        """Hold a pending row under the id of a job whose adapters are stored before it.

        Yield what the transaction that stores the job has to call: it deletes the row, and raises `CatalogBusy` if it
        is gone or of another owner, because a sweep may have deleted the adapters. After an error, the adapters are
        deleted.
        """
        row = {"key": key, "owner": self.hold_owner()}
        with self._database.write() as connection:
            connection.execute(sa.insert(pending_blobs).values(row))

        def publish(connection: Connection) -> None:
            is_mine = (pending_blobs.c.key == key) & (pending_blobs.c.owner == self._owner)
            if connection.execute(sa.delete(pending_blobs).where(is_mine)).rowcount != 1:
                raise CatalogBusy(f"the pending row of the job {key} was deleted while it was stored; try again")

        try:
            yield publish
        except BaseException:
            self._abandoned.append(key)
            # If the outcome is unknown and the job is stored, so is the deletion of its row.
            with suppress(LoraplexError):
                self.delete_stale_rows()
            raise

    def hold_owner(self) -> str:
        """Return the id of this owner, whose lock is held from now on. Raises `StorageFailed`."""
        with self._reserving:
            self._hold_lock()
        return self._owner

    def is_other_live(self, owner: str, connection: Connection) -> bool:
        """Return, in a transaction, whether an id is that of another owner, of any process, that has not ended."""
        if owner == self._owner:
            return False
        if self._locks is not None:
            return bool(self._locks.live([owner], connection))
        return _is_locked(self._folder / f"{owner}{_LOCK_SUFFIX}")

    def _live(self, owners: Collection[str]) -> set[str]:
        """Return those of these owners that have not ended; remove the locks of the others."""
        return live_owners(self._folder, cleans=True) if self._locks is None else self._locks.live(owners)

    def close(self) -> None:
        """End this owner: its pending rows are stale from now on."""
        if self._locks is not None:
            self._locks.release()
        if self._release is not None:
            (self._folder / f"{self._owner}{_LOCK_SUFFIX}").unlink(missing_ok=True)
            self._release()

    def _new_name(self) -> str:
        """Return the name for a new blob, whose key has a committed pending row."""
        # If the catalogue is locked at this moment, take the last revision seen: a write does not wait for it.
        with suppress(CatalogBusy):
            self._revision = self._database.revision()
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
        if self._locks is not None:
            self._locks.hold(self._owner)
            return
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


def live_owners(writers: Path, *, cleans: bool = False) -> set[str]:
    """Return the owners whose locks in a folder are held, by any process; with `cleans`, remove the other files."""
    live = set()
    # Not `glob`, which takes a file in place of the folder for an empty folder.
    with suppress(FileNotFoundError):
        for path in map(writers.joinpath, os.listdir(writers)):
            if path.suffix == _LOCK_SUFFIX and _is_locked(path):
                live.add(path.stem)
            elif path.suffix == _LOCK_SUFFIX and cleans:
                path.unlink(missing_ok=True)
    return live


def _referenced(connection: Connection, names: Sequence[str]) -> set[str]:
    """Return those of the blobs of these names that rows of any table refer to."""
    return {name for column in _REFERENCES for name in connection.scalars(sa.select(column).where(column.in_(names)))}


def _stored_jobs(connection: Connection, job_ids: Sequence[str]) -> Sequence[str]:
    return connection.scalars(sa.select(jobs.c.id).where(jobs.c.id.in_(job_ids))).all()


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
