"""From a cancel to the end of the work on its job, for jobs of every kind, at random moments.

`TRAINING_CANCELS=100` runs the long form; `FAULT_SEED` repeats the draws of a run that failed.
"""

import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.fault_results import chosen_seed
from tests.support.long_jobs import versions
from tests.support.process_tree import FIT, Process, is_running, running
from tests.support.service import ServiceProcess, eventually, wait_for_job

pytestmark = pytest.mark.slow

CANCELS = int(os.environ.get("TRAINING_CANCELS", "3"))
MOST_SECONDS = 1.0
BASE = "random:768,768,1"
_TRAINERS = 2
_LONGEST_PAUSE_SECONDS = 0.5
_GROUPS = 400
_KINDS: dict[str, dict[str, Any]] = {
    "steps": {"method": "adamw", "epochs": 1_000_000, "batch_size": 16},
    "fleet": {"method": "sgd", "epochs": 100_000, "learning_rate": 1e-6},
    # One call of LAPACK after another, each of tenths of a second.
    "exact": {"method": "closed_form", "ridge": "auto"},
}
_SHORT = {"method": "sgd", "epochs": 1, "learning_rate": 1e-6}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service with trainers, whose layer is as wide as a sentence encoder's."""
    folder = tmp_path_factory.mktemp("cancels") / "data"
    with ServiceProcess(folder, base=BASE, trainers=_TRAINERS, forks=False) as started:
        yield started


def _submit(client: httpx.Client, kind: str, name: str, training: dict[str, Any]) -> str:
    rows = _GROUPS if kind == "fleet" else 48
    generator = np.random.default_rng(rows)
    data = {side: generator.normal(size=(rows, 768)).round(2).tolist() for side in ("inputs", "targets")}
    body = {"name": name, "rank": 2, "data": data, "training": training}
    if kind == "fleet":
        body |= {"name": f"{name}-{{group}}", "data": {**data, "groups": list(range(_GROUPS))}}
    answer = client.post("/adapters", json=body)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def _fits(service: ServiceProcess) -> list[Process]:
    return running(service.process.pid, FIT)


def _seconds_to_cancel(service: ServiceProcess, kind: str, name: str, pause: float) -> float | None:
    """From the request to the end of the process that was at it; None where the job had ended before."""
    client = service.client
    job_id = _submit(client, kind, name, _KINDS[kind])
    eventually(lambda: client.get(f"/jobs/{job_id}").json()["status"] != "queued", what="a trainer for it")
    fits = _fits(service)
    threading.Event().wait(pause)
    begin = time.monotonic()
    answer = client.post(f"/jobs/{job_id}/cancel")
    if answer.status_code == 409:
        return None
    assert answer.json()["status"] == "cancelled"
    # Of the trainers' processes just one was at work.
    eventually(lambda: sum(map(is_running, fits)) == len(fits) - 1, what=f"the end of the fit of {kind}")
    seconds = time.monotonic() - begin
    assert client.get(f"/jobs/{job_id}").json() == answer.json()
    assert kind == "fleet" or versions(client, name) == []
    return seconds


@pytest.mark.timing
@pytest.mark.soak
@pytest.mark.timeout(120 + 6 * CANCELS)
def test_a_cancelled_training_is_at_work_no_more_within_a_second(wide: ServiceProcess) -> None:
    seed = chosen_seed()
    draw = random.Random(seed)
    measured: list[float] = []
    number = 0
    while len(measured) < CANCELS:
        # In turn, whatever had ended before it could be cancelled.
        kind, pause = list(_KINDS)[number % len(_KINDS)], draw.uniform(0, _LONGEST_PAUSE_SECONDS)
        number += 1
        seconds = _seconds_to_cancel(wide, kind, f"cancelled-{number}", pause)
        if seconds is not None:
            measured.append(seconds)
    p50, p90, p99 = np.quantile(measured, (0.5, 0.9, 0.99)).tolist()
    print(
        f"seed {seed}, {CANCELS} cancels: p50 {p50:.3f} s, p90 {p90:.3f} s, p99 {p99:.3f} s, most {max(measured):.3f} s"
    )
    assert p99 < MOST_SECONDS
    # What was cancelled leaves nothing behind, and the trainers go on.
    assert wait_for_job(wide.client, _submit(wide.client, "steps", "next", _SHORT))["status"] == "succeeded"
    folder = wide.data_dir / "checkpoints"
    assert not folder.is_dir() or list(folder.iterdir()) == []
