"""The number of series is the same whatever comes in.

`METRIC_NAMES=20000` runs the long form.
"""

import json
import os
import socket
from collections.abc import Iterator, Sequence

import httpx
import pytest
import torch

from adapters.lora.adapter import Adapter
from app.service import Service
from tests.conftest import Serve
from tests.support.concurrent_clients import publish
from tests.support.metrics_exposition import scrape, total

NAMES, AT_ONCE = int(os.environ.get("METRIC_NAMES", "4000")), 200
PUBLISHED = NAMES // 10
ADAPTER = Adapter(torch.ones(2, 1), torch.ones(1, 10), None, alpha=1.0)
TRAINING = {"rank": 1, "data": {"inputs": [[1.0] * 10] * 2, "targets": [[0.0, 1.0]] * 2}, "training": {"epochs": 1}}


def _predict(name: str) -> bytes:
    body = json.dumps({"adapter": name, "inputs": [[1.0] * 10]}).encode()
    head = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)


def _answers(client: httpx.Client, requests: Sequence[bytes]) -> Iterator[int]:
    """The statuses of requests that are sent one behind the other, some at once."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        answers = connection.makefile("rb")
        for begin in range(0, len(requests), AT_ONCE):
            some = requests[begin : begin + AT_ONCE]
            connection.sendall(b"".join(some))
            for _ in some:
                status = int(answers.readline().split()[1])
                length = 0
                while (line := answers.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                answers.read(length)
                yield status


def _one_of_each(client: httpx.Client, service: Service) -> None:
    """Of everything that follows, the first: from then on nothing is new."""
    publish(service.catalog, service.base, {"first": ADAPTER})
    for name in ("first", "missing"):
        list(_answers(client, [_predict(name)]))
        client.get(f"/adapters/{name}")
        client.post(f"/v2/models/{name}/infer", json={})
    client.get("/nowhere/first")
    client.request("BREW", "/predict")
    client.post("/adapters", json={"name": "first", **TRAINING})
    scrape(client)


@pytest.mark.slow
@pytest.mark.soak
def test_thousands_of_names_add_no_series(serve: Serve) -> None:
    client, service = serve()
    _one_of_each(client, service)
    before = scrape(client)
    publish(service.catalog, service.base, {f"name-{number}": ADAPTER for number in range(PUBLISHED)})
    statuses = list(_answers(client, [_predict(f"name-{number}") for number in range(NAMES)]))
    assert (statuses.count(200), statuses.count(404)) == (PUBLISHED, NAMES - PUBLISHED)
    for number in range(PUBLISHED // 2, PUBLISHED * 3 // 2, 4):
        client.get(f"/adapters/name-{number}")
        client.get(f"/nowhere/name-{number}")
    for number in range(50):
        client.post(f"/v2/models/name-{number + PUBLISHED - 25}/infer", json={})
        client.request(f"BREW{number}", "/predict")
        client.post("/adapters", json={"name": f"name-{number}", **TRAINING})
    after = scrape(client)
    assert set(after) == set(before)
    assert total(after, "requests_total", route="/predict") >= NAMES
