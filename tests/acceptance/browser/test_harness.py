"""The harness itself: it sees what goes wrong on a page, and what axe-core would say of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest

from tests.acceptance.browser.accessibility import axe
from tests.acceptance.browser.conftest import PageAt
from tests.acceptance.browser.page_errors import Troubles
from tests.acceptance.browser.viewports import PHONE

pytestmark = pytest.mark.slow

POLICY = "default-src 'self'; img-src 'self' data:"
GOOD = """<!doctype html><html lang="en"><head><title>Good</title><link rel="icon" href="data:,"></head>
<body><main><h1>Good</h1><p>Nothing is wrong here.</p></main></body></html>"""


@contextmanager
def site(html: str, script: str = "") -> Iterator[httpx.Client]:
    """A page under a strict policy, and its script."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers = {"/": ("text/html", html), "/script.js": ("text/javascript", script)}
            kind, body = answers.get(self.path, ("text/plain", "nothing"))
            self.send_response(200 if self.path in answers else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Security-Policy", POLICY)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}") as client:
            yield client
        server.shutdown()


def test_a_page_without_fault_has_none(page_at: PageAt, troubles: Troubles) -> None:
    with site(GOOD) as client:
        axe(page_at(client))
        troubles.check()


@pytest.mark.parametrize(
    ("html", "script", "what"),
    [
        (GOOD.replace("<p>", '<p style="color: red">'), "", "inline style violates"),
        (GOOD.replace("</main>", "<script>1</script></main>"), "", "inline script violates"),
        (GOOD.replace("</main>", '<script src="/script.js"></script></main>'), "throw Error('oh')", "uncaught: .*oh"),
        (GOOD.replace("</main>", '<script src="/script.js"></script></main>'), "console.error('oh')", "error: oh"),
        (GOOD.replace("</main>", '<img alt="A" src="/none.png"></main>'), "", "status of 404"),
    ],
)
def test_what_goes_wrong_on_a_page_is_told(
    page_at: PageAt, troubles: Troubles, html: str, script: str, what: str
) -> None:
    with site(html, script) as client:
        page_at(client)
        with pytest.raises(AssertionError, match=what):
            troubles.check()
        troubles.allow(what)
        troubles.check()


def test_a_request_to_another_origin_is_told(page_at: PageAt, troubles: Troubles) -> None:
    with site(GOOD.replace("</main>", '<img alt="A" src="http://127.0.0.1:9/a.png"></main>')) as client:
        page_at(client)
        with pytest.raises(AssertionError, match=r"request elsewhere: http://127\.0\.0\.1:9/a\.png"):
            troubles.check()
        troubles.allow("elsewhere|violates")


def test_what_was_allowed_has_to_happen() -> None:
    troubles = Troubles()
    troubles.allow("status of 422")
    with pytest.raises(AssertionError, match="did not happen"):
        troubles.check()


def test_axe_core_says_what_is_wrong_and_where(page_at: PageAt) -> None:
    with site(GOOD.replace("</main>", '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw="></main>')) as client:
        page = page_at(client, view=PHONE, scheme="dark")
        assert page.evaluate("[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [PHONE.width, True]
        with pytest.raises(AssertionError, match="image-alt"):
            axe(page)
