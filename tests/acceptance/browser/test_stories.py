"""What people come for, done in a browser from beginning to end, and no call made by hand."""

import csv
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from app.service import Service
from app.settings import Auth
from tests.acceptance.browser.accessibility import axe
from tests.acceptance.browser.conftest import PageAt, arrive
from tests.acceptance.browser.page_errors import Troubles
from tests.acceptance.browser.service_factory import DIGITS, ended, put_dataset, start_long_job, upload
from tests.conftest import Serve
from tests.support.deadlines import scaled
from tests.support.keys import ALL_OF_A_TENANT, make_key
from tests.support.service import DEADLINE_SECONDS

pytestmark = pytest.mark.slow

SLOWLY = scaled(DEADLINE_SECONDS * 1000)


@pytest.fixture
def training(serve: Serve) -> tuple[httpx.Client, Service]:
    """The bundled digits base, and a trainer."""
    return serve(base="digits", trainer=True)


@pytest.fixture
def digits(serve: Serve) -> httpx.Client:
    """The bundled digits base, without a trainer."""
    return serve(base="digits")[0]


def _drop(page: Page, name: str, content: str) -> None:
    """Let go of a file above the place for it."""
    dropped = page.evaluate_handle(
        """([name, content]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([content], name));
          return transfer;
        }""",
        [name, content],
    )
    for kind in ("dragenter", "dragover", "drop"):
        page.locator("[data-upload]").dispatch_event(kind, {"dataTransfer": dropped})


def _rows() -> tuple[list[list[float]], list[str]]:
    """The pixels and the digit of each row of the table."""
    with DIGITS.open() as file:
        rows = list(csv.DictReader(file))
    return [[float(row[f"pixel_{place}"]) for place in range(64)] for row in rows], [row["digit"] for row in rows]


def _labels(client: httpx.Client, adapter: str, rows: list[list[float]]) -> list[str]:
    """What the adapter calls these rows, as the API says."""
    answer = client.post("/predict", json={"adapter": adapter, "inputs": rows, "return": ["labels"]})
    return [str(label) for label in answer.raise_for_status().json()["labels"]]


def _draw_a_one(page: Page) -> None:
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    middle = box["x"] + box["width"] / 2
    page.mouse.move(middle, box["y"] + 4)
    page.mouse.down()
    page.mouse.move(middle, box["y"] + box["height"] - 4, steps=8)
    page.mouse.up()


def test_from_a_file_to_a_prediction(training: tuple[httpx.Client, Service], page_at: PageAt) -> None:
    client, _ = training
    page = page_at(client)
    expect(page.get_by_role("heading", name="First steps")).to_be_visible()
    _drop(page, "turned-digits.csv", DIGITS.read_text())
    expect(page.get_by_label("Name of the data set")).to_have_value("turned-digits")
    page.get_by_role("button", name="Upload").click()

    expect(page.get_by_role("heading", level=1)).to_have_text("turned-digits")
    expect(page.locator("#notice")).to_have_text("turned-digits was uploaded: 500 rows")
    expect(page.get_by_text("Every cell can be used for training.")).to_be_visible()
    expect(page.get_by_label("Inputs")).to_have_value('{"prefix": "pixel_"}')
    expect(page.get_by_label("Target")).to_have_value('{"column": "digit"}')
    page.get_by_label("Name of the adapter").fill("acme")
    page.get_by_role("button", name="Check").click()
    expect(page.locator("[data-estimate]")).to_contain_text(
        re.compile(r"\d+ rows are used for training, and \d+ are held out\.")
    )
    expect(page.locator("[data-estimate]")).to_contain_text("loss cross entropy")
    with page.expect_request("**/adapters") as request:
        page.get_by_role("button", name="Train", exact=True).click()
    body: Any = request.value.post_data_json
    assert body.keys() == {"name", "data"}
    assert body["data"].keys() == {"dataset", "inputs", "targets"}

    expect(page.get_by_role("heading", level=1)).to_have_text("Training of acme")
    expect(page.locator("#outcome .badge")).to_have_text("succeeded", timeout=2 * SLOWLY)
    expect(page.locator("[data-announce]")).to_have_text("The training has succeeded: acme, version 1")
    expect(page.locator("#notice")).to_be_empty()
    expect(page.locator("[data-caption]")).to_have_text("This training has no loss by step.")
    evaluation = page.get_by_role("group", name="Evaluation")
    expect(evaluation.get_by_role("columnheader", name="Accuracy")).to_be_visible()
    figures = (
        evaluation.get_by_role("row", name=model).get_by_role("cell").first for model in ("Adapter", "Base layer")
    )
    adapter, base = (float(figure.inner_text()) for figure in figures)
    assert adapter > 0.8 > 0.3 > base
    expect(page.get_by_role("group", name="Candidates").get_by_text("taken")).to_be_visible()
    page.get_by_role("link", name="Try it").last.click()

    arrive(page, "Try it")
    said = page.locator("[data-summary]")
    _draw_a_one(page)
    expect(said).to_contain_text("Base: 1")
    page.get_by_role("radio", name="A stored row").check()
    pixels, truth = _rows()
    numbers = range(3, 8)
    labels = _labels(client, "acme@1", [pixels[number] for number in numbers])
    for number, label in zip(numbers, labels, strict=True):
        page.get_by_label("Row", exact=True).fill(str(number))
        expect(page.locator("[data-other-columns]")).to_have_text(f"Label: {truth[number]}")
        expect(said).to_contain_text(f"acme@1: {label} (")
    assert sum(label == truth[number] for number, label in zip(numbers, labels, strict=True)) >= 4
    expect(page.get_by_role("table", name="acme")).to_be_visible()
    expect(page.get_by_role("table", name="Base layer")).to_be_visible()


def test_a_training_is_watched_as_it_goes_on_and_cancelled(
    training: tuple[httpx.Client, Service], page_at: PageAt
) -> None:
    client, _ = training
    job_id = start_long_job(client, "endless")
    page = page_at(client, f"/ui/jobs/{job_id}")
    expect(page.locator("#outcome .badge")).to_have_text("running", timeout=SLOWLY)
    curve = page.locator("[data-chart]")
    expect(curve).to_have_attribute("aria-label", re.compile(r"at step \d+"), timeout=SLOWLY)
    begun = curve.get_attribute("aria-label")
    expect(curve).not_to_have_attribute("aria-label", str(begun), timeout=SLOWLY)
    page.get_by_role("button", name="Cancel…").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Its progress is lost")
    dialog.get_by_role("button", name="Keep training").click()
    expect(dialog).not_to_be_visible()
    page.get_by_role("button", name="Cancel…").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel the training").click()
    expect(page.locator("#outcome .badge")).to_have_text("cancelled", timeout=SLOWLY)
    assert ended(client, job_id) == "cancelled"


def test_a_question_stays_open_while_the_job_goes_on_and_closes_with_its_end(serve: Serve, page_at: PageAt) -> None:
    client, service = serve(base="digits")
    job_id = start_long_job(client, "endless")
    page = page_at(client, f"/ui/jobs/{job_id}")
    badge, dialog = page.locator("#outcome .badge"), page.get_by_role("dialog")
    expect(page.locator("[data-announce]")).to_have_text("The training is queued")
    page.get_by_role("button", name="Cancel…").click()
    claim = service.queue.claim(base=service.base.fingerprint)
    assert claim is not None
    expect(badge).to_have_text("running")
    expect(dialog).to_be_visible()
    service.queue.fail(claim, {"code": "diverged", "title": "Diverged", "detail": "loss is infinite"})
    expect(badge).to_have_text("failed")
    expect(dialog).not_to_be_visible()
    expect(page.locator("[data-announce]")).to_have_text("The training has failed")


def test_versions_are_rolled_back_and_an_adapter_deleted_once_that_is_confirmed(
    digits: httpx.Client, page_at: PageAt
) -> None:
    upload(digits, "acme")
    digits.put("/adapters/acme", json={"A": [[1.0]] * 10, "B": [[0.02] * 64]}).raise_for_status()
    page = page_at(digits, "/ui/adapters/acme")
    expect(page.get_by_text("Live version: 2.")).to_be_visible()
    page.get_by_role("button", name="Roll back to this version").click()
    expect(page.locator("#notice")).to_have_text("Version 1 of acme is live")
    assert digits.get("/adapters/acme").json()["aliases"] == {"live": 1}
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Download version 2").click()
    assert downloading.value.suggested_filename == "acme-2.zip"
    page.get_by_role("button", name="Make this version live").click()
    expect(page.locator("#notice")).to_have_text("Version 2 of acme is live")
    expect(page.get_by_text("Live version: 2.")).to_be_visible()
    page.get_by_role("button", name="Delete…").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This deletes all 2 versions")
    dialog.get_by_role("button", name="Delete it").click()
    expect(page.locator("#notice")).to_have_text("acme was deleted")
    assert digits.get("/adapters/acme").status_code == 404


def test_what_has_changed_meanwhile_is_not_deleted_by_mistake(
    digits: httpx.Client, page_at: PageAt, troubles: Troubles
) -> None:
    upload(digits, "acme")
    page = page_at(digits, "/ui/adapters/acme")
    digits.put("/adapters/acme", json={"A": [[1.0]] * 10, "B": [[0.02] * 64]}).raise_for_status()
    page.get_by_role("button", name="Delete…").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete it").click()
    troubles.allow("status of 412")
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("changed since the page was loaded")
    assert digits.get("/adapters/acme").json()["versions"] == 2


def test_a_refusal_is_shown_beside_the_form_and_its_field_marked(
    digits: httpx.Client, page_at: PageAt, troubles: Troubles
) -> None:
    put_dataset(digits, "turned-digits", DIGITS.read_bytes())
    page = page_at(digits, "/ui/datasets/turned-digits")
    name = page.get_by_label("Name of the adapter")
    name.fill("not a name")
    page.get_by_role("button", name="Train", exact=True).click()
    troubles.allow("status of 422")
    expect(page.get_by_role("alert")).to_have_text(
        "Name of the adapter must be 1 to 128 characters of A-Z a-z 0-9 . _ -, the first a letter or digit."
    )
    expect(name).to_have_attribute("aria-invalid", "true")
    expect(name).to_be_focused()
    name.fill("acme")
    page.get_by_text("More settings").click()
    page.get_by_label("Epochs").fill("many")
    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.get_by_label("Epochs")).to_be_focused()
    expect(page.get_by_role("alert")).to_have_text("Epochs must be a whole number, or auto.")
    expect(name).not_to_have_attribute("aria-invalid", "true")
    page.get_by_label("Epochs").fill("0")
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("Epochs: input should be greater than or equal to 1")
    page.get_by_label("Epochs").fill("")
    page.get_by_label("Inputs").select_option(label="Other columns …")
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("Columns must not be empty.")
    expect(page.get_by_role("textbox", name="Columns")).to_be_focused()


def test_an_upload_on_its_way_can_be_cancelled(digits: httpx.Client, page_at: PageAt, troubles: Troubles) -> None:
    page = page_at(digits, "/ui/datasets")
    page.route("**/datasets/*", lambda _route: None)
    _drop(page, "Some Table (2).csv", "a,b\n1,2\n")
    expect(page.get_by_label("Name of the data set")).to_have_value("Some-Table-2-")
    page.get_by_role("button", name="Upload").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("[data-status]")).to_have_text("Cancelled. Nothing was stored")
    page.unroute_all()
    _drop(page, "slides.pdf", "")
    expect(page.get_by_role("alert")).to_contain_text("the name must end in .csv")
    _drop(page, "bad.csv", "a,b\n1\n")
    page.get_by_role("button", name="Upload").click()
    troubles.allow("status of 422")
    expect(page.get_by_role("alert")).to_contain_text("Row 0")
    assert digits.get("/datasets").json()["data"] == []


def test_numbers_are_pasted_in_any_usual_form_and_counted(digits: httpx.Client, page_at: PageAt) -> None:
    upload(digits, "acme")
    page = page_at(digits, "/ui/try?adapter=acme")
    page.get_by_role("radio", name="Paste").check()
    numbers, said, alert = page.locator("#numbers"), page.locator("[data-summary]"), page.get_by_role("alert")
    rows, _ = _rows()
    one_of_each = dict(zip(_labels(digits, "acme", rows), rows, strict=True))
    forms: list[Callable[[list[float]], str]] = [
        lambda row: ", ".join(map(str, row)),
        lambda row: " ".join(map(str, row)),
        str,
        lambda row: f"[{row}]",
    ]
    assert len(one_of_each) >= len(forms)
    for written, (label, row) in zip(forms, one_of_each.items(), strict=False):
        numbers.fill(written(row))
        expect(said).to_contain_text(f"acme: {label} (")
        expect(alert).to_be_empty()
        numbers.fill("3 3")
        expect(alert).to_have_text("There are 2 numbers, and the layer takes 64.")
    for text, wrong in (("3 three", '"three"'), ('["3", 3]', '"3"')):
        numbers.fill(text)
        expect(alert).to_have_text(f"{wrong} is not a number.")
    page.get_by_role("radio", name="Outputs").check()
    expect(page.get_by_role("table", name="acme").get_by_role("columnheader", name="Value")).to_be_visible()


def test_a_stored_row_that_comes_late_does_not_undo_a_drawing(digits: httpx.Client, page_at: PageAt) -> None:
    put_dataset(digits, "turned-digits", DIGITS.read_bytes())
    page = page_at(digits, "/ui/try")
    held: list[Route] = []
    page.route("**/ui/try/row?*", lambda route: held.append(route))
    with page.expect_request("**/ui/try/row?*"):
        page.get_by_role("radio", name="A stored row").check()
    # Nothing is asked by itself from here on: the row comes while the view still waits for the drawing to rest.
    page.evaluate("window.setTimeout = () => 0")
    _draw_a_one(page)
    drawing = str(page.locator("#canvas").get_attribute("aria-label"))
    with page.expect_response("**/ui/try/row?*") as late:
        held[0].continue_()
    late.value.finished()
    with page.expect_request("**/predict") as asked:
        page.get_by_role("button", name="Compare").click()
    expect(page.locator("#canvas")).to_have_attribute("aria-label", drawing)
    expect(page.locator("[data-other-columns]")).to_be_empty()
    body: Any = asked.value.post_data_json
    (drawn,) = body["inputs"]
    assert f"{sum(map(bool, drawn))} of them filled" in drawing


def test_what_could_not_be_had_is_told_until_it_can_be_had_again(
    digits: httpx.Client, page_at: PageAt, troubles: Troubles
) -> None:
    upload(digits, "acme", "globex")
    page = page_at(digits, "/ui/adapters/acme")
    page.get_by_role("button", name="Delete…").click()
    page.get_by_role("button", name="Delete it").click()
    notice, status, prefix = page.locator("#notice"), page.locator("#status"), page.get_by_label("Name begins with")
    expect(notice).to_have_text("acme was deleted")
    prefix.fill("g")
    expect(status).to_have_text("1 adapter beginning with “g”")
    expect(notice).to_have_text("acme was deleted")
    for pattern in ("ERR_FAILED|htmx:", "status of 503|Status Error Code 503"):
        troubles.allow(pattern)
    refusals: list[tuple[Callable[[Route], None], str]] = [
        (lambda route: route.abort(), "The service cannot be reached. Is it running?"),
        (lambda route: route.fulfill(status=503), "The page could not be refreshed (status 503)."),
    ]
    for refuse, said in refusals:
        page.route("**/ui/adapters?prefix=*", refuse)
        prefix.fill("acme")
        expect(notice).to_have_text(said)
        page.unroute_all()
        prefix.fill("globex")
        expect(notice).to_be_empty()
        expect(status).to_have_text("1 adapter beginning with “globex”")


def test_adapters_are_added_and_taken_away_and_the_address_keeps_them(digits: httpx.Client, page_at: PageAt) -> None:
    upload(digits, "acme", "globex", *(f"tenant-{number:02}" for number in range(20)))
    page = page_at(digits, "/ui/try")
    page.get_by_role("button", name="Load a sample 7").click()
    page.get_by_label("Add an adapter").fill("tenant-1")
    page.get_by_role("button", name="Add tenant-13").click()
    expect(page.get_by_role("table", name="tenant-13")).to_be_visible()
    expect(page).to_have_url(re.compile(r"\?adapter=acme&adapter=tenant-13$"))
    page.get_by_role("button", name="Remove acme").click()
    expect(page.get_by_role("table")).to_have_count(2)
    page.reload()
    expect(page.get_by_role("button", name="Remove tenant-13")).to_be_visible()


def test_the_keyboard_is_enough(digits: httpx.Client, page_at: PageAt) -> None:
    upload(digits, "acme", "globex")
    page = page_at(digits, "/ui/adapters")
    keys = page.keyboard
    focused = page.locator("*:focus")
    keys.press("Tab")
    expect(focused).to_have_text("Skip to the content")
    keys.press("Enter")
    keys.press("Tab")
    expect(focused).to_have_attribute("name", "prefix")
    keys.type("glo")
    expect(page.locator("#status")).to_have_text("1 adapter beginning with “glo”")
    expect(page.locator("#results tbody tr")).to_have_count(1)
    _tab_to(page, "globex")
    keys.press("Enter")
    arrive(page, "globex")
    _tab_to(page, "Delete…")
    keys.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    keys.press("Escape")
    expect(focused).to_have_text("Delete…")
    keys.press("Enter")
    _tab_to(page, "Delete it")
    keys.press("Enter")
    expect(page.locator("#notice")).to_have_text("globex was deleted")

    _tab_to(page, "Try it")
    keys.press("Enter")
    arrive(page, "Try it")
    page.locator("#source-draw").focus()
    keys.press("Tab")
    expect(focused).to_have_attribute("id", "canvas")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", *(["Space", "ArrowDown"] * 7), "Space"):
        keys.press(key)
    expect(page.locator("[data-cell]")).to_have_text("Row 8, column 4: 16 of 16")
    expect(page.locator("#canvas")).to_have_attribute("aria-label", "Drawing of 8 by 8 cells, 8 of them filled")
    drawn = [16.0 if column == 3 else 0.0 for _ in range(8) for column in range(8)]
    outputs = digits.post("/predict", json={"adapter": None, "inputs": [drawn]}).json()["outputs"][0]
    expect(page.locator("[data-summary]")).to_contain_text(f"Base: {outputs.index(max(outputs))} (")


def _tab_to(page: Page, text: str) -> None:
    """Press Tab until what has the focus says `text`."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()") == text:
            return
    raise AssertionError(f"{text} cannot be reached")


def test_the_name_of_a_data_set_stays_as_it_is_written(
    digits: httpx.Client, page_at: PageAt, troubles: Troubles
) -> None:
    put_dataset(digits, "diabetes", b"age,bmi\n1,2\n")
    page = page_at(digits, "/ui/try")
    page.get_by_role("radio", name="A stored row").check()
    troubles.allow("status of 422")
    expect(page.get_by_role("alert")).to_have_text(
        "The data set diabetes has no columns that give 64 numbers per row; paste them instead."
    )
    page.goto("/ui/datasets")
    _drop(page, "diabetes.pdf", "")
    expect(page.get_by_role("alert")).to_contain_text("diabetes.pdf has an unknown file type")


def test_the_id_of_a_job_is_there_to_be_used(digits: httpx.Client, page_at: PageAt) -> None:
    job_id = start_long_job(digits, "endless")
    page = page_at(digits, "/ui/jobs")
    shown = page.locator("#results code").first
    expect(shown).to_have_text(job_id[:10])
    expect(shown).to_have_attribute("title", job_id)
    page.goto(f"/ui/jobs/{job_id}")
    expect(page.get_by_text(f"Job {job_id}")).to_be_visible()


def test_a_user_signs_in_with_a_key_and_the_session_ends_with_it(
    serve: Serve, page_at: PageAt, troubles: Troubles
) -> None:
    troubles.allow("status of 401")
    client, service = serve(base="digits", auth=Auth.KEYS)
    key = make_key(service.keys, "acme", *ALL_OF_A_TENANT)
    page = page_at(client, "/ui/datasets")
    arrive(page, "Sign in")
    page.get_by_label("Key").fill(key.text[:-1])
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("not a key of the form lpx_")
    axe(page)
    page.get_by_label("Key").fill(key.text)
    page.get_by_role("button", name="Sign in").click()
    arrive(page, "Data sets")
    cookies = {cookie["name"]: cookie for cookie in page.context.cookies()}
    assert (cookies["loraplex_session"]["httpOnly"], cookies["loraplex_session"]["sameSite"]) == (True, "Strict")
    kept = str(page.evaluate("document.cookie + JSON.stringify({...localStorage, ...sessionStorage})"))
    assert not [secret for secret in ("lpx_", cookies["loraplex_session"]["value"]) if secret in kept]
    page.set_viewport_size({"width": 360, "height": 780})
    axe(page)
    page.get_by_role("button", name="Sign out").click()
    arrive(page, "Sign in")
    page.goto("/ui/datasets")
    arrive(page, "Sign in")
    page.get_by_label("Key").fill(key.text)
    page.get_by_role("button", name="Sign in").click()
    arrive(page, "Data sets")
    service.keys.revoke(key.key.id, tenant=None, by_operator=True)
    page.get_by_role("link", name="Jobs", exact=True).click()
    arrive(page, "Sign in")
    expect(page.get_by_role("alert")).to_contain_text(f"The key {key.key.id} was revoked")


def test_the_usage_of_a_tenant_is_shown_by_adapter_and_by_key(serve: Serve, page_at: PageAt) -> None:
    client, service = serve(base="digits")
    upload(client, "acme")
    for adapter in ("acme", "acme", None):
        client.post("/predict", json={"adapter": adapter, "inputs": [[0.0] * 64] * 7}).raise_for_status()
    service.observer.close()
    page = page_at(client)
    page.get_by_role("link", name="Usage", exact=True).click()
    arrive(page, "Usage")
    figures = page.get_by_role("region", name="Figures")
    expect(figures).to_have_text(re.compile(r"3\s+requests\s+21\s+rows"))
    expect(page.get_by_role("row", name="acme 2 14")).to_be_visible()
    expect(page.get_by_role("row", name="base layer 1 7")).to_be_visible()
    page.get_by_label("By", exact=True).select_option("key")
    expect(page.get_by_role("row", name="without a key 3 21")).to_be_visible()
    expect(page).to_have_url(re.compile(r"/ui/usage\?by=key$"))
    page.get_by_text("Figures of each hour").click()
    axe(page)
