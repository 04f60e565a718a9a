"""The pages as HTML: their policy, their errors, their escaping, and that they are no part of the API."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from adapters.catalog.catalog import Catalog
from adapters.catalog.counts import CatalogCounts, count_catalog
from adapters.catalog.versions import Publication, Source
from app.observability.metrics import exposition as figures_of_the_catalogue
from app.service import Service
from app.settings import Settings
from app.web.pages import rendering
from tests.conftest import Serve
from tests.support.catalog_factories import submit, training_job
from tests.support.dense_oracle import random_adapter
from tests.support.html_markup import Markup
from tests.support.service import eventually, serving

PATHS = (
    "/",
    "/ui/adapters",
    "/ui/adapters/acme",
    "/ui/jobs",
    "/ui/jobs/j",
    "/ui/datasets",
    "/ui/datasets/t",
    "/ui/try",
)
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "form-action": "'self'",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
}
HOSTILE = "<script>alert(1)</script>\"'&"
VENDORED = {
    "htmx/htmx.min.js": "d6fdc75f204e6bdefa99b69bf1e6d4ac69b8a364f77929f45c13476b4000f717",
    "uplot/uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uplot/uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}
"""As published: htmx.org 2.0.11, uplot 1.6.32."""

Running = tuple[httpx.Client, Service]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(base="random:10,2,42", data_dir=tmp_path_factory.mktemp("pages") / "data")
    with serving(settings) as (client, service):
        factors = {"A": [[1], [1]], "B": [[1] * 10], "labels": [HOSTILE, "plain"]}
        client.put("/adapters/acme", json=factors).raise_for_status()
        table = f'"{HOSTILE.replace(chr(34), chr(34) * 2)}",label\n' + "1,a\n,b\n"
        client.put("/datasets/t", content=table, headers={"Content-Type": "text/csv"}).raise_for_status()
        submit(service.queue, "j", training=training_job(rank=1, note=HOSTILE))
        service.queue.cancel("j", tenant="default")
        yield client, service


@pytest.fixture
def pages(running: Running) -> httpx.Client:
    return running[0]


@pytest.mark.parametrize("path", [*PATHS, "/ui/adapters/nobody", "/ui/nothing"])
def test_every_page_comes_under_a_strict_policy_and_keeps_to_it(pages: httpx.Client, path: str) -> None:
    answer = pages.get(path)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    told = [part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";")]
    assert dict(told) == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    page = Markup(answer.text)
    for tag, given in page.elements:
        assert not [name for name in given if name.startswith("on") or name == "style"], (tag, given)
        assert tag != "script" or given["src"]
    for address in page.addresses():
        assert urlsplit(address)[:2] == ("", ""), address


@pytest.mark.parametrize("path", PATHS)
def test_what_a_page_loads_and_links_to_is_there(pages: httpx.Client, path: str) -> None:
    for address in set(Markup(pages.get(path).text).addresses()):
        if not address.startswith(("#", "/docs")):
            status = pages.get(address).status_code
            # What only a write makes or removes answers to other methods.
            assert status in (200, 405), address


@pytest.mark.parametrize("path", [*PATHS, "/ui/adapters/nobody", "/static/favicon.svg"])
def test_a_head_is_answered_as_a_get_without_its_body(pages: httpx.Client, path: str) -> None:
    head, get = pages.head(path), pages.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_names_and_texts_of_others_are_text_on_every_page(pages: httpx.Client) -> None:
    for path in ("/ui/adapters/acme", "/ui/datasets/t", "/ui/jobs/j"):
        html = pages.get(path).text
        assert HOSTILE not in html
        assert HOSTILE in Markup(html).text, path
    for query in ("prefix", "cursor", "status", "adapter", "offset"):
        for path in ("/ui/adapters", "/ui/jobs", "/ui/datasets", "/ui/datasets/t", "/ui/try"):
            answer = pages.get(path, params={query: HOSTILE})
            assert answer.status_code in (200, 422)
            assert "<script>alert" not in answer.text


@pytest.mark.parametrize(
    ("path", "status", "title"),
    [
        ("/ui/adapters/nobody", 404, "There is no adapter of that name"),
        ("/ui/adapters/%3Cb%3E", 422, None),
        ("/ui/jobs/nothing", 404, None),
        ("/ui/datasets/none", 404, None),
        ("/ui/nothing/at/all", 404, None),
        ("/ui/adapters?cursor=made-up", 422, None),
        ("/ui/datasets/t?offset=x", 422, None),
        ("/ui/try?adapter=a@@", 422, None),
    ],
)
def test_an_error_is_a_page_with_ways_on(pages: httpx.Client, path: str, status: int, title: str | None) -> None:
    answer = pages.get(path)
    assert answer.status_code == status
    page = Markup(answer.text)
    assert title is None or title in page.text
    assert "/ui/adapters" in page.addresses()


def test_the_api_keeps_its_problems_its_paths_and_its_description(pages: httpx.Client) -> None:
    assert pages.get("/nothing").json()["code"] == "route_not_found"
    assert pages.get("/adapters/nobody").json()["code"] == "adapter_not_found"
    assert pages.post("/").json()["code"] == "method_not_allowed"
    assert pages.get("/adapters").json()["data"][0]["name"] == "acme"
    described = pages.get("/openapi.json").json()["paths"]
    assert not [path for path in described if path == "/" or path.startswith(("/ui", "/static"))]


def test_a_script_gets_the_part_that_it_asks_for_and_going_back_gets_the_page(pages: httpx.Client) -> None:
    part = pages.get("/ui/adapters", headers={"HX-Request": "true"})
    assert "<!doctype" not in part.text
    assert 'hx-swap-oob="innerHTML"' in part.text
    assert part.headers["vary"] == "HX-Request"
    back = pages.get("/ui/adapters", headers={"HX-Request": "true", "HX-History-Restore-Request": "true"})
    assert back.text.startswith("<!doctype html>")


def test_files_are_kept_for_good_under_the_name_of_their_content(pages: httpx.Client) -> None:
    address = rendering.static_url("css/base.css")
    kept = pages.get(address)
    assert kept.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert kept.headers["x-content-type-options"] == "nosniff"
    assert kept.headers["content-type"].startswith("text/css")
    plain = pages.get("/static/css/base.css")
    assert plain.content == kept.content
    assert plain.headers["cache-control"] == "no-cache"
    again = pages.get("/static/css/base.css", headers={"If-None-Match": plain.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    script = pages.get(rendering.static_url("js/main.js")).headers["content-type"]
    assert re.match("(text|application)/javascript", script)


@pytest.mark.parametrize(
    "path", ["nothing.js", "../settings.py", "..%2fsettings.py", "%2e%2e/main.py", "v-0/css/base.css", ""]
)
def test_no_other_file_is_given_away(pages: httpx.Client, path: str) -> None:
    answer = pages.get(f"/static/{path}")
    assert answer.status_code == 404
    assert answer.json()["code"] == "route_not_found"


def test_what_others_wrote_is_as_they_published_it_and_has_its_licence() -> None:
    vendor = rendering.STATIC_FOLDER / "vendor"
    for name, digest in VENDORED.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest, name
        assert (vendor / name).with_name("LICENSE").read_text().strip()


def test_our_scripts_are_small() -> None:
    for path in (rendering.STATIC_FOLDER / "js").glob("*.js"):
        assert len(path.read_text().splitlines()) <= 150, path


def test_thousands_of_adapters_are_listed_a_page_at_a_time(serve: Serve) -> None:
    client, service = serve()
    _publish(service.catalog, service, 3000)
    first = client.get("/ui/adapters")
    rows = [
        given["href"]
        for tag, given in Markup(first.text).elements
        if tag == "a" and "wrap" in (given.get("class") or "")
    ]
    assert len(rows) == 25
    seen, page = set(rows), first
    for _ in range(3):
        onwards = next(address for address in Markup(page.text).addresses() if "cursor=" in address)
        page = client.get(onwards)
        seen |= {address for address in Markup(page.text).addresses() if address.startswith("/ui/adapters/")}
    assert len(seen) == 100
    assert len(first.content) < 20_000
    assert "3,000" in client.get("/").text


def _publish(catalog: Catalog, service: Service, many: int) -> None:
    adapter = random_adapter(2, 10, 1, seed=1)
    catalog.publish(
        [
            Publication(name=f"tenant-{number:04}", adapter=adapter, base=service.base, source=Source.UPLOAD)
            for number in range(many)
        ],
        tenant="default",
    )


def test_the_overview_is_there_before_the_catalogue_is_counted(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    begins, counts = Event(), Event()

    def late(*given: Any, **named: Any) -> CatalogCounts:
        begins.set()
        counts.wait()
        return count_catalog(*given, **named)

    monkeypatch.setattr(figures_of_the_catalogue, "count_catalog", late)
    client, _ = serve()
    try:
        shown = client.get("/").text
        assert begins.is_set()
        assert "The stored adapters and data sets cannot be counted at the moment." in shown
        assert "First steps" not in shown
        assert "Nothing has been trained yet." in shown
    finally:
        counts.set()
    eventually(lambda: "First steps" in client.get("/").text, what="a count")


def test_the_throughput_counts_rows_of_predictions_and_nothing_else(serve: Serve) -> None:
    client, _ = serve()
    begun = client.get("/ui/throughput").json()
    client.post("/predict", json={"adapter": None, "inputs": [[0] * 10] * 7}).raise_for_status()
    client.get("/ui/adapters")
    now = client.get("/ui/throughput").json()
    assert now["rows"] - begun["rows"] == 7
    assert sum(now["counts"]) - sum(begun["counts"]) == 1
    assert now["at"] > begun["at"]


def test_a_stored_row_comes_as_the_layer_takes_it(serve: Serve, tmp_path: Path) -> None:
    client, _ = serve()
    names = [f"x{number}" for number in range(10)]
    lines = [",".join([*names, "label"]), *(",".join([str(row)] * 10 + [f"l{row}"]) for row in range(3))]
    headers = {"Content-Type": "text/csv"}
    client.put("/datasets/t", content="\n".join(lines), headers=headers).raise_for_status()
    client.put("/datasets/narrow", content="a,b\n1,2\n", headers=headers).raise_for_status()
    row = client.get("/ui/try/row", params={"dataset": "t", "row": 2}).json()
    assert row == {"row": 2, "rows": 3, "values": [2.0] * 10, "other_columns": {"label": "l2"}}
    for dataset, number, code in (
        ("t", "3", "out_of_range"),
        ("t", "-1", "out_of_range"),
        ("narrow", "0", "invalid_combination"),
        ("none", "0", "dataset_not_found"),
    ):
        answer = client.get("/ui/try/row", params={"dataset": dataset, "row": number})
        assert answer.json()["code"] == code
        assert answer.headers["content-type"] == "application/problem+json"
