"""Data sets over HTTP: upload, report, list, show, preview, delete."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from app.settings import Settings
from tests.conftest import Serve
from tests.support.catalog_factories import stored_files
from tests.support.data_set_files import arrow_stream, npz, parquet
from tests.support.service import serving

CSV, JSONL, PARQUET = "text/csv", "application/x-ndjson", "application/vnd.apache.parquet"
ARROW, NPZ = "application/vnd.apache.arrow.stream", "application/x-npz"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One service for all tests that use names of their own."""
    settings = Settings(base="random:10,2,42", data_dir=tmp_path_factory.mktemp("data") / "data")
    with serving(settings) as (client, _):
        yield client


def _put(client: httpx.Client, name: str, content: bytes | str, kind: str = CSV, **headers: str) -> httpx.Response:
    body = content.encode() if isinstance(content, str) else content
    return client.put(f"/datasets/{name}", content=body, headers={"Content-Type": kind, **headers})


def _code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def test_an_upload_answers_with_the_version_and_its_report(shared: httpx.Client) -> None:
    answer = _put(shared, "report", "x,t\n1.5,a\nNaN,\n2,b\n")
    version = answer.json()
    assert answer.status_code == 201
    assert answer.headers["etag"] == f'"{version["digest"]}"'
    assert {name: version[name] for name in ("dataset", "version", "rows", "content_type")} == {
        "dataset": "report",
        "version": 1,
        "rows": 3,
        "content_type": CSV,
    }
    assert version["columns"] == [
        {"name": "x", "type": "float64", "width": None, "nulls": 0, "not_finite": 1},
        {"name": "t", "type": "string", "width": None, "nulls": 1, "not_finite": 0},
    ]
    assert version["bad_rows"] == [
        {"row": 1, "column": "x", "reason": "NaN"},
        {"row": 1, "column": "t", "reason": "null"},
    ]
    assert shared.get("/datasets/report/versions/1").json() == version
    assert shared.get("/datasets/report").json() == {
        "name": "report",
        "created_at": version["created_at"],
        "versions": 1,
        "newest": version,
    }


def test_all_formats_of_the_same_rows_are_the_same_version(shared: httpx.Client) -> None:
    x_N2, y_N = np.arange(6.0).reshape(3, 2) / 4, np.array([1, 2, 3])
    table = pa.table({"x": list(x_N2), "y": y_N})
    lines = "".join(json.dumps({"x": x, "y": y}) + "\n" for x, y in zip(x_N2.tolist(), y_N.tolist(), strict=True))
    uploads = [
        (npz(x=x_N2, y=y_N), NPZ),
        (parquet(table), PARQUET),
        (arrow_stream(table), ARROW),
        (lines.encode(), JSONL),
        (lines.encode(), "application/jsonl; charset=utf-8"),
    ]
    answers = [_put(shared, "formats", content, kind) for content, kind in uploads]
    assert [answer.status_code for answer in answers] == [201, 200, 200, 200, 200]
    assert len({answer.text for answer in answers}) == 1


def test_other_content_is_another_version_and_old_ones_stay(shared: httpx.Client) -> None:
    first = _put(shared, "grows", "x\n1\n").json()
    second = _put(shared, "grows", "x\n1\n2\n").json()
    assert (first["version"], second["version"]) == (1, 2)
    listed = shared.get("/datasets/grows/versions").json()
    assert [entry["version"] for entry in listed["data"]] == [2, 1]
    assert listed["data"][1] == {name: first[name] for name in first if name not in ("columns", "bad_rows")}
    page = shared.get("/datasets/grows/versions?limit=1").json()
    rest = shared.get("/datasets/grows/versions", params={"limit": 1, "cursor": page["next_cursor"]}).json()
    assert ([entry["version"] for entry in rest["data"]], rest["next_cursor"]) == ([1], None)
    assert shared.get("/datasets/grows/preview?version=1").json()["rows"] == [{"x": 1}]
    assert shared.get("/datasets/grows/preview").json()["rows"] == [{"x": 1}, {"x": 2}]


def test_lists_go_by_prefix_and_pages(shared: httpx.Client) -> None:
    for name in ("list-b", "list-a", "list-c"):
        _put(shared, name, "x\n1\n")
    page = shared.get("/datasets", params={"prefix": "list-", "limit": 2}).json()
    assert [entry["name"] for entry in page["data"]] == ["list-a", "list-b"]
    assert page["data"][0]["newest"]["rows"] == 1
    cursor = page["next_cursor"]
    rest = shared.get("/datasets", params={"prefix": "list-", "limit": 2, "cursor": cursor}).json()
    assert ([entry["name"] for entry in rest["data"]], rest["next_cursor"]) == (["list-c"], None)
    assert _code(shared.get("/datasets", params={"prefix": "list", "cursor": cursor})) == (422, "invalid_cursor")


def test_a_preview_says_where_it_goes_on(shared: httpx.Client) -> None:
    _put(shared, "preview", '{"x": [1.5, NaN], "t": "a"}\n{"x": [1, 2]}\n{"x": null, "t": "c"}\n', JSONL)
    page = shared.get("/datasets/preview/preview?limit=2").json()
    assert page == {
        "dataset": "preview",
        "version": 1,
        "offset": 0,
        "rows": [{"x": [1.5, None], "t": "a"}, {"x": [1.0, 2.0], "t": None}],
        "next_offset": 2,
    }
    last = shared.get("/datasets/preview/preview?offset=2").json()
    assert (last["rows"], last["next_offset"]) == ([{"x": None, "t": "c"}], None)
    assert shared.get("/datasets/preview/preview?offset=3").json()["rows"] == []


@pytest.mark.parametrize("query", ["limit=101", "limit=0", "offset=-1", "version=0", "limit=x", "rows=1"])
def test_a_preview_takes_no_other_questions(shared: httpx.Client, query: str) -> None:
    assert shared.get(f"/datasets/preview/preview?{query}").status_code == 422


def test_what_is_not_there_is_404(shared: httpx.Client) -> None:
    _put(shared, "there", "x\n1\n")
    for path in ("", "/versions", "/versions/1", "/preview"):
        assert _code(shared.get(f"/datasets/none{path}")) == (404, "dataset_not_found")
    assert _code(shared.delete("/datasets/none")) == (404, "dataset_not_found")
    for number in ("2", "0", "9" * 500):
        assert _code(shared.get(f"/datasets/there/versions/{number}")) == (404, "version_not_found")
    assert _code(shared.get("/datasets/there/versions/live")) == (422, "wrong_type")
    assert _code(shared.get("/datasets/there/preview?version=2")) == (404, "version_not_found")


def test_a_deleted_data_set_goes_on_counting(shared: httpx.Client) -> None:
    _put(shared, "deleted", "x\n1\n")
    assert shared.delete("/datasets/deleted").status_code == 204
    assert _code(shared.get("/datasets/deleted")) == (404, "dataset_not_found")
    assert _put(shared, "deleted", "x\n1\n").json()["version"] == 2


def test_conditions_hold_as_for_adapters(shared: httpx.Client) -> None:
    assert _code(_put(shared, "conditions", "x\n1\n", **{"If-Match": "*"})) == (412, "precondition_failed")
    tag = _put(shared, "conditions", "x\n1\n", **{"If-None-Match": "*"}).headers["etag"]
    assert _code(_put(shared, "conditions", "x\n2\n", **{"If-None-Match": "*"})) == (412, "precondition_failed")
    assert _put(shared, "conditions", "x\n2\n", **{"If-Match": tag}).status_code == 201
    assert _code(shared.delete("/datasets/conditions", headers={"If-Match": tag})) == (412, "precondition_failed")
    assert shared.get("/datasets/conditions").json()["versions"] == 2


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "", "application/x-npy", "multipart/form-data"])
def test_other_content_types_are_415_and_the_answer_names_ours(shared: httpx.Client, kind: str) -> None:
    answer = _put(shared, "kind", "x\n1\n", kind)
    assert _code(answer) == (415, "unsupported_media_type")
    assert all(ours in answer.json()["detail"] for ours in (CSV, JSONL, PARQUET, ARROW, NPZ))


def test_a_bad_name_is_refused_before_the_body_is_read(shared: httpx.Client) -> None:
    assert _code(_put(shared, "bad%20name", "x\n1\n")) == (422, "invalid_name")


def test_rows_that_are_no_rows_are_named_in_the_answer(shared: httpx.Client) -> None:
    answer = _put(shared, "rows", "x,y\n1,2\n3\n" + "4,5,6\n" * 30)
    assert _code(answer) == (422, "bad_rows")
    assert answer.json()["row"] == 1
    assert answer.json()["rows"][:2] == [
        {"row": 1, "column": None, "reason": "1 cells, where there are 2 names"},
        {"row": 2, "column": None, "reason": "3 cells, where there are 2 names"},
    ]
    assert len(answer.json()["rows"]) == 20


def test_another_feature_space_is_refused(serve: Serve) -> None:
    client, _ = serve(feature_space="minilm@1")
    answer = _put(client, "space", "x\n1\n", **{"X-Feature-Space": "other@1"})
    assert _code(answer) == (409, "feature_space_mismatch")
    assert _put(client, "space", "x\n1\n", **{"X-Feature-Space": "minilm@1"}).status_code == 201


def test_a_data_set_may_be_larger_than_other_bodies_up_to_a_bound_of_its_own(serve: Serve) -> None:
    client, service = serve(max_body_bytes=10_000, max_dataset_bytes=400_000)
    text = "x\n" + "1\n" * 20_000

    def pieces() -> Any:
        yield from (text[begin : begin + 1000].encode() for begin in range(0, len(text), 1000))

    assert _put(client, "sized", text).json()["rows"] == 20_000
    chunked = client.put("/datasets/sized", content=pieces(), headers={"Content-Type": CSV})
    assert chunked.status_code == 200
    assert _code(_put(client, "sized", "x\n" + "12345\n" * 80_000)) == (413, "body_too_large")
    answer = _put(client, "sized", "x\n" + "1\n" * 100_000)
    assert _code(answer) == (422, "invalid_dataset")
    assert "400000 bytes" in answer.json()["detail"]
    assert _code(client.put("/adapters/sized", content=b"x" * 10_001)) == (413, "body_too_large")
    assert len(stored_files(service.settings.data_dir)) == 1
