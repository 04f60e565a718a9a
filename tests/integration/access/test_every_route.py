"""Every call and page with every kind of key: generated from the routes, so that none can be forgotten."""

import re
import socket

import pytest
from starlette.routing import Mount

from adapters.access.keys import Scope
from app.http.application import build_routes
from app.http.endpoints import ENDPOINTS, Endpoint
from app.web.pages import sign_in
from app.web.pages.rendering import STATIC_PREFIX
from tests.integration.access.conftest import World
from tests.support.keys import bearer

IN_TABLE = {endpoint.path for endpoint in ENDPOINTS}


def _pages() -> list[str]:
    """The paths of all pages: what is neither in the endpoint table nor a static file."""
    pages: list[str] = []
    for route in build_routes().routes:
        if isinstance(route, Mount):
            assert route.path == STATIC_PREFIX
        else:
            # FastAPI keeps what was included as it is, and has no public name for it.
            inner = route.original_router.routes  # type: ignore[attr-defined]
            pages += [page.path for page in inner if page.path not in IN_TABLE]
    return pages


def _url(path: str) -> str:
    """A path of a resource that nobody has."""
    return re.sub(r"{(\w+)(:path)?}", lambda match: "1" if match[1] == "version" else "nothing", path)


EACH_CALL = pytest.mark.parametrize("call", [pytest.param(one, id=f"{one.method} {one.path}") for one in ENDPOINTS])
PAGES = [path for path in _pages() if path != sign_in.PATH]


@EACH_CALL
def test_a_call_needs_a_key_that_is_accepted(world: World, call: Endpoint) -> None:
    for kind, headers in world.refused.items():
        answer = world.client.request(call.method, _url(call.path), headers=headers)
        if call.scope is None:
            assert answer.status_code not in (401, 403), kind
        else:
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), kind
            assert "lpx_" not in answer.text.replace("lpx_<id>", "")


@EACH_CALL
def test_a_call_needs_its_scope(world: World, call: Endpoint) -> None:
    for scope, key in world.scoped.items():
        answer = world.client.request(call.method, _url(call.path), headers=bearer(key))
        if call.scope in (None, scope):
            assert answer.status_code not in (401, 403), scope
        else:
            assert answer.status_code == 403, scope
            assert f"the scope {call.scope}" in answer.text


@EACH_CALL
def test_a_call_can_be_made_by_an_operator_and_for_no_other_tenant_by_others(world: World, call: Endpoint) -> None:
    url = _url(call.path)
    assert world.client.request(call.method, url, headers=bearer(world.operator)).status_code not in (401, 403)
    if call.scope is not None:
        for tenant, status in (("acme", 403), ("nobody", 403)):
            headers = {**bearer(world.other), "X-Tenant": tenant}
            assert world.client.request(call.method, url, headers=headers).status_code == status
        headers = {**bearer(world.operator), "X-Tenant": "nobody"}
        assert world.client.request(call.method, url, headers=headers).status_code == 404


def test_there_are_pages_to_check() -> None:
    assert {"/", "/ui/adapters", "/docs", "/openapi.json", "/ui/throughput"} <= set(PAGES)


@pytest.mark.parametrize("path", PAGES)
def test_a_page_needs_a_key_that_may_read(world: World, path: str) -> None:
    for kind, headers in world.refused.items():
        answer = world.client.get(_url(path), headers=headers)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), kind
        page = world.client.get(_url(path), headers={**headers, "Accept": "text/html"})
        assert (page.status_code, page.headers["WWW-Authenticate"]) == (401, "Bearer"), kind
        assert 'id="sign-in"' in page.text
    for scope, key in world.scoped.items():
        status = world.client.get(_url(path), headers=bearer(key)).status_code
        # The counters of all tenants need the scope of metrics too, and the usage and the audit log that of admins.
        is_shown = scope is Scope.READ and path not in ("/ui/throughput", "/ui/usage", "/ui/audit")
        assert (status not in (401, 403)) if is_shown else (status == 403), scope


@pytest.mark.parametrize("path", ["/nothing", "/adapters/a/nothing", "/v3", "/static", "/healthz/x", "/healthz%0a"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_a_path_that_does_not_exist_needs_a_key_too(world: World, path: str, method: str) -> None:
    assert world.client.request(method, path).status_code == 401
    status = world.client.request(method, path, headers=bearer(world.scoped[Scope.PREDICT])).status_code
    assert status in (404, 405)


def test_what_needs_no_key(world: World) -> None:
    open_paths = ["/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", sign_in.PATH, "/static/favicon.svg"]
    assert [world.client.get(path).status_code for path in open_paths] == [200] * len(open_paths)
    # The static files are no detour to another path.
    for path in ("/static/../metrics", "/static//metrics", "/static/%2e%2e/%2e%2e/settings.py", "/ui/sign-in/x"):
        assert world.client.get(path).status_code in (401, 404)


def test_a_key_is_checked_before_the_body_is_read(world: World) -> None:
    url = world.client.base_url
    head = f"PUT /datasets/x HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: text/csv\r\nContent-Length: 1000000\r\n\r\n"
    with socket.create_connection((url.host, url.port or 80), timeout=20) as connection:
        connection.sendall(head.encode())
        assert connection.recv(2**16).startswith(b"HTTP/1.1 401 ")
