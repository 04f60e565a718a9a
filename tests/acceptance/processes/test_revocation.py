"""Two workers as processes, under load: no request that is sent after a revocation was acknowledged succeeds."""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.access.keys import Keys, Scope
from adapters.access.tenants import DEFAULT_TENANT
from adapters.storage.sqlite_database import SqliteDatabase
from tests.support.keys import bearer, make_key
from tests.support.process_tree import suspended, workers
from tests.support.service import ServiceProcess

pytestmark = [pytest.mark.slow, pytest.mark.soak]

WORKERS, CONNECTIONS, KEYS = 2, 12, 10
REQUESTS = int(os.environ.get("REVOKED_REQUESTS", "300"))
"""To each worker, with all keys together."""
BODY = {"adapter": "a", "inputs": [[1.0] * 4]}
FACTORS = {"A": [[1.0], [2.0]], "B": [[1.0] * 4]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder: Path = tmp_path_factory.mktemp("revocation") / "data"
    settings: dict[str, Any] = {"base": "random:4,2,3", "auth": "keys", "workers": WORKERS, "trainers": 0}
    with ServiceProcess(folder, **settings) as started:
        yield started


def test_no_request_succeeds_on_either_process_after_a_revocation(service: ServiceProcess) -> None:
    database = SqliteDatabase(service.data_dir)
    keys = Keys(database, now=time.time)
    operator = bearer(make_key(keys, DEFAULT_TENANT, Scope.OPERATOR))
    service.client.put("/adapters/a", json=FACTORS, headers=operator).raise_for_status()
    stop = threading.Event()

    def publish() -> None:
        with service.connect() as client:
            while not stop.is_set():
                alpha = 1 + time.monotonic() % 1
                client.put("/adapters/a", json=FACTORS | {"alpha": alpha}, headers=operator).raise_for_status()

    clients = list(_connect_to_each(service))
    publisher = threading.Thread(target=publish)
    publisher.start()
    refused: Counter[str] = Counter()
    try:
        for _ in range(KEYS):
            key = make_key(keys, DEFAULT_TENANT, Scope.PREDICT)
            headers = bearer(key)
            answers = [client.post("/predict", json=BODY, headers=headers).raise_for_status() for client in clients]
            assert len(set(map(_worker, answers))) == WORKERS
            assert service.client.delete(f"/keys/{key.key.id}", headers=operator).status_code == 204
            for number in range(REQUESTS // KEYS * WORKERS):
                answer = clients[number % CONNECTIONS].post("/predict", json=BODY, headers=headers)
                assert answer.status_code == 401, answer.text
                refused[_worker(answer)] += 1
    finally:
        stop.set()
        publisher.join()
        for client in clients:
            client.close()
        database.close()
    assert refused.total() == REQUESTS * WORKERS
    assert len(refused) == WORKERS


def _connect_to_each(service: ServiceProcess) -> Iterator[httpx.Client]:
    """Clients with open connections, as many to each worker: the others are suspended while one accepts them."""
    for worker in workers(service):
        with ExitStack() as stack:
            for other in workers(service):
                if other.pid != worker.pid:
                    stack.enter_context(suspended(other))
            for _ in range(CONNECTIONS // WORKERS):
                client = service.connect()
                client.get("/healthz").raise_for_status()
                yield client


def _worker(answer: httpx.Response) -> str:
    """The part of a request's id that is the same for all of one process."""
    return str(answer.headers["X-Request-Id"])[:20]
