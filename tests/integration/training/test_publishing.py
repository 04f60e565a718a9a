"""What a training publishes, and what it refuses to begin."""

from typing import Any

import httpx
import pytest

from tests.support import training_oracle as world
from tests.support.service import train
from tests.support.training_oracle import NUMBERS, RANK, published_delta


def _train(client: httpx.Client, name: str, **body: Any) -> dict[str, Any]:
    job = train(client, name=name, rank=RANK, data=NUMBERS, **body)
    assert job["status"] == "succeeded", job["error"]
    return job


def test_a_version_says_where_it_came_from(trained: httpx.Client) -> None:
    job = _train(trained, "origin")
    version = trained.get(f"/adapters/origin/versions/{job['result']['version']}").json()
    assert (version["source"], version["job"], version["metrics"]) == ("job", job["id"], job["metrics"])
    assert (version["digest"], version["rank"], version["alpha"]) == (job["result"]["digest"], RANK, RANK)
    wanted = float(published_delta(trained, "origin").norm() / world.WEIGHT.double().norm())
    assert version["effect"]["relative_norm"] == pytest.approx(wanted, rel=1e-12)


def test_a_training_that_diverges_says_at_which_step_and_publishes_nothing(trained: httpx.Client) -> None:
    training = {"method": "sgd", "learning_rate": 1e5, "batch_size": None, "init": "randn"}
    job = train(trained, name="diverged", rank=RANK, data=NUMBERS, training=training)
    assert (job["status"], job["result"], job["metrics"]) == ("failed", None, None)
    assert job["error"]["code"] == "diverged"
    assert 1 < job["error"]["step"] < 10
    assert f"step {job['error']['step']}" in job["error"]["detail"]
    assert "status" not in job["error"]
    assert trained.get("/adapters/diverged").status_code == 404


def test_publish_never_makes_a_version_that_only_its_number_reaches(trained: httpx.Client) -> None:
    for version in (1, 2):
        job = _train(trained, "never", publish="never")
        assert job["result"]["version"] == version
    for refused in (
        trained.post("/predict", json={"adapter": "never", "inputs": [[0] * 5]}),
        trained.get("/adapters/never/download"),
    ):
        assert (refused.status_code, refused.json()["code"]) == (404, "adapter_not_live")
        assert "never@1" in refused.json()["detail"]
        assert "never@2" in refused.json()["detail"]
    shown = trained.get("/adapters/never").json()
    assert (shown["aliases"], shown["live"], shown["versions"]) == ({}, None, 2)
    assert trained.post("/predict", json={"adapter": "never@1", "inputs": [[0] * 5]}).status_code == 200
    assert trained.put("/adapters/never/aliases/live", json={"version": 1}).json()["aliases"] == {"live": 1}


def test_publish_never_leaves_live_where_it_is(trained: httpx.Client) -> None:
    first = _train(trained, "shadow")
    _train(trained, "shadow", publish="never", training={"seed": 1})
    shown = trained.get("/adapters/shadow").json()
    assert (shown["aliases"], shown["live"]["digest"]) == ({"live": 1}, first["result"]["digest"])
    assert shown["versions"] == 2


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("closed_form", "epochs", 50),
        ("closed_form", "learning_rate", 0.01),
        ("closed_form", "batch_size", None),
        ("closed_form", "init", "zero_delta"),
        ("adamw", "ridge", 0),
        ("sgd", "ridge", 0.5),
    ],
)
def test_a_field_that_the_method_would_ignore_is_refused(
    trained: httpx.Client, method: str, field: str, value: object
) -> None:
    body = {"name": "ignored", "rank": RANK, "data": NUMBERS, "training": {"method": method, field: value}}
    answer = trained.post("/adapters", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "ignored_field")
    assert answer.json()["field"] == f"training.{field}"
    assert method in answer.json()["detail"]


def test_huber_in_closed_form_is_refused_with_the_reason(trained: httpx.Client) -> None:
    body = {"method": "closed_form", "loss": "huber"}
    answer = trained.post("/adapters", json={"name": "a", "rank": 1, "data": NUMBERS, "training": body})
    assert answer.status_code == 422
    assert "squared error" in answer.json()["detail"]
