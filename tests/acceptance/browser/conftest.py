"""A real browser, headless Chromium through Playwright, for the pages.

On a laptop: install Chromium or Chrome (Debian: `apt-get install chromium`; any that is on the PATH as chromium,
chromium-browser, google-chrome or google-chrome-stable), then `.venv/bin/python -m pytest tests/acceptance/browser`.
Without one these tests are skipped, unless the environment has `TESTS_NEED_ALL`. `HEADED=1` shows the window,
each step slowly.

Playwright's own loop runs in the thread of the tests while the browser is open, so `asyncio.run` fails there: a service
runs in threads of its own (`serve`), and the browser is closed before the tests of the next folder.

A page's scripts run after its markup is there to be seen, and before its load event. `goto` and `reload` wait for that;
after a link, or a script that moves on, a test that goes on to type or click waits itself: `arrive`, or the notice.
"""

import os
from collections.abc import Callable, Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.acceptance.browser.page_errors import Troubles
from tests.acceptance.browser.viewports import DESKTOP, Scheme, View
from tests.support.deadlines import scaled
from tests.support.external_programs import program

PageAt = Callable[..., Page]
"""`page_at(client, path, view=DESKTOP, scheme="light")`"""
_MILLISECONDS = scaled(15_000)
REBOUND_HOST = "rebound.test"
"""A name that the browser resolves to loopback, as after DNS rebinding."""
_QUIET = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--host-resolver-rules=MAP {REBOUND_HOST} 127.0.0.1",
)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests of the pages; each test has a profile of its own in it."""
    chromium = program("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    # Root, in a container, may not make the sandbox.
    arguments = [*_QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    headed = bool(os.environ.get("HEADED"))
    expect.set_options(timeout=_MILLISECONDS)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium, args=arguments, headless=not headed, slow_mo=200 if headed else 0
        )
        yield launched
        launched.close()


def arrive(page: Page, heading: str) -> None:
    """Wait for the page under this heading, and for its scripts."""
    expect(page.get_by_role("heading", level=1)).to_have_text(heading)
    page.wait_for_load_state()


@pytest.fixture
def troubles() -> Troubles:
    """What goes wrong on the test's pages; what is meant to can be allowed: `troubles.allow("status of 422")`."""
    return Troubles()


@pytest.fixture
def page_at(browser: Browser, troubles: Troubles) -> Iterator[PageAt]:
    """Opens a page of a service; when the test ends, nothing may have gone wrong on any."""
    contexts = []

    def opened(client: httpx.Client, path: str = "/", *, view: View = DESKTOP, scheme: Scheme = "light") -> Page:
        origin = str(client.base_url).rstrip("/")
        context = browser.new_context(
            base_url=origin,
            viewport={"width": view.width, "height": view.height},
            color_scheme=scheme,
            reduced_motion="reduce",
            locale="en-GB",
            timezone_id="UTC",
        )
        contexts.append(context)
        context.set_default_timeout(_MILLISECONDS)
        troubles.watch(context, origin)
        page = context.new_page()
        page.goto(path)
        return page

    yield opened
    for context in contexts:
        context.close()
    troubles.check()
