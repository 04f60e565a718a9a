"""Every change leaves one entry in the audit log, in its own transaction: generated from the endpoint table."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any, NamedTuple

import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.access import audit
from adapters.access.keys import IssuedKey, Scope
from adapters.errors import StorageFailed
from adapters.storage.schema import metadata
from app.http.endpoints import ENDPOINTS, Endpoint
from app.service import Service
from app.settings import Auth, Settings
from tests.conftest import NewFolder
from tests.support.catalog_factories import as_upload, claimed, finish, make_adapter, submit
from tests.support.keys import ALL_OF_A_TENANT, bearer, make_key
from tests.support.service import serving, train

TENANT = "acme"
CSV = {"Content-Type": "text/csv"}
ROWS: dict[str, Any] = {
    "inputs": [[float((n * k) % 7) for k in range(1, 11)] for n in range(30)],
    "targets": [[float(n), 1.0] for n in range(30)],
}
KEPT = {"method": "closed_form", "ridge": 1.0, "keep_statistics": True}
TABLE = ",".join("abcdefghij") + ",y,z\n" + "".join(f"{','.join(map(str, x))},1,2\n" for x in ROWS["inputs"])
COLUMNS = {"inputs": {"columns": list("abcdefghij")}, "targets": {"columns": ["y", "z"]}}
# Calls that compute or list, and change nothing.
NO_CHANGES = {"predict", "infer", "infer_version", "filter_models"}
CHANGES = {one.operation_id: one for one in ENDPOINTS if one.method != "GET"}
_NUMBERS = count(1)


class AuditWorld(NamedTuple):
    """A worker that requires keys, without a trainer, and the keys of one tenant and of an operator."""

    client: httpx.Client
    service: Service
    key: IssuedKey
    operator: IssuedKey

    def call(self, method: str, url: str, **fields: Any) -> httpx.Response:
        """Answer of a request with the tenant's key."""
        return self.client.request(method, url, headers=bearer(self.key) | fields.pop("headers", {}), **fields)

    def entries(self) -> list[dict[str, Any]]:
        """The audit log of all tenants, oldest first."""
        return [row for name, row in self.rows() if name == "audit"]

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """All rows of the catalogue, except the blobs that may be written next and what a thread counts."""
        tables = [table for name, table in metadata.tables.items() if name not in ("pending_blobs", "rate_buckets")]
        with self.service.catalog.database.read() as connection:
            return [
                (table.name, dict(row))
                for table in tables
                for row in connection.execute(sa.select(table).order_by(*table.primary_key)).mappings()
            ]


@pytest.fixture(scope="module")
def audited(new_folder: NewFolder) -> Iterator[AuditWorld]:
    """A worker whose tenant has an adapter with statistics, which a trainer has published before."""
    settings = Settings(data_dir=new_folder("audit"), base="random:10,2,42", auth=Auth.KEYS)
    with serving(settings, trainer=True) as (client, service):
        key = make_key(service.keys, TENANT, *ALL_OF_A_TENANT)
        operator = make_key(service.keys, "default", Scope.OPERATOR)
        client.headers.update(bearer(key))
        assert train(client, name="kept", data=ROWS, rank="auto", training=KEPT)["status"] == "succeeded"
    with serving(settings) as (client, service):
        yield AuditWorld(client, service, key, operator)


class Case(NamedTuple):
    """A call that changes something, made ready, and one of the same endpoint that is refused."""

    prepare: Callable[[AuditWorld], tuple[str, dict[str, Any]]]
    action: str
    refused: tuple[str, dict[str, Any]]


def _name() -> str:
    return f"n{next(_NUMBERS)}"


def _upload(world: AuditWorld, name: str | None = None) -> str:
    name = name or _name()
    url = f"/adapters/{name}"
    world.call("PUT", url, json=as_upload(make_adapter(next(_NUMBERS)))).raise_for_status()
    return url


def _upload_two(world: AuditWorld) -> str:
    return _upload(world, _upload(world).removeprefix("/adapters/"))


def _delete(world: AuditWorld) -> str:
    url = _upload(world)
    world.call("DELETE", url).raise_for_status()
    return url


def _upload_table(world: AuditWorld) -> str:
    url = f"/datasets/{_name()}"
    world.call("PUT", url, content=TABLE, headers=CSV).raise_for_status()
    return url


def _queue(world: AuditWorld) -> str:
    return f"/jobs/{submit(world.service.queue, _name(), tenant=TENANT).id}"


def _failed(world: AuditWorld) -> str:
    data = COLUMNS | {"dataset": _upload_table(world).removeprefix("/datasets/")}
    job = world.call("POST", "/adapters", json={"name": _name(), "data": data}).raise_for_status().json()
    claim = claimed(world.service.queue, base=world.service.base.fingerprint)
    while claim.id != job["id"]:  # those that other tests have queued
        claim = claimed(world.service.queue, base=world.service.base.fingerprint)
    world.service.queue.fail(claim, {"code": "diverged", "detail": "a test"})
    return f"/jobs/{claim.id}"


def _finished(world: AuditWorld) -> str:
    queue, job_id = world.service.queue, _name()
    submit(queue, job_id, adapter=_name(), tenant=TENANT, base=job_id)
    finish(world.service.catalog, queue, claimed(queue, base=job_id))
    return f"/jobs/{job_id}"


def _new_key(world: AuditWorld) -> str:
    return f"/keys/{make_key(world.service.keys, TENANT, Scope.READ).key.id}"


def _session(world: AuditWorld) -> dict[str, Any]:
    return {"headers": {"Cookie": f"loraplex_session={world.service.sessions.open(world.key.key.id)}"}}


def test_limits_that_stay_the_same_are_no_change(audited: AuditWorld) -> None:
    body = {"limits": {"queued_jobs": 5, "rows_per_second": None}}
    operator = bearer(audited.operator)
    audited.client.put("/tenants/same", json=body, headers=operator).raise_for_status()
    with audited.service.catalog.database.read() as connection:
        before = connection.exec_driver_sql("SELECT access_revision FROM catalog").scalar()
    assert audited.client.put("/tenants/same", json=body, headers=operator).status_code == 200
    actions = [entry.action for entry in audited.service.audit.list(tenant="same")]
    assert actions == ["tenant.create"]
    with audited.service.catalog.database.read() as connection:
        assert connection.exec_driver_sql("SELECT access_revision FROM catalog").scalar() == before


NEW_KEY = {"name": "x", "scopes": ["read"]}
NO_ROWS: Mapping[str, Any] = {"data": {"inputs": [], "targets": []}}
CASES: Mapping[str, Case] = {
    "train_adapter": Case(
        lambda _: ("/adapters", {"json": {"name": _name(), "data": ROWS}}),
        "job.submit",
        ("/adapters", {"json": {"name": "a", **NO_ROWS}}),
    ),
    "upload_adapter": Case(
        lambda _: (f"/adapters/{_name()}", {"json": as_upload(make_adapter(next(_NUMBERS)))}),
        "adapter.publish",
        ("/adapters/kept", {"json": as_upload(make_adapter(0)), "headers": {"If-None-Match": "*"}}),
    ),
    "set_live": Case(
        lambda world: (f"{_upload_two(world)}/aliases/live", {"json": {"version": 1}}),
        "adapter.live",
        ("/adapters/kept/aliases/live", {"json": {"version": 99}}),
    ),
    "update_adapter": Case(
        lambda _: ("/adapters/kept/update", {"json": {"add": ROWS}}),
        "job.submit",
        ("/adapters/nothing/update", {"json": {"add": ROWS}}),
    ),
    "delete_adapter": Case(
        lambda world: (_upload(world), {}),
        "adapter.delete",
        ("/adapters/kept", {"headers": {"If-Match": f'"sha256:{"0" * 64}"'}}),
    ),
    "restore_adapter": Case(
        lambda world: (f"{_delete(world)}/restore", {}), "adapter.restore", ("/adapters/kept/restore", {})
    ),
    "evaluate_adapters": Case(
        lambda _: ("/evaluations", {"json": {"adapters": ["kept"], "data": ROWS}}),
        "job.submit",
        ("/evaluations", {"json": {"adapters": ["nothing"], "data": ROWS}}),
    ),
    "upload_dataset": Case(
        lambda _: (f"/datasets/{_name()}", {"content": TABLE, "headers": CSV}),
        "dataset.publish",
        ("/datasets/bad", {"content": "a,b\n1\n", "headers": CSV}),
    ),
    "delete_dataset": Case(lambda world: (_upload_table(world), {}), "dataset.delete", ("/datasets/nothing", {})),
    "cancel_job": Case(lambda world: (f"{_queue(world)}/cancel", {}), "job.cancel", ("/jobs/nothing/cancel", {})),
    "retry_job": Case(
        lambda world: (f"{_failed(world)}/retry", {"json": {}}), "job.submit", ("/jobs/nothing/retry", {"json": {}})
    ),
    "revert_job": Case(
        lambda world: (f"{_finished(world)}/revert", {}), "adapter.revert", ("/jobs/nothing/revert", {})
    ),
    "create_key": Case(
        lambda _: ("/keys", {"json": NEW_KEY}), "key.create", ("/keys", {"json": NEW_KEY | {"scopes": ["operator"]}})
    ),
    "revoke_key": Case(lambda world: (_new_key(world), {}), "key.revoke", ("/keys/nothing", {})),
    "sign_in": Case(
        lambda world: ("/session", {"json": {"key": world.key.text}}),
        "session.open",
        ("/session", {"json": {"key": "x"}}),
    ),
    "sign_out": Case(lambda world: ("/session", _session(world)), "session.close", ("/session", {"json": {}})),
    "put_tenant": Case(
        lambda _: (f"/tenants/{TENANT}", {"json": {"limits": {"queued_jobs": next(_NUMBERS)}}}),
        "tenant.update",
        ("/tenants/A", {"json": {}}),
    ),
}
EACH_CHANGE = pytest.mark.parametrize("call", CASES)


def test_every_call_that_may_change_something_is_among_the_cases() -> None:
    assert CASES.keys() == CHANGES.keys() - NO_CHANGES


def _send(world: AuditWorld, call: Endpoint, url: str, fields: Mapping[str, Any]) -> httpx.Response:
    key = world.operator if call.scope is Scope.OPERATOR else world.key
    # A session is opened and closed without a key in the header.
    authorization = {} if call.path == "/session" else bearer(key)
    try:
        headers = {**authorization, **fields.get("headers", {})}
        return world.client.request(call.method, url, **{**fields, "headers": headers})
    finally:
        world.client.cookies.clear()


@EACH_CHANGE
def test_a_change_leaves_one_entry_and_a_refused_one_none(audited: AuditWorld, call: str) -> None:
    endpoint, case = CHANGES[call], CASES[call]
    url, fields = case.prepare(audited)
    before = audited.entries()
    answer = _send(audited, endpoint, url, fields)
    assert answer.status_code in (200, 201, 202, 204), answer.text
    (entry,) = audited.entries()[len(before) :]
    key = audited.operator if endpoint.scope is Scope.OPERATOR else audited.key
    assert entry["action"] == case.action
    assert (entry["key_id"], entry["tenant"]) == (key.key.id, TENANT)
    assert (entry["request_id"], entry["client_address"]) == (answer.headers["X-Request-Id"], "127.0.0.1")
    before = audited.entries()
    refused = _send(audited, endpoint, *case.refused)
    assert refused.status_code >= 400 or (call == "sign_out" and refused.status_code == 204)
    assert audited.entries() == before


@contextmanager
def _failing_with_an_entry(write: AbstractContextManager[Connection]) -> Iterator[Connection]:
    """A transaction that fails before its commit if it has added an entry."""
    with write as connection:
        before = _count(connection)
        yield connection
        if _count(connection) != before:
            raise StorageFailed("a test: the commit fails")


def _count(connection: Connection) -> int:
    return int(connection.exec_driver_sql("SELECT count(*) FROM audit").scalar_one())


def _fail(_: float) -> str:
    raise StorageFailed("a test: the entry cannot be written")


@EACH_CHANGE
@pytest.mark.parametrize("failing", ["entry", "commit"])
def test_an_entry_and_its_change_are_stored_together_or_not_at_all(
    audited: AuditWorld, call: str, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, fields = CASES[call].prepare(audited)
    before = audited.rows()
    with monkeypatch.context() as patched:
        if failing == "entry":
            patched.setattr(audit, "rfc3339", _fail)
        else:
            kind = type(audited.service.catalog.database)
            write = kind.write
            patched.setattr(kind, "write", lambda self: _failing_with_an_entry(write(self)))
        answer = _send(audited, CHANGES[call], url, fields)
    assert answer.status_code >= 500
    assert audited.rows() == before


def test_a_trainer_makes_its_changes_for_the_request_that_submitted_the_job(audited: AuditWorld) -> None:
    job_id = audited.call("GET", "/adapters/kept/versions").json()["data"][0]["job"]
    submitted, published = (
        next(entry for entry in audited.entries() if entry["resource"] == resource)
        for resource in (f"jobs/{job_id}", "adapters/kept")
    )
    assert (submitted["action"], published["action"]) == ("job.submit", "adapter.publish")
    assert published["digest_after"] == audited.call("GET", "/adapters/kept").json()["live"]["digest"]
    actor = ("key_id", "request_id", "client_address", "tenant")
    assert [published[name] for name in actor] == [submitted[name] for name in actor]
    assert published["key_id"] == audited.key.key.id


def test_the_digests_of_an_adapter_follow_what_is_live(audited: AuditWorld) -> None:
    name = _name()
    first, second = (
        _upload(audited, name) and audited.call("GET", f"/adapters/{name}").json()["live"]["digest"] for _ in "12"
    )
    audited.call("PUT", f"/adapters/{name}/aliases/live", json={"version": 1}).raise_for_status()
    audited.call("DELETE", f"/adapters/{name}").raise_for_status()
    audited.call("POST", f"/adapters/{name}/restore").raise_for_status()
    audited.call("DELETE", f"/adapters/{name}?purge=true").raise_for_status()
    listed = audited.call("GET", "/audit", params={"resource": f"adapters/{name}"}).raise_for_status().json()["data"]
    assert [(entry["action"], entry["digest_before"], entry["digest_after"]) for entry in listed] == [
        ("adapter.purge", first, None),
        ("adapter.restore", None, first),
        ("adapter.delete", first, None),
        ("adapter.live", second, first),
        ("adapter.publish", first, second),
        ("adapter.publish", None, first),
    ]


def _pages(world: AuditWorld, **query: Any) -> list[dict[str, Any]]:
    """All pages of a list together."""
    entries: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = world.call("GET", "/audit", params={"limit": 7} | query | ({"cursor": cursor} if cursor else {}))
        cursor = page.raise_for_status().json()["next_cursor"]
        entries += page.json()["data"]
        assert len(page.json()["data"]) == 7 or cursor is None
    return entries


def test_the_log_is_listed_by_pages_and_streamed_as_lines(audited: AuditWorld) -> None:
    for _ in range(10):
        _upload(audited)
    stored = [entry for entry in audited.entries() if entry["tenant"] == TENANT]
    shown = [{name: value for name, value in entry.items() if name != "sequence"} for entry in reversed(stored)]
    assert _pages(audited) == shown
    stream = audited.call("GET", "/audit", headers={"Accept": "application/jsonl"})
    assert stream.headers["Content-Type"] == "application/jsonl"
    assert [json.loads(line) for line in stream.text.splitlines()] == shown
    since = shown[len(shown) // 2]["time"]
    in_another_zone = since.replace("Z", "+00:00")
    newer = [entry for entry in shown if entry["time"] >= since]
    assert _pages(audited, since=since) == _pages(audited, since=in_another_zone) == newer
    for column, parameter in (("key_id", "actor"), ("resource", "resource")):
        value = shown[3][column]
        assert _pages(audited, **{parameter: value}) == [entry for entry in shown if entry[column] == value]
    assert _pages(audited, actor="service", resource="adapters/kept") == []


@pytest.mark.parametrize(
    ("query", "headers", "code"),
    [
        ({"since": "yesterday"}, {}, "wrong_type"),
        ({"since": "2030-01-01"}, {}, "wrong_type"),
        ({"since": "0001-01-01T00:00:00+14:00"}, {}, "wrong_type"),
        ({"limit": 3}, {"Accept": "application/jsonl"}, "invalid_combination"),
        ({"cursor": "WzEsIjMiXQ"}, {}, "invalid_cursor"),
    ],
)
def test_a_wrong_query_is_refused(
    audited: AuditWorld, query: dict[str, Any], headers: dict[str, str], code: str
) -> None:
    answer = audited.call("GET", "/audit", params=query, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text


def test_each_tenant_has_a_log_of_its_own(audited: AuditWorld) -> None:
    other = make_key(audited.service.keys, "globex", Scope.ADMIN)
    listed = audited.client.get("/audit", headers=bearer(other)).raise_for_status().json()["data"]
    assert {entry["tenant"] for entry in listed} == {"globex"}
    assert [entry["action"] for entry in listed] == ["key.create", "tenant.create"]
    of_tenant = {**bearer(audited.operator), "X-Tenant": "globex"}
    assert audited.client.get("/audit", headers=of_tenant).json()["data"] == listed
    reader = make_key(audited.service.keys, TENANT, Scope.READ)
    assert audited.client.get("/audit", headers=bearer(reader)).status_code == 403


def test_the_page_shows_the_log_to_an_admin(audited: AuditWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.web.pages.audit._ENTRIES_PER_PAGE", 2)
    _upload(audited)
    name = _upload_two(audited).removeprefix("/adapters/")
    whole = audited.call("GET", "/ui/audit").raise_for_status().text
    assert f"adapters/{name}</th>" in whole
    assert 'href="/ui/audit" aria-current="page"' in whole
    part = {"HX-Request": "true"}
    found = audited.call("GET", "/ui/audit", params={"resource": f" adapters/{name}"}, headers=part).text
    assert (found.count("<tr>"), audited.key.key.id in found) == (3, True)
    hostile = audited.call("GET", "/ui/audit", params={"actor": "<script>", "resource": '"x'})
    assert "No change matches" in hostile.text
    assert "<script>" not in hostile.text.partition("</head>")[2]
    (link,) = re.findall(r'href="(/ui/audit\?cursor=[^"]+)"', whole)
    assert "First page" in audited.call("GET", link).text
    reader = make_key(audited.service.keys, TENANT, Scope.READ)
    assert audited.client.get("/ui/audit", headers=bearer(reader)).status_code == 403
