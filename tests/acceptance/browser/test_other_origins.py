"""Pages of other origins, in a real browser: none of their requests changes or computes anything."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.acceptance.browser.conftest import REBOUND_HOST
from tests.conftest import Serve

pytestmark = pytest.mark.slow

POST_THERE = """async url => {
    const request = { method: "POST", mode: "no-cors", headers: { "Content-Type": "text/plain" }, body: "{}" };
    return fetch(url, request).then(answer => answer.type, () => "blocked");
}"""
DELETE_HERE = "path => fetch(path, { method: 'DELETE' }).then(answer => answer.status, () => 'blocked')"


@pytest.fixture
def other_site() -> Iterator[int]:
    """The port of another web server on this machine, with an empty page."""

    class EmptyPage(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), EmptyPage)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page with a profile of its own."""
    context = browser.new_context()
    yield context.new_page()
    context.close()


def test_a_page_of_another_host_cannot_post(serve: Serve, other_site: int, page: Page) -> None:
    client, _ = serve()
    url = f"{str(client.base_url).rstrip('/')}/v2/repository/index"
    page.goto(f"http://localhost:{other_site}/")
    with page.expect_event("requestfailed", lambda request: request.url == url):
        # The browser does not hand the answer to the page: `Cross-Origin-Resource-Policy`.
        assert page.evaluate(POST_THERE, url) == "blocked"
    # The service refuses it too.
    headers = {"Content-Type": "text/plain", "Origin": f"http://localhost:{other_site}"}
    assert client.post(url, content="{}", headers=headers).status_code == 403
    # The same request without a page's headers is answered: nothing else refused it.
    assert client.post(url, content="{}", headers={"Content-Type": "text/plain"}).status_code == 200


def test_a_page_whose_name_has_the_service_s_address_neither_reads_nor_deletes(serve: Serve, page: Page) -> None:
    client, _ = serve()
    client.put("/adapters/acme", json={"A": [[1]] * 2, "B": [[1] * 10]}).raise_for_status()
    answer = page.goto(f"http://{REBOUND_HOST}:{client.base_url.port}/adapters")
    assert answer is not None
    assert answer.status == 403
    assert "acme" not in answer.text()
    # The refusal's own policy lets its page send nothing.
    assert page.evaluate(DELETE_HERE, "/adapters/acme") == "blocked"
    assert client.get("/adapters/acme").status_code == 200
