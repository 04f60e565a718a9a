"""Several processes behind one address: every answer is about all of them, and none goes back."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.metrics_exposition import Shown, scrape, scraped, series, total
from tests.support.process_tree import TRAINER, TrainerProcess, another, the, workers
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

BODY = {"adapter": None, "inputs": [[1.0] * 10]}
PREDICTED = {"route": "/predict", "method": "POST", "status": "200"}
REQUESTS, CONNECTIONS = 60, 12
ROWS_LIMIT = 2 * 16_384


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Two workers and a trainer, once the values of all three are shown."""
    with ServiceProcess(tmp_path_factory.mktemp("counted") / "data", base="random:10,2,42", workers=2) as service:
        scraped(service.client, lambda shown: shown.get(series("queue_rows_limit")) == ROWS_LIMIT, what="both workers")
        scraped(service.client, lambda shown: total(shown, "processes") == 3, what="all three processes")
        yield service


def _ask(service: ServiceProcess, requests: int = REQUESTS) -> None:
    """So many predictions, over connections that the kernel spreads over the workers."""
    for _ in range(CONNECTIONS):
        with service.connect() as client:
            for _ in range(requests // CONNECTIONS):
                assert client.post("/predict", json=BODY).status_code == 200


def _scrapes(service: ServiceProcess, number: int = CONNECTIONS) -> list[Shown]:
    """Scrapes over a connection each."""
    found = []
    for _ in range(number):
        with service.connect() as client:
            found.append(scrape(client))
    return found


def _counted(shown: Shown) -> dict[object, float]:
    counters = {key: value for key, value in shown.items() if key[0].endswith(("_total", "_count", "_sum", "_bucket"))}
    return {key: value for key, value in counters.items() if "process" not in dict(key[1])}


def test_every_answer_has_the_requests_of_both_workers(service: ServiceProcess) -> None:
    before = scrape(service.client)
    _ask(service)
    added = {
        series("requests_total", **PREDICTED): REQUESTS,
        series("request_seconds_count", route="/predict"): REQUESTS,
        series("queue_seconds_count"): REQUESTS,
        series("batch_rows_sum"): REQUESTS,
    }
    wanted = {key: before.get(key, 0.0) + number for key, number in added.items()}
    scraped(service.client, lambda shown: wanted.items() <= shown.items(), what="all requests")
    for shown in _scrapes(service):
        assert wanted.items() <= shown.items()
        assert shown[series("queue_rows_limit")] == ROWS_LIMIT
        assert {
            process for (name, labels), _ in shown.items() if name.endswith("open_fds") for _, process in labels
        } == {"worker-1", "worker-2", "trainer-1"}


def _kill_one(service: ServiceProcess) -> None:
    victim = workers(service)[0]
    victim.kill()
    eventually(lambda: len(workers(service)) == 2 and victim not in workers(service), what="another worker")


def test_no_counter_goes_back_when_a_worker_is_killed(service: ServiceProcess) -> None:
    starts = total(scrape(service.client), "process_starts_total")
    latest: dict[object, float] = {}
    for _ in range(2):
        _ask(service)
        for shown in _scrapes(service):
            counted = _counted(shown)
            assert {
                key: (value, counted.get(key)) for key, value in latest.items() if counted.get(key, 0) < value
            } == {}
            latest |= counted
        _kill_one(service)
    killed = scraped(service.client, lambda shown: total(shown, "process_starts_total") == starts + 2, what="restarts")
    assert total(killed, "processes", role="worker") == 2
    assert latest[series("requests_total", **PREDICTED)] >= REQUESTS


def test_a_service_that_is_started_again_begins_at_zero(tmp_path: Path) -> None:
    with ServiceProcess(tmp_path / "data", base="random:10,2,42", trainers=0) as service:
        _ask(service)
        scraped(service.client, lambda shown: shown.get(series("requests_total", **PREDICTED)) == REQUESTS)
        service.kill_group()
    with ServiceProcess(tmp_path / "data", base="random:10,2,42", trainers=0) as service:
        assert series("requests_total", **PREDICTED) not in scrape(service.client)


def test_a_trainer_that_is_killed_takes_its_place_again(service: ServiceProcess) -> None:
    trainer = the(service.process.pid, TRAINER)
    starts = series("process_starts_total", process="trainer-1")
    before = scrape(service.client)[starts]
    trainer.kill()
    another(service.process.pid, TRAINER, trainer)
    shown = scraped(service.client, lambda shown: shown.get(starts) == before + 1)
    assert total(shown, "processes", role="trainer") == 1


def test_a_trainer_apart_is_counted_until_it_ends_and_goes_on_when_it_comes_back(tmp_path: Path) -> None:
    with ServiceProcess(tmp_path / "data", base="random:10,2,42", trainers=0) as service:
        assert total(scrape(service.client), "processes", role="trainer") == 0
        for jobs in (1, 2):
            with TrainerProcess(tmp_path / "data", base="random:10,2,42") as trainer:
                shown = _trained(service.client, jobs)
                assert shown[series("adapters_published_total", source="job")] == jobs
                assert total(shown, "processes", role="trainer") == 1
                assert shown[series("process_starts_total", process="trainer-1")] == jobs
                assert trainer.stop() == 0
            scraped(service.client, lambda shown: total(shown, "processes", role="trainer") == 0, what="its end")


def _trained(client: httpx.Client, jobs: int) -> Shown:
    """Train once more, and scrape when so many trainings are counted."""
    data = {"inputs": [[1.0] * 10] * 4, "targets": [[0.0, 1.0]] * 4}
    body = {"name": "acme", "rank": 1, "data": data, "training": {"method": "closed_form"}}
    assert client.post("/adapters", json=body).status_code == 202
    ended = series("training_seconds_count", method="closed_form", status="succeeded")
    return scraped(client, lambda shown: shown.get(ended) == jobs, what="the training")
