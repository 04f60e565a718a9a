"""Two workers, one catalogue: what was acknowledged is what every later request uses, whoever answers it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from tests.harness import ServiceProcess, eventually
from tests.processes.tree import Process, workers

REPLACEMENTS = 200
ROWS = [[1.0] * 64]


@pytest.fixture
def client_of(service: ServiceProcess) -> Iterator[dict[int, httpx.Client]]:
    """For the process id of each worker a client whose connection it holds."""
    with ExitStack() as stack:
        found: dict[int, httpx.Client] = {}

        def each_has_one() -> bool:
            client = stack.enter_context(service.connect())
            client.get("/healthz").raise_for_status()
            port = client._transport._pool.connections[0]._connection._network_stream.get_extra_info("client_addr")[1]  # type: ignore[attr-defined]
            for worker in workers(service):
                if port in _ports(worker):
                    found.setdefault(worker.pid, client)
            return len(found) == 2

        eventually(each_has_one, what="a connection to each worker")
        yield found


def _ports(worker: Process) -> set[int]:
    return {connection.raddr.port for connection in worker.net_connections("tcp") if connection.raddr}


def _upload(client: httpx.Client, value: float) -> httpx.Response:
    body = {"A": [[value]] * 10, "B": [[1.0] * 64]}
    return client.put("/adapters/acme", json=body)


def test_no_worker_answers_from_a_version_that_was_replaced(
    service: ServiceProcess, client_of: dict[int, httpx.Client]
) -> None:
    base = service.client.post("/predict", json={"adapter": None, "inputs": ROWS}).json()["outputs"][0]
    acknowledged = first = _upload(service.client, 1.0).json()["version"]
    done = threading.Event()

    def read(client: httpx.Client) -> int:
        seen = set()
        while not done.is_set():
            floor = acknowledged
            answer = client.post("/predict", json={"adapter": "acme", "inputs": ROWS}).raise_for_status().json()
            version = answer["adapter"]["version"]
            assert version >= floor
            # The numbers are of the version that it names: ΔW·x is 64 times the number of the version.
            expected = [output + 64.0 * (version - first + 1) for output in base]
            assert answer["outputs"][0] == pytest.approx(expected, rel=1e-5)
            seen.add(version)
        return len(seen)

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read, client) for client in client_of.values()]
        try:
            for replacement in range(1, REPLACEMENTS + 1):
                answer = _upload(service.client, 1.0 + replacement)
                assert answer.status_code == 201
                acknowledged = answer.json()["version"]
                assert acknowledged == first + replacement
        finally:
            done.set()
        assert min(reader.result(60) for reader in readers) > REPLACEMENTS / 10
    for client in client_of.values():
        answer = client.post("/predict", json={"adapter": "acme", "inputs": ROWS})
        assert answer.json()["adapter"]["version"] == acknowledged


def test_a_roll_back_and_a_deletion_are_seen_by_every_worker(
    service: ServiceProcess, client_of: dict[int, httpx.Client]
) -> None:
    numbers = [_upload(service.client, value).json()["version"] for value in (-1.0, -2.0)]
    for number in numbers * 10:
        service.client.put("/adapters/acme/aliases/live", json={"version": number}).raise_for_status()
        for client in client_of.values():
            answer = client.post("/predict", json={"adapter": "acme", "inputs": ROWS})
            assert answer.json()["adapter"]["version"] == number
    service.client.delete("/adapters/acme").raise_for_status()
    for client in client_of.values():
        assert client.post("/predict", json={"adapter": "acme", "inputs": ROWS}).status_code == 404
        assert client.get("/adapters/acme").status_code == 404
