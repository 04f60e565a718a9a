"""A replica names itself in every answer, and closes connections while it drains."""

import re
import socket
from collections.abc import Callable

import httpx
import pytest

from app.service import Service
from app.settings import Settings
from tests.support.service import eventually

Serve = Callable[..., tuple[httpx.Client, Service]]
PREDICT = {"adapter": None, "inputs": [[0.0] * 10]}
THROUGH_ASGI = {"X-Request-Timeout": "50"}
REQUESTS = [
    httpx.Request("GET", "http://service/base"),
    httpx.Request("GET", "http://service/"),
    httpx.Request("GET", "http://service/nothing"),
    httpx.Request("PUT", "http://service/adapters/acme", content=b"x" * 2000),
    httpx.Request("GET", "http://service/base", headers={"Host": "another.example"}),
    httpx.Request("POST", "http://service/predict", json=PREDICT),
    httpx.Request("POST", "http://service/predict", json=PREDICT, headers=THROUGH_ASGI),
    httpx.Request("POST", "http://service/predict", json=PREDICT | {"adapter": "nobody"}),
    httpx.Request("POST", "http://service/v2/models/__base__/infer", json={}),
]


def _raw(client: httpx.Client, request: bytes) -> bytes:
    """Send bytes on a connection of their own, and return what comes until it is closed."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=60) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(2**16):
            answer += chunk
    return answer


def _send(client: httpx.Client, request: httpx.Request) -> httpx.Response:
    headers = {name: value for name, value in request.headers.items() if value != "service"}
    return client.request(request.method, request.url.path, content=request.content, headers=headers)


def test_every_answer_names_the_replica(serve: Serve) -> None:
    client, _ = serve(replica_name="east-1", max_body_bytes=1024)
    answers = [_send(client, request) for request in REQUESTS]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 413, 403, 200, 200, 404, 422]
    assert [answer.headers.get_list("x-served-by") for answer in answers] == [["east-1"]] * len(answers)
    assert b"\r\nx-served-by: east-1\r\n" in _raw(client, b"nonsense\r\n\r\n")


def test_a_service_on_one_machine_does_not_name_it(client: httpx.Client) -> None:
    assert all("x-served-by" not in _send(client, request).headers for request in REQUESTS)


def test_a_replica_is_named_after_its_host() -> None:
    cluster = {"database_url": "postgresql+psycopg://database/loraplex", "blob_url": "s3://bucket/loraplex"}
    assert Settings.model_validate(cluster).served_by == re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64]
    assert Settings.model_validate(cluster | {"replica_name": "east-1"}).served_by == "east-1"


@pytest.mark.parametrize("request_headers", [{}, THROUGH_ASGI])
def test_a_service_that_drains_answers_and_closes_the_connection(serve: Serve, request_headers: dict[str, str]) -> None:
    client, service = serve()
    before = client.post("/predict", json=PREDICT, headers=request_headers)
    assert "connection" not in before.headers
    service.draining = True
    for answer in [client.post("/predict", json=PREDICT, headers=request_headers) for _ in range(2)]:
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert answer.content == before.content
    body = b'{"adapter":null,"inputs":[[0,0,0,0,0,0,0,0,0,0]]}'
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    # The raw connection ends, which is what the client waits for.
    assert _raw(client, head % len(body) + body).startswith(b"HTTP/1.1 200 ")


def test_a_request_that_began_before_the_drain_is_answered(serve: Serve) -> None:
    client, service = serve()
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=60) as connection:
        body = b'{"adapter":null,"inputs":[[0,0,0,0,0,0,0,0,0,0]]}'
        head = (
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        connection.sendall(head % len(body) + body[:10])
        eventually(lambda: service.bodies.held == 10, what="the first part of the body")
        service.draining = True
        connection.sendall(body[10:])
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
