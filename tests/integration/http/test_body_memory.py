"""Bytes of request bodies in memory: counted as they come, refused past the limit, given back at the end."""

import json
import socket
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO

import httpx
import pytest

from adapters.peft.config import MAX_CONFIG_BYTES
from app.service import Service
from tests.conftest import Serve
from tests.support.service import eventually

LIMIT = 2**18
JSON = "application/json"


@contextmanager
def _half_sent(
    client: httpx.Client, target: str, size: int, length: int, kind: str = JSON, tenant: str = "default"
) -> Iterator[socket.socket]:
    """A connection that has sent `size` bytes of a body of `length`."""
    url = client.base_url
    with socket.create_connection((url.host, url.port or 0), timeout=30) as connection:
        head = f"{target} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n"
        connection.sendall(f"{head}X-Tenant: {tenant}\r\n\r\n".encode() + b" " * size)
        yield connection


def _held(service: Service, size: int) -> None:
    eventually(lambda: service.bodies.held == size, seconds=10, what=f"{size} bytes held, not {service.bodies.held}")


@pytest.mark.parametrize("target", ["POST /adapters", "PUT /adapters/acme", "POST /predict", "POST /v2/models/a/infer"])
def test_a_body_past_the_limit_is_refused_until_another_has_ended(serve: Serve, target: str) -> None:
    client, service = serve(max_inflight_body_bytes=LIMIT)
    method, path = target.split()
    size = LIMIT // 4
    with ExitStack() as stack:
        others = [stack.enter_context(_half_sent(client, target, size, size + 1)) for _ in range(3)]
        _held(service, 3 * size)
        refused = client.request(method, path, content=b" " * (size + 1), headers={"Content-Type": JSON})
        assert refused.status_code == 503
        assert "LORAPLEX_MAX_INFLIGHT_BODY_BYTES" in refused.text
        if not path.startswith("/v2"):
            assert refused.json()["code"] == "too_many_bytes"
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["connection"] == "close"
        others[0].close()
        _held(service, 2 * size)
        taken = client.request(method, path, content=b" " * size, headers={"Content-Type": JSON})
        assert 400 <= taken.status_code < 500
        assert "too_many" not in taken.text
    _held(service, 0)


def test_bodies_of_small_requests_count_while_they_come(serve: Serve) -> None:
    client, service = serve(max_inflight_body_bytes=LIMIT)
    size = LIMIT // 8
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(_half_sent(client, "POST /predict", size - 1, size))
        _held(service, 8 * (size - 1))
        with _half_sent(client, "POST /predict", 100, LIMIT - 1) as last:
            assert last.recv(100).startswith(b"HTTP/1.1 503")
        answer = client.post("/predict", content=b" " * 9)
        assert answer.status_code == 503
    _held(service, 0)
    assert client.post("/predict", json={"adapter": None, "inputs": [[0.0] * 10]}).status_code == 200
    _held(service, 0)


def test_a_body_of_unknown_length_is_refused_where_it_passes_the_limit(serve: Serve) -> None:
    client, service = serve(max_inflight_body_bytes=LIMIT)
    answer = client.post("/adapters", content=iter([b" " * 2**16] * 5), headers={"Content-Type": JSON})
    assert (answer.status_code, answer.json()["code"]) == (503, "too_many_bytes")
    _held(service, 0)


def test_the_slow_bodies_of_one_tenant_leave_room_for_those_of_another(serve: Serve) -> None:
    client, service = serve(max_inflight_body_bytes=LIMIT)
    client.put("/tenants/acme", json={}).raise_for_status()
    body = {"adapter": None, "inputs": [[0.0] * 10]}
    with _half_sent(client, "PUT /adapters/a", LIMIT - 1, LIMIT):
        _held(service, LIMIT - 1)
        assert client.post("/predict", json=body).status_code == 503
        assert client.post("/predict", json=body, headers={"X-Tenant": "acme"}).status_code == 200
        with _half_sent(client, "PUT /adapters/a", LIMIT // 2, LIMIT // 2 + 1, tenant="acme") as last:
            assert last.recv(100).startswith(b"HTTP/1.1 503"), "more than an equal share"
    _held(service, 0)


def test_a_data_set_is_not_counted(serve: Serve) -> None:
    client, service = serve(max_inflight_body_bytes=2**16)
    csv = b"a,b\n" + b"1.5,2\n" * 30_000
    with _half_sent(client, "PUT /datasets/d", len(csv), len(csv) + 1, "text/csv"):
        assert client.put("/datasets/e", content=csv, headers={"Content-Type": "text/csv"}).status_code == 201
        assert service.bodies.held == 0


def test_an_upload_is_bounded_by_what_its_layer_can_need(serve: Serve) -> None:
    client, _ = serve(max_rank=4)
    refused = client.put("/adapters/acme", content=b"[" + b" " * 2**22 + b"]", headers={"Content-Type": JSON})
    assert (refused.status_code, refused.json()["code"]) == (413, "body_too_large")
    assert "rank 4" in refused.json()["detail"]
    hostile = b'{"A":[' + b",".join([b"[1.5]"] * 200_000) + b"]}"
    refused = client.put("/adapters/acme", content=hostile, headers={"Content-Type": JSON})
    assert (refused.status_code, refused.json()["code"]) == (422, "wrong_shape")
    assert refused.json()["given"] == "200001 lists"


def test_a_large_config_is_refused_unread(serve: Serve) -> None:
    client, _ = serve()
    config, tensors = b"{" + b" " * MAX_CONFIG_BYTES + b"}", b"x"
    files = {"config": ("adapter_config.json", config), "tensors": ("adapter_model.safetensors", tensors)}
    refused = client.put("/adapters/acme", files=files)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_upload")
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_config.json", config)
        archive.writestr("adapter_model.safetensors", tensors)
    refused = client.put("/adapters/acme", content=packed.getvalue(), headers={"Content-Type": "application/zip"})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_archive")
    for answer in (refused,):
        assert "adapter_config.json" in answer.json()["detail"]


@pytest.mark.parametrize("rows", [30_000])
def test_a_large_body_is_read_as_a_small_one(serve: Serve, rows: int) -> None:
    client, _ = serve(max_rows=rows)
    inputs = [[float(row % 7)] * 10 for row in range(rows)]
    bodies = [
        ("/predict", {"adapter": None, "inputs": inputs, "return": ["labels"]}),
        ("/adapters", {"name": "a", "rank": 1, "data": {"inputs": inputs, "targets": [[0.5, 1]] * rows}}),
    ]
    for path, body in bodies:
        text = json.dumps(body)
        assert len(text) > 2**20
        answer = client.post(path, content=text, headers={"Content-Type": JSON})
        assert answer.status_code in (200, 202), answer.text[:500]
        wrong = text.replace("[6.0, 6.0", "[6.0, null", 1)
        answer = client.post(path, content=wrong, headers={"Content-Type": JSON}).json()
        assert (answer["code"], answer["row"], answer["given"]) == ("wrong_type", 6, "null")
        assert "column 1" in answer["detail"]
