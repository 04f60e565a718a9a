"""Client threads that keep a service busy until it is killed under them."""

import os
import random
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import httpx
import numpy as np

from tests.acceptance.crash.ledger import Ledger, State, Submitted, Uploaded
from tests.acceptance.crash.oracle import answer, inputs_of, recipes
from tests.support.fault_results import RESULTS
from tests.support.service import ServiceProcess, wait_for_job

_OUTSTANDING_JOBS = 4
_PAUSE_SECONDS = 0.0 if RESULTS in os.environ else 0.01
"""`make fault` sends as much as it can. The short forms leave other tests a part of the cores."""
_BUSY = 503
_DISK_FULL = 507
_REFUSED = (_BUSY, _DISK_FULL)


class Load:
    """Threads that upload, train and ask; they end when the connection does, or at the first thing that is wrong."""

    def __init__(
        self, service: ServiceProcess, ledger: Ledger, seed: int, *, pause_seconds: float = _PAUSE_SECONDS
    ) -> None:
        """Start them. Each waits for up to twice `pause_seconds` before a call."""
        self._service = service
        self._pause_seconds = pause_seconds
        self._ledger = ledger
        self.failed = threading.Event()
        self.failures: list[BaseException] = []
        self._stop = threading.Event()
        draw = random.Random(seed)
        loops: list[Callable[[httpx.Client, random.Random], None]] = []
        for mine in ledger.uploaded:
            loops.append(partial(change, ledger, mine))
        for names in ledger.trained:
            loops.append(partial(train, ledger, names))
        loops.append(partial(ask, ledger))
        self._threads = [
            threading.Thread(target=self._loop, args=(loop, random.Random(draw.getrandbits(64)))) for loop in loops
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Wait for the threads of a service that is dead; raises what one of them found wrong."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        if self.failures:
            raise self.failures[0]

    def _loop(self, step: Callable[[httpx.Client, random.Random], None], draw: random.Random) -> None:
        try:
            with self._service.connect() as client:
                while not self._stop.wait(draw.uniform(0, 2 * self._pause_seconds)):
                    step(client, draw)
        except httpx.TransportError:
            pass  # killed
        except BaseException as error:
            self.failures.append(error)
            self.failed.set()


def change(ledger: Ledger, names: Sequence[Uploaded], client: httpx.Client, draw: random.Random) -> None:
    """Upload, replace, upload again, roll back or delete: one call, whose outcome is certain once it is answered."""
    settled = [name for name in names if name.in_flight is None]
    if not settled:
        return
    mine = draw.choice(settled)
    state, path = mine.state, f"/adapters/{mine.name}"
    action = draw.random() if state.versions else 0.0
    if action < 0.7:
        again = state.live is not None and draw.random() < 0.1
        upload = ledger.upload(state.versions[state.live]) if again and state.live else ledger.new_upload()
        after, call = state.after_upload(upload.digest), partial(client.put, path, json=upload.body())
    elif action < 0.85:
        number = draw.choice(sorted(state.versions))
        after = state.after_roll_back(number)
        call = partial(client.put, f"{path}/aliases/live", json={"version": number})
    else:
        after, call = state.after_delete(), partial(client.delete, path)
    mine.in_flight = after
    answered = call()
    if answered.status_code in _REFUSED:
        ledger.count(f"changes refused: {answered.json()['code']}")
        if answered.json().get("outcome") != "unknown":
            mine.in_flight = None
        return
    _check_acknowledged(ledger, mine.name, state, after, answered)
    mine.state, mine.in_flight = after, None
    mine.history.append(after)
    ledger.count("changes acknowledged")


def _check_acknowledged(ledger: Ledger, name: str, state: State, after: State, answered: httpx.Response) -> None:
    if not after.versions:
        assert answered.status_code == 204, answered.text
    elif after.next_number == state.next_number and answered.request.url.path.endswith("/live"):
        assert answered.status_code == 200, answered.text
        assert answered.json()["aliases"] == {"live": after.live}
    else:
        assert after.live is not None
        assert answered.status_code == (200 if after == state else 201), answered.text
        version = answered.json()
        assert (version["version"], version["digest"]) == (after.live, after.versions[after.live]), name
        ledger.see(version)


def train(ledger: Ledger, names: Sequence[str], client: httpx.Client, draw: random.Random) -> None:
    """Queue a job, cancel one, delete what they publish, or look how they do."""
    mine = {job_id: job for job_id, job in list(ledger.jobs.items()) if job.name in names}
    running = [job_id for job_id, job in mine.items() if job.ended is None]
    action = draw.random()
    if len(running) < _OUTSTANDING_JOBS and action < 0.5:
        _submit(client, ledger, draw.choice(names), doomed=draw.random() < 0.1)
    elif action < 0.52 and (doomed := [job_id for job_id in running if mine[job_id].doomed]):
        _cancel(client, ledger, draw.choice(doomed))
    elif action < 0.521:
        _delete(client, ledger, draw.choice(names))
    elif running:
        look_at(client, ledger, draw.choice(running))


def train_one(client: httpx.Client, ledger: Ledger) -> None:
    """Queue a job and see it end."""
    job_id = _submit(client, ledger, ledger.trained[0][0], doomed=False)
    if job_id is not None:
        wait_for_job(client, job_id)


def _submit(client: httpx.Client, ledger: Ledger, name: str, *, doomed: bool) -> str | None:
    ledger.count("jobs sent")
    answered = client.post("/adapters", json={"name": name, **recipes()[name.split("-")[1]].body})
    if answered.status_code in _REFUSED:
        return None
    assert answered.status_code == 202, answered.text
    job_id: str = answered.json()["id"]
    ledger.jobs[job_id] = Submitted(name, doomed)
    ledger.count("jobs acknowledged")
    return job_id


def _cancel(client: httpx.Client, ledger: Ledger, job_id: str) -> None:
    job = ledger.jobs[job_id]
    was, job.cancelled = job.cancelled, job.cancelled or None
    answered = client.post(f"/jobs/{job_id}/cancel")
    assert answered.status_code in (200, 409, *_REFUSED), answered.text
    job.cancelled = {200: True, 409: False}.get(answered.status_code, was)
    if answered.status_code == 200:
        job.ended = answered.json()
        assert job.ended["status"] == "cancelled"
        ledger.count("cancels acknowledged")


def _delete(client: httpx.Client, ledger: Ledger, name: str) -> None:
    before = [job for job in list(ledger.jobs.values()) if job.name == name and not job.deleted]
    was = [job.deleted for job in before]
    for job in before:
        job.deleted = None
    answered = client.delete(f"/adapters/{name}")
    assert answered.status_code in (204, 404, *_REFUSED), answered.text
    for job, deleted in zip(before, was, strict=True):
        job.deleted = True if answered.status_code == 204 else deleted
    if answered.status_code == 204:
        ledger.count("changes acknowledged")


def look_at(client: httpx.Client, ledger: Ledger, job_id: str) -> dict[str, Any]:
    """A job that was acknowledged: it is there, it goes one way, and what has ended stays as it is."""
    answered = client.get(f"/jobs/{job_id}")
    assert answered.status_code == 200, f"job {job_id} was acknowledged: {answered.text}"
    job: dict[str, Any] = answered.json()
    known = ledger.jobs[job_id]
    if known.ended is not None:
        assert job == known.ended
    elif job["status"] not in ("queued", "running"):
        known.ended = job
    if known.cancelled:
        assert job["status"] == "cancelled"
    return job


def ask(ledger: Ledger, client: httpx.Client, draw: random.Random) -> None:
    """A mixed batch of any names; each answer must be the one of the version that it says it is."""
    names = [mine.name for group in ledger.uploaded for mine in group if mine.state.versions]
    names += [draw.choice(draw.choice(ledger.trained))] if draw.random() < 0.2 else []
    adapters = [draw.choice([*names, None]) for _ in range(4)]
    if check_answers(client, ledger, adapters):
        ledger.count("batches checked")


def check_answers(client: httpx.Client, ledger: Ledger, adapters: Sequence[str | None]) -> list[dict[str, Any]]:
    """The distinct versions that answered, one row for each reference; empty where one is not there."""
    x_NI = inputs_of(len(adapters))
    answered = client.post("/predict", json={"adapters": list(adapters), "inputs": x_NI.tolist()})
    if answered.status_code in (404, _BUSY):
        return []
    assert answered.status_code == 200, answered.text
    body = answered.json()
    for x_I, output, place in zip(x_NI, body["outputs"], body["row_adapters"], strict=True):
        version = None if place is None else body["adapters"][place]
        delta_OI = None if version is None else ledger.delta(version["name"], version["digest"])
        np.testing.assert_allclose(output, answer(x_I, delta_OI), rtol=1e-3, atol=1e-2, err_msg=str(version))
    versions: list[dict[str, Any]] = body["adapters"]
    return versions
