"""Heads and trailers have a limit and a deadline, and a refusal comes after the answers before it."""

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest

from app import guarded_http
from app.service import Service
from app.settings import Settings
from tests.harness import DEADLINE_SECONDS, serving

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
    settings = Settings(data_dir=folder, base=f"identity:{IN}", max_head_bytes=MAX_HEAD_BYTES)
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
    line, end = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Long: ".encode(), b"\r\n\r\n"
    return line + b"x" * (size - len(line) - len(end)) + end


@pytest.mark.parametrize("before", [b"", GOOD])
@pytest.mark.parametrize("size", [MAX_HEAD_BYTES, MAX_HEAD_BYTES + 1, 3 * MAX_HEAD_BYTES])
@pytest.mark.parametrize("cut", [20, 1500, MAX_HEAD_BYTES - 1])
def test_a_head_may_have_so_many_bytes_however_it_comes(running: Running, before: bytes, size: int, cut: int) -> None:
    whole = before + head("/healthz", size)
    answers = answers_to(running, whole[:cut], whole[cut:])

    assert [status for status, _ in answers] == [200] * bool(before) + [200 if size <= MAX_HEAD_BYTES else 431]


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
    whole = CHUNKED + b"".join(b"1;ext=%b\r\n \r\n" % (b"e" * 100) for _ in range(200)) + b"0\r\n\r\n"
    assert len(whole) > 3 * MAX_HEAD_BYTES
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert [status for status, _ in answers_to(running, whole + last)] == [200, 200]


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
        while time.monotonic() - began < 20:
            connection.sendall(part)
            time.sleep(0.1)
    return time.monotonic() - began


def test_a_refused_client_that_goes_on_is_let_go(running: Running) -> None:
    with connect(running) as connection:
        assert 1 < seconds_until_closed(connection, b"x" * 2**16) < 10


@pytest.mark.parametrize(
    ("sent", "constant"),
    [
        (b"", None),
        (b"G", "HEAD_SECONDS"),
        (GOOD + b"GET / HTTP/1.1\r\nX: ", "HEAD_SECONDS"),
        (GOOD[:-1], "BODY_SECONDS"),
        (CHUNKED, "BODY_SECONDS"),
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
        connection.settimeout(KEEP_ALIVE_SECONDS + 5)
        assert everything(connection).count(b"HTTP/1.1") == (sent.startswith(GOOD))


def test_a_head_has_its_time_from_its_first_byte(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_http, "HEAD_SECONDS", 1.5)
    with connect(running) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert 1 < seconds_until_closed(connection, b"x") < 10


def test_a_body_that_comes_slowly_is_waited_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_http, "BODY_SECONDS", 1.5)
    with connect(running) as connection:
        connection.sendall(GOOD[:-5])
        for byte in GOOD[-5:]:
            time.sleep(0.7)
            connection.sendall(bytes([byte]))
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
