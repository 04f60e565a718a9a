"""Usage: what a client counts of its own requests is what the service says, once and for its own tenant only."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from adapters.access.grants import OPERATOR, Caller, Grant
from adapters.access.keys import IssuedKey, Scope
from adapters.access.tenants import DEFAULT_TENANT, Limits, Tenants
from adapters.access.usage import Usage, UsageBy, UsageCount, UsageSlot
from adapters.clock import parse_rfc3339
from adapters.errors import StorageFailed
from adapters.names import Reference
from adapters.storage.database import Database
from app.http.paging import make_cursor
from app.observability.usage_counter import UsageCounter
from app.service import Service
from app.serving.queue_entry import QueueEntry
from app.serving.request import InferenceRequest
from app.settings import Auth, Settings
from tests.conftest import NewFolder
from tests.support.catalog_factories import as_upload
from tests.support.databases import open_database
from tests.support.dense_oracle import random_adapter
from tests.support.keys import ALL_OF_A_TENANT, bearer, make_key
from tests.support.service import serving
from tests.support.storage_kinds import on_both_storages

pytestmark = on_both_storages

I, O = 4, 2
ROW = [1.0] * I
HOUR = 3600
NOON = 400_000 * HOUR
"""A whole hour."""
Lines = list[dict[str, Any]]


class World(NamedTuple):
    """A worker with keys, and an adapter `a` of the tenant `acme`."""

    client: httpx.Client
    service: Service
    key: IssuedKey
    operator: IssuedKey

    def usage(self, key: IssuedKey, **query: str) -> Lines:
        """Store what was counted, and return what a key is told."""
        self.service.observer.close()
        answer = self.client.get("/usage", params=query, headers=bearer(key)).raise_for_status().json()
        assert answer["next_cursor"] is None
        lines: Lines = answer["data"]
        return lines


@pytest.fixture
def world(data_folder: Path) -> Iterator[World]:
    with serving(Settings(data_dir=data_folder, base=f"random:{I},{O},3", auth=Auth.KEYS)) as (client, service):
        key = make_key(service.keys, "acme", *ALL_OF_A_TENANT)
        for name in ("a", "b"):
            body = as_upload(random_adapter(O, I, 2, seed=1))
            client.put(f"/adapters/{name}", json=body, headers=bearer(key)).raise_for_status()
        yield World(client, service, key, make_key(service.keys, DEFAULT_TENANT, Scope.OPERATOR))


def _sums(lines: Lines, by: str) -> dict[str | None, tuple[int, int]]:
    """Requests and rows by name. The test may run in two hours."""
    requests, rows = Counter[str | None](), Counter[str | None]()
    for line in lines:
        requests[line[by]] += line["requests"]
        rows[line[by]] += line["rows"]
    return {name: (requests[name], rows[name]) for name in requests}


def _infer(version: str = "") -> tuple[str, dict[str, Any]]:
    tensor = {"name": "inputs", "shape": [2, I], "datatype": "FP32", "data": ROW * 2}
    return f"/v2/models/a{version}/infer", {"inputs": [tensor]}


REQUESTS: list[tuple[tuple[str, dict[str, Any]], dict[str | None, int]]] = [
    (("/predict", {"adapter": "a", "inputs": [ROW] * 3}), {"a": 3}),
    (("/predict", {"adapter": "b@1", "inputs": [ROW]}), {"b": 1}),
    (("/predict", {"adapter": None, "inputs": [ROW] * 2}), {None: 2}),
    (("/predict", {"adapters": ["a", None, "a@live", "b", "a@1"], "inputs": [ROW] * 5}), {"a": 3, None: 1, "b": 1}),
    (("/predict", {"adapter": "a", "inputs": [ROW], "return": ["labels"]}), {"a": 1}),
    (_infer(), {"a": 2}),
    (_infer("/versions/1"), {"a": 2}),
]
"""Requests, and the rows of each adapter that they name."""


def test_every_prediction_counts_once_for_its_key_and_once_for_each_of_its_adapters(world: World) -> None:
    other = make_key(world.service.keys, "acme", Scope.PREDICT)
    # The second header keeps a request from the fast path.
    for headers in (bearer(world.key), {**bearer(other), "X-Request-Timeout": "50"}):
        for (url, body), _ in REQUESTS:
            assert world.client.post(url, json=body, headers=headers).status_code == 200
    adapters = {
        name: (2 * sum(name in rows for _, rows in REQUESTS), 2 * sum(rows.get(name, 0) for _, rows in REQUESTS))
        for name in ("a", "b", None)
    }
    of_key = len(REQUESTS), sum(sum(rows.values()) for _, rows in REQUESTS)
    assert _sums(world.usage(world.key, by="adapter"), "adapter") == adapters
    keys = {world.key.key.id: of_key, other.key.id: of_key}
    assert _sums(world.usage(world.key, by="key"), "key") == keys
    total = world.usage(world.key)
    assert {name for line in total for name in line} == {"hour", "requests", "rows"}
    assert tuple(sum(line[name] for line in total) for name in ("requests", "rows")) == (2 * of_key[0], 2 * of_key[1])
    # What was counted stays when an adapter is gone.
    world.client.delete("/adapters/b?purge=true", headers=bearer(world.key)).raise_for_status()
    assert _sums(world.usage(world.key, by="adapter"), "adapter") == adapters


def test_what_was_not_answered_does_not_count(world: World) -> None:
    huge = {"adapter": None, "inputs": [[3e38] * I]}
    for body, status in (
        ({"adapter": "nobody", "inputs": [ROW]}, 404),
        ({"adapter": "a", "inputs": []}, 422),
        (huge, 422),
    ):
        assert world.client.post("/predict", json=body, headers=bearer(world.key)).status_code == status
    assert world.client.post("/predict", json=huge).status_code == 401
    assert world.client.get("/adapters/a", headers=bearer(world.key)).status_code == 200
    assert world.usage(world.key) == []


def test_a_tenant_sees_its_own_usage_and_an_operator_that_of_any(world: World) -> None:
    body = {"adapter": "a", "inputs": [ROW]}
    selected = {**bearer(world.operator), "X-Tenant": "acme"}
    for headers in (bearer(world.key), selected):
        world.client.post("/predict", json=body, headers=headers).raise_for_status()
    other = make_key(world.service.keys, "globex", *ALL_OF_A_TENANT)
    for key in (other, world.operator):
        assert [world.usage(key, by=by) for by in ("adapter", "key")] == [[], []]
    # The operator's own requests are the tenant's that they were for.
    keys = {world.key.key.id: (1, 1), world.operator.key.id: (1, 1)}
    assert _sums(world.usage(world.key, by="key"), "key") == keys
    shown = world.client.get("/usage", params={"by": "key"}, headers=selected).json()["data"]
    assert _sums(shown, "key") == keys


def test_without_keys_the_key_is_null(data_folder: Path) -> None:
    with serving(Settings(data_dir=data_folder, base=f"random:{I},{O},3")) as (client, service):
        client.post("/predict", json={"adapter": None, "inputs": [ROW]}).raise_for_status()
        service.observer.close()
        [line] = client.get("/usage", params={"by": "key"}).raise_for_status().json()["data"]
        assert (line["key"], line["requests"], line["rows"]) == (None, 1, 1)


def test_the_page_shows_the_usage_of_the_last_day_to_an_admin(world: World) -> None:
    world.service.tenants.put("acme", Limits(adapters=5, requests_per_second=2000))
    for body in ({"adapter": "a", "inputs": [ROW] * 2}, {"adapters": ["b", None], "inputs": [ROW] * 2}):
        world.client.post("/predict", json=body, headers=bearer(world.key)).raise_for_status()
    world.service.observer.close()

    def cells(key: IssuedKey, by: str) -> list[list[str]]:
        answer = world.client.get("/ui/usage", params={"by": by}, headers={**bearer(key), "HX-Request": "true"})
        rows = re.findall(r"<tr>(.*?)</tr>", answer.raise_for_status().text, re.DOTALL)
        return [re.sub(r"<[^>]*>", " ", row).split() for row in rows[1:]]

    assert cells(world.key, "adapter") == [["a", "1", "2"], ["base", "layer", "1", "1"], ["b", "1", "1"]]
    assert cells(world.key, "key") == [[world.key.key.id, "2", "4"]]
    assert cells(make_key(world.service.keys, "globex", *ALL_OF_A_TENANT), "adapter") == []
    page = world.client.get("/ui/usage", headers=bearer(world.key)).text
    assert len(re.findall("<rect", page)) == 24
    assert re.findall(r"Adapters</th>\s*<td[^>]*>(.*?)</td>\s*<td[^>]*>(.*?)</td>", page) == [("2", "5")]
    assert re.findall(r"Requests per second</th>\s*<td[^>]*>(.*?)</td>\s*<td[^>]*>(.*?)</td>", page) == [("–", "2,000")]
    assert 'href="/ui/usage"' in world.client.get("/", headers=bearer(world.key)).text
    reader = bearer(make_key(world.service.keys, "acme", Scope.READ))
    assert world.client.get("/ui/usage", headers=reader).status_code == 403
    assert 'href="/ui/usage"' not in world.client.get("/", headers=reader).text


# --- the list


def _stamp(hour: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOON + hour * HOUR))


@pytest.fixture(scope="module")
def filled(new_folder: NewFolder) -> Iterator[httpx.Client]:
    """A service with some hours of two adapters."""
    settings = Settings(data_dir=new_folder("usage"), base=f"random:{I},{O},3")
    with serving(settings) as (client, service):
        counts = [
            UsageCount(UsageSlot(DEFAULT_TENANT, by, NOON // HOUR + hour, name), hour + 1, 10 * (hour + 1))
            for hour in range(4)
            for by, name in ((UsageBy.ADAPTER, "a"), (UsageBy.ADAPTER, ""), (UsageBy.KEY, ""), (UsageBy.KEY, "k"))
        ]
        service.usage.add(counts, writer="test", sequence=1)
        yield client


def test_hours_are_listed_oldest_first_page_by_page(filled: httpx.Client) -> None:
    query: dict[str, Any] = {"from": _stamp(0), "by": "adapter", "limit": 3}
    lines: Lines = []
    while True:
        page = filled.get("/usage", params=query).raise_for_status().json()
        lines += page["data"]
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    assert [(line["hour"], line["adapter"], line["requests"]) for line in lines] == [
        (_stamp(hour), name, hour + 1) for hour in range(4) for name in (None, "a")
    ]


@pytest.mark.parametrize(
    ("begins", "ends", "hours"),
    [
        (_stamp(0), None, range(4)),
        (_stamp(1), _stamp(3), range(1, 3)),
        # An hour that has begun is not in a time that begins within it.
        (_stamp(1).replace("00:00Z", "00:01Z"), _stamp(3).replace("00:00Z", "00:01Z"), range(2, 4)),
        (_stamp(2).replace("Z", "+02:00"), _stamp(3).replace("Z", "+02:00"), range(1)),
        (_stamp(3), _stamp(1), range(0)),
    ],
)
def test_the_sum_of_the_hours_that_begin_in_a_time(
    filled: httpx.Client, begins: str, ends: str | None, hours: range
) -> None:
    query = {"from": begins} if ends is None else {"from": begins, "to": ends}
    lines = filled.get("/usage", params=query).raise_for_status().json()["data"]
    assert lines == [{"hour": _stamp(hour), "requests": 2 * (hour + 1), "rows": 20 * (hour + 1)} for hour in hours]


def test_by_default_the_last_24_hours_are_shown(filled: httpx.Client) -> None:
    assert filled.get("/usage").json()["data"] == []


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"from": "yesterday"}, "wrong_type"),
        ({"to": "2030-01-31T12:00:00"}, "wrong_type"),
        ({"by": "row"}, "out_of_range"),
        ({"cursor": "x"}, "invalid_cursor"),
        ({"tenant": "acme"}, "unknown_field"),
    ],
)
def test_a_query_that_is_not_valid_is_refused(filled: httpx.Client, query: dict[str, str], code: str) -> None:
    refused = filled.get("/usage", params=query)
    assert (refused.status_code, refused.json()["code"]) == (422, code)


@pytest.mark.parametrize("position", ["", "x", "9" * 30 + " a", "-1 a", "1"])
def test_a_cursor_that_a_client_made_up_is_refused(filled: httpx.Client, position: str) -> None:
    cursor = make_cursor(f"usage {DEFAULT_TENANT} None None None", position)
    refused = filled.get("/usage", params={"cursor": cursor})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_cursor")


# --- counting and storing


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.seconds = float(NOON)

    def __call__(self) -> float:
        return self.seconds


class Store(NamedTuple):
    """A catalogue of its own, and its clock."""

    usage: Usage
    database: Database
    clock: Clock

    def counter(self, **settings: Any) -> UsageCounter:
        """A counter that stores only when it is told to."""
        clock = self.clock
        return UsageCounter(self.usage, seconds_between_flushes=1e6, now=clock, monotonic=clock, **settings)

    def sums(self, by: UsageBy, tenant: str = DEFAULT_TENANT) -> dict[tuple[int, str | None], tuple[int, int]]:
        """Requests and rows by hour after noon and name."""
        lines = self.usage.list(tenant=tenant, by=by, begins=0, ends=None, limit=10**6)
        begins = (int(parse_rfc3339(line.hour)) - NOON for line in lines)
        return {
            (begin // HOUR, line.name): (line.requests, line.rows) for begin, line in zip(begins, lines, strict=True)
        }


@pytest.fixture
def store(data_folder: Path) -> Iterator[Store]:
    database, clock = open_database(data_folder), Clock()
    yield Store(Usage(database, now=clock), database, clock)
    database.close()


def _entry(*names: str | None, caller: Caller = OPERATOR) -> QueueEntry:
    """A request with one row for each of these adapters."""
    references = [None if name is None else Reference(name) for name in names]
    rows = np.zeros((len(names), I), np.float32)
    request = InferenceRequest(rows, references, by_row=len(names) > 1)
    return QueueEntry(request, Grant(caller), lambda: None, wait_seconds=1, disconnected=None)


def test_a_request_counts_in_the_hour_in_which_it_was_answered(store: Store) -> None:
    counter = store.counter()
    for seconds in (0, HOUR - 0.001, HOUR, 2 * HOUR - 0.001):
        store.clock.seconds = NOON + seconds
        counter.count(_entry("a"))
    counter.close()
    assert store.sums(UsageBy.ADAPTER) == {(0, "a"): (2, 2), (1, "a"): (2, 2)}


def test_a_commit_whose_outcome_is_unknown_is_repeated_and_counts_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, add = store.counter(), Usage.add
    failures: list[str] = []

    def fail(self: Usage, counts: Any, **of_batch: Any) -> None:
        failures.append("stored" if len(failures) % 2 else "not stored")
        if failures[-1] == "stored":
            add(self, counts, **of_batch)
        raise StorageFailed("it is unknown whether it was stored", outcome_unknown=True)

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(Usage, "add", fail)
            for _ in range(4):
                counter.count(_entry("a"))
                with pytest.raises(StorageFailed):
                    counter.flush()
        # Counted while the outcome is unknown.
        counter.count(_entry("a"))
        counter.flush()
    assert failures.count("stored") == 6
    assert store.sums(UsageBy.ADAPTER) == {(0, "a"): (15, 15)}
    counter.close()
    assert store.sums(UsageBy.KEY) == {(0, None): (15, 15)}


def test_two_processes_add_to_the_same_hour(store: Store) -> None:
    for _ in range(2):
        counter = store.counter()
        counter.count(_entry("a", "b", "a"))
        counter.close()
    assert store.sums(UsageBy.ADAPTER) == {(0, "a"): (2, 4), (0, "b"): (2, 2)}
    assert store.sums(UsageBy.KEY) == {(0, None): (2, 6)}


def test_many_adapters_are_stored_in_small_transactions(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, add, sizes = store.counter(), Usage.add, []

    def noted(self: Usage, counts: Any, **of_batch: Any) -> None:
        sizes.append(len(counts))
        add(self, counts, **of_batch)

    monkeypatch.setattr(Usage, "add", noted)
    for first in range(0, 10_000, 1000):
        counter.count(_entry(*(f"adapter-{number}" for number in range(first, first + 1000))))
    counter.close()
    assert sizes == [2000] * 5 + [1]
    assert store.sums(UsageBy.ADAPTER) == {(0, f"adapter-{number}"): (1, 1) for number in range(10_000)}
    assert store.sums(UsageBy.KEY) == {(0, None): (10, 10_000)}


def test_adapters_beyond_the_bound_are_counted_together(store: Store) -> None:
    counter = store.counter(max_slots=3)
    acme = Caller("k", "acme", frozenset())
    for caller in (OPERATOR, acme):
        for name in ("a", "b", "c", "d", "a"):
            counter.count(_entry(name, caller=caller))
    counter.close()
    assert store.sums(UsageBy.ADAPTER) == {(0, "a"): (2, 2), (0, "b"): (1, 1), (0, "c"): (1, 1), (0, "*"): (1, 1)}
    assert store.sums(UsageBy.ADAPTER, "acme") == {(0, "*"): (5, 5)}
    assert store.sums(UsageBy.KEY, "acme") == {(0, "k"): (5, 5)}


def test_hours_are_kept_for_62_days(store: Store) -> None:
    Tenants(store.database, now=store.clock).put("acme", Limits())
    counter = store.counter()
    for caller in (OPERATOR, Caller("k", "acme", frozenset())):
        for hour in (0, 1):
            store.clock.seconds = NOON + hour * HOUR
            counter.count(_entry("a", "b", caller=caller))
    counter.close()
    store.clock.seconds = NOON + 62 * 24 * HOUR
    assert store.usage.remove_expired() == 0
    store.clock.seconds += HOUR
    assert store.usage.remove_expired() == 6
    assert set(store.sums(UsageBy.ADAPTER)) == set(store.sums(UsageBy.ADAPTER, "acme")) == {(1, "a"), (1, "b")}
    with store.database.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM usage_writers").scalar_one() == 0
