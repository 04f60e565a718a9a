"""Small requests are answered straight from their connection: as the ASGI application would, and without it."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from adapters.lora.adapter import Adapter
from app.http.endpoints import ENDPOINTS
from app.http.middleware import Middleware
from app.service import Service
from app.serving.fast_path import ALLOWED_HEADERS, PREDICT, FastPath
from app.settings import Settings
from tests.support.concurrent_clients import JSON, publish
from tests.support.deadlines import scaled
from tests.support.dense_oracle import random_adapter
from tests.support.service import DEADLINE_SECONDS, eventually, serving

I, O = 8, 3
THROUGH_ASGI = {"X-Request-Timeout": "50"}
"""A header that changes nothing here, and that only the ASGI application reads."""
KEEP_ALIVE_SECONDS = 1
MOST_UNREAD_ANSWERS = 100
"""Together about 30 MB, several times what the kernel holds for a connection."""
ROW = [1.0, -2.0, 0.5, 0.25, 3.0, 1.0, 1.0, 1e-3]
HUGE = [3e38] * I
VARYING = {"date", "server-timing", "x-request-id"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Service]]:
    """A worker with two adapters, which closes what rests for a second."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("direct"), base=f"random:{I},{O},3")
    with serving(settings, keep_alive_seconds=KEEP_ALIVE_SECONDS) as (client, service):
        adapters: dict[str, Adapter] = {name: random_adapter(O, I, 2, seed=seed) for seed, name in enumerate("ab")}
        publish(service.catalog, service.base, adapters)
        yield client, service


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Service]]:
    """A worker on a base layer with `WIDE` outputs."""
    with serving(Settings(data_dir=tmp_path_factory.mktemp("wide"), base=f"random:1,{WIDE},3")) as both:
        yield both


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the requests that became ASGI calls."""
    seen: list[str] = []
    edge = Middleware.__call__

    async def noted(self: Middleware, scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope.get("path", ""))
        await edge(self, scope, receive, send)

    monkeypatch.setattr(Middleware, "__call__", noted)
    return seen


def predict(adapter: Any, *rows: Any, **more: Any) -> tuple[str, bytes, dict[str, str]]:
    """A `POST /predict`."""
    return "/predict", json.dumps({"adapter": adapter, "inputs": rows} | more).encode(), JSON


def infer(path: str, *rows: Any, header: Any = None, **more: Any) -> tuple[str, bytes, dict[str, str]]:
    """An infer request with its rows as FP32."""
    tensor = np.array(rows, dtype="<f4").tobytes()
    parameters = {"binary_data_size": len(tensor)}
    given = {"name": "inputs", "shape": [len(rows), I], "datatype": "FP32", "parameters": parameters}
    asked = {"inputs": [given], "parameters": {"binary_data_output": True}} | (header or {})
    text = json.dumps(asked).encode()
    return f"/v2/models/{path}/infer", text + tensor, {"Inference-Header-Content-Length": str(len(text))} | more


def infer_json(data: Any, *, rows: int = 1, **more: Any) -> tuple[str, bytes, dict[str, str]]:
    """An infer request of `a` in JSON."""
    tensor = {"name": "inputs", "shape": [rows, I], "datatype": "FP32", "data": data} | more
    return "/v2/models/a/infer", json.dumps({"inputs": [tensor]}).encode(), JSON


CLASSIFIED = {"name": "outputs", "parameters": {"classification": 2}}
BY_ROW = ("/predict", json.dumps({"adapters": ["a", None, "b", "a"], "inputs": [ROW] * 4}).encode(), JSON)
TAKEN = {
    "an adapter": predict("a", ROW),
    "many rows": predict("b@1", *[ROW] * 50),
    "the base": predict(None, ROW),
    "an adapter a row": BY_ROW,
    "an unknown adapter": predict("nobody", ROW),
    "an unknown version": predict("a@7", ROW),
    "an answer past float32": predict("a", ROW, HUGE),
    "binary": infer("a", ROW, ROW),
    "binary, a version": infer("b/versions/1", ROW),
    "binary, the base": infer("__base__", ROW),
    "binary with an id": infer("a", ROW, header={"id": "7"}),
    "binary, an unknown model": infer("nobody", ROW),
    "binary, an answer past float32": infer("a", HUGE),
    "binary, answered as JSON": infer("a", ROW, header={"parameters": {}}),
    "infer in JSON, flat": infer_json([*ROW, *ROW], rows=2),
    "infer in JSON, nested": infer_json([ROW, ROW], rows=2),
}
WIDE = 2**13
"""Outputs of a base layer on which the fast path answers up to `MOST_WIDE_ROWS` rows, about 300 KB of JSON."""
MOST_WIDE_ROWS = 4
LEFT = {
    "a row too wide": predict("a", [*ROW, 1]),
    "not a number": predict("a", [*ROW[1:], "1"]),
    "not finite": predict("a", [*ROW[1:], 1e39]),
    "not JSON": ("/predict", b'{"adapter": "a", "inputs": [[', JSON),
    "no body": ("/predict", b"", JSON),
    "a bad name": predict("a b", ROW),
    "a field twice": ("/predict", b'{"adapter": null, "adapter": null, "inputs": [[1,2,3,4,5,6,7,8]]}', JSON),
    "no content type": (*predict("a", ROW)[:2], {}),
    "another feature space": (*predict("a", ROW)[:2], JSON | {"X-Feature-Space": "other"}),
    "a query": ("/predict?x=1", *predict("a", ROW)[1:]),
    "a whole number past 64 bits": predict("a", [2**70, *ROW[1:]]),
    "binary, bytes that are missing": (infer("a", ROW)[0], infer("a", ROW)[1][:-1], infer("a", ROW)[2]),
    "binary, not finite": infer("a", [np.nan, *ROW[1:]]),
    "infer in JSON, a number missing": infer_json(ROW[1:]),
    "infer in JSON, nested deeper": infer_json([[ROW]]),
    "infer in JSON, much around the numbers": infer_json(ROW, parameters={"note": "x" * 1024}),
    "binary, a long header": infer("a", ROW, header={"id": "x" * 2**14}),
    "infer in JSON, FP16": infer_json(ROW, datatype="FP16"),
    "binary with a time-out": infer("a", ROW, header={"parameters": {"timeout": 10**7, "binary_data_output": True}}),
    "binary, a bad name": infer("a~b", ROW),
    "binary, a bad version": infer("a/versions/01", ROW),
    "labels": predict("a", ROW, **{"return": ["labels", "probabilities"], "top_k": 2}),
    "outputs, by their name": predict("a", ROW, **{"return": ["outputs"]}),
    "binary, classes": infer("a", ROW, header={"outputs": [CLASSIFIED]}),
    "another path": ("/v2/models/infer", b"{}", JSON),
}


def told(answer: httpx.Response) -> tuple[int, list[tuple[str, str]], bytes]:
    """All of an answer that does not vary from one to the next."""
    assert set(answer.headers) >= VARYING - {"server-timing"}
    headers = sorted((name, value) for name, value in answer.headers.multi_items() if name not in VARYING)
    return answer.status_code, headers, answer.content


@pytest.mark.parametrize("name", [*TAKEN, *LEFT])
def test_an_answer_is_the_one_that_the_application_gives(
    world: tuple[httpx.Client, Service], calls: list[str], name: str
) -> None:
    client, _ = world
    path, body, headers = TAKEN[name] if name in TAKEN else LEFT[name]

    answer = client.post(path, content=body, headers=headers)
    assert (calls == []) == (name in TAKEN)
    through_asgi = client.post(path, content=body, headers=headers | THROUGH_ASGI)

    assert calls
    assert told(answer) == told(through_asgi)


ALLOWED = sorted(name.decode() for name in ALLOWED_HEADERS[PREDICT] - {b"host", b"connection", b"content-length"})
NOT_ALLOWED = {
    "X-Request-Timeout": "50",
    "X-Feature-Space": "other",
    "Origin": "http://localhost",
    "Sec-Fetch-Site": "same-origin",
    "Content-Encoding": "identity",
    "Idempotency-Key": "7",
    "X-Unknown": "1",
}


def fallbacks(client: httpx.Client) -> dict[str, float]:
    """Requests that were left to ASGI so far, by reason."""
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    pattern = re.compile(r'loraplex_fast_path_fallbacks_total\{reason="(\w+)"\} (\S+)')
    return {match[1]: float(match[2]) for line in lines if (match := pattern.fullmatch(line))}


@pytest.mark.parametrize("header", ALLOWED)
@pytest.mark.parametrize("name", ["an adapter", "binary"])
def test_a_header_of_the_allow_list_changes_nothing(
    world: tuple[httpx.Client, Service], calls: list[str], name: str, header: str
) -> None:
    client, _ = world
    path, body, headers = TAKEN[name]
    with_header = headers if header in ("content-type", "x-request-id") else headers | {header: "x"}

    answer = client.post(path, content=body, headers=with_header)
    assert calls == []
    assert told(answer) == told(client.post(path, content=body, headers=with_header | THROUGH_ASGI))


@pytest.mark.parametrize("header", NOT_ALLOWED)
def test_any_other_header_is_left_to_the_application_and_counted(
    world: tuple[httpx.Client, Service], calls: list[str], header: str
) -> None:
    client, _ = world
    path, body, headers = TAKEN["an adapter"]
    before = fallbacks(client)
    calls.clear()

    client.post(path, content=body, headers=headers | {header: NOT_ALLOWED[header]})

    assert calls == [path]
    assert fallbacks(client) == before | {"header": before["header"] + 1}


@pytest.mark.parametrize(
    ("request_parts", "reason"),
    [
        ((*predict("a", ROW)[:2], JSON | {"Host": "elsewhere.example"}), "host"),
        (predict("a", [*ROW, 1]), "body"),
        (("/predict", b" " * 2**18 + predict("a", ROW)[1], JSON), "length"),
        ((*predict("a", ROW)[:2], JSON | {"Connection": "close"}), "connection"),
        (infer("a~b", ROW), None),
    ],
    ids=["host", "body", "length", "connection", "another path"],
)
def test_a_request_that_is_left_to_the_application_is_counted_by_its_reason(
    world: tuple[httpx.Client, Service], request_parts: tuple[str, bytes, dict[str, str]], reason: str | None
) -> None:
    client, _ = world
    path, body, headers = request_parts
    before = fallbacks(client)

    client.post(path, content=body, headers=headers)

    assert fallbacks(client) == before | ({} if reason is None else {reason: before[reason] + 1})


def test_the_allow_list_has_no_header_that_the_endpoint_honours_and_the_fast_path_does_not() -> None:
    for endpoint in ENDPOINTS:
        if endpoint.asgi is not None:
            honoured = {header.lower().encode() for header in endpoint.request_headers}
            assert honoured & ALLOWED_HEADERS[endpoint.path] <= {b"x-request-id", b"inference-header-content-length"}


def test_a_clients_request_id_is_kept_and_others_have_one_of_their_own(world: tuple[httpx.Client, Service]) -> None:
    client, _ = world
    path, body, headers = TAKEN["an adapter"]

    ids = [client.post(path, content=body, headers=headers).headers["x-request-id"] for _ in range(2)]
    kept = client.post(path, content=body, headers=headers | {"X-Request-Id": "mine-1.2_3"})
    replaced = client.post(path, content=body, headers=headers | {"X-Request-Id": "mine\tor yours"})

    assert len({*ids, replaced.headers["x-request-id"]}) == 3
    assert kept.headers["x-request-id"] == "mine-1.2_3"


def message(path: str, body: bytes, headers: dict[str, str], *, version: str = "1.1") -> bytes:
    """A whole POST."""
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return (
        f"POST {path} HTTP/{version}\r\nHost: localhost\r\n{fields}Content-Length: {len(body)}\r\n\r\n".encode() + body
    )


def connect(client: httpx.Client) -> socket.socket:
    """A connection of one's own."""
    return socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=DEADLINE_SECONDS)


def statuses(connection: socket.socket) -> list[int]:
    """Of all the answers until the service closes the connection."""
    received = b"".join(iter(lambda: connection.recv(2**16), b""))
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize(
    ("header", "status"),
    [("Host: elsewhere.example", 403), ("Content-Type: text/plain", 200), ("X-Request-Id: other", 200)],
)
def test_a_head_with_a_header_twice_is_left_to_the_application(
    world: tuple[httpx.Client, Service], calls: list[str], header: str, status: int
) -> None:
    client, _ = world
    path, body, headers = TAKEN["an adapter"]
    # The fast path would read only the last header of a name, and it accepts each of those.
    request_line, rest = message(path, body, headers | {"X-Request-Id": "mine"}).split(b"\r\n", 1)

    with connect(client) as connection:
        connection.sendall(b"\r\n".join([request_line, header.encode(), rest]))
        assert connection.recv(2**16).startswith(b"HTTP/1.1 %d " % status)
    assert calls == [path]


@pytest.mark.parametrize("more", [0, 1])
def test_an_answer_of_many_numbers_is_left_to_the_application(
    wide: tuple[httpx.Client, Service], calls: list[str], more: int
) -> None:
    client, _ = wide
    rows = MOST_WIDE_ROWS + more
    path, body, headers = predict(None, *[[1.0]] * rows)

    answer = client.post(path, content=body, headers=headers)

    assert np.array(answer.json()["outputs"]).shape == (rows, WIDE)
    assert calls == [path] * more


def test_a_client_that_does_not_read_its_answers_is_left_to_the_application(
    wide: tuple[httpx.Client, Service], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = wide
    small = message(*predict(None, *[[1.0]] * MOST_WIDE_ROWS))
    last = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    direct_answers: list[bytes | None] = []
    answer = FastPath.respond

    def record(self: FastPath, *given: Any, **named: Any) -> bytes | None:
        direct_answers.append(answer(self, *given, **named))
        return direct_answers[-1]

    monkeypatch.setattr(FastPath, "respond", record)

    def is_answered(sent: int) -> bool:
        return bool(calls) or len(direct_answers) == sent

    with connect(client) as connection:
        sent = 0
        # The kernel's buffers take some MiB before the connection's own buffer is full.
        while not calls and sent < MOST_UNREAD_ANSWERS:
            # One at a time: a request that follows an unfinished one is the application's in any case.
            connection.sendall(small)
            sent += 1
            eventually(partial(is_answered, sent), what="its answer")
        assert calls == ["/predict"]
        assert len(direct_answers) == sent - 1
        connection.sendall(last)
        assert statuses(connection) == [200] * sent + [404]


def test_requests_that_follow_each_other_in_one_write_are_answered_in_their_order(
    world: tuple[httpx.Client, Service],
) -> None:
    client, _ = world
    small, unknown, other = (message(*TAKEN[name]) for name in ("an adapter", "an unknown adapter", "binary"))
    bad = message(*LEFT["not JSON"])
    get = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    with connect(client) as connection:
        connection.sendall(small + unknown + get + bad + other + small + last)
        assert statuses(connection) == [200, 404, 200, 400, 200, 200, 404]


def test_a_body_may_come_in_pieces(world: tuple[httpx.Client, Service], calls: list[str]) -> None:
    client, _ = world
    path, body, headers = TAKEN["many rows"]
    whole = message(path, body, headers | {"Connection": "keep-alive"})

    with connect(client) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin in range(0, len(whole), 500):
            connection.sendall(whole[begin : begin + 500])
            time.sleep(0.001)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 OK\r\n")
    assert calls == []


def test_another_version_of_http_is_left_to_asgi_although_it_keeps_the_connection(
    world: tuple[httpx.Client, Service], calls: list[str]
) -> None:
    client, _ = world
    path, body, headers = TAKEN["an adapter"]
    whole = message(path, body, headers | {"Connection": "keep-alive"}, version="1.0")

    with connect(client) as connection:
        connection.sendall(whole)
        head, _, _ = connection.recv(2**16).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert calls == ["/predict"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_connection_that_is_not_to_be_kept_is_closed_after_its_answer(
    world: tuple[httpx.Client, Service], version: str
) -> None:
    client, _ = world
    path, body, headers = TAKEN["an adapter"]

    with connect(client) as connection:
        connection.sendall(message(path, body, headers | {"Connection": "close"}, version=version))
        assert statuses(connection) == [200]


def test_a_client_that_asks_first_whether_it_may_send_is_told_so(world: tuple[httpx.Client, Service]) -> None:
    client, _ = world
    path, body, headers = TAKEN["an adapter"]
    whole = message(path, body, headers | {"Expect": "100-continue", "Connection": "close"})

    with connect(client) as connection:
        connection.sendall(whole[: -len(body)])
        assert connection.recv(2**16).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(body)
        assert statuses(connection) == [200]


def test_a_connection_that_rests_is_closed_and_one_that_is_used_is_not(world: tuple[httpx.Client, Service]) -> None:
    client, _ = world
    small = message(*TAKEN["an adapter"])

    with connect(client) as rests, connect(client) as used, connect(client) as half_sent:
        for connection in (rests, half_sent, used):
            connection.sendall(small)
            assert connection.recv(2**16)
        half_sent.sendall(small[:-1])
        rested = time.monotonic()
        for _ in range(4):
            time.sleep(KEEP_ALIVE_SECONDS / 2)
            used.sendall(small)
            assert used.recv(2**16).startswith(b"HTTP/1.1 200")
        rests.settimeout(KEEP_ALIVE_SECONDS)
        assert rests.recv(1) == b""
        assert time.monotonic() - rested < scaled(4 * KEEP_ALIVE_SECONDS)
        half_sent.sendall(small[-1:])
        assert half_sent.recv(2**16).startswith(b"HTTP/1.1 200")


def test_a_request_that_began_before_the_last_answer_is_not_taken_for_rest(
    world: tuple[httpx.Client, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, service = world
    small = message(*TAKEN["an adapter"])

    with connect(client) as connection:
        connection.sendall(small + small[:9])
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        start = service.batcher._start
        monkeypatch.setattr(
            service.batcher, "_start", lambda: service.batcher._loop.call_later(2 * KEEP_ALIVE_SECONDS, start)
        )
        connection.sendall(small[9:])
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")


def test_whoever_hangs_up_leaves_the_queue_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Settings(data_dir=tmp_path, base=f"random:{I},{O},3")) as (client, service):
        # No batch starts.
        monkeypatch.setattr(service.batcher, "_start", lambda: None)
        with connect(client) as connection:
            connection.sendall(message(*TAKEN["the base"]))
            eventually(lambda: service.batcher._rows == 1, what="the request's coming")
        eventually(lambda: service.batcher._rows == 0, what="its leaving")


def test_a_failure_of_ours_is_a_500_that_the_log_explains(
    world: tuple[httpx.Client, Service], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, service = world
    path, body, headers = TAKEN["an adapter"]

    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    with monkeypatch.context() as patched:
        patched.setattr(service.batcher, "_forward", fail)
        answer = client.post(path, content=body, headers=headers)

    assert answer.status_code == 500
    assert answer.json()["code"] == "internal_error"
    assert answer.headers["x-request-id"] in answer.json()["detail"]
    assert "boom" in caplog.text
    assert client.post(path, content=body, headers=headers).status_code == 200


def test_a_connection_is_closed_if_its_answer_cannot_be_written(
    world: tuple[httpx.Client, Service], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, service = world
    small = message(*TAKEN["an adapter"])

    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    with monkeypatch.context() as patched, connect(client) as connection:
        patched.setattr(service.observer, "finish_request", fail)
        connection.sendall(small)
        assert connection.recv(2**16) == b""
    assert "boom" in caplog.text

    with connect(client) as connection:
        connection.sendall(small)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")


def test_whoever_has_begun_a_request_when_the_service_stops_gets_its_answer(tmp_path: Path) -> None:
    small = message(*TAKEN["the base"])
    answers = []

    def is_closed(client: httpx.Client) -> bool:
        try:
            connect(client).close()
        except ConnectionRefusedError:
            return True
        return False

    def send_the_rest(client: httpx.Client, connection: socket.socket) -> None:
        eventually(lambda: is_closed(client), what="the end of the listener")
        connection.sendall(small[-1:])
        answers.append(connection.recv(2**16))

    with serving(Settings(data_dir=tmp_path, base=f"random:{I},{O},3")) as (client, _):
        # uvicorn cannot read this address: whoever keeps it for later fails on it when the service stops.
        stray = connect(client)
        stray.sendall(message("http://x:999999/infer", b"{}", JSON)[:-1])
        connection = connect(client)
        connection.sendall(small[:-1])
        assert client.get("/healthz").status_code == 200
        late = threading.Thread(target=send_the_rest, args=(client, connection))
        late.start()
    late.join()
    stray.close()
    connection.close()
    assert answers[0].startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answers[0]
