"""Two machines with two workers each, under more requests than a tenant may send: together they accept its rate."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.concurrent_clients import check_rate
from tests.support.object_server import ObjectServer, new_url
from tests.support.postgres_server import PostgresServer
from tests.support.service import ServiceProcess

pytestmark = [pytest.mark.slow, pytest.mark.timing]

MACHINES, SECONDS = 2, 4.0
CONNECTIONS = (6, 1)
"""To each machine: not as many to one as to the other, so that a fixed share would not do."""
FIRST_SECONDS = 1.0
"""Before anything is counted: the workers may accept more until they have settled once."""


@pytest.fixture(scope="module")
def machines(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer, s3: ObjectServer
) -> Iterator[list[ServiceProcess]]:
    assert s3.process.poll() is None
    folder: Path = tmp_path_factory.mktemp("machines")
    storage: dict[str, Any] = {"database_url": postgres_server.new_database(), "blob_url": new_url()}
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                ServiceProcess(folder / str(number), base="random:4,2,3", workers=2, trainers=0, **storage)
            )
            for number in range(MACHINES)
        ]


def _accepted(machines: list[ServiceProcess]) -> list[int]:
    """Send as much as there is time for, and count what each machine accepts in `SECONDS`."""
    body = {"adapter": None, "inputs": [[1.0] * 4]}
    begin = time.monotonic() + FIRST_SECONDS
    accepted: Counter[int] = Counter()
    statuses: Counter[int] = Counter()

    def send(number: int) -> None:
        with machines[number].connect() as client:
            while (now := time.monotonic()) < begin + SECONDS:
                answer = client.post("/predict", json=body)
                statuses[answer.status_code] += 1
                if now >= begin and answer.status_code == 200:
                    accepted[number] += 1
                time.sleep(0.005)

    numbers = [number for number, count in enumerate(CONNECTIONS) for _ in range(count)]
    threads = [threading.Thread(target=send, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    return [accepted[number] for number in range(MACHINES)]


def test_two_machines_accept_the_rate_of_requests(machines: list[ServiceProcess]) -> None:
    machines[0].client.put("/tenants/default", json={"limits": {"requests_per_second": 100}}).raise_for_status()

    def measure() -> float:
        accepted = _accepted(machines)
        print(f"accepted by each machine: {accepted}, {sum(accepted) / SECONDS} a second")
        assert all(accepted)
        return sum(accepted) / SECONDS

    check_rate(measure, 100, tolerance=0.1)
