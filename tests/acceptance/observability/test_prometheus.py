"""A real Prometheus beside a real service: each query of dashboard and alerts is understood, and has an answer."""

import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.acceptance.observability.monitoring_files import ALERTS, PROMETHEUS, expressions
from tests.support.external_programs import program
from tests.support.service import ServiceProcess, eventually, free_port

pytestmark = pytest.mark.slow

A, B = [[0.1], [0.2]], [[0.1] * 10]
DATA = {"inputs": [[1.0] * 10] * 4, "targets": [[0.0, 1.0]] * 4}
DEADLINE_SECONDS = 60


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One worker and one trainer."""
    program("prometheus")  # before anything is started for nothing
    with ServiceProcess(tmp_path_factory.mktemp("watched") / "data", base="random:10,2,42") as service:
        yield service


@pytest.fixture(scope="module")
def prometheus(service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Prometheus with our configuration, but for where the service is and how often it looks."""
    folder: Path = tmp_path_factory.mktemp("prometheus")
    configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{service.port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    (folder / "alerts.yml").write_text((PROMETHEUS / "alerts.yml").read_text())
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            eventually(lambda: _is_ready(client), what="a ready Prometheus")
            yield client
    finally:
        process.terminate()
        process.wait(DEADLINE_SECONDS)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def _found(prometheus: httpx.Client, expression: str) -> list[float]:
    """What a query finds now, without what is not a number."""
    answer = prometheus.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    values = [float(sample["value"][1]) for sample in answer["data"]["result"]]
    return [value for value in values if math.isfinite(value)]


def _work(client: httpx.Client) -> None:
    """A little of everything that is measured."""
    client.put("/adapters/acme", json={"A": A, "B": B}).raise_for_status()
    training: dict[str, Any] = {"name": "trained", "rank": 1, "data": DATA, "training": {"epochs": 1}}
    client.post("/adapters", json=training).raise_for_status()
    for _ in range(5):
        client.post("/predict", json={"adapter": "acme", "inputs": [[1.0] * 10]}).raise_for_status()


def test_each_query_of_the_dashboard_has_data(service: ServiceProcess, prometheus: httpx.Client) -> None:
    empty = dict(expressions())

    def all_have() -> bool:
        _work(service.client)
        for panel in [panel for panel, expression in empty.items() if _found(prometheus, expression)]:
            del empty[panel]
        return not empty

    try:
        eventually(all_have)
    finally:
        assert empty == {}


def test_each_alert_can_be_evaluated_and_none_speaks_of_a_service_that_is_well(
    service: ServiceProcess, prometheus: httpx.Client
) -> None:
    def evaluated() -> list[dict[str, Any]]:
        groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
        rules: list[dict[str, Any]] = [rule for group in groups for rule in group["rules"]]
        return rules if all(rule["health"] != "unknown" for rule in rules) else []

    rules = eventually(evaluated, what="an evaluation of each alert")
    assert {rule["name"]: rule["health"] for rule in rules} == {rule["alert"]: "ok" for rule in ALERTS}
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
    for rule in ALERTS:
        _found(prometheus, rule["expr"])


def test_prometheus_takes_every_line_of_a_scrape(service: ServiceProcess, prometheus: httpx.Client) -> None:
    def target() -> dict[str, Any] | None:
        targets = prometheus.get("/api/v1/targets").json()["data"]["activeTargets"]
        return next((each for each in targets if each["health"] != "unknown"), None)

    seen = eventually(target, what="a scrape")
    assert (seen["health"], seen["lastError"]) == ("up", "")
    run = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=service.client.get("/metrics").text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout + run.stderr == ""
