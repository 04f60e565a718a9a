"""Children that are stopped (SIGSTOP): past the lease they are killed and started again."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from adapters.child_process import StoppedClock
from tests.support.deadlines import scaled
from tests.support.external_programs import skip_or_fail
from tests.support.failing_disk import STOP, SYNC, FailingDisk
from tests.support.long_jobs import submit_endless, wait_until_it_runs
from tests.support.process_tree import FIT, TRAINER, Process, all_gone, another, suspended, the, workers
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

BASE = "random:10,2,42"
LEASE_SECONDS = 3
BODY = {"A": [[1.0], [1.0]], "B": [[1.0] * 10]}


@pytest.fixture(autouse=True)
def on_linux() -> None:
    """Skip on systems that do not show the state of a process."""
    if not sys.platform.startswith("linux"):
        skip_or_fail("the state of a process can be read on Linux only")


@pytest.fixture
def sleeper() -> Iterator[Process]:
    """A process that does nothing."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield psutil.Process(process.pid)
        process.kill()


class _Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_time_that_a_process_is_stopped_counts_from_the_first_look_and_ends_when_it_goes_on(
    sleeper: Process,
) -> None:
    clock = _Time()
    stopped = StoppedClock(monotonic=clock)

    def look(seconds: float) -> float:
        clock.now += seconds
        return stopped.seconds(sleeper.pid)

    assert [look(0), look(1), look(1)] == [0, 0, 0]
    sleeper.suspend()
    eventually(lambda: sleeper.status() == psutil.STATUS_STOPPED, what="the stop")
    assert [look(1), look(0.5), look(0.5), look(1)] == [0, 0.5, 1, 2]
    # Whoever looks was stopped for an hour too: that is not held against the process.
    assert look(3600) == 4
    sleeper.resume()
    eventually(lambda: sleeper.status() != psutil.STATUS_STOPPED, what="its going on")
    assert look(1) == 0
    sleeper.suspend()
    eventually(lambda: sleeper.status() == psutil.STATUS_STOPPED, what="the stop")
    assert [look(1), look(1)] == [0, 1]


def test_a_process_that_is_gone_is_not_stopped(sleeper: Process) -> None:
    sleeper.kill()
    sleeper.wait()
    assert StoppedClock().seconds(sleeper.pid) == 0


def test_a_worker_that_is_stopped_in_a_commit_holds_the_catalogue_no_longer_than_its_lease(tmp_path: Path) -> None:
    disk = FailingDisk(tmp_path)
    with (
        ServiceProcess(
            tmp_path / "data", preload=disk.environment(), base=BASE, workers=2, trainers=0, lease_seconds=LEASE_SECONDS
        ) as service,
        ThreadPoolExecutor(1) as pool,
    ):
        before = workers(service)
        service.client.put("/adapters/kept", json=BODY).raise_for_status()
        # While the database itself is written, nobody else may read it.
        disk.fail(SYNC, file="catalog.sqlite3", error=STOP, count=1)
        lost = pool.submit(_put, service, "lost")
        (stopped,) = eventually(
            lambda: [worker for worker in before if worker.status() == psutil.STATUS_STOPPED], what="the stop"
        )
        disk.heal()
        begin = time.monotonic()
        # A new connection is accepted by the worker that runs.
        assert _put(service, "one").status_code == 201
        assert time.monotonic() - begin < scaled(4 * LEASE_SECONDS)
        with pytest.raises(httpx.TransportError):
            lost.result(scaled(30))
        with service.connect() as client:
            assert [each["name"] for each in client.get("/adapters").json()["data"]] == ["kept", "one"]
        assert all_gone([stopped])
        eventually(lambda: len(workers(service)) == 2, what="a second worker")
        assert "has been stopped for more than 3 s and is killed" in service.log.read_text()


def _put(service: ServiceProcess, name: str) -> httpx.Response:
    with service.connect() as client:
        return client.put(f"/adapters/{name}", json=BODY)


def test_a_trainer_or_a_fit_that_stays_stopped_is_killed_and_the_job_goes_on(tmp_path: Path) -> None:
    with ServiceProcess(tmp_path / "data", base=BASE, lease_seconds=LEASE_SECONDS) as service:
        leader = service.process.pid
        job_id = submit_endless(service.client)
        wait_until_it_runs(service.client, job_id)
        trainer, fit = the(leader, TRAINER), the(leader, FIT)
        # Not one stop after another: the time begins anew.
        for _ in range(3):
            with suspended(fit):
                time.sleep(1.2)
            time.sleep(2)
        assert the(leader, FIT) == fit

        fit.suspend()
        fit = another(leader, FIT, fit)
        assert the(leader, TRAINER) == trainer
        wait_until_it_runs(service.client, job_id, attempt=2)

        # Both: what is stopped does not see its trainer go.
        fit.suspend()
        trainer.suspend()
        eventually(lambda: all_gone([trainer, fit]), what="the end of the trainer and of its fit")
        another(leader, TRAINER, trainer)
        wait_until_it_runs(service.client, job_id, attempt=3)
        log = service.log.read_text()
        assert "the fit process has been stopped for more than 3 s and is killed" in log
        assert "trainer 1 has been stopped for more than 3 s and is killed" in log
