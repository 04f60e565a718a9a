"""A crash at each point of a publish: the old state or the new one, and no file that a sweep would not find."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from sqlite3 import connect

import pytest
import sqlalchemy as sa

from adapters.catalog.adapter_cache import find_adapter
from adapters.catalog.catalog import Catalog
from adapters.errors import JobNotFound
from adapters.jobs.job import JobStatus
from adapters.jobs.job_adapters import AdapterStatus, Selection
from adapters.jobs.queue import JobQueue
from adapters.jobs.revert import SkipReason
from adapters.names import Reference
from adapters.storage.schema import pending_blobs
from tests.acceptance.crash.crash_points import (
    FIRST_BATCH,
    FLEET,
    OF_A_BUCKET,
    POINTS,
    REVERTED,
    REVERTED_AT_ONCE,
    STORED_AT_ONCE,
    points_on,
)
from tests.conftest import place_storage
from tests.support.catalog_factories import make_adapter, publish_for, put, referenced_files, stored_files
from tests.support.databases import copy_storage, open_catalog, rows_of
from tests.support.deadlines import scaled
from tests.support.fork_server import run_code
from tests.support.storage_kinds import on_both_storages

pytestmark = on_both_storages

FILES_LEFT = {
    "the pending key is replaced, not committed": 1,
    "the blob is written, not synced": 1,
    "the blob is synced, not renamed": 1,
    "the blob is about to be renamed": 1,
    "the blob is renamed, its folder not synced": 1,
    "the blob is durable, no row yet": 1,
    "the version's row is in, not committed": 1,
    "live has moved, not committed": 1,
    "the revision has moved, not committed": 1,
    "the replacement is about to commit": 1,
    "the object is uploaded, its copy here is not complete": 1,
    "the same bytes lie there twice": 1,
    "a fleet's pages are in the file, not committed": 3,
    "the deletion is committed, the files are there": 1,
    "the job's data is there, its row is not": 1,
    "the job has published, not committed": 1,
    "the job's publish is committed, its data is there": 1,
    "a batch's blob is durable, no row yet": 1,
    "a batch's versions are in, nothing else": 1,
    "a batch is recorded, not committed": 1,
    "a part of a job's adapters is stored": 1,
    "a job's adapters are stored, its row is not": 1,
    "a large job is about to commit": 1,
    "the cancel is committed, the data is there": 1,
}
"""How many files nobody refers to after each crash; otherwise none."""


@pytest.fixture(scope="module")
def crashed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, database_kind: str
) -> dict[str, Path]:
    """For each point the data folder of a process that died there."""
    folder = tmp_path_factory.mktemp("crashed")
    (folder / "start").mkdir()
    place_storage(request, folder / "start", database_kind)
    code = "from tests.acceptance.crash.crash_points import main; main()"
    ended = run_code(code, folder, database_kind, timeout=scaled(200))
    assert ended.returncode == 0, ended.stderr
    points = points_on(database_kind)
    assert json.loads(ended.stdout) == dict.fromkeys(points, signal.SIGKILL)
    return {point: folder / str(number) for number, point in enumerate(points)}


@pytest.fixture(scope="module", params=[*POINTS, *OF_A_BUCKET])
def point(request: pytest.FixtureRequest, database_kind: str) -> str:
    """Where it died."""
    chosen: str = request.param
    if chosen not in points_on(database_kind):
        pytest.skip(f"{chosen}: this storage has no such point")
    return chosen


@pytest.fixture
def folder(crashed: dict[str, Path], point: str, tmp_path: Path) -> Path:
    """A copy of what it left."""
    return copy_storage(crashed[point], tmp_path / "data")


@pytest.fixture(scope="module")
def catalog(crashed: dict[str, Path], point: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    """Another copy, opened and swept, as every start does. Each of its tests changes what the others do not look at."""
    folder = copy_storage(crashed[point], tmp_path_factory.mktemp("swept") / "data")
    opened = open_catalog(folder, now=time.time)
    opened.sweep()
    yield opened
    opened.database.close()


def test_a_crash_leaves_the_old_state_or_the_new_one(catalog: Catalog, point: str) -> None:
    queue = JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=15)
    names = [adapter.name for adapter in catalog.adapters(tenant="default") if adapter.name not in (*FLEET, *REVERTED)]
    job = queue.get("claimed", tenant="default")
    if point == "the deletion is committed, the files are there":
        assert names == []
    else:
        # After the commit the new state, although nobody was told; before it the old one.
        seed, number = {
            "the replacement is committed, not answered": (2, 2),
            "the job's publish is committed, its data is there": (3, 2),
        }.get(point, (1, 1))
        assert names == ["acme"]
        version, adapter = find_adapter(catalog, Reference("acme"), tenant="default")
        assert version.version == number == catalog.adapter("acme", tenant="default").versions
        assert adapter.digest == version.digest == make_adapter(seed).digest
    ended = {
        "the job's publish is committed, its data is there": JobStatus.SUCCEEDED,
        "the cancel is committed, the data is there": JobStatus.CANCELLED,
    }
    assert job.status is ended.get(point, JobStatus.RUNNING)
    assert (job.result is not None) == (job.status is JobStatus.SUCCEEDED)
    if job.data_file is not None:
        assert catalog.blobs.read(job.data_file) == b"rows"
    if point == "the job is committed, not answered":
        assert queue.get("another", tenant="default").status is JobStatus.QUEUED
    else:
        with pytest.raises(JobNotFound):
            queue.get("another", tenant="default")


def test_a_batch_of_a_fleet_is_published_whole_or_not_at_all(catalog: Catalog, point: str) -> None:
    queue = JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=15)
    done = len(FLEET) if point == "a batch is committed, the job is not told" else FIRST_BATCH
    claim = queue.get("fleet", tenant="default")
    assert claim.status is JobStatus.RUNNING
    assert [one.name for one in queue.waiting(claim)] == FLEET[done:]
    published = queue.adapters("fleet", Selection(status=AdapterStatus.PUBLISHED), tenant="default")
    assert [one.name for one in published] == FLEET[:done]
    for one in published:
        version, adapter = find_adapter(catalog, Reference(one.name), tenant="default")
        assert (version.version, version.digest, version.job) == (one.version, one.digest, "fleet")
        assert adapter.digest == make_adapter(one.position).digest
    names = {adapter.name for adapter in catalog.adapters(tenant="default")}
    assert names - {"acme", *REVERTED} == set(FLEET[:done])
    # The next attempt goes on where it was, and a name that was rolled back counts from where it was.
    rest = publish_for(catalog, queue, claim, queue.waiting(claim))
    assert {one.version.version for one in rest} <= {1}
    assert queue.tally(claim) == {"published": len(FLEET), "failed": 0, "total": len(FLEET)}


def test_a_revert_that_was_cut_off_keeps_whole_slices_and_is_finished_by_the_next(catalog: Catalog, point: str) -> None:
    slices = {
        "the first slice of a revert is committed": 1,
        "the second slice of a revert is not committed": 1,
        "the second slice of a revert is committed": 2,
    }
    done = slices.get(point, 0) * REVERTED_AT_ONCE

    def live() -> list[int]:
        return [catalog.adapter(name, tenant="default").aliases["live"] for name in REVERTED]

    assert live() == [1] * done + [2] * (len(REVERTED) - done)
    queue = JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=15)
    rest = queue.revert("ended", tenant="default")
    assert [adapter.name for adapter in rest.reverted] == REVERTED[done:]
    assert [(adapter.name, adapter.reason) for adapter in rest.skipped] == [
        (name, SkipReason.LIVE_MOVED) for name in REVERTED[:done]
    ]
    assert live() == [1] * len(REVERTED)


ADAPTERS_LEFT = {
    "a part of a job's adapters is stored": 2 * STORED_AT_ONCE,
    "a job's adapters are stored, its row is not": len(FLEET),
    "a large job is about to commit": len(FLEET),
}
"""Number of rows of adapters without a job that a crash at a point leaves; 0 at all other points."""


def _adapters_of_no_job(folder: Path) -> int:
    ((number,),) = rows_of(folder, "SELECT COUNT(*) FROM job_adapters WHERE job NOT IN (SELECT id FROM jobs)")
    return int(number)


def test_a_sweep_removes_what_a_crash_left(folder: Path, point: str) -> None:
    opened = open_catalog(folder, now=time.time)
    assert _adapters_of_no_job(folder) == ADAPTERS_LEFT.get(point, 0)
    queue = JobQueue(opened.database, opened.writer, now=time.time, lease_seconds=15)
    assert [job.id for job in queue.list(tenant="default", adapter=FLEET[0])] == ["fleet"]
    left = stored_files(folder) - referenced_files(folder)
    assert len(left) == FILES_LEFT.get(point, 0)
    assert referenced_files(folder) <= stored_files(folder)
    assert opened.sweep() == len(left)
    assert stored_files(folder) == referenced_files(folder)
    assert _adapters_of_no_job(folder) == 0
    with opened.database.read() as connection:
        assert connection.scalars(sa.select(pending_blobs.c.key)).all() == []
    assert list((folder / "writers").glob("*.lock")) == []
    opened.database.close()


@pytest.mark.only_on_sqlite
def test_a_crash_leaves_a_sound_catalogue(folder: Path) -> None:
    with closing(connect(folder / "catalog.sqlite3")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.only_on_sqlite
def test_a_commit_that_was_cut_off_in_the_file_leaves_pages_to_undo(crashed: dict[str, Path]) -> None:
    folder = crashed["a fleet's pages are in the file, not committed"]
    assert (folder / "catalog.sqlite3-journal").stat().st_size > 0
    assert b"device-0000" in (folder / "catalog.sqlite3").read_bytes()


def test_after_a_crash_the_numbers_go_on(catalog: Catalog) -> None:
    taken = (
        [version.version for version in catalog.versions("acme", tenant="default")]
        if catalog.adapters(prefix="acme", tenant="default")
        else [1]
    )
    assert put(catalog, "acme", 9).version == max(taken) + 1
