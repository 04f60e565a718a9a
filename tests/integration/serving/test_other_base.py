"""A folder that was made for another base layer or feature space: each adapter says what /predict would."""

import httpx
import pytest

from tests.conftest import Serve
from tests.support.html_markup import Markup

FACTORS = {"A": [[1.0], [2.0]], "B": [[1.0] * 10]}
HERE, ELSEWHERE = "random:10,2,42", "random:10,2,43"
SPACE, OTHER = "minilm@1", "minilm@2"


def _predicted(client: httpx.Client, name: str) -> str | None:
    answer = client.post("/predict", json={"adapter": name, "inputs": [[1.0] * 10]})
    return None if answer.status_code == 200 else answer.json()["code"]


def _put(client: httpx.Client, name: str) -> None:
    client.put(f"/adapters/{name}", json=FACTORS).raise_for_status()


@pytest.fixture
def mixed(serve: Serve) -> httpx.Client:
    """A service with adapters of its own base layer and feature space, of others, and of none."""
    _put(serve(base=ELSEWHERE, feature_space=SPACE)[0], "base")
    _put(serve(base=ELSEWHERE, feature_space=OTHER)[0], "both")
    _put(serve(base=HERE, feature_space=OTHER)[0], "space")
    _put(serve(base=HERE)[0], "unnamed")
    client, _ = serve(base=HERE, feature_space=SPACE)
    _put(client, "own")
    return client


WANTED = {
    "base": "base_mismatch",
    "both": "base_mismatch",
    "own": None,
    "space": "feature_space_mismatch",
    "unnamed": None,
}


def test_each_adapter_says_what_predict_would(mixed: httpx.Client) -> None:
    listed = {one["name"]: one["problem"] for one in mixed.get("/adapters").json()["data"]}
    assert listed == {name: _predicted(mixed, name) for name in WANTED} == WANTED
    assert {name: mixed.get(f"/adapters/{name}").json()["problem"] for name in WANTED} == WANTED


def test_it_is_the_live_version_s(mixed: httpx.Client) -> None:
    _put(mixed, "base")
    assert mixed.get("/adapters/base").json()["problem"] is None
    back = mixed.put("/adapters/base/aliases/live", json={"version": 1}).json()
    assert (back["live"]["version"], back["problem"]) == (1, "base_mismatch")


def test_the_page_of_a_job_says_that_it_waits_for_another_base_layer(serve: Serve) -> None:
    first, _ = serve(base=ELSEWHERE)
    data = {"inputs": [[1.0] * 10], "targets": [[1.0, 1.0]]}
    job_id = first.post("/adapters", json={"name": "waits", "rank": 1, "data": data}).raise_for_status().json()["id"]
    second, _ = serve(base=HERE)
    assert "It is waiting for a trainer.</p>" in first.get(f"/ui/jobs/{job_id}").text
    assert "a trainer with another base layer" in second.get(f"/ui/jobs/{job_id}").text


def test_the_page_marks_them(mixed: httpx.Client) -> None:
    shown = mixed.get("/ui/adapters").text
    assert (shown.count("other base"), shown.count("other feature space")) == (2, 1)
    for name, problem in WANTED.items():
        page = mixed.get(f"/ui/adapters/{name}").text
        text = " ".join(Markup(page).text.split())
        assert ("this service cannot serve it" in text) is (problem is not None)
        assert (f'/ui/try?adapter={name}"' in page) is (problem is None)
        if problem is not None:
            assert problem in text
        else:
            assert "Live version: 1." in text
