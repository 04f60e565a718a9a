"""`serve --trainers 0` and `loraplex trainer` on one folder: cancels, hand-overs, and one that comes back too late."""

import signal
import time

import psutil  # type: ignore[import-untyped]
import pytest

from tests.support.catalog_factories import stored_files
from tests.support.long_jobs import submit, submit_endless, versions, wait_until_it_runs, wait_until_it_steps
from tests.support.process_tree import (
    FIT,
    LEASE_SECONDS,
    TRAINER,
    Process,
    TrainerProcess,
    is_running,
    running,
    session_of,
    suspend_without_lock,
    suspended,
    the,
)
from tests.support.service import ServiceProcess, eventually, wait_for_job

pytestmark = pytest.mark.slow


@pytest.fixture
def fit(service: ServiceProcess, trainer: TrainerProcess) -> Process:
    """The trainer's process that fits, once it has: one that is stopped before it is ready gets no job."""
    assert wait_for_job(service.client, submit(service.client, "first"))["status"] == "succeeded"
    service.client.delete("/adapters/first").raise_for_status()
    return the(trainer.process.pid, FIT)


def _files(service: ServiceProcess) -> int:
    return len(stored_files(service.data_dir))


def test_they_work_together_from_a_folder_with_decoys(
    service: ServiceProcess, trainer: TrainerProcess, fit: Process
) -> None:
    assert service.client.get("/base").json()["in_features"] == 64
    assert running(service.process.pid, TRAINER) == running(service.process.pid, FIT) == []
    assert "the wrong package" not in service.log.read_text() + trainer.log.read_text()


def test_a_cancelled_fit_ends_and_publishes_nothing(service: ServiceProcess, fit: Process) -> None:
    job_id = submit_endless(service.client, "cancelled")
    wait_until_it_steps(service.client, job_id)
    begin = time.monotonic()
    answer = service.client.post(f"/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    eventually(lambda: not is_running(fit), what="the end of the fit")
    print(f"cancel to the end of the fit: {time.monotonic() - begin:.3f} s")
    again = service.client.post(f"/jobs/{job_id}/cancel")
    assert (again.status_code, again.json()) == (200, answer.json())
    # The trainer goes on with the next job, and nothing of the cancelled one comes out.
    job = wait_for_job(service.client, submit(service.client, "next"))
    assert job["status"] == "succeeded", job
    assert service.client.post(f"/jobs/{job['id']}/cancel").json()["code"] == "job_ended"
    assert versions(service.client, "cancelled") == []
    service.client.delete("/adapters/next").raise_for_status()
    assert _files(service) == 0


def test_a_trainer_that_was_held_up_past_its_lease_publishes_nothing(
    service: ServiceProcess, trainer: TrainerProcess, fit: Process
) -> None:
    with suspended(fit):  # so that it cannot end before its trainer stands still
        job_id = submit(service.client)
        wait_until_it_runs(service.client, job_id)
        suspend_without_lock([psutil.Process(trainer.process.pid)], service.data_dir)
    with TrainerProcess(service.data_dir, lease_seconds=LEASE_SECONDS) as other:
        job = wait_for_job(service.client, job_id)
        assert (job["status"], job["attempt"]) == ("succeeded", 2)

        # Its own fit went on while it stood still: what it wakes up to is an adapter that it may not publish.
        trainer.process.send_signal(signal.SIGCONT)
        eventually(lambda: f"job {job_id} is succeeded" in trainer.log.read_text(), what="the refusal")
        assert versions(service.client) == [1]
        assert service.client.get(f"/jobs/{job_id}").json() == job
        assert _files(service) == 1

        # Told to end in the middle of a job, the one hands it to the other, and the attempt does not count.
        with suspended(the(other.process.pid, FIT)):
            suspend_without_lock([psutil.Process(trainer.process.pid)], service.data_dir)
            job_id = submit(service.client)
            wait_until_it_runs(service.client, job_id)
            trainer.process.send_signal(signal.SIGCONT)
            assert other.stop() == 0
        assert session_of(other.process.pid) == []
    job = wait_for_job(service.client, job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    assert versions(service.client) == [2, 1]
    service.client.delete("/adapters/acme").raise_for_status()
