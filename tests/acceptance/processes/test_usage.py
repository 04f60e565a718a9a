"""Usage of two workers: exact after a stop, and never more than what was sent after `kill -9`."""

import sqlite3
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.catalog_factories import as_upload
from tests.support.dense_oracle import random_adapter
from tests.support.process_tree import workers
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

I, O = 4, 2
LOST_SECONDS = 5.0
PAUSE_SECONDS = 0.01
"""Of each client between two calls."""
INPUTS = {"name": "inputs", "shape": [2, I], "datatype": "FP32"}
BINARY = np.ones((2, I), np.float32).tobytes()
BINARY_HEAD = (
    b'{"inputs":[{"name":"inputs","shape":[2,%d],"datatype":"FP32","parameters":{"binary_data_size":%d}}]}'
    % (I, len(BINARY))
)
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/predict", {"json": {"adapter": "a", "inputs": [[1.0] * I] * 2}}),
    ("/predict", {"json": {"adapters": ["a", "a@1"], "inputs": [[1.0] * I] * 2}}),
    ("/predict", {"json": {"adapter": None, "inputs": [[1.0] * I] * 2, "return": ["labels"]}}),
    ("/v2/models/a/infer", {"json": {"inputs": [{**INPUTS, "data": [1.0] * 2 * I}]}}),
    (
        "/v2/models/a/versions/1/infer",
        {
            "content": BINARY_HEAD + BINARY,
            "headers": {
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(len(BINARY_HEAD)),
            },
        },
    ),
]
"""Calls with two rows each."""


class Load:
    """Threads that send calls one after another, and the times at which each was answered."""

    def __init__(self, url: httpx.URL) -> None:
        self.sent: deque[str] = deque()
        self.answered_at: deque[float] = deque()
        self._url = url
        self._stop = Event()
        self._threads = [Thread(target=self._run, args=(number,)) for number in range(4)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        try:
            while not self._stop.is_set():
                # A new connection now and then, so that both workers have some.
                with httpx.Client(base_url=self._url) as client:
                    for call in range(50):
                        if self._stop.wait(PAUSE_SECONDS):
                            return
                        path, arguments = CALLS[(call + number) % len(CALLS)]
                        self.sent.append(path)
                        client.post(path, **arguments).raise_for_status()
                        self.answered_at.append(time.monotonic())
        except httpx.TransportError:
            assert self._stop.is_set()

    def end(self, stop: Callable[[], None] = lambda: None) -> None:
        """Stop the service, if `stop` says how, and then the threads."""
        self._stop.set()
        stop()
        for thread in self._threads:
            thread.join()


def _stored(data_dir: Path) -> tuple[int, int]:
    """Requests and rows in the catalogue of a service that does not run."""
    with closing(sqlite3.connect(data_dir / "catalog.sqlite3")) as connection:
        statement = "SELECT sum(requests), sum(rows) FROM usage WHERE dimension = ?"
        by_key = connection.execute(statement, ["key"]).fetchone()
        # Every request has names of one adapter only.
        assert connection.execute(statement, ["adapter"]).fetchone() == by_key
    return int(by_key[0] or 0), int(by_key[1] or 0)


def _start(folder: Path) -> ServiceProcess:
    service = ServiceProcess(folder, workers=2, trainers=0, base=f"random:{I},{O},3", log_requests="none")
    service.wait_until_ready()
    eventually(lambda: len(workers(service)) == 2, what="two workers")
    service.client.put("/adapters/a", json=as_upload(random_adapter(O, I, 2, seed=1))).raise_for_status()
    return service


def test_a_stop_loses_nothing_and_a_kill_no_more_than_five_seconds(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    answered = 0
    for is_killed in (False, True, False):
        service = _start(folder)
        try:
            load = Load(service.client.base_url)
            # What a stop may lose was counted in its last seconds, and what a kill may lose in the seconds before it.
            eventually(partial(_has_run, load, LOST_SECONDS + 2 if is_killed else 0.5), what="load")
            if is_killed:
                killed_at = time.monotonic()
                before = _before(load, killed_at - LOST_SECONDS)
                load.end(service.kill_group)
            else:
                load.end()
        finally:
            service.close()
        requests, rows = _stored(folder)
        assert rows == 2 * requests
        if is_killed:
            assert answered + before <= requests <= answered + len(load.sent)
            assert before > 0
        else:
            assert requests == answered + len(load.answered_at) == answered + len(load.sent)
        answered = requests


def _has_run(load: Load, seconds: float) -> bool:
    return bool(load.answered_at) and time.monotonic() - load.answered_at[0] > seconds


def _before(load: Load, moment: float) -> int:
    return sum(answered_at < moment for answered_at in list(load.answered_at))
