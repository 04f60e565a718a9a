"""Heads and trailers have a limit and a deadline, and a refusal comes after the answers before it."""

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.service import Service
from app.serving import connection_guard as guarded_http
from app.serving import connections as open_connections
from app.serving import uvicorn_protocol as wire
from app.serving.fast_path import FastPath
from app.settings import Settings
from tests.support.deadlines import scaled
from tests.support.service import DEADLINE_SECONDS, eventually, serving

MAX_HEAD_BYTES = 4096
KEEP_ALIVE_SECONDS = 1
IN = 4
BODY = json.dumps({"adapter": None, "inputs": [[0.0] * IN]}).encode()
GOOD = (
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    + BODY
)
CHUNKED = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED += b"%x\r\n%b\r\n" % (len(BODY), BODY)

Running = tuple[httpx.Client, Service]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A worker with small limits."""
    folder = tmp_path_factory.mktemp("heads")
    settings = Settings(data_dir=folder, base=f"identity:{IN}", max_head_bytes=MAX_HEAD_BYTES, allowed_hosts="x")
    with serving(settings, keep_alive_seconds=KEEP_ALIVE_SECONDS) as both:
        yield both


def connect(running: Running) -> socket.socket:
    """A connection of one's own."""
    return socket.create_connection(("127.0.0.1", running[0].base_url.port or 0), timeout=DEADLINE_SECONDS)


def everything(connection: socket.socket) -> bytes:
    """All that comes until the service closes the connection."""
    return b"".join(iter(lambda: connection.recv(2**16), b""))


def answers_to(running: Running, *pieces: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each answer, until the service closes the connection."""
    with connect(running) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.02)
        answers = re.split(rb"HTTP/1.1 (?=\d)", everything(connection))[1:]
    return [(int(answer[:3]), answer.partition(b"\r\n\r\n")[2]) for answer in answers]


def head(path: str, size: int) -> bytes:
    """A head of exactly `size` bytes."""
    line, end = f"GET {path} HTTP/1.1\r\nHost:x\r\nConnection:close\r\nX-Long:".encode(), b"\r\n\r\n"
    return line + b"x" * (size - len(line) - len(end)) + end


@pytest.mark.parametrize("before", [b"", GOOD])
@pytest.mark.parametrize("size", [MAX_HEAD_BYTES, MAX_HEAD_BYTES + 1, 3 * MAX_HEAD_BYTES])
@pytest.mark.parametrize("cut", [20, 1500, MAX_HEAD_BYTES - 1])
def test_a_head_may_have_so_many_bytes_however_it_comes(running: Running, before: bytes, size: int, cut: int) -> None:
    whole = before + head("/healthz", size)
    answers = answers_to(running, whole[:cut], whole[cut:])

    assert [status for status, _ in answers] == [200] * bool(before) + [200 if size <= MAX_HEAD_BYTES else 431]


@pytest.mark.parametrize(("lead", "cut"), [(b"", 1), (b"", 2000), (b"\r\n\r\n", MAX_HEAD_BYTES - 1)])
@pytest.mark.parametrize("header", [b"X:", b"X: ", b"X:  \t"], ids=["no space", "a space", "padding"])
def test_a_head_of_the_limit_is_accepted_in_any_pieces(running: Running, lead: bytes, cut: int, header: bytes) -> None:
    start = b"GET /healthz HTTP/1.1\r\nHost:x\r\nConnection:close\r\n"
    lines, rest = divmod(MAX_HEAD_BYTES - len(start) - 2, len(header) + 2)
    whole = start + (header + b"\r\n") * (lines - 1) + header + b"x" * rest + b"\r\n\r\n"
    assert len(whole) == MAX_HEAD_BYTES

    assert [status for status, _ in answers_to(running, lead + whole[:cut], whole[cut:-1], whole[-1:])] == [200]


def test_a_head_is_refused_before_it_ends(running: Running) -> None:
    (answer,) = answers_to(running, head("/healthz", 2 * MAX_HEAD_BYTES)[: MAX_HEAD_BYTES + 1])
    assert answer[0] == 431


@pytest.mark.parametrize("path", ["/healthz", "/v2/models/a"])
def test_the_refusal_is_in_the_form_of_its_path(running: Running, path: str) -> None:
    (answer,) = answers_to(running, head(path, MAX_HEAD_BYTES + 9))
    members = json.loads(answer[1])
    assert answer[0] == 431
    if path.startswith("/v2"):
        assert members.keys() == {"error"}
    else:
        assert (members["code"], members["field"], members["expected"]) == (
            "head_too_large",
            "head",
            "at most 4096 bytes",
        )


def test_a_long_address_counts(running: Running) -> None:
    (answer,) = answers_to(running, b"GET /" + b"x" * MAX_HEAD_BYTES)
    assert answer[0] == 431


@pytest.mark.parametrize(
    "end",
    [
        b"0\r\nX-Long: " + b"x" * 3 * MAX_HEAD_BYTES,
        b"0\r\n" + b"X-Many: x\r\n" * (3 * MAX_HEAD_BYTES // 11),
        b"0\r\nX-Long: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"1;" + b"x" * 3 * MAX_HEAD_BYTES,
    ],
    ids=["a trailer", "many trailers", "whole trailers", "a chunk's extension"],
)
def test_trailers_and_extensions_of_chunks_count_too(running: Running, end: bytes) -> None:
    (answer,) = answers_to(running, CHUNKED + end)
    assert answer[0] == 431
    assert json.loads(answer[1])["code"] == "head_too_large"


def test_a_body_in_many_small_chunks_is_no_head(running: Running) -> None:
    whole = CHUNKED + b"1;a=b\r\n \r\n" * 4000 + b"0\r\n\r\n"
    assert len(whole) > 8 * MAX_HEAD_BYTES
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert [status for status, _ in answers_to(running, whole + last)] == [200, 200]


def test_framing_is_bounded_by_the_content_that_it_brings(running: Running) -> None:
    chunk = b"1;%b\r\n \r\n" % (b"e" * 900)
    with connect(running) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(CHUNKED)
        with suppress(ConnectionError):
            for _ in range(20):
                connection.sendall(chunk)
                time.sleep(0.02)
            connection.sendall(b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 431 ")


BAD_TARGETS = [b"http://[::1", b"http://a:99999999/", b"http://x", b"/\x80"]


@pytest.mark.parametrize("target", BAD_TARGETS)
@pytest.mark.parametrize(
    ("before", "statuses"),
    [(b"", []), (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", [200]), (GOOD, [200]), (GOOD + GOOD, [200, 200])],
    ids=["first", "after a GET", "after a prediction", "after two"],
)
@pytest.mark.parametrize("pause", [False, True])
def test_an_address_that_cannot_be_read_is_refused_after_the_answers_before_it(
    running: Running, target: bytes, before: bytes, statuses: list[int], pause: bool
) -> None:
    bad = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target
    answers = answers_to(running, *([before, bad + GOOD] if pause else [before + bad + GOOD]))

    assert [status for status, _ in answers] == [*statuses, 400]
    assert json.loads(answers[-1][1])["code"] == "not_http"


@pytest.mark.parametrize(
    ("owner", "callback", "sent"),
    [
        (wire.FastPathProtocol, "begin_body", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
        (HttpToolsProtocol, "on_url", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
        (HttpToolsProtocol, "on_body", CHUNKED),
        (FastPath, "enqueue", GOOD),
    ],
)
def test_a_defect_is_logged_and_not_blamed_on_the_client(
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: type,
    callback: str,
    sent: bytes,
) -> None:
    defect = ZeroDivisionError("a defect")

    def fail(*_: object) -> None:
        raise defect

    monkeypatch.setattr(owner, callback, fail)
    (answer,) = answers_to(running, sent)

    assert (answer[0], json.loads(answer[1])["code"]) == (500, "internal_error")
    assert defect in [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert running[1].bodies.held == 0


def test_trailers_are_not_headers(running: Running) -> None:
    client, _ = running
    upload = {"A": [[1.0]] * IN, "B": [[1.0] * IN]}
    client.put("/adapters/acme", json=upload).raise_for_status()
    body = json.dumps(upload).encode()
    start = b"PUT /adapters/acme HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    start += b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(body), body)

    (answer,) = answers_to(running, start + b"0\r\nIf-None-Match: *\r\n\r\n")

    assert answer[0] == 200


def test_what_is_refused_is_answered_after_what_came_before_it(running: Running) -> None:
    statuses = [status for status, _ in answers_to(running, GOOD + GOOD + b"nonsense\r\n\r\n" + GOOD)]
    assert statuses == [200, 200, 400]


def test_a_client_that_still_sends_can_read_why_it_is_refused(running: Running) -> None:
    with connect(running) as connection:
        for _ in range(300):
            connection.sendall(b"x" * 2**16)
        assert everything(connection).startswith(b"HTTP/1.1 400 ")


def seconds_until_closed(connection: socket.socket, part: bytes) -> float:
    """How long a client can send `part` again and again, ten times a second."""
    began = time.monotonic()
    with suppress(ConnectionError):
        while time.monotonic() - began < scaled(20):
            connection.sendall(part)
            time.sleep(0.1)
    return time.monotonic() - began


def test_a_refused_client_that_goes_on_is_let_go(running: Running) -> None:
    with connect(running) as connection:
        assert 1 < seconds_until_closed(connection, b"x" * 2**16) < scaled(10)


@pytest.mark.parametrize(
    ("sent", "constant"),
    [
        (b"", None),
        (b"G", "HEAD_SECONDS"),
        (GOOD + b"GET / HTTP/1.1\r\nX: ", "HEAD_SECONDS"),
        (GOOD[:-1], "MESSAGE_SECONDS"),
        (CHUNKED, "MESSAGE_SECONDS"),
    ],
    ids=["nothing", "a byte", "a head after a request", "a body", "a chunk"],
)
def test_who_is_silent_for_long_is_let_go(
    running: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes, constant: str | None
) -> None:
    if constant is not None:
        monkeypatch.setattr(guarded_http, constant, KEEP_ALIVE_SECONDS)
    with connect(running) as connection:
        connection.sendall(sent)
        connection.settimeout(KEEP_ALIVE_SECONDS + scaled(5))
        assert everything(connection).count(b"HTTP/1.1") == (sent.startswith(GOOD))


def test_a_head_has_its_time_from_its_first_byte(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_http, "HEAD_SECONDS", 1.5)
    with connect(running) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert 1 < seconds_until_closed(connection, b"x") < scaled(10)


def test_a_body_that_comes_slowly_is_waited_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_http, "MESSAGE_SECONDS", 1.5)
    with connect(running) as connection:
        connection.sendall(GOOD[:-5])
        for byte in GOOD[-5:]:
            time.sleep(0.7)
            connection.sendall(bytes([byte]))
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")


LARGE = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"


def connect_unreading(running: Running, sent: bytes) -> socket.socket:
    """A connection with a small receive buffer that has sent `sent`."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(DEADLINE_SECONDS)
    connection.connect(("127.0.0.1", running[0].base_url.port or 0))
    connection.sendall(sent)
    return connection


@pytest.mark.parametrize(
    "sent",
    [LARGE * 100, LARGE * 20 + b"nonsense\r\n\r\n", LARGE * 20 + LARGE[:-2] + b"Connection: close\r\n\r\n"],
    ids=["many requests", "a refusal", "the last request"],
)
def test_a_client_that_reads_nothing_is_let_go(running: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(guarded_http, "MESSAGE_SECONDS", 1.5)
    with connect_unreading(running, sent) as connection:
        assert 1 < seconds_until_closed(connection, b"\r\n") < scaled(10)


@pytest.mark.slow
def test_a_client_that_reads_slowly_is_waited_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_http, "MESSAGE_SECONDS", 1.5)
    times = 100
    with connect_unreading(running, LARGE * times) as connection:
        received = bytearray()
        for _ in range(20):
            received += connection.recv(2**18)
            time.sleep(0.2)
        connection.settimeout(KEEP_ALIVE_SECONDS + scaled(5))
        received += everything(connection)
    assert received.count(b"HTTP/1.1 200 ") == times
    assert received.rstrip().endswith(b"}")


@pytest.fixture
def one_connection(tmp_path: Path) -> Iterator[Running]:
    """A worker that keeps one connection open."""
    with serving(Settings(data_dir=tmp_path, base=f"identity:{IN}", max_connections=1, allowed_hosts="x")) as both:
        yield both


@pytest.mark.parametrize("sent", [GOOD[:-1], CHUNKED, LARGE * 100], ids=["half a body", "a chunk", "nothing read"])
def test_who_is_silent_in_a_request_makes_room_for_a_new_client(
    one_connection: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(open_connections, "_LEAST_SILENT_SECONDS", 2.5)
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    def answer() -> bytes:
        with connect(one_connection) as connection, suppress(ConnectionError):
            connection.sendall(last)
            return everything(connection)
        return b""

    with connect_unreading(one_connection, sent) as silent:
        time.sleep(0.5)
        assert answer() == b""  # It has not been silent for long enough.
        eventually(lambda: answer().startswith(b"HTTP/1.1 200 "), what="room for a new client")
        assert seconds_until_closed(silent, b" ") < scaled(5)
