"""The durable queue, on a clock that the test moves: lease, fence, attempts, cancel."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy.engine import Connection

from adapters.catalog import Catalog
from adapters.errors import AdapterDeleted, ClaimLost, JobEnded, QueueFull
from adapters.job_queue import MAX_ATTEMPTS, JobQueue
from adapters.jobs import Job, Status
from adapters.versions import Source, Version
from tests.catalog.making import publication, put, referenced_files, stored_files

LEASE_SECONDS = 15.0


class _Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    """Stands until the test moves it."""
    return _Clock()


@pytest.fixture
def queue(catalog: Catalog, clock: _Clock) -> JobQueue:
    """A queue on that clock."""
    return JobQueue(catalog.database, catalog.blobs, now=clock, lease_seconds=LEASE_SECONDS)


def _submit(queue: JobQueue, job_id: str = "j", *, adapter: str = "acme", max_queued: int = 100) -> Job:
    return queue.submit(
        job_id,
        adapter=adapter,
        base="",
        feature_space=None,
        spec={},
        steps=9,
        data=b"rows",
        max_queued=max_queued,
    )


def _claim(queue: JobQueue) -> Job:
    claim = queue.claim()
    assert claim is not None
    return claim


def _publish(catalog: Catalog, queue: JobQueue, claim: Job, seed: int = 0) -> Version:
    def succeed(connection: Connection, versions: Sequence[Version]) -> None:
        queue.succeed(connection, claim, versions[0], progress={}, metrics={}, history=[])

    made = publication(claim.adapter, seed, source=Source.JOB, job=claim.id)
    return catalog.publish([made], also=succeed)[0]


def test_jobs_are_claimed_in_the_order_in_which_they_were_queued(queue: JobQueue) -> None:
    for job_id in "cab":
        _submit(queue, job_id)
    assert [_claim(queue).id for _ in range(3)] == ["c", "a", "b"]
    assert queue.claim() is None


def test_a_lease_that_is_renewed_is_kept_and_one_that_is_not_is_lost(queue: JobQueue, clock: _Clock) -> None:
    _submit(queue)
    first = _claim(queue)
    for _ in range(5):
        clock.now += LEASE_SECONDS - 1
        queue.heartbeat(first, progress=None, history=[])
        assert queue.claim() is None
    clock.now += LEASE_SECONDS
    second = _claim(queue)
    assert (second.attempt, second.fence, second.started_at) == (2, first.fence + 1, first.started_at)
    with pytest.raises(ClaimLost):
        queue.heartbeat(first, progress=None, history=[])


def test_a_late_publish_is_refused_by_its_fence(catalog: Catalog, queue: JobQueue, clock: _Clock, folder: Path) -> None:
    _submit(queue)
    late = _claim(queue)
    clock.now += LEASE_SECONDS
    in_time = _claim(queue)
    with pytest.raises(ClaimLost):
        _publish(catalog, queue, late, seed=1)
    version = _publish(catalog, queue, in_time, seed=2)
    with pytest.raises(ClaimLost):
        _publish(catalog, queue, late, seed=3)
    with pytest.raises(ClaimLost):
        _publish(catalog, queue, in_time, seed=4)
    assert catalog.versions("acme") == [version]
    assert queue.get("j").result == {"name": "acme", "version": 1, "digest": version.digest}
    queue.remove_data(late)
    assert stored_files(folder) == {version.file}


def test_the_third_death_ends_a_job(queue: JobQueue, clock: _Clock, folder: Path) -> None:
    _submit(queue)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert _claim(queue).attempt == attempt
        clock.now += LEASE_SECONDS
    assert queue.claim() is None
    job = queue.get("j")
    assert (job.status, job.attempt) == (Status.FAILED, 3)
    assert job.error is not None
    assert job.error["code"] == "worker_died"
    assert job.finished_at is not None
    assert stored_files(folder) == referenced_files(folder) == set()


def test_a_job_that_kills_its_trainers_does_not_hold_up_the_next_one(queue: JobQueue, clock: _Clock) -> None:
    _submit(queue, "deadly")
    _submit(queue, "harmless")
    for _ in range(MAX_ATTEMPTS):
        assert _claim(queue).id == "deadly"
        clock.now += LEASE_SECONDS
    assert _claim(queue).id == "harmless"
    assert queue.get("deadly").status is Status.FAILED


def test_a_lease_that_was_handed_back_does_not_count(queue: JobQueue) -> None:
    _submit(queue)
    for _ in range(2 * MAX_ATTEMPTS):
        claim = _claim(queue)
        assert claim.attempt == 1
        queue.hand_back(claim)
        assert (queue.get("j").status, queue.get("j").attempt) == (Status.QUEUED, 0)
    with pytest.raises(ClaimLost):
        queue.hand_back(claim)


def test_a_job_whose_fit_died_is_taken_again_at_once_and_the_death_counts(queue: JobQueue) -> None:
    _submit(queue)
    queue.abandon(_claim(queue))
    assert _claim(queue).attempt == 2


@pytest.mark.parametrize("running", [False, True])
def test_a_cancelled_job_stays_so_and_publishes_nothing(
    catalog: Catalog, queue: JobQueue, folder: Path, running: bool
) -> None:
    _submit(queue)
    claim = _claim(queue) if running else None
    cancelled = queue.cancel("j")
    assert cancelled.status is Status.CANCELLED
    assert queue.cancel("j") == cancelled
    assert queue.claim() is None
    if claim is not None:
        with pytest.raises(ClaimLost):
            queue.check_ours(claim)
        with pytest.raises(ClaimLost):
            _publish(catalog, queue, claim)
        with pytest.raises(ClaimLost):
            queue.fail(claim, {}, history=[])
    assert catalog.adapters() == []
    assert stored_files(folder) == set()


def test_an_ended_job_cannot_be_cancelled(catalog: Catalog, queue: JobQueue) -> None:
    _submit(queue, "ok")
    _publish(catalog, queue, _claim(queue))
    _submit(queue, "not ok")
    queue.fail(_claim(queue), {"code": "diverged"}, history=[])
    for job_id in ("ok", "not ok"):
        with pytest.raises(JobEnded):
            queue.cancel(job_id)


def test_a_job_of_an_adapter_that_was_deleted_since_publishes_nothing(catalog: Catalog, queue: JobQueue) -> None:
    put(catalog, "acme", 1)
    _submit(queue)
    catalog.delete("acme")
    put(catalog, "acme", 2)
    with pytest.raises(AdapterDeleted):
        _publish(catalog, queue, _claim(queue), seed=3)
    assert [version.version for version in catalog.versions("acme")] == [2]


def test_a_full_queue_refuses_and_stores_nothing(queue: JobQueue, folder: Path) -> None:
    _submit(queue, "a", max_queued=2)
    _submit(queue, "b", max_queued=2)
    before = stored_files(folder)
    with pytest.raises(QueueFull):
        _submit(queue, "c", max_queued=2)
    assert stored_files(folder) == before
    _claim(queue)  # a running job does not wait
    _submit(queue, "c", max_queued=2)
