"""Two workers as processes, under more requests than a tenant may send: together they accept its rate."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.concurrent_clients import check_rate
from tests.support.process_tree import workers
from tests.support.service import ServiceProcess, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timing]

WORKERS, CONNECTIONS, SECONDS = 2, 16, 3.0
PREFIX_CHARACTERS = 20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder: Path = tmp_path_factory.mktemp("rates") / "data"
    with ServiceProcess(folder, base="random:4,2,3", workers=WORKERS, trainers=0) as started:
        _wait_for_both(started)
        yield started


def _worker(answer: httpx.Response) -> str:
    """The part of a request's id that is the same for all of one process."""
    return answer.headers["X-Request-Id"][:PREFIX_CHARACTERS]


def _wait_for_both(service: ServiceProcess) -> None:
    """Wait until each worker has answered: it is ready once one of them is."""
    seen: set[str] = set()

    def have_both_answered() -> bool:
        with service.connect() as client:
            seen.add(_worker(client.get("/healthz")))
        return len(seen) == WORKERS

    eventually(have_both_answered, what="an answer of each worker")


def _limit(service: ServiceProcess, **limits: float) -> None:
    service.client.put("/tenants/default", json={"limits": limits}).raise_for_status()


def _accepted(service: ServiceProcess, *, rows: int = 1, through_asgi: bool = False) -> Counter[str]:
    """Send as much as there is time for, and count what each worker accepts in `SECONDS`, after half a second."""
    body = {"adapter": None, "inputs": [[1.0] * 4] * rows}
    headers = {"X-Request-Timeout": "50"} if through_asgi else {}
    begin = time.monotonic() + 0.5
    accepted: Counter[str] = Counter()
    statuses: Counter[int] = Counter()

    def send() -> None:
        while time.monotonic() < begin + SECONDS:
            # A new connection now and then, so that both workers have some.
            with service.connect() as client:
                for _ in range(20):
                    if (now := time.monotonic()) >= begin + SECONDS:
                        break
                    answer = client.post("/predict", json=body, headers=headers)
                    statuses[answer.status_code] += 1
                    if now >= begin and answer.status_code == 200:
                        accepted[_worker(answer)] += 1
                    time.sleep(0.005)

    threads = [threading.Thread(target=send) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    return accepted


@pytest.mark.parametrize("through_asgi", [False, True], ids=["fast", "asgi"])
def test_two_workers_accept_the_rate_of_requests(service: ServiceProcess, through_asgi: bool) -> None:
    _limit(service, requests_per_second=200)

    def measure() -> float:
        accepted = _accepted(service, through_asgi=through_asgi)
        assert len(accepted) == WORKERS
        return accepted.total() / SECONDS

    check_rate(measure, 200, tolerance=0.05)


def test_two_workers_accept_the_rate_of_rows(service: ServiceProcess) -> None:
    _limit(service, rows_per_second=1000)

    def measure() -> float:
        accepted = _accepted(service, rows=10)
        assert len(accepted) == WORKERS
        return 10 * accepted.total() / SECONDS

    check_rate(measure, 1000, tolerance=0.05)


def test_a_worker_that_is_killed_changes_no_rate(service: ServiceProcess) -> None:
    _limit(service, requests_per_second=200)
    _accepted(service)
    victim = workers(service)[0]
    victim.send_signal(signal.SIGKILL)
    eventually(lambda: len(workers(service)) == WORKERS and victim not in workers(service), what="another worker")
    service.wait_until_ready()
    check_rate(lambda: _accepted(service).total() / SECONDS, 200, tolerance=0.05)
