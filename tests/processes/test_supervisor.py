"""`loraplex serve` and its children: started, restarted, stopped, and none of them left behind."""

import signal
import socket
import time
from pathlib import Path

from adapters.catalog import Catalog
from adapters.job_queue import JobQueue
from adapters.jobs import Status
from tests.harness import ServiceProcess, eventually, train
from tests.processes.long_jobs import submit_endless, versions, wait_until_it_runs, wait_until_it_steps
from tests.processes.tree import FIT, TRAINER, all_gone, another, is_running, session_of, the, workers

BASE = "random:10,2,42"
_END_SECONDS = 10
"""A third of the grace that a busy service would have."""


def test_it_works_from_a_folder_with_decoys(service: ServiceProcess) -> None:
    assert service.client.get("/base").json()["in_features"] == 64
    data = {"inputs": [[1.0] * 64], "targets": [[0.0] * 10]}
    job = train(service.client, name="decoy", rank=1, data=data, training={"method": "closed_form"})
    assert job["status"] == "succeeded", job
    assert "the wrong package" not in service.log.read_text()
    service.client.delete("/adapters/decoy").raise_for_status()


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


def test_a_trainer_killed_in_a_fit_is_started_again_and_so_is_its_job(service: ServiceProcess) -> None:
    job_id = submit_endless(service.client)
    wait_until_it_steps(service.client, job_id)
    trainer, fit = the(service.process.pid, TRAINER), the(service.process.pid, FIT)
    trainer.kill()
    eventually(lambda: not is_running(fit), seconds=_END_SECONDS, what="the end of the orphaned fit")
    another(service.process.pid, TRAINER, trainer)
    wait_until_it_steps(service.client, job_id, attempt=2)
    assert service.client.post(f"/jobs/{job_id}/cancel").json()["attempt"] == 2
    assert versions(service.client) == []


def test_a_cancelled_fit_ends_within_a_second_and_publishes_nothing(service: ServiceProcess) -> None:
    job_id = submit_endless(service.client)
    wait_until_it_steps(service.client, job_id)
    fit = the(service.process.pid, FIT)
    begin = time.monotonic()
    answer = service.client.post(f"/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    eventually(lambda: not is_running(fit), seconds=1, what="the end of the fit")
    print(f"cancel to the end of the fit: {time.monotonic() - begin:.3f} s")
    again = service.client.post(f"/jobs/{job_id}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")
    # The trainer goes on with the next job, and nothing of the cancelled one comes out.
    data = {"inputs": [[1.0] * 64], "targets": [[0.0] * 10]}
    job = train(service.client, name="next", rank=1, data=data, training={"method": "closed_form"})
    assert job["status"] == "succeeded", job
    assert versions(service.client) == []
    assert service.client.post(f"/jobs/{job['id']}/cancel").json()["code"] == "job_ended"
    service.client.delete("/adapters/next").raise_for_status()
    assert list((service.data_dir / "blobs").iterdir()) == []


def test_no_child_outlives_its_supervisor_whichever_way_it_ends(tmp_path: Path) -> None:
    with ServiceProcess(tmp_path / "data", base=BASE, lease_seconds=1) as service:
        job_id = submit_endless(service.client)
        wait_until_it_steps(service.client, job_id)
        members = session_of(service.process.pid)
        assert len(members) == 4  # supervisor, worker, trainer, fit
        service.process.kill()
        service.process.wait()
        eventually(lambda: all_gone(members), seconds=_END_SECONDS, what="the end of the children")
        # The address is free at once.
        with socket.create_server(("127.0.0.1", service.port)):
            pass
    with ServiceProcess(tmp_path / "data", base=BASE, lease_seconds=1) as service:
        wait_until_it_runs(service.client, job_id)
        the(service.process.pid, FIT)
        members = session_of(service.process.pid)
        with socket.create_connection(("127.0.0.1", service.port)) as idle:
            idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in idle.recv(4096)
            assert _seconds_to_end(service) < _END_SECONDS
        assert all_gone(members)
        assert session_of(service.process.pid) == []
    # The fit that ran was handed back both times, and no attempt counts.
    catalog = Catalog(tmp_path / "data", now=time.time)
    job = JobQueue(catalog.database, catalog.blobs, now=time.time, lease_seconds=1).get(job_id)
    catalog.database.close()
    assert (job.status, job.attempt, job.lease_until) == (Status.QUEUED, 0, None)


def _seconds_to_end(service: ServiceProcess) -> float:
    begin = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(60) == 0
    seconds = time.monotonic() - begin
    print(f"SIGTERM to the end of a service: {seconds:.3f} s")
    return seconds
