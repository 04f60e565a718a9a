"""Several workers, one catalogue: what was acknowledged is what every later request uses, whoever answers it.

`REPLACEMENTS=1000` runs the long form.
"""

import http.client
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import pytest

from tests.support.process_tree import Process, workers
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

REPLACEMENTS = int(os.environ.get("REPLACEMENTS", "120"))
WORKERS, READERS = 3, 2
"""Processes that answer, and connections that each of them is asked over all the while."""
ROWS = [[1.0] * 64]
QUESTION = json.dumps({"adapter": "acme", "inputs": ROWS}).encode()


class Client:
    """One connection. The standard library's: six of them and the writer share this process's one core."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        assert self.ask("GET", "/healthz")[0] == 200
        self.port: int = self._connection.sock.getsockname()[1]

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and body of an answer."""
        content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        self._connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        said = answer.read()
        return answer.status, json.loads(said) if said else None

    def close(self) -> None:
        """Close it."""
        self._connection.close()


Clients = dict[int, list[Client]]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Three workers, so that there are others than the one that a replacement goes through."""
    with ServiceProcess(tmp_path_factory.mktemp("three") / "data", workers=WORKERS, trainers=0) as started:
        yield started


@pytest.fixture(scope="module")
def clients_of(service: ServiceProcess) -> Iterator[Clients]:
    """For the process id of each worker clients whose connections it holds: one to write, the others to read."""
    with ExitStack() as stack:
        found: Clients = {}

        def all_have_enough() -> bool:
            client = stack.enter_context(closing(Client(service.port)))
            for worker in workers(service):
                if client.port in _ports(worker):
                    found.setdefault(worker.pid, []).append(client)
            return len(found) == WORKERS and min(map(len, found.values())) > READERS

        eventually(all_have_enough, what="connections to each worker")
        yield found


def _ports(worker: Process) -> set[int]:
    return {connection.raddr.port for connection in worker.net_connections("tcp") if connection.raddr}


def _upload(client: Client, value: float) -> int:
    """Replace the adapter; its new version."""
    status, said = client.ask("PUT", "/adapters/acme", {"A": [[value]] * 10, "B": [[1.0] * 64]})
    assert status == 201, said
    version: int = said["version"]
    return version


def _predict(client: Client) -> tuple[int, Any]:
    return client.ask("POST", "/predict", QUESTION)


@pytest.mark.soak
def test_no_worker_answers_from_a_version_that_was_replaced(service: ServiceProcess, clients_of: Clients) -> None:
    (writer, *_), *others = clients_of.values()
    readers = {pid: clients[1 : 1 + READERS] for pid, clients in clients_of.items()}
    base = writer.ask("POST", "/predict", {"adapter": None, "inputs": ROWS})[1]["outputs"][0]
    acknowledged = first = _upload(writer, 1.0)
    done, changed = False, threading.Condition()

    def ask(client: Client) -> tuple[int, int]:
        """What was acknowledged when a request began, and the version that answered it."""
        floor = acknowledged
        status, answer = _predict(client)
        assert status == 200, answer
        version: int = answer["adapter"]["version"]
        assert version >= floor
        # The numbers are of the version that it names: ΔW·x is 64 times the number of the version.
        expected = base[0] + 64.0 * (version - first + 1)
        assert answer["outputs"][0][0] == pytest.approx(expected, rel=1e-5)
        return floor, version

    def read(client: Client) -> set[int]:
        """Ask again after each acknowledgement, and so while the next replacement is under way."""
        floors = {first}
        while not done:
            with changed:
                changed.wait_for(lambda: done or acknowledged not in floors)
            floors.add(ask(client)[0])
        return floors

    with ThreadPoolExecutor(WORKERS * READERS) as pool:
        reading = {pid: [pool.submit(read, client) for client in clients] for pid, clients in readers.items()}
        try:
            for replacement in range(1, REPLACEMENTS + 1):
                with_this = _upload(writer, 1.0 + replacement)
                assert with_this == first + replacement
                with changed:
                    acknowledged = with_this
                    changed.notify_all()
                # Right after it, one of the others, in turn: the readers may be in the middle of a request.
                assert ask(others[replacement % len(others)][0]) == (acknowledged, acknowledged)
        finally:
            with changed:
                done = True
                changed.notify_all()
        seen = {pid: [reader.result(60) for reader in running] for pid, running in reading.items()}
    # They did run meanwhile: each asked after many acknowledgements, and each worker after most.
    for floors in seen.values():
        assert min(map(len, floors)) > REPLACEMENTS / 10
        assert len(set().union(*floors)) > REPLACEMENTS / 4
    for clients in clients_of.values():
        assert _predict(clients[0])[1]["adapter"]["version"] == acknowledged


def test_a_roll_back_and_a_deletion_are_seen_by_every_worker(service: ServiceProcess, clients_of: Clients) -> None:
    changing, *_ = clients = [first for first, *_ in clients_of.values()]
    numbers = [_upload(changing, value) for value in (-1.0, -2.0)]
    for number in numbers * 10:
        assert changing.ask("PUT", "/adapters/acme/aliases/live", {"version": number})[0] == 200
        assert [_predict(client)[1]["adapter"]["version"] for client in clients] == [number] * WORKERS
    assert changing.ask("DELETE", "/adapters/acme")[0] == 204
    for client in clients:
        assert _predict(client)[0] == 404
        assert client.ask("GET", "/adapters/acme")[0] == 404
