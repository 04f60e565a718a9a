"""`kill -9` of trainers and of their fits at random moments: every job ends, none publishes twice, and one that goes
on from a checkpoint ends in the same bytes as one that nothing happened to.

`TRAINING_KILLS=100` runs the long form; `FAULT_SEED` repeats the draws of a run that failed.
"""

import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.crash.oracle import BASE
from tests.acceptance.crash.training_cases import (
    GOES_ON,
    KINDS,
    Digests,
    check_versions,
    published,
    submit,
    times_gone_on,
    undisturbed,
)
from tests.conftest import place_storage
from tests.support.catalog_factories import referenced_files, stored_files
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_seed, recorded
from tests.support.process_tree import FIT, TrainerProcess, running, session_of
from tests.support.service import ServiceProcess, eventually, wait_for_job
from tests.support.storage_kinds import on_both_storages

pytestmark = [pytest.mark.slow, pytest.mark.soak, on_both_storages]

KILLS = int(os.environ.get("TRAINING_KILLS", "2"))
LEASE_SECONDS = 1
TRAINERS = 2
_LONGEST_PAUSE_SECONDS = 1.5
_WAITING_JOBS = 3
_STAND_STILL = 0.15
"""Kills before which a trainer, with its fit, is held up until another one has its job."""
_OFTEN = 20
"""Kills of which some must have hit a training past a checkpoint."""


class House:
    """A service, the trainers beside it, and the jobs that it was given."""

    def __init__(self, folder: Path) -> None:
        self.service = ServiceProcess(folder / "data", base=BASE, trainers=0, lease_seconds=LEASE_SECONDS)
        self.trainers: list[TrainerProcess] = []
        self.kinds: dict[str, str] = {}
        """Of each job."""

    def start_trainers(self) -> None:
        """As many as there should be."""
        self.trainers = [trainer for trainer in self.trainers if trainer.process.poll() is None]
        while len(self.trainers) < TRAINERS:
            data_dir = self.service.data_dir
            self.trainers.append(TrainerProcess(data_dir, base=BASE, lease_seconds=LEASE_SECONDS))

    def submit(self, kind: str) -> str:
        """Queue a job, under names that no other job has."""
        job_id = submit(self.service.client, kind, f"job-{len(self.kinds)}-{kind}")
        self.kinds[job_id] = kind
        return job_id

    def jobs(self, status: str) -> list[dict[str, Any]]:
        """Those of the jobs that are in this state."""
        query: dict[str, Any] = {"status": status, "limit": 1000}
        data = self.service.client.get("/jobs", params=query).raise_for_status().json()["data"]
        return [job for job in data if job["id"] in self.kinds]

    def trainer_of(self, job_id: str) -> TrainerProcess | None:
        """The one that is at a job's present attempt."""
        job = self.service.client.get(f"/jobs/{job_id}").json()
        line = f"job {job_id} for {job['adapter']}: attempt {job['attempt']}"
        return next((trainer for trainer in self.trainers if line in trainer.log.read_text()), None)

    def has_ended(self, job_id: str) -> bool:
        """Whether a job has ended, however it did."""
        return self.service.client.get(f"/jobs/{job_id}").json()["status"] not in ("queued", "running")

    def at_work(self) -> list[TrainerProcess]:
        """The trainers that have a job."""
        found = (self.trainer_of(job["id"]) for job in self.jobs("running"))
        return [trainer for trainer in found if trainer is not None]

    def check_end(self, job_id: str, calm: dict[str, Digests]) -> tuple[dict[str, Any], Digests]:
        """How a job ended, and what of it: all that it should have, or a part where its trainers died too often."""
        job = wait_for_job(self.service.client, job_id)
        digests, wanted = published(self.service.client, job), calm[self.kinds[job_id]]
        if job["status"] == "succeeded":
            assert digests == wanted, job
        else:
            assert (job["status"], job["error"]["code"], job["attempt"]) == ("failed", "worker_died", 3), job
            assert digests.items() <= wanted.items(), job
        return job, digests

    def check_files(self) -> None:
        """No checkpoint, no data and no half-written file is left."""
        data_dir = self.service.data_dir
        # A trainer that starts removes what those that were killed had no time to.
        with TrainerProcess(data_dir, base=BASE, lease_seconds=LEASE_SECONDS):
            eventually(lambda: checkpoints(data_dir) == [], what="the removal of the checkpoints")
            eventually(lambda: stored_files(data_dir) == referenced_files(data_dir), what="the removal of the files")

    def close(self) -> None:
        """End all of it."""
        for trainer in self.trainers:
            trainer.__exit__()
        self.service.close()


@pytest.fixture(scope="module")
def house(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, database_kind: str
) -> Iterator[House]:
    """With trainers that have started."""
    folder = tmp_path_factory.mktemp("kills")
    place_storage(request, folder / "data", database_kind)
    made = House(folder)
    try:
        made.start_trainers()
        made.service.wait_until_ready()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def calm(house: House) -> dict[str, Digests]:
    """What each kind of training ends in when nothing happens to it."""
    return undisturbed(house.service.client)


def checkpoints(data_dir: Path) -> list[str]:
    """The files in the folder of checkpoints."""
    folder = data_dir / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def kill_trainer(trainer: TrainerProcess) -> None:
    """The trainer alone: its fit notices by itself."""
    trainer.process.kill()
    trainer.process.wait()


def kill_fit(trainer: TrainerProcess) -> None:
    """The process that fits alone, where it runs."""
    for fit in running(trainer.process.pid, FIT):
        fit.kill()


def kill_both(trainer: TrainerProcess) -> None:
    """At once, as a container goes."""
    for process in session_of(trainer.process.pid):
        process.kill()
    trainer.process.wait()


def stand_still(trainer: TrainerProcess) -> None:
    """Both, past the lease, and then they go on."""
    members = session_of(trainer.process.pid)
    for process in members:
        process.suspend()
    threading.Event().wait(1.5 * LEASE_SECONDS)
    for process in members:
        process.resume()


HARMS: list[Callable[[TrainerProcess], None]] = [kill_trainer, kill_fit, kill_both]


def test_a_training_whose_trainer_dies_goes_on_from_its_last_checkpoint_and_ends_the_same(
    house: House, calm: dict[str, Digests]
) -> None:
    # On a busy machine, a fit can end before it is killed, and a lease can run out by itself.
    for _ in range(5):
        job_id = house.submit("stopping")
        _harm_twice(house, job_id)
        job, digests = house.check_end(job_id, calm)
        if (job["status"], job["attempt"], times_gone_on(job)) == ("succeeded", 3, 2):
            break
    else:
        raise AssertionError("no training was killed twice past a checkpoint and ended in its third attempt")
    steps = [int(line["text"].rsplit(" ", 1)[1]) for line in job["log"] if GOES_ON in line["text"]]
    assert 0 < steps[0] < steps[1] < job["progress"]["steps"]
    check_versions(house.service.data_dir, {job_id: digests})
    eventually(lambda: checkpoints(house.service.data_dir) == [], what="the removal of the checkpoints")


def _harm_twice(house: House, job_id: str) -> None:
    """Kill the trainer of a job's first attempt and the fit of its second, each past a checkpoint of its own."""
    folder = house.service.data_dir / "checkpoints"
    written = 0
    for attempt, harm in ((1, kill_trainer), (2, kill_fit)):
        checkpoint = folder / f"{job_id}.{attempt}.safetensors"
        # One that this attempt has written, and not the one that it began with.
        moment = eventually(
            lambda: _written_after(checkpoint, written) or house.has_ended(job_id),  # noqa: B023 - called here
            what=f"a checkpoint of attempt {attempt}",
        )
        if moment is True:
            return
        written = moment
        harm(eventually(partial(house.trainer_of, job_id), what="a trainer at work"))
        house.start_trainers()


def _written_after(file: Path, earlier: int) -> int | None:
    """When it was written, in ns, where it is there and that is after `earlier`."""
    with suppress(FileNotFoundError):
        if (written := file.stat().st_mtime_ns) > earlier:
            return written
    return None


@pytest.mark.timeout(scaled(240 + 20 * KILLS))
def test_every_job_ends_once_and_the_same_whatever_is_killed(house: House, calm: dict[str, Digests]) -> None:
    seed = chosen_seed()
    with recorded("kills of trainers", seed) as counts:
        told = _kill_at_random(house, calm, random.Random(seed))
        counts.update(told)
        counts["kills"] = KILLS
    assert KILLS < _OFTEN or told["attempts that went on from a checkpoint"] > KILLS / _OFTEN


def _kill_at_random(house: House, calm: dict[str, Digests], draw: random.Random) -> Counter[str]:
    told: Counter[str] = Counter()
    given = set(house.kinds)
    for _ in range(KILLS):
        while len(house.jobs("queued")) < _WAITING_JOBS:
            house.submit(draw.choice(KINDS))
        if draw.random() < 0.8:
            eventually(house.at_work, what="a trainer at work")
        threading.Event().wait(draw.uniform(0, _LONGEST_PAUSE_SECONDS))
        if draw.random() < _STAND_STILL:
            stand_still(draw.choice(house.at_work() or house.trainers))
            told["trainers that stood still past their lease"] += 1
        harm, trainer = draw.choice(HARMS), draw.choice(house.at_work() or house.trainers)
        harm(trainer)
        told[harm.__name__] += 1
        house.start_trainers()
    ended = {job_id: house.check_end(job_id, calm) for job_id in house.kinds if job_id not in given}
    check_versions(house.service.data_dir, {job_id: digests for job_id, (_, digests) in ended.items()})
    house.check_files()
    for job, _ in ended.values():
        told[f"jobs {job['status']}" + (f" {job['error']['code']}" if job["error"] else "")] += 1
        told[f"jobs of {job['attempt']} attempts"] += 1
        told["attempts that went on from a checkpoint"] += times_gone_on(job)
    return told
