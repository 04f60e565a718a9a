"""Keys and sessions over HTTP: who may make, see and revoke which, and what a session is."""

import json
import re
import socket

import httpx
import pytest
from pydantic import ValidationError

from adapters.access.keys import Scope
from adapters.access.tenants import DEFAULT_TENANT
from app.http import middleware
from app.settings import Auth, Settings
from tests.conftest import Serve
from tests.integration.access.conftest import OTHER, TENANT, World
from tests.support.keys import ALL_OF_A_TENANT, bearer, make_key

IN_TENANT = {"X-Tenant": TENANT}


def _code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def test_an_admin_makes_lists_and_revokes_the_keys_of_its_own_tenant(world: World) -> None:
    admin = bearer(world.scoped[Scope.ADMIN])
    body = {"name": "ci", "scopes": ["train", "read"], "expires_at": "2040-01-01T00:00:00+01:00"}
    made = world.client.post("/keys", json=body, headers=admin)
    assert made.status_code == 201
    assert made.headers["Cache-Control"] == "no-store"
    key = made.json()
    assert list(key) == ["id", "key", "tenant", "scopes", "expires_at"]
    assert (key["tenant"], key["scopes"], key["expires_at"]) == (
        TENANT,
        ["read", "train"],
        "2039-12-31T23:00:00.000000Z",
    )
    assert world.client.get("/base", headers=bearer(key["key"])).status_code == 200
    pages: list[list[dict[str, object]]] = []
    cursor = None
    while not pages or cursor:
        query = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = world.client.get("/keys", params=query, headers=admin).raise_for_status().json()
        cursor = page["next_cursor"]
        pages.append(page["data"])
    listed = {entry["id"]: entry for page in pages for entry in page}
    assert len(pages) > 1
    assert {entry["tenant"] for entry in listed.values()} == {TENANT}
    assert (listed[key["id"]]["name"], listed[key["id"]]["revoked_at"]) == ("ci", None)
    assert "lpx_" not in str(listed)
    for _ in range(2):  # revoking it again changes nothing
        assert world.client.delete(f"/keys/{key['id']}", headers=admin).status_code == 204
    assert world.client.get("/base", headers=bearer(key["key"])).status_code == 401


def test_an_admin_reaches_no_other_tenant_and_makes_no_operator(world: World) -> None:
    admin = bearer(world.scoped[Scope.ADMIN])
    new = {"name": "x", "scopes": ["read"]}
    assert _code(world.client.post("/keys", json=new | {"tenant": OTHER}, headers=admin)) == (403, "forbidden")
    assert _code(world.client.post("/keys", json=new | {"tenant": "nobody"}, headers=admin)) == (403, "forbidden")
    assert _code(world.client.post("/keys", json=new | {"scopes": ["operator"]}, headers=admin)) == (403, "forbidden")
    for key_id in (world.other.key.id, "0" * 16, "nothing", "%00"):
        assert _code(world.client.delete(f"/keys/{key_id}", headers=admin)) == (404, "key_not_found")
    assert world.client.post("/keys", json=new | {"tenant": TENANT}, headers=admin).status_code == 201
    default = bearer(make_key(world.service.keys, DEFAULT_TENANT, Scope.ADMIN))
    assert _code(world.client.delete(f"/keys/{world.operator.key.id}", headers=default)) == (403, "forbidden")


def test_an_operator_makes_tenants_and_reaches_each(world: World) -> None:
    operator = bearer(world.operator)
    new = {"name": "x", "scopes": ["read"]}
    made = world.client.post("/keys", json=new | {"tenant": "new"}, headers=operator).json()
    assert made["tenant"] == "new"
    listed = world.client.get("/keys", headers={**operator, "X-Tenant": "new"}).json()["data"]
    assert [entry["id"] for entry in listed] == [made["id"]]
    assert _code(world.client.delete(f"/keys/{made['id']}", headers=operator)) == (404, "key_not_found")
    assert world.client.delete(f"/keys/{made['id']}", headers={**operator, "X-Tenant": "new"}).status_code == 204
    assert world.client.post("/keys", json=new, headers={**operator, **IN_TENANT}).json()["tenant"] == TENANT
    assert world.client.post("/keys", json=new | {"scopes": ["operator"]}, headers=operator).status_code == 201
    wrong = world.client.post("/keys", json=new | {"scopes": ["operator"]}, headers={**operator, **IN_TENANT})
    assert _code(wrong) == (422, "invalid_combination")
    assert _code(world.client.post("/keys", json=new | {"tenant": "A B"}, headers=operator)) == (422, "invalid_name")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["everything"]}, "scopes"),
        ({"scopes": "read"}, "scopes"),
        ({"name": None}, "name"),
        ({"name": "x" * 129}, "name"),
        ({"expires_at": "soon"}, "expires_at"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"key": "lpx_"}, "key"),
    ],
)
def test_a_wrong_field_is_named(world: World, change: dict[str, object], field: str) -> None:
    body = {"name": "x", "scopes": ["read"]} | change
    answer = world.client.post("/keys", json=body, headers=bearer(world.scoped[Scope.ADMIN]))
    assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_a_session_counts_as_its_key_until_either_ends(world: World) -> None:
    key = make_key(world.service.keys, TENANT, Scope.READ)
    with httpx.Client(base_url=world.client.base_url) as browser:
        assert browser.post("/session", json={"key": f" {key.text}\n"}).status_code == 204
        assert browser.get("/base").status_code == 200
        assert browser.get("/", headers={"Accept": "text/html"}).status_code == 200
        assert _code(browser.get("/metrics")) == (403, "forbidden")
        # A key in the header goes before the cookie, also one that is refused.
        assert browser.get("/base", headers=bearer("lpx_nonsense")).status_code == 401
        assert browser.get("/metrics", headers=bearer(world.operator)).status_code == 200
        # A page of another site can do nothing with the cookie.
        foreign = browser.delete("/adapters/a", headers={"Origin": "https://elsewhere.test"})
        assert _code(foreign) == (403, "cross_site")
        token = browser.cookies["loraplex_session"]
        assert browser.delete("/session").status_code == 204
        assert "loraplex_session" not in browser.cookies
        assert browser.get("/base", headers={"Cookie": f"loraplex_session={token}"}).status_code == 401
        browser.post("/session", json={"key": key.text})
        world.service.keys.revoke(key.key.id, tenant=None, by_operator=True)
        assert "was revoked" in browser.get("/base").json()["detail"]
        assert _code(browser.post("/session", json={"key": key.text})) == (401, "unauthenticated")


@pytest.mark.parametrize("has_session", [False, True], ids=["key", "session"])
@pytest.mark.parametrize("pieces", [1, 2], ids=["a late body", "a slow body"])
def test_a_request_whose_body_ends_after_the_revocation_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, has_session: bool, pieces: int
) -> None:
    monkeypatch.setattr(middleware, "_LONGEST_BODY_SECONDS", 0.0)
    key = make_key(world.service.keys, TENANT, Scope.WRITE)
    token = world.service.sessions.open(key.key.id)
    credential = f"Cookie: loraplex_session={token}" if has_session else f"Authorization: Bearer {key.text}"
    url, body = world.client.base_url, json.dumps({"A": [[1.0]] * 2, "B": [[1.0] * 4]}).encode()
    head = f"PUT /adapters/late HTTP/1.1\r\nHost: {url.host}\r\n{credential}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection((url.host, url.port or 0), timeout=30) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100"), "the key was accepted"
        begun = 0 if pieces == 1 else len(body) - 1
        connection.sendall(body[:begun])
        if has_session:
            world.service.sessions.close(token)
        else:
            world.service.keys.revoke(key.key.id, tenant=None, by_operator=True)
        connection.sendall(body[begun:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")
    assert world.client.get("/adapters/late", headers=bearer(world.scoped[Scope.READ])).status_code == 404


def test_the_cookie_of_a_session_is_out_of_reach_of_scripts_and_other_sites(world: World) -> None:
    key = make_key(world.service.keys, TENANT, Scope.READ).text
    plain = world.client.post("/session", json={"key": key}).headers["Set-Cookie"]
    assert re.fullmatch(r"loraplex_session=[\w-]{43}; HttpOnly; Max-Age=604800; Path=/; SameSite=Strict", plain)
    origin = f"https://{world.client.base_url.netloc.decode()}"
    secure = world.client.post("/session", json={"key": key}, headers={"Origin": origin}).headers["Set-Cookie"]
    assert secure.endswith("; Secure")
    world.client.cookies.clear()


def test_a_service_without_keys_ignores_them_and_makes_none(serve: Serve) -> None:
    client, service = serve()
    for headers in (bearer("lpx_nonsense"), {"Authorization": "Basic x"}, {"Cookie": "loraplex_session=x"}):
        assert client.get("/base", headers=headers).status_code == 200
        assert client.post("/predict", json={"adapter": None, "inputs": [[0] * 10]}, headers=headers).status_code == 200
    assert _code(client.post("/keys", json={"name": "x", "scopes": ["read"]})) == (409, "keys_disabled")
    assert _code(client.post("/session", json={"key": "x"})) == (409, "keys_disabled")
    assert client.get("/keys").json() == {"data": [], "next_cursor": None}
    assert "needs no key" in client.get("/ui/sign-in").text
    make_key(service.keys, "acme", *ALL_OF_A_TENANT)
    assert client.get("/base", headers={"X-Tenant": "acme"}).status_code == 200
    assert _code(client.get("/base", headers={"X-Tenant": "nobody"})) == (404, "tenant_not_found")
    assert _code(client.get("/base", headers={"X-Tenant": "A B"})) == (404, "tenant_not_found")
    twice = client.get("/base", headers=[("X-Tenant", "acme"), ("X-Tenant", "default")])
    assert _code(twice) == (422, "invalid_combination")


def test_a_service_without_keys_listens_on_loopback_alone_unless_it_is_told_to() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.7", "example.com"):
        with pytest.raises(ValidationError, match=r"not loopback.*LORAPLEX_AUTH=keys.*LORAPLEX_ALLOW_OPEN=true"):
            Settings(host=host)
        Settings(host=host, auth=Auth.KEYS)
        Settings(host=host, allow_open=True)
    for host in ("127.0.0.1", "::1", "localhost"):
        Settings(host=host)
