"""What HAProxy repeats on another replica with `deploy/haproxy.cfg`, if the first one gave no answer."""

import http.client
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from tests.support.cluster import HAPROXY_CONFIG
from tests.support.external_programs import program
from tests.support.replica_client import Connection
from tests.support.service import eventually, free_port

pytestmark = pytest.mark.slow

REQUESTS = 20
PREDICTIONS = ("/predict", "/v2/models/name/infer")
_RESET = struct.pack("ii", 1, 0)


class _Stub(ThreadingHTTPServer):
    """A replica that is ready, and answers each other request, or closes or resets its connection."""

    daemon_threads = True

    def __init__(self, end: str | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.end, self.requests = end, 0
        Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def shutdown_request(self, request: Any) -> None:
        """Close without a FIN, which would come before a reset."""
        self.close_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: HAProxy resets the connections of its checks."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        assert isinstance(server, _Stub)
        if self.path != "/readyz":
            server.requests += 1
            if server.end is not None:
                if server.end == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                self.close_connection = True
                return
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def _proxy(*stubs: _Stub) -> Iterator[int]:
    port = free_port()
    addresses = {f"API_{number + 1}": f"127.0.0.1:{stub.server_port}" for number, stub in enumerate(stubs)}
    process = subprocess.Popen(
        [program("haproxy"), "-db", "-f", HAPROXY_CONFIG],
        env=os.environ | addresses | {"BIND": f"127.0.0.1:{port}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: _accepts(port), what="HAProxy")
        yield port
    finally:
        process.kill()
        process.wait()


def _accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _status(port: int, method: str, path: str) -> int | None:
    """Send a request as most clients do, its head and its body apart; return None if the connection is closed."""
    with closing(Connection(port)) as connection:
        try:
            return connection.ask(method, path, b"{}" if method != "GET" else None).status
        except (OSError, http.client.HTTPException):
            return None


@pytest.mark.parametrize("end", ["close", "reset"])
def test_predictions_and_reads_without_an_answer_are_repeated_and_changes_are_not(end: str) -> None:
    with ExitStack() as stack:
        dead, alive = (stack.enter_context(_Stub(kind)) for kind in (end, None))
        port = stack.enter_context(_proxy(dead, alive))
        for path in PREDICTIONS:
            assert {_status(port, "POST", path) for _ in range(REQUESTS)} == {200}
        assert {_status(port, "GET", "/adapters/name") for _ in range(REQUESTS)} == {200}
        assert dead.requests > 0
        before = dead.requests + alive.requests
        changes = [_status(port, "PUT", "/adapters/name") for _ in range(REQUESTS)]
        assert set(changes) <= {200, 502, None}
        assert {502, None} & set(changes)
        assert dead.requests + alive.requests == before + REQUESTS
