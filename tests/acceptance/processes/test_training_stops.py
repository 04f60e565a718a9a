"""A trainer that stands still past its lease, in the middle of a fleet or between two checkpoints, comes back too late.

What it still does reaches neither the catalogue nor the checkpoint of the one that has its job now.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from adapters.jobs.job import JobStatus
from adapters.jobs.queue import JobQueue
from adapters.training.execution.fit_client import ChildFitter
from app.service import Service
from tests.conftest import Serve
from tests.support.long_jobs import submit, versions
from tests.support.process_tree import (
    FIT,
    LEASE_SECONDS,
    TrainerProcess,
    children,
    is_running,
    session_of,
    suspend_without_lock,
    suspended,
    the,
)
from tests.support.service import ServiceProcess, eventually, wait_for_job

pytestmark = pytest.mark.slow

_GROUPS, _ROWS_A_GROUP = 600, 4
"""Three batches."""


def _rows(rows: int, base: dict[str, Any]) -> dict[str, Any]:
    generator = np.random.default_rng(rows)
    inputs, targets = (generator.normal(size=(rows, base[side])) for side in ("in_features", "out_features"))
    return {"inputs": inputs.round(3).tolist(), "targets": targets.round(3).tolist()}


def _submit(client: httpx.Client, name: str, *, fleet: bool = False, **training: Any) -> str:
    rows = _GROUPS * _ROWS_A_GROUP if fleet else 64
    data = _rows(rows, client.get("/base").json())
    if fleet:
        name, data = f"{name}-{{group}}", {**data, "groups": [row % _GROUPS for row in range(rows)]}
    body = {"name": name, "rank": 2, "data": data, "training": {"method": "adamw"} | training}
    answer = client.post("/adapters", json=body)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def _published(client: httpx.Client, job_id: str) -> dict[str, tuple[int, str]]:
    query: dict[str, Any] = {"status": "published", "limit": 1000}
    page = client.get(f"/jobs/{job_id}/adapters", params=query).raise_for_status().json()
    return {each["name"]: (each["version"], each["digest"]) for each in page["data"]}


@contextmanager
def _standing_still(trainer: TrainerProcess, service: ServiceProcess) -> Iterator[None]:
    """The trainer and its fit."""
    members = session_of(trainer.process.pid)
    try:
        suspend_without_lock(members, service.data_dir)
        yield
    finally:
        for process in members:
            process.resume()


@pytest.fixture(scope="module")
def other(service: ServiceProcess) -> Iterator[TrainerProcess]:
    """Another trainer of the service."""
    with TrainerProcess(service.data_dir, lease_seconds=LEASE_SECONDS) as started:
        the(started.process.pid, FIT)
        yield started


def _refused(trainer: TrainerProcess, job_id: str) -> bool:
    return f"job {job_id} is succeeded at fence 2; this claim has fence 1" in trainer.log.read_text()


def test_the_batches_of_a_fleet_that_come_too_late_are_refused(
    service: ServiceProcess, trainer: TrainerProcess, other: TrainerProcess
) -> None:
    client = service.client
    spec: dict[str, Any] = {"method": "adamw", "epochs": 80, "batch_size": 1}
    with _standing_still(other, service):
        calm = _submit(client, "calm", fleet=True, **spec)
        assert wait_for_job(client, calm)["status"] == "succeeded"
        job_id = _submit(client, "late", fleet=True, **spec)
        eventually(lambda: _published(client, job_id), what="the first batch")
        held_up = _standing_still(trainer, service)
        held_up.__enter__()
        before = _published(client, job_id)
    try:
        job = wait_for_job(client, job_id)
        published = _published(client, job_id)
    finally:
        held_up.__exit__(None, None, None)
    assert 0 < len(before) < len(published) == _GROUPS
    assert before.items() <= published.items()
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    eventually(lambda: _refused(trainer, job_id), what="the refusal")
    assert client.get(f"/jobs/{job_id}").json() == job
    assert _published(client, job_id) == published
    assert {version for version, _ in published.values()} == {1}
    assert {versions_of(client, name) for name in list(published)[::60]} == {1}
    digests = [digest for _, (_, digest) in sorted(_published(client, calm).items())]
    assert [digest for _, (_, digest) in sorted(published.items())] == digests


def versions_of(client: httpx.Client, name: str) -> int:
    """How many an adapter has."""
    return len(versions(client, name))


def test_a_fit_that_goes_on_without_its_trainer_writes_into_its_own_checkpoint_alone(
    service: ServiceProcess, trainer: TrainerProcess, other: TrainerProcess
) -> None:
    client = service.client
    spec: dict[str, Any] = {"method": "adamw", "epochs": 12_000, "batch_size": 32}
    folder = service.data_dir / "checkpoints"
    with _standing_still(other, service):
        job_id = _submit(client, "late-alone", **spec)
        mine, next_one = (folder / f"{job_id}.{fence}.safetensors" for fence in (1, 2))
        eventually(mine.exists, what="a checkpoint")
        held_up = _standing_still(trainer, service)
        held_up.__enter__()
    try:
        eventually(next_one.exists, what="the other one, which takes it over as its own")
        the(trainer.process.pid, FIT).resume()
        eventually(mine.exists, what="another one by the fit of the first")
        job = wait_for_job(client, job_id)
    finally:
        held_up.__exit__(None, None, None)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert [line["text"].startswith("continues from the checkpoint at step") for line in job["log"]] == [True]
    eventually(lambda: _refused(trainer, job_id), what="the refusal")
    assert client.get(f"/jobs/{job_id}").json() == job
    assert versions(client, "late-alone") == [1]
    eventually(lambda: list(folder.iterdir()) == [], what="the removal of the checkpoints")


def _fit() -> Any:
    return next(iter(children(FIT)), None)


def test_the_fence_alone_refuses_what_comes_too_late(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = serve(trainer=True, own_fitter=True, lease_seconds=1)
    # A trainer that looks at its lease nowhere but where it publishes, and waits for a fit that stands still.
    monkeypatch.setattr(ChildFitter, "_end_if_stopped", lambda _: None)
    monkeypatch.setattr(service.queue, "check_claim", lambda _: None)
    monkeypatch.setattr(service.queue, "heartbeat", lambda *_, **__: None)
    assert wait_for_job(client, submit(client, "first"))["status"] == "succeeded"
    for fleet in (False, True):
        _come_too_late(client, service, fleet=fleet)


def _come_too_late(client: httpx.Client, service: Service, *, fleet: bool) -> None:
    blobs = service.settings.data_dir / "blobs"
    fit = eventually(_fit, what="the fit")
    with suspended(fit):
        job_id = _submit(client, f"late-{fleet}", fleet=fleet, epochs=3)
        # This test is the other trainer, which claims it once the lease has run out.
        eventually(lambda: service.queue.get(job_id, tenant="default").status is JobStatus.RUNNING, what="a claim")
        # It keeps its claim for as long as it takes to look, so that the first trainer does not claim the job again.
        other = JobQueue(service.catalog.database, service.catalog.writer, now=time.time, lease_seconds=600)
        claim = eventually(lambda: other.claim(base=service.base.fingerprint), what="another claim")
        assert (claim.id, claim.attempt) == (job_id, 2)
        files = sorted(blobs.iterdir())
    # The trainer that is refused ends the fit: it cannot know how far that is.
    eventually(lambda: not is_running(fit), what="the end of the fit")
    assert _published(client, job_id) == {}
    assert client.get(f"/jobs/{job_id}").json()["status"] == "running"
    assert sorted(blobs.iterdir()) == files
    service.queue.release(claim)
    job = wait_for_job(client, job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    published = _published(client, job_id)
    assert len(published) == (_GROUPS if fleet else 1)
    assert {version for version, _ in published.values()} == {1}
