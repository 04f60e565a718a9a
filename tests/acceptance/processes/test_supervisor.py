"""`loraplex serve` and its children: started, restarted, stopped, and none of them left behind."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapters.catalog.catalog import Catalog
from adapters.jobs.job import Job, JobStatus
from adapters.jobs.queue import JobQueue
from tests.support.deadlines import scaled
from tests.support.long_jobs import submit_endless, wait_until_it_runs
from tests.support.process_tree import FIT, TRAINER, all_gone, another, is_running, session_of, the, workers
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

BASE = "random:10,2,42"
LEASE_SECONDS = 3
"""Long enough for a trainer on a busy machine to keep it."""
_END_SECONDS = 10
"""A third of the grace that a busy service has."""


def test_the_supervisor_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, app.processes.supervisor; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_killed_worker_is_started_again_and_nobody_notices(service: ServiceProcess) -> None:
    body = {"A": [[1.0]] * 10, "B": [[1.0] * 64]}
    digest = service.client.put("/adapters/kept", json=body).json()["digest"]
    before = workers(service)
    before[0].kill()
    eventually(lambda: before[0] not in workers(service), what="the death of the worker")
    for _ in range(20):
        with service.connect() as client:
            answer = client.post("/predict", json={"adapter": "kept", "inputs": [[0.5] * 64]})
        assert answer.json()["adapter"]["digest"] == digest
    after = eventually(lambda: len(now := workers(service)) == 2 and now, what="a second worker")
    assert before[1] in after
    service.client.delete("/adapters/kept").raise_for_status()


def test_a_trainer_is_replaced_when_it_dies_and_no_child_outlives_its_supervisor(tmp_path: Path) -> None:
    with ServiceProcess(tmp_path / "data", base=BASE, lease_seconds=LEASE_SECONDS) as service:
        leader = service.process.pid
        job_id = submit_endless(service.client)
        wait_until_it_runs(service.client, job_id)
        trainer, fit = the(leader, TRAINER), the(leader, FIT)
        trainer.kill()
        eventually(lambda: not is_running(fit), seconds=_END_SECONDS, what="the end of the orphaned fit")
        another(leader, TRAINER, trainer)
        wait_until_it_runs(service.client, job_id, attempt=2)

        # Supervisor, worker, trainer and fit.
        members = eventually(lambda: len(found := session_of(leader)) == 4 and found, what="all four processes")
        service.process.kill()
        service.process.wait()
        eventually(lambda: all_gone(members), seconds=_END_SECONDS, what="the end of the children")
        # The address is free at once.
        with socket.create_server(("127.0.0.1", service.port)):
            pass
    # The trainer that was left alone handed the job back: only the one that was killed counts.
    assert _is_handed_back(_job(tmp_path / "data", job_id), attempt=1)

    with ServiceProcess(tmp_path / "data", base=BASE, lease_seconds=LEASE_SECONDS) as service:
        wait_until_it_runs(service.client, job_id, attempt=2)
        members = session_of(service.process.pid)
        with socket.create_connection(("127.0.0.1", service.port)) as idle:
            idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in idle.recv(4096)
            assert _seconds_to_end(service) < scaled(_END_SECONDS)
        assert all_gone(members)
        assert session_of(service.process.pid) == []
    assert _is_handed_back(_job(tmp_path / "data", job_id), attempt=1)


def _seconds_to_end(service: ServiceProcess) -> float:
    begin = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(scaled(60)) == 0
    seconds = time.monotonic() - begin
    print(f"SIGTERM to the end of a service: {seconds:.3f} s")
    return seconds


def _job(folder: Path, job_id: str) -> Job:
    """A job of a service that is down."""
    catalog = Catalog(folder, now=time.time)
    try:
        return JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=1).get(job_id, tenant="default")
    finally:
        catalog.database.close()


def _is_handed_back(job: Job, *, attempt: int) -> bool:
    return (job.status, job.attempt, job.lease_until) == (JobStatus.QUEUED, attempt, None)
