"""`serve --trainers 0` and `loraplex trainer` on one folder, and a trainer that comes back too late."""

import signal
from contextlib import ExitStack
from pathlib import Path

from tests.harness import ServiceProcess, eventually, wait_for_job
from tests.processes.long_jobs import submit, versions, wait_until_it_runs
from tests.processes.tree import FIT, TRAINER, TrainerProcess, running, session_of, suspended, the

SETTINGS = {"base": "random:10,2,42", "lease_seconds": 2}


def test_a_trainer_that_was_held_up_past_its_lease_publishes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with ExitStack() as stack:
        service = stack.enter_context(ServiceProcess(folder, base=SETTINGS["base"], trainers=0))
        assert running(service.process.pid, TRAINER) == running(service.process.pid, FIT) == []
        warm_up = submit(service.client, "first")
        assert service.client.get(f"/jobs/{warm_up}").json()["status"] == "queued"

        held_up = stack.enter_context(TrainerProcess(folder, **SETTINGS))
        assert wait_for_job(service.client, warm_up)["status"] == "succeeded"
        fit = the(held_up.process.pid, FIT)
        with suspended(fit):  # so that it cannot end before its trainer stands still
            job_id = submit(service.client)
            wait_until_it_runs(service.client, job_id)
            held_up.process.send_signal(signal.SIGSTOP)
        in_time = stack.enter_context(TrainerProcess(folder, **SETTINGS))
        job = wait_for_job(service.client, job_id)
        assert (job["status"], job["attempt"]) == ("succeeded", 2)

        # Its own fit went on while it stood still: what it wakes up to is an adapter that it may not publish.
        held_up.process.send_signal(signal.SIGCONT)
        eventually(lambda: f"job {job_id} is succeeded" in held_up.log.read_text(), what="the refusal")
        assert versions(service.client) == [1]
        assert service.client.get(f"/jobs/{job_id}").json() == job
        assert len(list((folder / "blobs").iterdir())) == 2

        # Told to end in the middle of a job, the one hands it to the other, and the attempt does not count.
        with suspended(the(in_time.process.pid, FIT)):
            held_up.process.send_signal(signal.SIGSTOP)
            job_id = submit(service.client)
            wait_until_it_runs(service.client, job_id)
            held_up.process.send_signal(signal.SIGCONT)
            assert in_time.stop() == 0
        job = wait_for_job(service.client, job_id)
        assert (job["status"], job["attempt"]) == ("succeeded", 1)
        assert versions(service.client) == [2, 1]
        assert held_up.stop() == 0
        assert session_of(held_up.process.pid) == session_of(in_time.process.pid) == []
