"""A request that asks for another protocol is answered as what it is, and its body is its own."""

import json
import re
import socket
from collections.abc import Iterator

import httpx
import pytest

from app.http.errors import NotHttp
from app.service import Service
from app.serving import uvicorn_protocol as wire
from app.settings import Settings
from tests.conftest import Serve
from tests.support.service import DEADLINE_SECONDS, serving

IN = 4
ROW = {"adapter": None, "inputs": [[0.0] * IN]}
LAST = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
SMUGGLED = b"DELETE /adapters/victim HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADES = ["h2c", "websocket", "TLS/1.0", "anything, else"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Service]]:
    """A worker with an adapter that nobody may delete."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("upgrades"), base=f"identity:{IN}", allowed_hosts="x")
    with serving(settings) as (client, service):
        client.put("/adapters/victim", json={"A": [[1.0]] * IN, "B": [[1.0] * IN]}).raise_for_status()
        yield client, service
        assert client.get("/adapters/victim").status_code == 200


def framed(body: bytes, *, chunked: bool) -> bytes:
    """The end of a head, and a body."""
    if chunked:
        return b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def statuses(client: httpx.Client, sent: bytes, *, one_by_one: bool) -> list[int]:
    """Of all answers until the service closes the connection."""
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=DEADLINE_SECONDS) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin in range(0, len(sent), 1 if one_by_one else len(sent)):
            connection.sendall(sent[begin : begin + (1 if one_by_one else len(sent))])
        received = b"".join(iter(lambda: connection.recv(2**16), b""))
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d{3}) ", received)]


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize(
    ("line", "body", "status"),
    [
        ("POST /predict", json.dumps(ROW).encode(), 200),
        ("POST /predict", SMUGGLED, 400),
        ("POST /v2/models/__base__/infer", SMUGGLED, 400),
        ("PUT /adapters/new", SMUGGLED, 400),
        ("DELETE /adapters/absent", SMUGGLED, 404),
        ("GET /healthz", SMUGGLED, 200),
        ("POST /nothing", SMUGGLED, 404),
    ],
)
def test_the_body_of_a_request_that_asks_for_an_upgrade_is_read_as_its_own(
    running: tuple[httpx.Client, Service],
    line: str,
    body: bytes,
    status: int,
    upgrade: str,
    chunked: bool,
    one_by_one: bool,
) -> None:
    head = f"{line} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: {upgrade}\r\n".encode()
    message = head + b"HTTP2-Settings: AAEAAEAAAAIAAAAB\r\nContent-Type: application/json\r\n"
    message += framed(body, chunked=chunked)

    assert statuses(running[0], message + message + LAST, one_by_one=one_by_one) == [status, status, 200]


@pytest.mark.parametrize("upgrade", UPGRADES)
def test_a_request_without_a_body_is_followed_by_the_next(running: tuple[httpx.Client, Service], upgrade: str) -> None:
    message = f"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: {upgrade}\r\n\r\n".encode()
    assert statuses(running[0], message * 3 + LAST, one_by_one=False) == [200] * 4


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upgrade_and_the_end_of_the_connection_go_together(
    running: tuple[httpx.Client, Service], chunked: bool
) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close, upgrade\r\nUpgrade: h2c\r\n"
    message = head + b"Content-Type: application/json\r\n" + framed(json.dumps(ROW).encode(), chunked=chunked)
    assert statuses(running[0], message + SMUGGLED, one_by_one=False) == [200]


def test_a_tunnel_is_refused_and_what_would_go_through_it_is_not_read(running: tuple[httpx.Client, Service]) -> None:
    tunnel = b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n"
    assert statuses(running[0], tunnel + SMUGGLED + LAST, one_by_one=False) == [400]


@pytest.mark.parametrize("chunked", [False, True])
def test_an_error_in_the_made_up_head_of_a_body_is_an_answer(
    running: tuple[httpx.Client, Service], monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    begin_body = wire.FastPathProtocol.begin_body

    def fail_when_resuming(self: wire.FastPathProtocol) -> bool:
        if self._is_resuming:
            raise NotHttp("a body that cannot be read")
        return begin_body(self)

    monkeypatch.setattr(wire.FastPathProtocol, "begin_body", fail_when_resuming)
    message = b"PUT /adapters/new HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n"
    message += framed(SMUGGLED, chunked=chunked)
    assert statuses(running[0], LAST.replace(b"Connection: close\r\n", b"") + message, one_by_one=False) == [200, 400]


@pytest.mark.parametrize("path", ["/healthz", "/base", "/predict", "/adapters/x"])
def test_a_length_of_thousands_of_digits_is_refused(serve: Serve, path: str) -> None:
    client, _ = serve()
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {'0' * 5000}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.base_url.port or 80), timeout=30) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code": "not_http"' in answer
