"""`serve --trainers 0` and `loraplex trainer` on one folder, and a trainer that comes back too late."""

import signal
from contextlib import ExitStack
from pathlib import Path

from tests.harness import ServiceProcess, eventually, wait_for_job
from tests.processes.long_jobs import submit, versions, wait_until_it_runs
from tests.processes.tree import FIT, TRAINER, TrainerProcess, is_running, running, session_of, the

SETTINGS = {"base": "random:10,2,42", "lease_seconds": 2}


def test_a_trainer_that_was_held_up_past_its_lease_publishes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with ExitStack() as stack:
        service = stack.enter_context(ServiceProcess(folder, base=SETTINGS["base"], trainers=0))
        assert running(service.process.pid, TRAINER) == running(service.process.pid, FIT) == []
        job_id = submit(service.client)
        assert service.client.get(f"/jobs/{job_id}").json()["status"] == "queued"

        held_up = stack.enter_context(TrainerProcess(folder, **SETTINGS))
        fit = the(held_up.process.pid, FIT)
        fit.suspend()  # so that it cannot end before its trainer stands still
        wait_until_it_runs(service.client, job_id)
        held_up.process.send_signal(signal.SIGSTOP)
        fit.resume()
        in_time = stack.enter_context(TrainerProcess(folder, **SETTINGS))
        job = wait_for_job(service.client, job_id)
        assert (job["status"], job["attempt"]) == ("succeeded", 2)

        # Its own fit went on while it stood still: what it wakes up to is an adapter that it may not publish.
        held_up.process.send_signal(signal.SIGCONT)
        eventually(lambda: f"job {job_id} is succeeded" in held_up.log.read_text(), what="the refusal")
        eventually(lambda: not is_running(fit), what="the end of the fit")
        assert versions(service.client) == [1]
        assert service.client.get(f"/jobs/{job_id}").json() == job
        assert len(list((folder / "blobs").iterdir())) == 1

        # Told to end in the middle of a job, the one hands it to the other, and the attempt does not count.
        fits = [the(trainer.process.pid, FIT) for trainer in (held_up, in_time)]
        for fit in fits:
            fit.suspend()
        job_id = submit(service.client)
        wait_until_it_runs(service.client, job_id)
        leaving, staying = (held_up, in_time) if _has(held_up, job_id) else (in_time, held_up)
        fits[staying is in_time].resume()
        assert leaving.stop() == 0
        job = wait_for_job(service.client, job_id)
        assert (job["status"], job["attempt"]) == ("succeeded", 1)
        assert versions(service.client) == [2, 1]
        assert staying.stop() == 0
        assert session_of(held_up.process.pid) == session_of(in_time.process.pid) == []


def _has(trainer: TrainerProcess, job_id: str) -> bool:
    """Whether this is the trainer that said that it claimed a job."""
    return f"job {job_id} for" in trainer.log.read_text()
