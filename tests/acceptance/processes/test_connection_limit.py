"""Many connections that do nothing keep no new client out."""

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest

from tests.support.external_programs import skip_or_fail
from tests.support.service import ServiceProcess

pytestmark = pytest.mark.timing

CONNECTIONS, MOST_FILES = 1500, 1024
MOST_SECONDS = 0.5
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
ROW = [0.0] * 4


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One worker that may open no more than 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * CONNECTIONS:
        skip_or_fail(f"this process may open no more than {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * CONNECTIONS), hard))
    folder = tmp_path_factory.mktemp("files") / "data"
    with ServiceProcess(folder, most_files=MOST_FILES, base="identity:4", trainers=0) as started:
        yield started
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_new_client_is_answered_beside_many_half_sent_bodies(service: ServiceProcess) -> None:
    half = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=20))
            with suppress(ConnectionError):  # Past the limit, it may be closed already.
                connection.sendall(half)

        def is_answered() -> bool:
            with httpx.Client(base_url=service.client.base_url, timeout=20) as client:
                return client.get("/healthz").status_code == 200

        began = time.monotonic()
        while time.monotonic() - began < 15:
            with suppress(httpx.TransportError):
                if is_answered():
                    break
            time.sleep(0.2)
        for _ in range(5):
            began = time.monotonic()
            assert is_answered()
            assert time.monotonic() - began < MOST_SECONDS


@pytest.mark.parametrize("sent", [b"", GET[:9], GET], ids=["nothing", "half a head", "a request"])
def test_a_new_client_is_answered_beside_many_idle_connections(service: ServiceProcess, sent: bytes) -> None:
    question = {"adapter": None, "inputs": [ROW]}
    service.client.post("/predict", json=question).raise_for_status()
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=20))
            connection.sendall(sent)
            if sent == GET:
                assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
        for _ in range(10):
            client = stack.enter_context(httpx.Client(base_url=service.client.base_url, timeout=20))
            began = time.monotonic()
            client.post("/predict", json=question).raise_for_status()
            assert time.monotonic() - began < MOST_SECONDS
            files = {"a": ("adapter_model.safetensors", b"x" * 2**21), "b": ("adapter_config.json", b"{}")}
            assert client.put("/adapters/acme", files=files).status_code == 422
            client.put("/adapters/acme", json={"A": [[1.0]] * 4, "B": [ROW]}).raise_for_status()
