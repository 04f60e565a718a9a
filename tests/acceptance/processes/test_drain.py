"""SIGTERM: a service says that it is not ready, goes on answering until a load balancer has noticed, and ends."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.deadlines import scaled
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

PREDICT = {"adapter": None, "inputs": [[0.0] * 10]}


def test_a_service_answers_while_it_drains_and_then_ends(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"base": "random:10,2,42", "trainers": 0, "workers": 2, "drain_seconds": scaled(5)}
    with ServiceProcess(tmp_path / "data", shutdown_grace_seconds=scaled(20), **settings) as service:
        kept = [service.connect() for _ in range(8)]
        for client in kept:
            assert client.post("/predict", json=PREDICT).headers.get("connection") is None
        service.process.send_signal(signal.SIGTERM)
        # Both workers accept connections, and which one does is the system's choice.
        eventually(lambda: {httpx.get(f"{service.client.base_url}/readyz").status_code for _ in range(8)} == {503})
        for client in kept:
            # On the connection of before, and on a new one, because the first answer has closed it.
            for _ in range(2):
                answer = client.post("/predict", json=PREDICT)
                assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            client.close()
        assert service.process.wait(scaled(30)) == 0
        with pytest.raises(httpx.ConnectError):
            service.client.get("/readyz")


def test_a_request_in_flight_at_the_end_of_the_drain_is_answered(tmp_path: Path) -> None:
    with ServiceProcess(tmp_path / "data", base="random:10,2,42", trainers=0, drain_seconds=0) as service:
        progress: list[str] = []

        def body() -> Iterator[bytes]:
            yield b'{"A": [[1.0], [1.0]], '
            service.process.send_signal(signal.SIGTERM)
            eventually(lambda: _is_closed(service), what="the end of the listener")
            progress.append("closed")
            yield b'"B": [[1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]}'

        headers = {"Content-Type": "application/json"}
        with service.connect() as client:
            answer = client.put("/adapters/acme", content=body(), headers=headers)
        assert (answer.status_code, progress) == (201, ["closed"])
        assert service.process.wait(scaled(60)) == 0


def _is_closed(service: ServiceProcess) -> bool:
    try:
        with service.connect() as client:
            client.get("/healthz")
    except httpx.TransportError:
        return True
    return False
