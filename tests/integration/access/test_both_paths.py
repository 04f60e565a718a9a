"""The fast path and the ASGI application give the same answer to each kind of key, and refuse a revoked one at once."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters.access.keys import IssuedKey, Scope
from adapters.access.tenants import DEFAULT_TENANT
from app.service import Service
from app.settings import Auth, Settings
from tests.conftest import NewFolder
from tests.integration.access.conftest import TENANT, I, World
from tests.support.catalog_factories import submit
from tests.support.keys import bearer, make_key, told
from tests.support.metrics_exposition import read, series
from tests.support.service import serving

REVOCATIONS = int(os.environ.get("REVOCATIONS", "6"))
THROUGH_ASGI = {"X-Request-Timeout": "50"}
"""A header that changes nothing here, and that only the ASGI application reads."""
BODY = {"adapter": None, "inputs": [[1.0] * I]}


def _infer(client: httpx.Client, **headers: str) -> httpx.Response:
    tensor = {"name": "inputs", "shape": [1, I], "datatype": "FP32", "data": [1.0] * I}
    return client.post("/v2/models/__base__/infer", json={"inputs": [tensor]}, headers=headers)


def _fallbacks(world: World) -> float:
    metrics = world.client.get("/metrics", headers=bearer(world.operator)).text
    return read(metrics)[series("fast_path_fallbacks_total", reason="key")]


def test_each_kind_of_key_gets_the_same_answer_on_both_paths(world: World) -> None:
    kinds = dict(world.refused)
    kinds |= {scope.value: bearer(key) for scope, key in world.scoped.items()}
    kinds |= {"another tenant's": bearer(world.other), "operator": bearer(world.operator)}
    for kind, headers in kinds.items():
        for _ in range(2):  # the second request of a good key takes the fast path
            fast = world.client.post("/predict", json=BODY, headers=headers)
            slow = world.client.post("/predict", json=BODY, headers={**headers, **THROUGH_ASGI})
            assert told(fast) == told(slow), kind
            assert told(_infer(world.client, **headers)) == told(_infer(world.client, **headers, **THROUGH_ASGI)), kind
        expected = 401 if kind in world.refused else 200 if kind in ("predict", "another tenant's", "operator") else 403
        assert fast.status_code == expected, kind


def test_a_verified_key_takes_the_fast_path(world: World) -> None:
    headers = bearer(world.scoped[Scope.PREDICT])
    world.client.post("/predict", json=BODY, headers=headers)
    before = _fallbacks(world)
    for _ in range(5):
        assert world.client.post("/predict", json=BODY, headers=headers).status_code == 200
    assert _fallbacks(world) == before


def test_a_key_is_verified_once_after_another_was_revoked(world: World) -> None:
    headers = bearer(world.scoped[Scope.PREDICT])
    another = make_key(world.service.keys, TENANT, Scope.PREDICT)
    world.client.post("/predict", json=BODY, headers=headers)
    operator = {**bearer(world.operator), "X-Tenant": TENANT}
    world.client.delete(f"/keys/{another.key.id}", headers=operator).raise_for_status()
    # The batch of the first one reads the revocation, the second one is verified.
    for _ in range(2):
        world.client.post("/predict", json=BODY, headers=headers).raise_for_status()
    before = _fallbacks(world)
    for _ in range(5):
        world.client.post("/predict", json=BODY, headers=headers).raise_for_status()
    assert _fallbacks(world) == before
    grant = world.service.grants.of_header(headers["Authorization"].encode())
    assert grant is not None
    assert world.service.grants.is_current(grant)


def test_a_key_is_found_however_its_scheme_is_written(world: World) -> None:
    text = world.scoped[Scope.PREDICT].text
    for header in (f"bearer {text}", f"BEARER  {text}", f"Bearer{' ' * 1000}{text}"):
        assert world.client.post("/predict", json=BODY, headers={"Authorization": header}).status_code == 200
    twice = [("Authorization", f"Bearer {text}")] * 2
    assert world.client.post("/predict", json=BODY, headers=twice).status_code == 401


@pytest.fixture(scope="module")
def workers(new_folder: NewFolder) -> Iterator[list[tuple[httpx.Client, Service]]]:
    """Two workers on one data folder."""
    folder: Path = new_folder("workers")
    settings = Settings(data_dir=folder, base=f"random:{I},2,3", auth=Auth.KEYS)
    with serving(settings) as one, serving(settings) as two:
        yield [one, two]


@pytest.mark.soak
def test_no_request_succeeds_on_any_worker_after_a_revocation_was_acknowledged(
    workers: list[tuple[httpx.Client, Service]],
) -> None:
    keys = workers[0][1].keys
    operator = make_key(keys, DEFAULT_TENANT, Scope.OPERATOR)
    stays = make_key(keys, DEFAULT_TENANT, Scope.PREDICT)
    refused = 0
    for _ in range(REVOCATIONS):
        key = make_key(keys, DEFAULT_TENANT, Scope.PREDICT, Scope.READ)
        for client, _ in workers:
            assert [_predict(client, key), _predict(client, key)] == [200, 200]
        stop = threading.Event()
        # Requests with other keys keep both workers' batches going meanwhile.
        threads = [threading.Thread(target=_hammer, args=(client.base_url, stays, stop)) for client, _ in workers]
        for thread in threads:
            thread.start()
        answer = workers[0][0].delete(f"/keys/{key.key.id}", headers=bearer(operator))
        assert answer.status_code == 204
        statuses = [_predict(client, key) for client, _ in reversed(workers) for _ in range(20)]
        statuses += [client.get("/base", headers=bearer(key)).status_code for client, _ in workers]
        stop.set()
        for thread in threads:
            thread.join()
        assert set(statuses) == {401}
        refused += len(statuses)
    assert refused == 42 * REVOCATIONS
    assert [_predict(client, stays) for client, _ in workers] == [200, 200]


def _predict(client: httpx.Client, key: IssuedKey) -> int:
    return client.post("/predict", json=BODY, headers=bearer(key)).status_code


def _hammer(url: httpx.URL, key: IssuedKey, stop: threading.Event) -> None:
    with httpx.Client(base_url=url) as client:
        while not stop.is_set():
            assert _predict(client, key) == 200


def test_a_stream_of_events_ends_when_its_key_is_revoked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.service.job_events, "heartbeat_seconds", 0.02)
    submit(world.service.queue, "streamed", tenant=TENANT)
    key, other = (make_key(world.service.keys, TENANT, Scope.READ) for _ in range(2))
    with world.client.stream("GET", "/jobs/streamed/events", headers=bearer(key)) as answer:
        parts = answer.iter_bytes()
        assert b"event: status" in next(parts)
        # The revocation of another key ends nothing.
        world.service.keys.revoke(other.key.id, tenant=None, by_operator=True)
        assert any(b"heartbeat" in next(parts) for _ in range(5))
        world.service.keys.revoke(key.key.id, tenant=None, by_operator=True)
        for _ in parts:
            pass
    status = world.client.get("/jobs/streamed", headers={**bearer(world.operator), "X-Tenant": TENANT}).json()["status"]
    assert status == "queued"
