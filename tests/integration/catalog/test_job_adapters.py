"""What a job trains: a fleet published in batches, what of it fails, what stays, and what a gate leaves as it is."""

import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from adapters.catalog.adapter_cache import find_adapter
from adapters.catalog.catalog import Catalog
from adapters.errors import AdapterDeleted, BadRows, ClaimLost, StorageFull
from adapters.jobs.job import JobStatus
from adapters.jobs.job_adapters import AdapterOutcome, AdapterStatus, JobAdapter, Selection, read_tally
from adapters.jobs.queue import FAILED_AT_ONCE, MAX_LOG_LINES, REVERTED_AT_ONCE, JobQueue
from adapters.lora.adapter import delta_norms
from adapters.names import Reference
from tests.support.catalog_factories import (
    claimed,
    finish,
    make_adapter,
    migrate,
    publication,
    publish_for,
    put,
    referenced_files,
    stored_files,
    submit,
    submit_fleet,
    submit_job,
    training_job,
)
from tests.support.databases import change_rows, open_catalog, rows_of
from tests.support.deadlines import scaled
from tests.support.storage_kinds import on_both_storages

pytestmark = on_both_storages

NAMES = [f"tenant-{number}" for number in range(6)]
ERROR = {"code": "diverged", "detail": "the loss stopped being finite"}


def _outcomes(queue: JobQueue, outcome: AdapterStatus, job_id: str = "j") -> list[str]:
    return [adapter.name for adapter in queue.adapters(job_id, Selection(status=outcome), tenant="default")]


def test_a_fleet_goes_batch_by_batch_and_what_is_published_is_served_at_once(catalog: Catalog, queue: JobQueue) -> None:
    submit_fleet(queue, NAMES)
    claim = claimed(queue)
    assert [(one.name, one.position) for one in queue.waiting(claim)] == list(zip(NAMES, range(6), strict=True))
    publish_for(catalog, queue, claim, queue.waiting(claim)[:4], metrics={"train_loss": 0.5})
    queue.fail_adapters(claim, [(4, ERROR)])
    assert _outcomes(queue, AdapterStatus.PUBLISHED) == NAMES[:4]
    assert [one.name for one in queue.waiting(claim)] == NAMES[5:]
    assert queue.tally(claim) == {"published": 4, "failed": 1, "total": 6}
    for one in queue.adapters("j", Selection(status=AdapterStatus.PUBLISHED), tenant="default"):
        version, adapter = find_adapter(catalog, Reference(one.name), tenant="default")
        assert (one.version, one.digest, one.metrics) == (1, version.digest, {"train_loss": 0.5})
        assert (one.moved_live, one.replaced, one.group) == (True, None, one.name)
        assert adapter.digest == make_adapter(one.position).digest
    (failed,) = queue.adapters("j", Selection(status=AdapterStatus.FAILED), tenant="default")
    assert (failed.name, failed.version, failed.error) == (NAMES[4], None, ERROR)
    assert queue.get("j", tenant="default").status is JobStatus.RUNNING


def test_the_next_attempt_goes_on_where_the_last_one_was(catalog: Catalog, queue: JobQueue) -> None:
    submit_fleet(queue, NAMES)
    first = claimed(queue)
    publish_for(catalog, queue, first, queue.waiting(first)[:2])
    queue.expire_lease(first)
    second = claimed(queue)
    with pytest.raises(ClaimLost):
        queue.waiting(first)
    with pytest.raises(ClaimLost):
        publish_for(catalog, queue, first, queue.adapters("j", tenant="default")[2:])
    publish_for(catalog, queue, second, queue.waiting(second))
    assert [catalog.adapter(name, tenant="default").versions for name in NAMES] == [1] * 6
    queue.succeed(second, result=None, progress={"step": 9}, metrics={"adapters": 6}, history=[[1, 0.5]])
    job = queue.get("j", tenant="default")
    assert (job.status, job.metrics, job.data_file) == (JobStatus.SUCCEEDED, {"adapters": 6}, None)


def test_a_cancelled_fleet_keeps_what_is_published(catalog: Catalog, queue: JobQueue, folder: Path) -> None:
    submit_fleet(queue, NAMES)
    claim = claimed(queue)
    publish_for(catalog, queue, claim, queue.waiting(claim)[:3])
    queue.cancel("j", tenant="default")
    for refused in (
        lambda: publish_for(catalog, queue, claim, queue.adapters("j", tenant="default")[3:]),
        lambda: queue.fail_adapters(claim, [(3, ERROR)]),
        lambda: queue.append_log(claim, "too late"),
    ):
        with pytest.raises(ClaimLost):
            refused()
    assert [adapter.name for adapter in catalog.adapters(tenant="default")] == NAMES[:3]
    assert _outcomes(queue, AdapterStatus.WAITING) == NAMES[3:]
    assert stored_files(folder) == referenced_files(folder)


def test_of_a_failed_job_what_was_waiting_has_its_error(catalog: Catalog, queue: JobQueue) -> None:
    submit_fleet(queue, NAMES)
    claim = claimed(queue)
    publish_for(catalog, queue, claim, queue.waiting(claim)[:3])
    queue.fail_adapters(claim, [(3, ERROR)])
    queue.fail(claim, {"code": "worker_died"})
    errors = [None if one.error is None else one.error["code"] for one in queue.adapters("j", tenant="default")]
    assert errors == [None, None, None, "diverged", "worker_died", "worker_died"]


def test_of_a_fleet_an_adapter_that_was_deleted_fails_alone(catalog: Catalog, queue: JobQueue, folder: Path) -> None:
    for name in NAMES[:3]:
        put(catalog, name)
    submit_fleet(queue, NAMES)
    catalog.delete(NAMES[1], tenant="default")
    catalog.delete(NAMES[2], tenant="default")
    put(catalog, NAMES[2], 9)
    claim = claimed(queue)
    published = publish_for(catalog, queue, claim, queue.waiting(claim), statistics=b"sums")
    assert [one.version.adapter for one in published] == [NAMES[0], *NAMES[3:]]
    assert _outcomes(queue, AdapterStatus.FAILED) == NAMES[1:3]
    assert {one.error["code"] for one in queue.adapters("j", tenant="default") if one.error} == {"adapter_deleted"}
    assert find_adapter(catalog, Reference(NAMES[2]), tenant="default")[1].digest == make_adapter(9).digest
    assert stored_files(folder) == referenced_files(folder)


def test_a_batch_of_which_every_adapter_was_deleted_publishes_nothing(
    catalog: Catalog, queue: JobQueue, folder: Path
) -> None:
    put(catalog, "a")
    submit_fleet(queue, ["a"])
    catalog.delete("a", tenant="default")
    claim, before = claimed(queue), catalog.revision()
    assert publish_for(catalog, queue, claim, queue.waiting(claim)) == []
    assert (catalog.revision(), catalog.adapters(tenant="default")) == (before, [])
    assert _outcomes(queue, AdapterStatus.FAILED) == ["a"]
    assert stored_files(folder) == referenced_files(folder)


def test_a_job_of_one_adapter_that_was_deleted_publishes_nothing(catalog: Catalog, queue: JobQueue) -> None:
    put(catalog, "acme")
    submit(queue)
    catalog.delete("acme", tenant="default")
    claim = claimed(queue)
    with pytest.raises(AdapterDeleted):
        finish(catalog, queue, claim)
    assert _outcomes(queue, AdapterStatus.WAITING) == ["acme"]


def test_live_moves_only_from_the_version_that_was_compared(catalog: Catalog, folder: Path) -> None:
    put(catalog, "acme", 1)
    gated = publication("acme", 2, checks_live=True, expected_live=1)
    assert [(one.moved_live, one.replaced) for one in catalog.publish([gated], tenant="default")] == [(True, 1)]
    (late,) = catalog.publish([publication("acme", 3, checks_live=True, expected_live=1)], tenant="default")
    assert (late.version.version, late.moved_live, late.replaced) == (3, False, None)
    assert catalog.adapter("acme", tenant="default").aliases == {"live": 2}
    first, second = catalog.publish([publication("new", 4, checks_live=True, expected_live=None)] * 2, tenant="default")
    assert (first.moved_live, second.moved_live) == (True, False)
    assert catalog.adapter("new", tenant="default").aliases == {"live": 1}


def test_a_job_of_a_fleet_is_found_by_each_of_its_names(catalog: Catalog, queue: JobQueue) -> None:
    submit_fleet(queue, NAMES, "fleet")
    submit(queue, "single", adapter=NAMES[2])
    assert [job.id for job in queue.list(adapter=NAMES[2], tenant="default")] == ["single", "fleet"]
    assert [job.id for job in queue.list(adapter=NAMES[3], tenant="default")] == ["fleet"]
    assert queue.list(adapter="{tenant}", tenant="default") == []
    claimed(queue)
    assert [job.id for job in queue.list(adapter=NAMES[2], status=JobStatus.QUEUED, tenant="default")] == ["single"]


def test_the_log_keeps_the_newest_lines_and_their_numbers(catalog: Catalog, queue: JobQueue) -> None:
    submit(queue)
    claim = claimed(queue)
    for number in range(1, MAX_LOG_LINES + 4):
        queue.append_log(claim, f"{number} " + "x" * 600)
    log = queue.get("j", tenant="default").log
    assert [line.number for line in log] == list(range(4, MAX_LOG_LINES + 4))
    assert [line.text[:4] for line in log] == [f"{number} xxxx"[:4] for number in range(4, MAX_LOG_LINES + 4)]
    assert {len(line.text) for line in log} == {500}
    queue.expire_lease(claim)
    queue.append_log(again := claimed(queue), "another attempt")
    assert queue.get("j", tenant="default").log[-1][1:] == ("another attempt", MAX_LOG_LINES + 4)
    queue.heartbeat(again, progress={"step": 1}, history=[[1, 0.5]])
    queue.heartbeat(again, progress={"step": 2})
    job = queue.get("j", tenant="default")
    assert (job.progress, job.history) == ({"step": 2}, [(1, 0.5)])


def test_data_may_be_written_as_they_come_and_what_fails_leaves_nothing(
    catalog: Catalog, queue: JobQueue, folder: Path
) -> None:
    def good(file: BinaryIO) -> None:
        for part in (b"a", b"bc"):
            file.write(part)

    def bad(file: BinaryIO) -> None:
        file.write(b"a")
        raise BadRows("row 7 cannot be used", rows=[])

    def full(file: BinaryIO) -> None:
        raise OSError(28, "No space left on device")

    stored = submit(queue, "good", data=good)
    assert stored.data_file is not None
    assert catalog.blobs.read(stored.data_file) == b"abc"
    for writer, error in ((bad, BadRows), (full, StorageFull)):
        with pytest.raises(error):
            submit(queue, "bad", data=writer)
    assert submit(queue, "none", data=None).data_file is None
    assert stored_files(folder) == {stored.data_file}
    assert [job.id for job in queue.list(tenant="default")] == ["none", "good"]


def test_statistics_stay_with_their_version_and_go_with_it(catalog: Catalog, folder: Path) -> None:
    made = [publication(name, 1, statistics=name.encode(), lineage={"seed": 3}) for name in ("a", "b")]
    versions = [one.version for one in catalog.publish(made, tenant="default")]
    assert catalog.sweep() == 0
    assert catalog.versions("a", tenant="default") == [versions[0]]
    assert versions[0].lineage == {"seed": 3}
    assert [catalog.blobs.read(version.statistics or "") for version in versions] == [b"a", b"b"]
    catalog.delete("a", tenant="default")
    # The statistics are gone at once; the bytes of the two lie in one file.
    assert stored_files(folder) == {versions[1].file, versions[1].statistics}


def test_norms_of_many_are_those_of_the_dense_products() -> None:
    adapters = [make_adapter(seed, rank=1 + seed % 3) for seed in range(9)]
    dense = [
        float(torch.linalg.matrix_norm(one.alpha / one.rank * one.a_OR.double() @ one.b_RI.double()))
        for one in adapters
    ]
    assert delta_norms(adapters) == pytest.approx(dense, rel=1e-12)


def _in_batches(waiting: Sequence[JobAdapter], size: int) -> list[Sequence[JobAdapter]]:
    return [waiting[begin : begin + size] for begin in range(0, len(waiting), size)]


@pytest.mark.only_on_sqlite
@pytest.mark.parametrize("adapters", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_fleet_of_thousands_is_queued_published_and_reverted(
    catalog: Catalog, queue: JobQueue, adapters: int
) -> None:
    names = [f"tenant-{number:05}" for number in range(adapters)]
    catalog.publish([publication(name, 1) for name in names[:600]], tenant="default")
    begun = time.monotonic()
    submit_fleet(queue, names)
    claim = claimed(queue)
    batches = _in_batches(queue.waiting(claim), 1000)
    for batch in batches:
        publish_for(catalog, queue, claim, batch)
    queue.cancel("j", tenant="default")
    assert queue.tally(claim) == {"published": adapters, "failed": 0, "total": adapters}
    before = catalog.revision()
    done = queue.revert("j", tenant="default")
    assert catalog.revision() == before + adapters / REVERTED_AT_ONCE
    assert time.monotonic() - begun < scaled(
        30
    )  # 2.3 ms for each adapter, as one by one, would take longer to publish alone
    assert done.skipped == []
    assert [back.name for back in done.reverted] == names
    assert [back.to for back in done.reverted] == [1] * 600 + [None] * (adapters - 600)
    assert catalog.adapter(names[0], tenant="default").aliases == {"live": 1}
    assert catalog.adapter(names[-1], tenant="default").aliases == {}


def _counted(folder: Path, job_id: str) -> dict[str, int]:
    """Count the adapters of a job, past the code under test."""
    counts = {
        "total": "TRUE",
        "published": "version IS NOT NULL",
        "failed": "error IS NOT NULL",
        "waiting": "version IS NULL AND error IS NULL",
        **{f"outcome_{name}": f"outcome = '{name}' AND \"group\" IS NOT NULL" for name in AdapterOutcome},
        "moved": 'moved_live AND "group" IS NOT NULL',
    }
    columns = ", ".join(f"COUNT(CASE WHEN {condition} THEN 1 END)" for condition in counts.values())
    (row,) = rows_of(folder, f"SELECT {columns} FROM job_adapters WHERE job = '{job_id}'")
    return dict(zip(counts, row, strict=True))


@pytest.mark.parametrize("is_of_older_release", [False, True])
def test_the_running_tally_is_what_a_count_of_the_adapters_says(
    catalog: Catalog, queue: JobQueue, folder: Path, monkeypatch: pytest.MonkeyPatch, is_of_older_release: bool
) -> None:
    monkeypatch.setattr("adapters.jobs.queue.FAILED_AT_ONCE", 4)
    names = [f"tenant-{number:02}" for number in range(30)]
    adapters = [JobAdapter(name, name, 1, position=number) for number, name in enumerate(names)]
    adapters.append(JobAdapter("prior", None, 1, position=30))
    put(catalog, names[7])
    training = replace(training_job(), is_fleet=True)
    submit_job(queue, "j", adapter="{tenant}", adapters=adapters, training=training)
    catalog.delete(names[7], tenant="default")
    claim = claimed(queue)
    if is_of_older_release:
        change_rows(folder, "UPDATE jobs SET tally = NULL")

    def check() -> None:
        with catalog.database.read() as connection:
            assert read_tally(connection, "j") == _counted(folder, "j")

    check()
    waiting = queue.waiting(claim)
    outcomes = ["better", "same", "worse", "better"]
    reports = {n: {"decision": {"outcome": outcomes[n % 4], "gain": 0.1}} for n in range(31)}
    publish_for(catalog, queue, claim, [*waiting[:8], waiting[30]], reports=reports)
    check()
    publish_for(catalog, queue, claim, waiting[8:12], reports=reports, moves_live=False)
    queue.fail_adapters(claim, [(position, ERROR) for position in range(12, 15)])
    check()
    # Again, as after a frame whose acknowledgement was lost.
    queue.fail_adapters(claim, [(position, ERROR) for position in range(13, 16)])
    check()
    assert queue.tally(claim) == {"published": 12, "failed": 5, "total": 31}
    queue.fail(claim, ERROR)
    check()
    job = queue.get("j", tenant="default")
    assert job.report is not None
    assert job.report["summary"] == {"better": 5, "same": 3, "worse": 3, "failed": 19, "moved": 7}
    assert {one.error["code"] for one in queue.adapters("j", tenant="default") if one.error} == {
        "diverged",
        "adapter_deleted",
    }


def test_a_failure_of_a_large_fleet_that_was_cut_off_is_taken_up_by_the_next_attempt(
    catalog: Catalog, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit_fleet(queue, [f"tenant-{number:05}" for number in range(2 * FAILED_AT_ONCE + 1)])
    claim = claimed(queue)

    def die(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("adapters.storage.slices.let_others_write", die)
        with pytest.raises(KeyboardInterrupt):
            queue.fail(claim, ERROR)
    assert queue.tally(claim) == {"published": 0, "failed": FAILED_AT_ONCE, "total": 2 * FAILED_AT_ONCE + 1}
    for _ in range(2):
        queue.expire_lease(claim)
        claim = claimed(queue)
        assert len(queue.waiting(claim)) == FAILED_AT_ONCE + 1
    queue.expire_lease(claim)
    assert queue.claim(base="") is None
    job = queue.get("j", tenant="default")
    assert (job.status, job.error and job.error["code"]) == (JobStatus.FAILED, "worker_died")
    assert queue.tally(claim) == {"published": 0, "failed": 2 * FAILED_AT_ONCE + 1, "total": 2 * FAILED_AT_ONCE + 1}


def test_a_job_from_before_fleets_has_its_adapter_too(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    migrate(path, "0001")
    common = ("default", "acme", "", 1, 1, "", 2, '{"shown": {"data": {"rows": 7}}}', "[]")
    with closing(sqlite3.connect(path)) as connection, connection:
        for job_id, status, result, metrics, error in (
            ("ok", "succeeded", '{"name": "acme", "version": 3, "digest": "sha256:00"}', '{"train_loss": 1.5}', None),
            ("bad", "failed", None, None, '{"code": "diverged"}'),
            ("on", "queued", None, None, None),
        ):
            connection.execute(
                "INSERT INTO jobs (id, status, result, metrics, error, tenant, adapter, created_at, attempt, fence,"
                " base, deletions, spec, history) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (job_id, status, result, metrics, error, *common),
            )
    opened = open_catalog(tmp_path, now=time.time)
    queue = JobQueue(opened.database, opened.writer, now=time.time, lease_seconds=15)
    with closing(opened.database):
        (ok,), (bad,), (on,) = (queue.adapters(job_id, tenant="default") for job_id in ("ok", "bad", "on"))
        assert (ok.version, ok.digest, ok.metrics, ok.rows) == (3, "sha256:00", {"train_loss": 1.5}, 7)
        assert (bad.version, bad.error) == (None, {"code": "diverged"})
        assert (on.version, on.deletions) == (None, 2)
        assert on.error is not None
        assert "older release" in on.error["detail"]
        assert queue.claim(base="") is None
        ended = queue.get("on", tenant="default")
        assert (ended.status, ended.data_file) == (JobStatus.FAILED, None)
        assert ended.finished_at is not None
        assert datetime.fromisoformat(ended.finished_at).tzinfo is not None
        assert [job.id for job in queue.list(adapter="acme", tenant="default")] == ["on", "bad", "ok"]
