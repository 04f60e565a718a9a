"""Every view as people find it: axe-core has nothing to say in light or dark, wide or narrow; nothing sticks out."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from app.service import Service
from tests.acceptance.browser.accessibility import axe, axe_contrast
from tests.acceptance.browser.conftest import PageAt, arrive
from tests.acceptance.browser.page_errors import Troubles
from tests.acceptance.browser.service_factory import LONG_NAME, filled, upload
from tests.acceptance.browser.viewports import SCHEMES, View
from tests.conftest import Serve
from tests.support.service import eventually

pytestmark = pytest.mark.slow

NARROW = View(360, 780)
WIDE = View(1280, 900)
PICTURES = Path(__file__).parents[3] / "docs" / "screenshots"
MOST_BYTES = 150_000
ON_A_PHONE = ("overview", "adapter", "try")
"""What there is a narrow picture of."""
VIEWS = {
    "overview": "/",
    "adapters": "/ui/adapters",
    "adapter": "/ui/adapters/acme",
    "jobs": "/ui/jobs",
    "job": "/ui/jobs/{acme}",
    "fleet": "/ui/jobs/{fleet}",
    "failed-job": "/ui/jobs/{broken}",
    "datasets": "/ui/datasets",
    "dataset": "/ui/datasets/turned-digits",
    "bad-rows": "/ui/datasets/people",
    "try": "/ui/try?adapter=acme",
    "usage": "/ui/usage",
    "audit": "/ui/audit",
}
FIRST = "first-steps"
SHOWN = {name for name in VIEWS if name not in ("fleet", "failed-job", "bad-rows")}

PICTURED = bool(os.environ.get("SCREENSHOTS"))
"""Whether pictures are taken: `make screenshots`."""

Running = tuple[httpx.Client, Service]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with filled(tmp_path_factory.mktemp("views")) as both:
        yield both


def _address(client: httpx.Client, path: str) -> str:
    jobs = client.get("/jobs").json()["data"]
    named = {job["adapter"]: job["id"] for job in reversed(jobs)}
    return path.format(acme=named["acme"], fleet=named["team-{digit}"], broken=named["broken"])


def _settle(page: Page, name: str, client: httpx.Client) -> None:
    """Let what scripts add be there."""
    if name == "overview" and PICTURED:
        _traffic(page, client)
    if name == "usage" and PICTURED:
        _used(page, client)
    if name == "try":
        page.get_by_role("radio", name="A stored row").check()
        page.get_by_label("Data set").select_option("turned-digits")
        page.get_by_label("Row", exact=True).fill("3")
        expect(page.locator("[data-other-columns]")).to_have_text("Label: 3")
        expect(page.locator("[data-summary]")).to_contain_text("Base: 2 (")
    if name == "job":
        expect(page.get_by_role("heading", name="What auto compared")).to_be_visible()
        expect(page.locator("[data-caption]")).to_have_text("This training has no loss by step.")
    if name == "failed-job":
        expect(page.locator("[data-caption]")).to_contain_text("Loss on the batch of each step")


def _traffic(page: Page, client: httpx.Client) -> None:
    """Ask for predictions until a curve can be seen."""
    sizes = iter(range(1, 10_000))

    def enough() -> bool:
        client.post("/predict", json={"adapter": "acme", "inputs": [[0] * 64] * (1 + next(sizes) % 40)})
        return int(page.locator("#traffic").get_attribute("data-samples") or 0) >= 8

    eventually(enough, what="a curve")


def _used(page: Page, client: httpx.Client) -> None:
    """Ask for predictions of several adapters, and show the page once they are counted."""
    for number in range(12):
        body = {"adapter": f"tenant-{number:03}", "inputs": [[0] * 64] * (3 * number + 1)}
        client.post("/predict", json=body).raise_for_status()
    eventually(lambda: len(client.get("/usage?by=adapter").json()["data"]) >= 12, what="the usage")
    page.reload()


def _sticks_out(page: Page) -> int:
    width: int = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return width


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_can_be_used_by_everyone_in_light_and_dark_wide_and_narrow(
    page_at: PageAt, running: Running, name: str
) -> None:
    client, _ = running
    page = page_at(client, _address(client, VIEWS[name]), view=WIDE)
    _settle(page, name, client)
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        for view in (WIDE, NARROW):
            page.set_viewport_size({"width": view.width, "height": view.height})
            # Colours depend on the scheme, and all else on the width: each is in one of the two pairs.
            if (scheme == "light") == (view == WIDE):
                axe(page)
            else:
                axe_contrast(page)
            assert _sticks_out(page) <= 0, view
            if PICTURED and name in SHOWN:
                _picture(page, name, scheme, view)


def _picture(page: Page, name: str, scheme: str, view: View) -> None:
    if view == NARROW and name not in ON_A_PHONE:
        return
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.evaluate("scrollTo(0, 0)")
    path = PICTURES / f"{name}-{scheme}{'-phone' if view == NARROW else ''}.png"
    page.screenshot(path=path)
    assert path.stat().st_size < MOST_BYTES, path


def test_an_empty_service_says_what_to_do(serve: Serve, page_at: PageAt) -> None:
    client, _ = serve(base="digits")
    page = page_at(client, view=WIDE)
    expect(page.get_by_role("heading", name="First steps")).to_be_visible()
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        axe(page)
        if PICTURED:
            _picture(page, FIRST, scheme, WIDE)
    for path in ("/ui/adapters", "/ui/jobs", "/ui/datasets", "/ui/try"):
        page.goto(path)
        axe(page)
        expect(page.locator(".empty:visible").first).to_be_visible()


def test_the_pictures_that_are_kept_are_of_today_s_views() -> None:
    wide = {f"{name}-{scheme}.png" for name in {*SHOWN, FIRST} for scheme in SCHEMES}
    narrow = {f"{name}-{scheme}-phone.png" for name in ON_A_PHONE for scheme in SCHEMES}
    assert {path.name for path in PICTURES.glob("*.png")} == wide | narrow, "make screenshots; remove those of no view"


def test_an_open_dialog_and_an_open_menu_have_no_faults_either(page_at: PageAt, running: Running) -> None:
    page = page_at(running[0], "/ui/adapters/acme")
    page.get_by_role("button", name="Delete…").click()
    expect(page.get_by_role("dialog")).to_contain_text("2 versions")
    axe(page)
    page = page_at(running[0], "/ui/datasets/turned-digits", scheme="dark", view=NARROW)
    page.get_by_text("More settings").click()
    axe(page)
    assert _sticks_out(page) <= 0


def test_what_is_not_there_is_a_page(page_at: PageAt, running: Running, troubles: Troubles) -> None:
    page = page_at(running[0], "/ui/adapters/nobody")
    troubles.allow("status of 404")
    expect(page.get_by_role("heading", level=1)).to_have_text("There is no adapter of that name")
    axe(page)
    page.get_by_role("link", name="Adapters").first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Adapters")


def test_adapters_are_found_as_the_name_is_typed_and_pages_go_on(page_at: PageAt, running: Running) -> None:
    page = page_at(running[0], "/ui/adapters")
    rows = page.locator("#results tbody tr")
    expect(rows).to_have_count(25)
    page.get_by_role("link", name="Next page").click()
    expect(page.get_by_role("link", name="tenant-029")).to_be_visible()
    expect(page).to_have_url(re.compile("cursor="))
    page.get_by_label("Name begins with").press_sequentially("tenant-00")
    expect(rows).to_have_count(10)
    expect(page.get_by_role("status").filter(has_text="10 adapters")).to_be_visible()
    expect(page).to_have_url(re.compile("prefix=tenant-00$"))
    page.reload()
    expect(rows).to_have_count(10)
    page.get_by_label("Name begins with").fill("no-such")
    expect(page.get_by_text("Names are case-sensitive")).to_be_visible()


def test_jobs_are_filtered_by_status_and_adapter(page_at: PageAt, running: Running) -> None:
    page = page_at(running[0], "/ui/jobs")
    rows = page.locator("#results tbody tr")
    expect(rows).to_have_count(4)
    page.get_by_label("Status").select_option("failed")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("diverged")
    page.get_by_label("Status").select_option("")
    expect(rows).to_have_count(4)
    page.get_by_label("Adapter").fill("team-3")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("team-{digit}")


def test_the_curve_of_the_traffic_moves_with_predictions(page_at: PageAt, running: Running) -> None:
    client, _ = running
    page = page_at(client)
    rate, latency = page.locator("[data-rate]"), page.locator("[data-latency]")
    expect(rate).to_have_text("0")

    def moves() -> bool:
        client.post("/predict", json={"adapter": "acme", "inputs": [[0] * 64] * 50}).raise_for_status()
        return rate.inner_text() != "0" and "ms" in latency.inner_text()

    eventually(moves, what="a look at the predictions")


def test_a_long_name_wraps_and_can_be_followed(page_at: PageAt, running: Running) -> None:
    page = page_at(running[0], f"/ui/adapters?prefix={LONG_NAME[:9]}", view=NARROW)
    page.get_by_role("link", name=LONG_NAME).click()
    arrive(page, LONG_NAME)
    assert _sticks_out(page) <= 0


@pytest.mark.parametrize("path", ["adapters?prefix=", "datasets?prefix=", "jobs?adapter=", "try?prefix="])
def test_words_without_a_break_that_are_looked_for_do_not_stick_out(
    page_at: PageAt, running: Running, path: str
) -> None:
    page = page_at(running[0], f"/ui/{path}{'a' * 128}", view=NARROW)
    expect(page.get_by_text("a" * 128).first).to_be_visible()
    assert _sticks_out(page) <= 0


def test_an_answer_of_a_name_without_a_break_does_not_stick_out(page_at: PageAt, running: Running) -> None:
    name = "w" * 128
    upload(running[0], name)
    try:
        page = page_at(running[0], f"/ui/try?adapter={name}", view=NARROW)
        page.get_by_role("button", name="Load a sample 3").click()
        expect(page.locator("[data-summary]")).to_contain_text(name)
        assert _sticks_out(page) <= 0
    finally:
        running[0].delete(f"/adapters/{name}").raise_for_status()
