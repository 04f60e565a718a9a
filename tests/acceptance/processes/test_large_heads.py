"""Heads without end cost the worker that reads them neither time nor memory."""

import re
import socket
import threading
import time
from contextlib import suppress

import pytest

from tests.support.process_tree import WORKER, the
from tests.support.service import ServiceProcess

pytestmark = pytest.mark.timing

MIB = 2**20
MOST_SECONDS = 0.5
MOST_GROWTH = 48 * MIB
START = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
LONG = b"x" * MIB
FLOODS = {
    "one value": (START + b"X-Long: ", LONG, 90),
    "many headers": (START, b"X-Many: %b\r\n" % (b"x" * 1000) * 1000, 300),
    "an address": (b"GET /", LONG, 90),
    "one trailer": (CHUNKED + b"0\r\nX-Long: ", LONG, 90),
    "many trailers": (CHUNKED + b"0\r\n", b"X-Many: %b\r\n" % (b"x" * 1000) * 1000, 90),
    "a chunk's extension": (CHUNKED + b"2;", LONG, 90),
}


def flood(port: int, start: bytes, part: bytes, times: int) -> bytes:
    """Send a start and then a part many times, as long as the service takes it; return what it answers."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        with suppress(ConnectionError):
            connection.sendall(start)
            for _ in range(times):
                connection.sendall(part)
        received = b""
        with suppress(ConnectionError):
            while more := connection.recv(2**16):
                received += more
    return received


@pytest.mark.parametrize("kind", FLOODS)
def test_others_are_answered_beside_a_head_without_end(lone_worker: ServiceProcess, kind: str) -> None:
    question = {"adapter": None, "inputs": [[0.0] * 64]}
    lone_worker.client.post("/predict", json=question).raise_for_status()
    worker = the(lone_worker.process.pid, WORKER)
    before = worker.memory_info().rss
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: answers.append(flood(lone_worker.port, *FLOODS[kind]))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    most_seconds, most_bytes = 0.0, before
    while any(thread.is_alive() for thread in threads):
        began = time.monotonic()
        lone_worker.client.post("/predict", json=question).raise_for_status()
        most_seconds = max(most_seconds, time.monotonic() - began)
        most_bytes = max(most_bytes, worker.memory_info().rss)
    assert [re.findall(rb"HTTP/1.1 431 .*head_too_large", answer, re.S) != [] for answer in answers] == [True, True]
    assert most_seconds < MOST_SECONDS
    assert most_bytes - before < MOST_GROWTH
