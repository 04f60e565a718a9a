"""A closed form that kept its statistics goes on: rows are added, rows are forgotten, exactly."""

# N rows · I in_features · O out_features
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from app.settings import Settings
from tests.support.service import serving, train, wait_for_job
from tests.support.training_oracle import INPUTS, NUMBERS, OUTPUTS, RANK, ROWS, X, Y, published_delta

CUT = 15
FIRST, SECOND = ({"inputs": X[part].tolist(), "targets": Y[part].tolist()} for part in (slice(CUT), slice(CUT, ROWS)))
RIDGE = 0.3


def _train(client: httpx.Client, name: str, data: dict[str, Any], **training: Any) -> dict[str, Any]:
    settings = {"method": "closed_form", "ridge": RIDGE, "keep_statistics": True} | training
    job = train(client, name=name, rank=RANK, data=data, training=settings)
    assert job["status"] == "succeeded", job["error"]
    return job


def _update(client: httpx.Client, name: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/adapters/{name}/update", json=body)
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"
    return wait_for_job(client, answer.json()["id"])


def _apart(client: httpx.Client, one: str, other: str) -> float:
    first, second = published_delta(client, one), published_delta(client, other)
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("bias", [False, True])
def test_training_in_two_parts_is_training_on_the_whole(trained: httpx.Client, bias: bool) -> None:
    _train(trained, f"whole-{bias}", NUMBERS, bias=bias)
    _train(trained, f"parts-{bias}", FIRST, bias=bias)
    job = _update(trained, f"parts-{bias}", add=SECOND)
    assert job["status"] == "succeeded", job["error"]
    assert job["metrics"]["rows"] == ROWS
    assert _apart(trained, f"parts-{bias}", f"whole-{bias}") < 1e-6


def test_forgotten_rows_have_never_been_there(trained: httpx.Client) -> None:
    _train(trained, "never", FIRST)
    _train(trained, "forgets", NUMBERS)
    assert _apart(trained, "forgets", "never") > 1e-3
    assert _update(trained, "forgets", forget=SECOND)["status"] == "succeeded"
    assert _apart(trained, "forgets", "never") < 1e-6


def test_an_update_can_be_updated(trained: httpx.Client) -> None:
    _train(trained, "one", FIRST)
    assert _update(trained, "one", add=SECOND)["status"] == "succeeded"
    job = _update(trained, "one", forget=FIRST)
    assert job["result"]["version"] == 3
    _train(trained, "only-second", SECOND)
    assert _apart(trained, "one", "only-second") < 1e-6


def test_updates_that_wait_together_all_count(trained: httpx.Client) -> None:
    _train(trained, "queued", FIRST)
    parts = [{"inputs": X[row : row + 3].tolist(), "targets": Y[row : row + 3].tolist()} for row in range(CUT, ROWS, 3)]
    jobs = [trained.post("/adapters/queued/update", json={"add": part}).json()["id"] for part in parts]
    assert [wait_for_job(trained, job)["status"] for job in jobs] == ["succeeded"] * len(parts)
    _train(trained, "at-once", NUMBERS)
    assert _apart(trained, "queued", "at-once") < 1e-6


def test_the_prior_stays_the_prior(trained: httpx.Client) -> None:
    trained.put("/adapters/fleet", json={"A": torch.ones(OUTPUTS, 1).tolist(), "B": torch.ones(1, INPUTS).tolist()})
    prior = {"prior": {"adapter": "fleet"}, "ridge": 50}
    _train(trained, "prior-parts", FIRST, **prior)
    _train(trained, "prior-whole", NUMBERS, **prior)
    # Live moves on: it is the version that was live then which counts.
    trained.put("/adapters/fleet", json={"A": torch.zeros(OUTPUTS, 1).tolist(), "B": torch.ones(1, INPUTS).tolist()})
    assert _update(trained, "prior-parts", add=SECOND)["status"] == "succeeded"
    assert _apart(trained, "prior-parts", "prior-whole") < 1e-6


def test_the_version_says_what_it_came_from(trained: httpx.Client) -> None:
    _train(trained, "lineage", FIRST)
    _update(trained, "lineage", add=SECOND, forget={"inputs": X[:2].tolist(), "targets": Y[:2].tolist()})
    lineage = trained.get("/adapters/lineage").json()["live"]["lineage"]
    assert lineage["parent"] == "lineage@1"
    assert {part: lineage["data"][part]["rows"] for part in ("add", "forget")} == {"add": ROWS - CUT, "forget": 2}
    assert (lineage["spec"]["ridge"], lineage["spec"]["method"]) == (RIDGE, "closed_form")


def test_an_update_may_stay_unpublished(trained: httpx.Client) -> None:
    _train(trained, "quiet", FIRST)
    assert _update(trained, "quiet", add=SECOND, publish="never")["result"]["version"] == 2
    assert trained.get("/adapters/quiet").json()["live"]["version"] == 1


def test_forgetting_everything_is_refused_and_changes_nothing(trained: httpx.Client) -> None:
    _train(trained, "empty", FIRST)
    job = _update(trained, "empty", forget=FIRST)
    assert (job["status"], job["error"]["code"]) == ("failed", "ill_conditioned")
    assert trained.get("/adapters/empty").json()["versions"] == 1


def test_rows_that_were_never_in_cannot_be_forgotten(trained: httpx.Client) -> None:
    _train(trained, "strangers", FIRST, ridge=0)
    job = _update(trained, "strangers", forget={"inputs": (100 * X[:5]).tolist(), "targets": Y[:5].tolist()})
    assert (job["status"], job["error"]["code"]) == ("failed", "ill_conditioned")


def test_an_adapter_without_statistics_cannot_be_updated(trained: httpx.Client) -> None:
    train(trained, name="plain", rank=RANK, data=FIRST, training={"method": "closed_form"})
    answer = trained.post("/adapters/plain/update", json={"add": SECOND})
    assert (answer.status_code, answer.json()["code"]) == (409, "no_statistics")
    assert trained.post("/adapters/nobody/update", json={"add": SECOND}).status_code == 404


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, "missing_field", "add"),
        ({"add": None}, "wrong_type", "add"),
        ({"add": {"inputs": [[1.0]], "targets": [[1.0]]}}, "wrong_shape", "add.inputs"),
        ({"forget": {"inputs": X[:1].tolist(), "targets": [[1, 2, None]]}}, "wrong_type", "forget.targets"),
        ({"add": FIRST | {"groups": ["a"] * CUT}}, "ignored_field", "add"),
        ({"add": FIRST, "publish": {"when": "if_better"}}, "missing_field", "split"),
        ({"add": FIRST, "rank": 2}, "unknown_field", "rank"),
    ],
)
def test_a_bad_update_names_the_culprit(trained: httpx.Client, body: dict[str, Any], code: str, field: str) -> None:
    if trained.get("/adapters/strict").status_code == 404:
        _train(trained, "strict", FIRST)
    answer = trained.post("/adapters/strict/update", json=body)
    assert answer.status_code == 422, answer.text
    assert (answer.json()["code"], answer.json()["field"]) == (code, field)


def test_updates_that_wait_together_say_which_version_each_began_with(trained: httpx.Client) -> None:
    _train(trained, "chain", FIRST)
    for part in (FIRST, SECOND):
        wait_for_job(trained, trained.post("/adapters/chain/update", json={"add": part}).json()["id"])
    versions = trained.get("/adapters/chain/versions").json()["data"]
    assert [each["lineage"]["parent"] for each in versions] == ["chain@2", "chain@1", None]


def test_sums_of_another_base_are_not_gone_on_from(tmp_path: Path) -> None:
    data = {"inputs": [[1, 2, 3, 4], [4, 3, 2, 1], [0, 1, 0, 2]], "targets": [[1, 2, 3]] * 3}
    settings = {"method": "closed_form", "keep_statistics": True, "ridge": 1}
    for seed in (42, 43):
        with serving(Settings(base=f"random:4,3,{seed}", data_dir=tmp_path), trainer=True) as (client, _):
            train(client, name="acme", rank=2, data=data, training=settings)
    # Nobody trains yet: live moves while the update waits.
    with serving(Settings(base="random:4,3,43", data_dir=tmp_path)) as (client, _):
        job = client.post("/adapters/acme/update", json={"add": data}).raise_for_status().json()["id"]
        client.put("/adapters/acme/aliases/live", json={"version": 1}).raise_for_status()
    with serving(Settings(base="random:4,3,43", data_dir=tmp_path), trainer=True) as (client, _):
        ended = wait_for_job(client, job)
        assert (ended["status"], ended["error"]["code"]) == ("failed", "base_mismatch")
        assert client.get("/adapters/acme").json()["versions"] == 2
