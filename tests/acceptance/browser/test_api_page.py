"""The page of the API: Swagger UI from our own files."""

import re

import pytest
from playwright.sync_api import expect

from app.http.errors import STATUS
from app.openapi.document import TAGS
from tests.acceptance.browser.accessibility import axe
from tests.acceptance.browser.conftest import PageAt
from tests.acceptance.browser.viewports import DESKTOP, PHONE, Scheme, View
from tests.conftest import Serve

pytestmark = pytest.mark.slow

SWAGGER_UI_S_OWN = (
    *("heading-order", "nested-interactive"),
    *("landmark-main-is-top-level", "landmark-no-duplicate-main", "landmark-unique"),
)
"""Rules that its markup does not keep. Colours are ours."""


@pytest.mark.parametrize(("view", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_the_page_lists_every_operation_and_every_code(
    serve: Serve, page_at: PageAt, view: View, scheme: Scheme
) -> None:
    client, _ = serve()
    document = client.get("/openapi.json").json()
    page = page_at(client, "/docs", view=view, scheme=scheme)
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    expect(page.locator(".opblock")).to_have_count(len(operations))
    expect(page.locator(".opblock-tag")).to_have_count(len(TAGS))
    shown = {
        block["id"].rpartition("-")[2]: block["text"]
        for block in page.locator(".opblock").evaluate_all("all => all.map(one => ({id: one.id, text: one.innerText}))")
    }
    for operation in operations:
        assert operation["summary"] in shown[operation["operationId"]]
    expect(page.locator(".info tbody tr")).to_have_count(len(STATUS))
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in re.findall(r"\d+", background)[:3]) > 3 * 128
    assert light is (scheme == "light")
    axe(page, without=SWAGGER_UI_S_OWN)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"


def test_a_call_can_be_tried_out_on_the_page(serve: Serve, page_at: PageAt) -> None:
    client, _ = serve()
    page = page_at(client, "/docs")
    block = page.locator("#operations-base-show_base")
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    block.get_by_role("button", name="Execute").click()
    answer = block.locator(".live-responses-table .response")
    expect(answer.locator(".response-col_status")).to_contain_text("200")
    expect(answer).to_contain_text(client.get("/base").json()["fingerprint"])
