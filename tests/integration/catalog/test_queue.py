"""The durable queue, on a clock that the test moves: lease, fence, attempts, cancel."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.errors import AdapterDeleted, ClaimLost, JobEnded, QueueFull
from adapters.jobs.job import JobStatus
from adapters.jobs.queue import MAX_ATTEMPTS, JobQueue
from tests.support.catalog_factories import claimed, finish, put, referenced_files, stored_files, submit
from tests.support.storage_kinds import on_both_storages

pytestmark = on_both_storages

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
    return JobQueue(catalog.database, catalog.writer, now=clock, lease_seconds=LEASE_SECONDS)


def test_jobs_are_claimed_in_the_order_in_which_they_were_queued(queue: JobQueue) -> None:
    for job_id in "cab":
        submit(queue, job_id)
    assert [claimed(queue).id for _ in range(3)] == ["c", "a", "b"]
    assert queue.claim(base="") is None


def test_a_trainer_takes_the_jobs_of_its_own_base_layer_alone(queue: JobQueue, clock: _Clock) -> None:
    for job_id, base in (("old", "a"), ("first", "b"), ("second", "b")):
        submit(queue, job_id, base=base)
    assert [claimed(queue, base="b").id for _ in range(2)] == ["first", "second"]
    assert queue.claim(base="b") is None
    old = queue.get("old", tenant="default")
    assert (old.status, old.attempt) == (JobStatus.QUEUED, 0)
    held = claimed(queue, base="a")
    # Nor does it take over, or end, one whose trainer died.
    for _ in range(MAX_ATTEMPTS):
        clock.now += LEASE_SECONDS
        assert queue.claim(base="c") is None
    assert queue.get("old", tenant="default").status is JobStatus.RUNNING
    assert claimed(queue, base="a").fence == held.fence + 1


def test_jobs_for_another_base_layer_do_not_fill_the_queue(queue: JobQueue) -> None:
    for job_id in "ab":
        submit(queue, job_id, base="other", max_queued=2)
    submit(queue, "c", base="mine", max_queued=2)
    submit(queue, "d", base="mine", max_queued=2)
    for base in ("other", "mine"):
        with pytest.raises(QueueFull):
            submit(queue, "e", base=base, max_queued=2)


def _backlogs(queue: JobQueue, **jobs: int) -> None:
    """Queue so many jobs of each tenant, all of the first before those of the next."""
    for tenant, count in jobs.items():
        for number in range(count):
            submit(queue, f"{tenant}-{number}", tenant=tenant)


def test_claims_take_turns_between_tenants_and_keep_the_order_of_each(queue: JobQueue, clock: _Clock) -> None:
    _backlogs(queue, busy=4, quiet=2, late=1)
    order = []
    for _ in range(7):
        # One trainer: each job ends before the next claim.
        job = claimed(queue)
        order.append(job.id)
        clock.now += 1
        queue.fail(job, {"code": "diverged"}, history=[])
    assert order == ["busy-0", "quiet-0", "late-0", "busy-1", "quiet-1", "busy-2", "busy-3"]


def test_the_tenant_with_the_fewest_running_jobs_is_served_first(queue: JobQueue, clock: _Clock) -> None:
    _backlogs(queue, busy=3, quiet=2)
    first = claimed(queue)
    clock.now += 1
    second = claimed(queue)
    assert (first.id, second.id) == ("busy-0", "quiet-0")
    clock.now += 1
    queue.fail(second, {"code": "diverged"}, history=[])
    # The busy tenant was served less recently, but still has a job.
    assert claimed(queue).id == "quiet-1"
    # A job whose trainer died does not run, and is the oldest of its tenant.
    clock.now += LEASE_SECONDS
    assert claimed(queue).id == "busy-0"


def test_a_tenant_that_was_served_before_the_clock_was_set_back_keeps_its_turns(queue: JobQueue, clock: _Clock) -> None:
    _backlogs(queue, a=3, b=3)
    order = ""
    for _ in range(5):
        job = claimed(queue)
        order += job.tenant
        queue.fail(job, {"code": "diverged"}, history=[])
        clock.now += 1 if len(order) > 1 else -1000
    # As if neither had been served before the clock was set back.
    assert order == "aabab"


def test_two_trainers_at_once_never_claim_one_job_and_serve_both_tenants(queue: JobQueue) -> None:
    _backlogs(queue, busy=8, quiet=4)

    def work() -> list[str]:
        return [claimed(queue).id for _ in range(4)]

    with ThreadPoolExecutor(2) as threads:
        first, second = (future.result(timeout=60) for future in [threads.submit(work), threads.submit(work)])
    # Nothing ends, so that the two tenants have as many running jobs after every second claim.
    claims = [f"{tenant}-{number}" for tenant in ("busy", "quiet") for number in range(4)]
    assert sorted([*first, *second]) == claims


@pytest.mark.only_on_sqlite
def test_a_claim_reads_indexes_alone_until_it_has_chosen_a_job(catalog: Catalog, queue: JobQueue) -> None:
    plans: list[str] = []

    def explain(_connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "FROM jobs" in statement:
            plan = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.extend(str(row[3]) for row in plan)

    sa.event.listen(sa.Engine, "before_cursor_execute", explain)
    try:
        assert queue.claim(base="b") is None
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", explain)
    searched = [plan for plan in plans if "jobs" in plan or "other" in plan]
    assert len(searched) == 5
    assert "SEARCH jobs USING COVERING INDEX ix_jobs_status_tenant (status=? AND base=?)" in searched
    assert all(" INDEX ix_jobs_" in plan and plan.startswith("SEARCH") for plan in searched)


def test_a_lease_that_is_renewed_is_kept_and_one_that_is_not_is_lost(queue: JobQueue, clock: _Clock) -> None:
    submit(queue)
    first = claimed(queue)
    for _ in range(5):
        clock.now += LEASE_SECONDS - 1
        queue.heartbeat(first, progress=None, history=[])
        assert queue.claim(base="") is None
    clock.now += LEASE_SECONDS
    second = claimed(queue)
    assert (second.attempt, second.fence, second.started_at) == (2, first.fence + 1, first.started_at)
    with pytest.raises(ClaimLost):
        queue.heartbeat(first, progress=None, history=[])


def test_a_late_publish_is_refused_by_its_fence(catalog: Catalog, queue: JobQueue, clock: _Clock, folder: Path) -> None:
    submit(queue)
    late = claimed(queue)
    clock.now += LEASE_SECONDS
    in_time = claimed(queue)
    with pytest.raises(ClaimLost):
        finish(catalog, queue, late)
    version = finish(catalog, queue, in_time)
    with pytest.raises(ClaimLost):
        finish(catalog, queue, late)
    with pytest.raises(ClaimLost):
        finish(catalog, queue, in_time)
    assert catalog.versions("acme", tenant="default") == [version]
    assert queue.get("j", tenant="default").result == {"name": "acme", "version": 1, "digest": version.digest}
    queue.remove_data(late)
    assert stored_files(folder) == {version.file}


def test_the_third_death_ends_a_job(queue: JobQueue, clock: _Clock, folder: Path) -> None:
    submit(queue)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert claimed(queue).attempt == attempt
        clock.now += LEASE_SECONDS
    assert queue.claim(base="") is None
    job = queue.get("j", tenant="default")
    assert (job.status, job.attempt) == (JobStatus.FAILED, 3)
    assert job.error is not None
    assert job.error["code"] == "worker_died"
    assert job.finished_at is not None
    assert stored_files(folder) == referenced_files(folder) == set()


def test_a_job_that_kills_its_trainers_does_not_hold_up_the_next_one(queue: JobQueue, clock: _Clock) -> None:
    submit(queue, "deadly")
    submit(queue, "harmless")
    for _ in range(MAX_ATTEMPTS):
        assert claimed(queue).id == "deadly"
        clock.now += LEASE_SECONDS
    assert claimed(queue).id == "harmless"
    assert queue.get("deadly", tenant="default").status is JobStatus.FAILED


def test_a_lease_that_was_handed_back_does_not_count(queue: JobQueue) -> None:
    submit(queue)
    for _ in range(2 * MAX_ATTEMPTS):
        claim = claimed(queue)
        assert claim.attempt == 1
        queue.release(claim)
        job = queue.get("j", tenant="default")
        assert (job.status, job.attempt) == (JobStatus.QUEUED, 0)
    with pytest.raises(ClaimLost):
        queue.release(claim)


def test_a_job_whose_fit_died_is_taken_again_at_once_and_the_death_counts(queue: JobQueue) -> None:
    submit(queue)
    queue.expire_lease(claimed(queue))
    assert claimed(queue).attempt == 2


@pytest.mark.parametrize("running", [False, True])
def test_a_cancelled_job_stays_so_and_publishes_nothing(
    catalog: Catalog, queue: JobQueue, folder: Path, running: bool
) -> None:
    submit(queue)
    claim = claimed(queue) if running else None
    cancelled = queue.cancel("j", tenant="default")
    assert cancelled.status is JobStatus.CANCELLED
    assert queue.cancel("j", tenant="default") == cancelled
    assert queue.claim(base="") is None
    if claim is not None:
        with pytest.raises(ClaimLost):
            queue.check_claim(claim)
        with pytest.raises(ClaimLost):
            finish(catalog, queue, claim)
        with pytest.raises(ClaimLost):
            queue.fail(claim, {"code": "diverged"}, history=[])
    assert catalog.adapters(tenant="default") == []
    assert stored_files(folder) == set()


def test_an_ended_job_cannot_be_cancelled(catalog: Catalog, queue: JobQueue) -> None:
    submit(queue, "ok")
    finish(catalog, queue, claimed(queue))
    submit(queue, "not ok")
    queue.fail(claimed(queue), {"code": "diverged"}, history=[])
    for job_id in ("ok", "not ok"):
        with pytest.raises(JobEnded):
            queue.cancel(job_id, tenant="default")


def test_a_job_of_an_adapter_that_was_deleted_since_publishes_nothing(catalog: Catalog, queue: JobQueue) -> None:
    put(catalog, "acme", 1)
    submit(queue)
    catalog.delete("acme", tenant="default")
    put(catalog, "acme", 2)
    with pytest.raises(AdapterDeleted):
        finish(catalog, queue, claimed(queue))
    assert [version.version for version in catalog.versions("acme", tenant="default")] == [2]


def test_a_full_queue_refuses_and_stores_nothing(queue: JobQueue, folder: Path) -> None:
    submit(queue, "a", max_queued=2)
    submit(queue, "b", max_queued=2)
    before = stored_files(folder)
    with pytest.raises(QueueFull):
        submit(queue, "c", max_queued=2)
    assert stored_files(folder) == before
    claimed(queue)  # a running job does not wait
    submit(queue, "c", max_queued=2)


def test_of_two_submitters_at_once_only_one_gets_the_last_place(queue: JobQueue, folder: Path) -> None:
    submit(queue, "first", max_queued=2)
    both_write = threading.Barrier(2, timeout=30)

    def write(file: BinaryIO) -> None:
        # Both have found a place free before either of them stores its job.
        both_write.wait()
        file.write(b"rows")

    with ThreadPoolExecutor(2) as threads:
        submitted = [threads.submit(submit, queue, job_id, data=write, max_queued=2) for job_id in "ab"]
        errors = [future.exception() for future in submitted]
    assert [type(error) for error in errors if error is not None] == [QueueFull], errors
    accepted = [future.result().id for future, error in zip(submitted, errors, strict=True) if error is None]
    assert [job.id for job in queue.list(tenant="default")] == [*accepted, "first"]
    assert stored_files(folder) == referenced_files(folder)
    assert len(stored_files(folder)) == 2
