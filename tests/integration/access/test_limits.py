"""Limits of a tenant: what exceeds them is refused on every path, and what another tenant does counts for nothing."""

import gc
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.access.keys import Scope
from adapters.access.tenants import DEFAULT_TENANT
from adapters.errors import RateLimited
from app.service import Service
from app.settings import Auth, Settings
from tests.conftest import NewFolder
from tests.support.catalog_factories import as_upload, claimed, submit
from tests.support.dense_oracle import random_adapter
from tests.support.keys import ALL_OF_A_TENANT, bearer, make_key, told
from tests.support.service import eventually, serving, train

I, O = 4, 2
THROUGH_ASGI = {"X-Request-Timeout": "50"}
CSV = {"Content-Type": "text/csv"}
TABLE = "a,b\n1,2\n3,4\n"
ROWS: dict[str, list[Any]] = {
    "inputs": [[float(n), 1.0, 2.0, 3.0] for n in range(20)],
    "targets": [n % 2 for n in range(20)],
}
FITS = {"method": "adamw", "loss": "cross_entropy", "epochs": 1}


class World:
    """A worker with a trainer, and clients of it: an operator, and one of each tenant that a test asks for."""

    def __init__(self, client: httpx.Client, service: Service, stack: ExitStack) -> None:
        self.service = service
        self._anyone, self._stack = client, stack
        self.operator = self._client(bearer(make_key(service.keys, DEFAULT_TENANT, Scope.OPERATOR)))

    def _client(self, headers: Mapping[str, str]) -> httpx.Client:
        client = httpx.Client(base_url=self._anyone.base_url, headers=headers, timeout=60)
        return self._stack.enter_context(client)

    def tenant(self, name: str, **limits: float) -> httpx.Client:
        """A client with a key of a tenant with these limits."""
        self.limit(name, **limits)
        return self._client(bearer(make_key(self.service.keys, name, *ALL_OF_A_TENANT)))

    def limit(self, name: str, **limits: float) -> None:
        """Set the limits of a tenant."""
        self.operator.put(f"/tenants/{name}", json={"limits": limits}).raise_for_status()


@pytest.fixture(scope="module")
def world(new_folder: NewFolder) -> Iterator[World]:
    settings = Settings(data_dir=new_folder("limits"), base=f"random:{I},{O},3", auth=Auth.KEYS)
    with serving(settings, trainer=True) as (client, service), ExitStack() as stack:
        yield World(client, service, stack)


def _predict(client: httpx.Client, rows: int = 1, headers: Mapping[str, str] | None = None) -> httpx.Response:
    return client.post("/predict", json={"adapter": None, "inputs": [[1.0] * I] * rows}, headers=headers)


def _infer(client: httpx.Client, headers: Mapping[str, str] | None = None) -> httpx.Response:
    tensor = {"name": "inputs", "shape": [1, I], "datatype": "FP32", "data": [1.0] * I}
    return client.post("/v2/models/__base__/infer", json={"inputs": [tensor]}, headers=headers)


def _training(name: str) -> dict[str, Any]:
    return {"name": name, "rank": 1, "data": ROWS, "training": FITS}


def _factors(seed: int) -> dict[str, Any]:
    return as_upload(random_adapter(O, I, 2, seed=seed))


def _without_times(answer: httpx.Response) -> tuple[int, list[tuple[str, str]], bytes]:
    status, headers, body = told(answer)
    varying = ("retry-after", "ratelimit", "content-length")
    stable = [header for header in headers if header[0] not in varying]
    return status, stable, re.sub(rb"again in [0-9.e+-]+ s", b"", body)


def test_a_rate_is_refused_alike_on_both_paths_and_all_routes(world: World) -> None:
    client = world.tenant("slow", requests_per_second=0.01)
    assert _predict(client).status_code == 200
    fast, slow = _predict(client), _predict(client, headers=THROUGH_ASGI)
    assert _without_times(fast) == _without_times(slow)
    assert _without_times(_infer(client)) == _without_times(_infer(client, headers=THROUGH_ASGI))
    for answer in (fast, slow, _infer(client), client.get("/adapters"), client.get("/nothing"), client.get("/metrics")):
        assert answer.status_code == 429
        wait = int(answer.headers["Retry-After"])
        assert 90 <= wait <= 100
        assert answer.headers["RateLimit-Policy"] == '"requests";q=1;w=100'
        assert answer.headers["RateLimit"] == f'"requests";r=0;t={wait}'
    problem = fast.json()
    assert (problem["code"], problem["expected"]) == ("rate_limited", "at most 0.01 requests per second")
    assert "rate_limited" not in _predict(world.tenant("other")).text
    world.limit("slow")
    client.get("/adapters")
    assert all(_predict(client).status_code == 200 for _ in range(20))


@pytest.mark.parametrize("headers", [{}, THROUGH_ASGI], ids=["fast", "asgi"])
def test_a_refusal_is_freed_without_the_garbage_collector(world: World, headers: dict[str, str]) -> None:
    """A cycle would keep the request's body until a collection, which then stops the requests of all tenants."""
    client = world.tenant(f"refused-{len(headers)}", requests_per_second=0.01)
    assert _predict(client).status_code == 200

    def refusals() -> int:
        return sum(type(value) is RateLimited for value in gc.get_objects())

    gc.collect()
    before = refusals()
    gc.disable()
    try:
        for _ in range(5):
            assert _predict(client, headers=headers).status_code == 429
        eventually(lambda: refusals() < before + 5, seconds=5, what="the end of the last request")
    finally:
        gc.enable()


@pytest.mark.parametrize("headers", [{}, THROUGH_ASGI], ids=["fast", "asgi"])
def test_rows_are_counted_whatever_the_number_of_requests(world: World, headers: dict[str, str]) -> None:
    client = world.tenant(f"rows-{len(headers)}", rows_per_second=0.5)
    assert _predict(client, 10, headers).status_code == 200
    refused = _predict(client, headers=headers)
    assert (refused.status_code, refused.headers["RateLimit-Policy"]) == (429, '"rows";q=1;w=2')
    assert 15 <= int(refused.headers["Retry-After"]) <= 20
    assert client.get("/adapters").status_code == 200


def test_a_rate_that_would_never_end_to_wait_for_is_refused(world: World) -> None:
    for limit in ("requests_per_second", "rows_per_second"):
        for rate in (1e-320, 1e-30, 0.0009):
            answer = world.operator.put("/tenants/slowest", json={"limits": {limit: rate}})
            assert (answer.status_code, answer.json()["field"]) == (422, f"limits.{limit}")
    client = world.tenant("slowest", rows_per_second=0.001)
    assert _predict(client, 4096).status_code == 200
    for headers in ({}, THROUGH_ASGI):
        answer = _predict(client, headers=headers)
        assert (answer.status_code, answer.headers["RateLimit-Policy"]) == (429, '"rows";q=1;w=1000')


def test_signing_in_counts_as_a_request_of_the_tenant(world: World) -> None:
    world.limit("pages", requests_per_second=0.01)
    body = {"key": make_key(world.service.keys, "pages", Scope.READ).text}
    with httpx.Client(base_url=world.operator.base_url) as browser:
        assert [browser.post("/session", json=body).status_code for _ in range(3)] == [204, 429, 429]


def test_an_operator_can_always_change_a_limit(world: World) -> None:
    world.limit(DEFAULT_TENANT, requests_per_second=0.001)
    try:
        assert 429 in [world.operator.get("/adapters").status_code for _ in range(2)]
    finally:
        world.limit(DEFAULT_TENANT)
    world.operator.get("/adapters")
    assert world.operator.get("/adapters").status_code == 200


def _exceeds(answer: httpx.Response, limit: str, value: int, used: int) -> None:
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (403, "quota_exceeded")
    assert problem["quota"] == {"limit": limit, "value": value, "used": used}


def test_adapters_are_counted_by_name_and_without_the_trash(world: World) -> None:
    client = world.tenant("names", adapters=2)
    for name in ("a", "b"):
        client.put(f"/adapters/{name}", json=_factors(1)).raise_for_status()
    _exceeds(client.put("/adapters/c", json=_factors(1)), "adapters", 2, 2)
    assert client.put("/adapters/a", json=_factors(2)).status_code == 201, "another version is no other adapter"
    client.delete("/adapters/a").raise_for_status()
    client.put("/adapters/c", json=_factors(1)).raise_for_status()
    _exceeds(client.post("/adapters/a/restore"), "adapters", 2, 2)
    client.delete("/adapters/b").raise_for_status()
    assert client.post("/adapters/a/restore").status_code == 200


def test_stored_bytes_are_those_of_all_versions_and_of_the_trash(world: World) -> None:
    client = world.tenant("bytes")
    size = client.put("/adapters/a", json=_factors(1)).json()["bytes"]
    world.limit("bytes", stored_bytes=2 * size + 1)
    assert client.put("/adapters/a", json=_factors(1)).status_code == 200, "the same bytes again are not stored again"
    client.put("/adapters/a", json=_factors(2)).raise_for_status()
    _exceeds(client.put("/adapters/b", json=_factors(3)), "stored_bytes", 2 * size + 1, 2 * size)
    client.delete("/adapters/a").raise_for_status()
    _exceeds(client.put("/adapters/b", json=_factors(3)), "stored_bytes", 2 * size + 1, 2 * size)
    assert client.post("/adapters/a/restore").status_code == 200, "what is in the trash is counted already"
    client.delete("/adapters/a", params={"purge": "true"}).raise_for_status()
    assert client.put("/adapters/b", json=_factors(3)).status_code == 201


def test_dataset_bytes_are_those_of_all_versions(world: World) -> None:
    client = world.tenant("tables")
    size = client.put("/datasets/a", content=TABLE, headers=CSV).json()["bytes"]
    world.limit("tables", dataset_bytes=size)
    assert client.put("/datasets/a", content=TABLE, headers=CSV).status_code == 200
    _exceeds(client.put("/datasets/b", content=TABLE, headers=CSV), "dataset_bytes", size, size)
    client.delete("/datasets/a").raise_for_status()
    assert client.put("/datasets/b", content=TABLE, headers=CSV).status_code == 201


def test_a_training_that_exceeds_a_quota_fails_with_it(world: World) -> None:
    client = world.tenant("trains", adapters=1)
    done = train(client, **_training("a"))
    assert done["status"] == "succeeded"
    failed = train(client, **_training("b"))
    assert failed["status"] == "failed"
    assert failed["error"]["quota"] == {"limit": "adapters", "value": 1, "used": 1}
    assert [adapter["name"] for adapter in client.get("/adapters").json()["data"]] == ["a"]


def test_groups_of_a_fleet_beyond_a_quota_fail_one_by_one(world: World) -> None:
    client = world.tenant("fleet", adapters=2)
    rows = {name: ROWS[name] * 4 for name in ROWS}
    groups = [f"g{number}" for number in range(4) for _ in range(20)]
    job = train(client, name="{group}", rank=1, data={**rows, "groups": groups}, training=FITS)
    assert job["status"] == "succeeded", job
    adapters = client.get(f"/jobs/{job['id']}/adapters").json()["data"]
    errors = [adapter["error"]["code"] if adapter["error"] else None for adapter in adapters]
    assert sorted(map(str, errors)) == ["None", "None", "quota_exceeded", "quota_exceeded"]
    assert len(client.get("/adapters").json()["data"]) == 2


@pytest.mark.parametrize("kind", ["adapters", "queued_jobs", "dataset_bytes"])
def test_of_racing_requests_at_a_quota_exactly_one_succeeds(kind: str, data_folder: Path) -> None:
    settings = Settings(data_dir=data_folder, base=f"random:{I},{O},3")
    calls: dict[str, Callable[[httpx.Client, str], httpx.Response]] = {
        "adapters": lambda client, name: client.put(f"/adapters/{name}", json=_factors(1)),
        "queued_jobs": lambda client, name: client.post("/adapters", json=_training(name)),
        "dataset_bytes": lambda client, name: client.put(f"/datasets/{name}", content=TABLE, headers=CSV),
    }
    with serving(settings) as (one, _), serving(settings) as (other, _), ThreadPoolExecutor(4) as pool:
        one.put("/datasets/first", content=TABLE, headers=CSV).raise_for_status()
        value = 2 * one.get("/datasets/first").json()["newest"]["bytes"] if kind == "dataset_bytes" else 1
        one.put(f"/tenants/{DEFAULT_TENANT}", json={"limits": {kind: value}}).raise_for_status()
        together = threading.Barrier(4)

        def send(client: httpx.Client, name: str) -> httpx.Response:
            together.wait()
            return calls[kind](client, name)

        answers = list(pool.map(send, [one, other, one, other], "abcd"))
        accepted, *refused = sorted(answers, key=lambda answer: answer.status_code)
        assert accepted.status_code in (201, 202)
        assert {answer.json()["quota"]["limit"] for answer in refused} == {kind}
        assert [answer.status_code for answer in refused] == [403] * 3


def test_jobs_beyond_the_number_that_may_run_stay_queued(world: World) -> None:
    queue = world.service.queue
    for tenant, limit in (("runs-one", 1), ("runs-none", 0)):
        world.limit(tenant, concurrent_jobs=limit)
        for number in range(2):
            submit(queue, f"{tenant}-{number}", tenant=tenant, base=tenant[:4])
    submit(queue, "free", tenant="other", base="runs")
    first, second = claimed(queue, base="runs"), claimed(queue, base="runs")
    assert [first.id, second.id] == ["runs-one-0", "free"]
    assert queue.claim(base="runs") is None
    queue.release(first)
    again = claimed(queue, base="runs")
    assert again.id == "runs-one-0"
    queue.expire_lease(again)
    assert claimed(queue, base="runs").id == "runs-one-0", "a job whose trainer died runs on"
    queue.cancel("runs-one-0", tenant="runs-one")
    assert claimed(queue, base="runs").id == "runs-one-1"
