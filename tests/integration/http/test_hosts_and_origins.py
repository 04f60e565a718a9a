"""Hosts and origins: what a service on a real socket refuses, on the fast path and off it."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.http.middleware import Middleware
from app.service import Service
from app.settings import Settings
from tests.conftest import Serve
from tests.support.log_lines import line_of
from tests.support.metrics_exposition import scrape, series
from tests.support.service import DEADLINE_SECONDS, ServiceProcess, eventually, serving

A, B = [[1.0], [2.0]], [[1.0, 0.0, 0.0]]
PREDICT = json.dumps({"adapter": "acme", "inputs": [[1, 2, 3]]}).encode()
INFER = json.dumps({"inputs": [{"name": "inputs", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}).encode()
JSON = {"Content-Type": "application/json"}
EVIL = {"Host": "evil.example"}
CALLS = [("/predict", PREDICT), ("/v2/models/acme/infer", INFER)]

Running = tuple[httpx.Client, Service]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A worker with one adapter, `acme`, and no hosts of its own."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("hosts") / "data", base="random:3,2,7")
    with serving(settings) as (client, service):
        client.put("/adapters/acme", json={"A": A, "B": B}).raise_for_status()
        yield client, service


@pytest.fixture
def asgi_paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the requests that did not take the fast path."""
    paths: list[str] = []
    edge = Middleware.__call__

    async def noted(self: Middleware, scope: Any, receive: Any, send: Any) -> None:
        paths.append(scope.get("path", ""))
        await edge(self, scope, receive, send)

    monkeypatch.setattr(Middleware, "__call__", noted)
    return paths


def status_of(client: httpx.Client, head: bytes) -> int:
    """The status of the answer to these bytes, sent on a connection of their own."""
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=DEADLINE_SECONDS) as connection:
        connection.sendall(head + b"Connection: close\r\n\r\n")
        received = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert received.startswith(b"HTTP/1.1 ")
    return int(received[9:12])


def test_a_rebound_name_cannot_delete_an_adapter(running: Running) -> None:
    client, _ = running
    answer = client.delete("/adapters/acme", headers=EVIL)
    assert answer.status_code == 403
    error = answer.json()
    assert (error["code"], error["field"], error["given"]) == ("host_not_allowed", "Host", "evil.example")
    assert "LORAPLEX_ALLOWED_HOSTS" in error["detail"]
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"]
    assert client.get("/adapters/acme").status_code == 200


@pytest.mark.parametrize(("path", "body"), CALLS)
@pytest.mark.parametrize(
    ("headers", "code"),
    [
        (EVIL, "host_not_allowed"),
        ({"Host": "localhost:80@evil.example"}, "host_not_allowed"),
        ({"Origin": "http://evil.example"}, "cross_site"),
        ({"Origin": "null"}, "cross_site"),
        ({"Sec-Fetch-Site": "cross-site"}, "cross_site"),
    ],
)
def test_a_prediction_is_refused_too(
    running: Running, path: str, body: bytes, headers: dict[str, str], code: str
) -> None:
    client, _ = running
    answer = client.post(path, content=body, headers=JSON | headers)
    assert answer.status_code == 403
    if path == "/predict":
        assert answer.json()["code"] == code
    else:
        assert list(answer.json()) == ["error"]
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(("path", "body"), CALLS)
def test_the_fast_path_takes_the_service_s_own_names_and_leaves_pages_to_the_application(
    running: Running, asgi_paths: list[str], path: str, body: bytes
) -> None:
    client, _ = running
    own = f"127.0.0.1:{client.base_url.port}"
    for host in (own, own, "localhost", "[::1]:1"):
        assert client.post(path, content=body, headers=JSON | {"Host": host}).status_code == 200
    assert asgi_paths == []
    for page in ({"Origin": f"http://{own}"}, {"Sec-Fetch-Site": "same-origin"}):
        assert client.post(path, content=body, headers=JSON | page).status_code == 200
    assert asgi_paths == [path, path]
    assert client.post(path, content=body, headers=JSON | EVIL).status_code == 403
    assert asgi_paths == [path, path, path]


@pytest.mark.parametrize(
    "path", ["/", "/metrics", "/openapi.json", "/static/css/page.css", "/v2", "/adapters", "/nothing"]
)
def test_nothing_is_shown_to_a_rebound_name(running: Running, path: str) -> None:
    client, _ = running
    assert client.get(path, headers=EVIL).status_code == 403
    assert client.get(path, headers=EVIL | {"Sec-Fetch-Site": "same-origin"}).status_code == 403


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"])
def test_health_is_shown_to_every_name(running: Running, path: str) -> None:
    assert running[0].get(path, headers=EVIL).status_code == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET http://evil.example/base HTTP/1.1\r\nHost: localhost\r\n", 403),
        (b"GET http://localhost/base HTTP/1.1\r\nHost: evil.example\r\n", 403),
        (b"GET http://localhost@evil.example/base HTTP/1.1\r\nHost: localhost\r\n", 403),
        (b"GET http://localhost/base HTTP/1.1\r\nHost: localhost\r\n", 200),
        (b"GET /base HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", 403),
        (b"GET /base HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", 403),
        (b"GET /base HTTP/1.1\r\nHost:\r\n", 403),
        (b"GET /base HTTP/1.1\r\n", 403),
        (b"GET /base HTTP/1.0\r\n", 200),
        (b"GET /base HTTP/1.0\r\nHost: evil.example\r\n", 403),
        (b"GET /base HTTP/1.1\r\nHost: LOCALHOST.:1\r\n", 200),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n", 404),
    ],
)
def test_every_way_to_name_a_host_counts(running: Running, head: bytes, status: int) -> None:
    assert status_of(running[0], head) == status


def test_the_fast_path_needs_a_host(running: Running) -> None:
    head = b"POST /predict HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 0\r\n"
    assert status_of(running[0], head) == 403


def test_a_preflight_of_another_host_is_refused(running: Running) -> None:
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "DELETE"}
    answer = running[0].options("/adapters/acme", headers=preflight)
    assert (answer.status_code, answer.json()["code"]) == (403, "cross_site")
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(("allowed", "status"), [("api, loraplex.example.com:443", 200), ("*", 200), (None, 403)])
def test_the_setting_adds_hosts(serve: Serve, allowed: str | None, status: int) -> None:
    client, _ = serve(allowed_hosts=allowed)
    for host in ("api:8000", "loraplex.example.com"):
        assert client.get("/base", headers={"Host": host}).status_code == status


def test_refusals_are_counted_and_logged_as_other_answers_are(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("refused")
    with ServiceProcess(folder / "data", base="random:3,2,7", trainers=0, allowed_hosts="api") as service:
        assert service.client.get("/base", headers={"Host": "api:8000"}).status_code == 200
        refused = service.client.post("/predict", content=PREDICT, headers=JSON | EVIL)
        assert refused.status_code == 403
        line = line_of(service.log, refused.headers["x-request-id"])
        assert (line["status"], line["code"], line["path"]) == (403, "host_not_allowed", "/predict")
        counted = series("requests_total", route="other", method="POST", status="403")
        eventually(lambda: scrape(service.client).get(counted) == 1, what="the count")
