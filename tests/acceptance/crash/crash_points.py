"""Dies by `kill -9` at each point of a publish, a deletion or the life of a job.

`python -m tests.acceptance.crash.crash_points FOLDER KIND` makes one data folder a point, each by a child of its own,
all from the same start: `acme` with one version, a job that a trainer has claimed, and one of a fleet of which half
is published. `FOLDER/start` names the database and the bucket, if there are any.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch
from sqlalchemy.engine import Connection

from adapters.catalog import queries
from adapters.catalog.versions import Published
from adapters.jobs import job_adapters
from adapters.jobs import queue as jobs_queue
from adapters.jobs.job import Job
from adapters.jobs.queue import JobQueue
from adapters.storage import slices
from adapters.storage.pending_blobs import BlobWriter, Upload
from tests.support.catalog_factories import claimed, publication, publish_for, put, submit, submit_fleet
from tests.support.databases import copy_storage, open_catalog
from tests.support.storage_kinds import CLUSTER

FLEET = [f"tenant-{number:02}" for number in range(40)]
FIRST_BATCH = 20
"""Of the fleet's adapters, published before anything dies."""
REVERTED = [f"reverted-{number:02}" for number in range(10)]
"""Adapters with a first version, and a live one of a fleet that has ended."""
REVERTED_AT_ONCE = 4
STORED_AT_ONCE = 16


def die(*_: object, **__: object) -> None:
    """At once, as in a power cut: nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


class House:
    """One data folder and what is done to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog = open_catalog(folder, now=time.time, trash_days=0)
        # The first blob of a process makes its lock and commits pending rows: the points are those of a later one.
        with self.catalog.writer.upload() as upload:
            upload.write(b"removed at once")
        self.queue = JobQueue(self.catalog.database, self.catalog.writer, now=time.time, lease_seconds=15)

    def submit(self, job_id: str) -> Job:
        """Queue a job for acme."""
        return submit(self.queue, job_id)

    def replace(self) -> object:
        """Publish version 2 of acme."""
        return put(self.catalog, "acme", 2)

    def replace_at_first(self) -> object:
        """Publish version 2 of acme as the first change of a process."""
        return put(open_catalog(self.folder, now=time.time), "acme", 2)

    def replace_by_the_same(self) -> object:
        """Upload what is live."""
        return put(self.catalog, "acme", 1)

    def fleet(self) -> object:
        """Publish many adapters at once, more than SQLite keeps in memory before it commits."""
        return self.catalog.publish(
            [publication(f"device-{n:04}", n) for n in range(150)], record=self.before_commit, tenant="default"
        )

    def delete(self) -> object:
        """Delete acme."""
        self.catalog.delete("acme", tenant="default")
        return None

    def finish(self) -> object:
        """Publish what the claimed job made."""
        claim = self.queue.get("claimed", tenant="default")

        def succeed(connection: Connection, published: Sequence[Published]) -> None:
            self.queue.record(connection, claim, published)
            result = {"name": "acme"}
            self.queue.succeed(claim, result=result, progress={}, metrics={}, history=[], connection=connection)
            self.before_commit()

        made = self.catalog.publish(
            [publication("acme", 3, job=claim.id, position=0)], record=succeed, tenant="default"
        )
        self.queue.remove_data(claim)
        return made

    def publish_a_batch(self) -> object:
        """Publish the second half of the claimed fleet."""
        claim = self.queue.get("fleet", tenant="default")
        rest = self.queue.waiting(claim)
        return publish_for(self.catalog, self.queue, claim, rest, record=self.before_commit)

    def cancel(self) -> object:
        """Cancel the claimed job."""
        return self.queue.cancel("claimed", tenant="default")

    def revert(self) -> object:
        """Revert the fleet that has ended, in slices."""
        return self.queue.revert("ended", tenant="default")

    def submit_large(self) -> object:
        """Queue a job whose adapters are stored in slices."""
        return submit_fleet(self.queue, FLEET, "large")

    def submit_another(self) -> object:
        """Queue a job."""
        return self.submit("another")

    def before_commit(self, *_: object) -> None:
        """Where the last statement has run."""


def _at_slice(number: int, owner: Any, name: str, *, after: bool = False) -> Callable[[House], None]:
    """Die in a slice of a change, counted from 1, in place of a call of a module or after it."""

    def patch(_: House) -> None:
        jobs_queue.REVERTED_AT_ONCE, job_adapters.STORED_AT_ONCE = REVERTED_AT_ONCE, STORED_AT_ONCE
        original, earlier = getattr(owner, name), iter(range(1, number))

        def called(*arguments: Any, **named: Any) -> Any:
            if next(earlier, None) is None:
                if after:
                    original(*arguments, **named)
                die()
            return original(*arguments, **named)

        setattr(owner, name, called)

    return patch


def _instead(owner: Any, name: str, *, after: bool = False) -> Callable[[House], None]:
    """Die in place of a call, or after it."""

    def patch(_: House) -> None:
        original = getattr(owner, name)

        def called(*arguments: Any, **named: Any) -> None:
            if after:
                original(*arguments, **named)
            die()

        setattr(owner, name, called)

    return patch


def _instead_of_blobs(name: str, *, after: bool = False) -> Callable[[House], None]:
    """Die in place of a call of the blobs, in a folder or in a bucket, or after it."""
    return lambda house: _instead(type(house.catalog.blobs), name, after=after)(house)


def _engine(house: House) -> sa.Engine:
    engine: sa.Engine = house.catalog.database._engine  # type: ignore[attr-defined]
    return engine


def _at_commit(house: House) -> None:
    """Die in place of the commit of a write, in any database of the process."""
    for name in ("write", "write_job"):
        # In the class that defines it, which is that of other databases too.
        kind = next(kind for kind in type(house.catalog.database).__mro__ if name in vars(kind))
        setattr(kind, name, _cut_off(getattr(kind, name)))


def _cut_off(write: Callable[[Any], AbstractContextManager[Connection]]) -> Callable[[Any], Any]:
    @contextmanager
    def cut_off(database: Any) -> Iterator[Connection]:
        with write(database) as connection:
            yield connection
            die()

    return cut_off


def _after_commit(house: House) -> None:
    write = house.catalog.database.write

    @contextmanager
    def committed() -> Any:
        with write() as connection:
            yield connection
        die()

    house.catalog.database.write = committed  # type: ignore[method-assign]


def _spill(house: House) -> None:
    """Let SQLite write pages of the open transaction into its file, so that a hot journal is left to undo them."""
    _engine(house).dispose()
    sa.event.listen(_engine(house), "connect", lambda connection, _: connection.execute("PRAGMA cache_size=5"))
    house.before_commit = die  # type: ignore[method-assign]


def _in_last_statement(house: House) -> None:
    house.before_commit = die  # type: ignore[method-assign]


POINTS: dict[str, tuple[Callable[[House], object], Callable[[House], None]]] = {
    "the writer's lock has no name": (House.replace_at_first, _instead(Path, "rename")),
    "the writer's lock is held, no key is pending": (
        House.replace_at_first,
        _instead(BlobWriter, "_hold_lock", after=True),
    ),
    "keys are pending, not committed": (House.replace_at_first, _at_commit),
    "keys are pending, no file": (House.replace, _instead_of_blobs("write")),
    "the pending key is replaced, not committed": (House.replace, _instead(Upload, "publish", after=True)),
    "the blob is written, not synced": (House.replace, _instead(os, "fsync")),
    "the blob is synced, not renamed": (House.replace, _instead(os, "fsync", after=True)),
    "the blob is about to be renamed": (House.replace, _instead(Path, "rename")),
    "the blob is renamed, its folder not synced": (House.replace, _instead(Path, "rename", after=True)),
    "the blob is durable, no row yet": (House.replace, _instead_of_blobs("write", after=True)),
    "the version's row is in, not committed": (House.replace, _instead(queries, "insert_versions", after=True)),
    "live has moved, not committed": (House.replace, _instead(queries, "set_alias", after=True)),
    "the revision has moved, not committed": (House.replace, _instead(queries, "increment_revision", after=True)),
    "the replacement is about to commit": (House.replace, _at_commit),
    "the replacement is committed, not answered": (House.replace, _after_commit),
    "the same bytes lie there twice": (House.replace_by_the_same, _instead_of_blobs("remove")),
    "a fleet's pages are in the file, not committed": (House.fleet, _spill),
    "the deletion is about to commit": (House.delete, _at_commit),
    "the deletion is committed, the files are there": (House.delete, _after_commit),
    "the job's data is there, its row is not": (House.submit_another, _instead_of_blobs("write", after=True)),
    "the job is committed, not answered": (House.submit_another, _after_commit),
    "the job has published, not committed": (House.finish, _in_last_statement),
    "the job's publish is committed, its data is there": (House.finish, _after_commit),
    "a batch's blob is durable, no row yet": (House.publish_a_batch, _instead_of_blobs("write", after=True)),
    "a batch's versions are in, nothing else": (
        House.publish_a_batch,
        _instead(queries, "insert_versions", after=True),
    ),
    "a batch is recorded, not committed": (House.publish_a_batch, _in_last_statement),
    "a batch is committed, the job is not told": (House.publish_a_batch, _after_commit),
    "the first slice of a revert is not committed": (House.revert, _at_slice(1, jobs_queue, "revert", after=True)),
    "the first slice of a revert is committed": (House.revert, _at_slice(1, slices, "let_others_write")),
    "the second slice of a revert is not committed": (House.revert, _at_slice(2, jobs_queue, "revert", after=True)),
    "the second slice of a revert is committed": (House.revert, _at_slice(2, slices, "let_others_write")),
    "a part of a job's adapters is stored": (House.submit_large, _at_slice(2, slices, "let_others_write")),
    "a job's adapters are stored, its row is not": (House.submit_large, _at_slice(2, jobs_queue, "_check_room")),
    "a large job is about to commit": (House.submit_large, _at_slice(1, jobs_queue, "_record", after=True)),
    "the cancel is about to commit": (House.cancel, _at_commit),
    "the cancel is committed, the data is there": (House.cancel, _after_commit),
}


_OF_A_CLUSTER = (
    *("adapters.storage.object_blobs", "adapters.storage.postgres_database"),
    *("psycopg", "sqlalchemy.dialects.postgresql.psycopg", "tests.support.object_server"),
)
OF_ONE_MACHINE = (
    "the writer's lock has no name",
    "the blob is written, not synced",
    "the blob is synced, not renamed",
    "the blob is about to be renamed",
    "the blob is renamed, its folder not synced",
    "a fleet's pages are in the file, not committed",
)
"""Points in calls of a file system, or in SQLite's file."""
OF_A_BUCKET: dict[str, tuple[Callable[[House], object], Callable[[House], None]]] = {
    "the object is about to be uploaded": (House.replace, _instead_of_blobs("write_file")),
    "the object is uploaded, its copy here is not complete": (
        House.replace,
        _instead_of_blobs("write_file", after=True),
    ),
}


def points_on(kind: str) -> Mapping[str, tuple[Callable[[House], object], Callable[[House], None]]]:
    """The points of a kind of storage."""
    if kind != CLUSTER:
        return POINTS
    return {name: point for name, point in POINTS.items() if name not in OF_ONE_MACHINE} | OF_A_BUCKET


def make_start(folder: Path) -> None:
    """A data folder as each child finds it."""
    house = House(folder)
    house.catalog.publish([publication(name, 100) for name in REVERTED], tenant="default")
    submit_fleet(house.queue, REVERTED, "ended", data=None)
    claim = claimed(house.queue)
    publish_for(house.catalog, house.queue, claim, house.queue.waiting(claim))
    house.queue.cancel("ended", tenant="default")
    put(house.catalog, "acme", 1)
    house.submit("claimed")
    assert house.queue.claim(base="") is not None
    submit_fleet(house.queue, FLEET, "fleet")
    claim = claimed(house.queue)
    publish_for(house.catalog, house.queue, claim, house.queue.waiting(claim)[:FIRST_BATCH])
    house.catalog.database.close()


def main() -> None:
    """Die at each point; the parent goes on, and says how each child ended."""
    folder, ended = Path(sys.argv[1]), {}
    # A process with more threads should not be forked.
    torch.set_num_threads(1)
    if sys.argv[2] == CLUSTER:
        # Once, and not in each child.
        for name in _OF_A_CLUSTER:
            import_module(name)
    # By a child too: threads of this process, such as obstore's, would not survive the forks.
    if os.fork() == 0:
        make_start(folder / "start")
        os._exit(0)
    assert os.wait()[1] == 0, "no start"
    for number, (point, (action, patch)) in enumerate(points_on(sys.argv[2]).items()):
        child = os.fork()
        if child == 0:
            house = House(copy_storage(folder / "start", folder / str(number)))
            patch(house)
            action(house)
            os._exit(1)
        ended[point] = -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
