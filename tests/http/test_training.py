"""What a training does and says, each number against the test's own computation."""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from app.service import Service
from app.settings import Settings
from tests.harness import serving, train
from tests.http import training_world as world
from tests.http.training_world import CLASSES, LABELS, NUMBERS, OUTPUTS, RANK, ROWS, cross_entropy, mse, published_delta

Running = tuple[httpx.Client, Service]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    save_file({"weight": world.WEIGHT, "bias": world.BIAS}, folder / "base.safetensors")
    settings = Settings(base=str(folder / "base.safetensors"), data_dir=folder / "data")
    with serving(settings, trainer=True) as both:
        yield both


@pytest.fixture
def client(running: Running) -> httpx.Client:
    return running[0]


def _train(client: httpx.Client, name: str, data: dict[str, Any] = NUMBERS, **training: Any) -> dict[str, Any]:
    job = train(client, name=name, rank=RANK, data=data, training=training)
    assert job["status"] == "succeeded", job["error"]
    return job


def test_the_metrics_are_those_of_the_factors_as_published(client: httpx.Client) -> None:
    for method in ("adamw", "sgd", "closed_form"):
        metrics = _train(client, f"metrics-{method}", method=method)["metrics"]
        wanted = mse(published_delta(client, f"metrics-{method}"))
        assert metrics["train_loss"] == pytest.approx(wanted, rel=1e-12)
        assert metrics["base_train_loss"] == pytest.approx(mse(), rel=1e-12)
        assert (metrics["validation_loss"], metrics["base_validation_loss"]) == (None, None)
        assert wanted < mse()


def test_the_train_loss_leaves_the_ridge_out(client: httpx.Client) -> None:
    job = _train(client, "ridge", method="closed_form", ridge=5)
    assert job["metrics"]["train_loss"] == pytest.approx(mse(published_delta(client, "ridge")), rel=1e-12)
    assert job["metrics"]["train_loss"] > _train(client, "no-ridge", method="closed_form")["metrics"]["train_loss"]


def test_the_closed_form_s_history_is_the_loss_before_and_after(client: httpx.Client) -> None:
    job = _train(client, "before-after", method="closed_form")
    assert job["history"] == [[0, job["metrics"]["base_train_loss"]], [1, job["metrics"]["train_loss"]]]
    assert job["progress"] == {"step": 1, "steps": 1, "loss": job["metrics"]["train_loss"]}


def test_cross_entropy_is_torch_s_mean_over_rows(client: httpx.Client) -> None:
    job = _train(client, "classes", LABELS, loss="cross_entropy", epochs=80, learning_rate=0.05)
    delta = published_delta(client, "classes")
    metrics = job["metrics"]
    assert metrics["train_loss"] == pytest.approx(cross_entropy(delta), rel=1e-12)
    assert metrics["base_train_loss"] == pytest.approx(cross_entropy(), rel=1e-12)
    assert metrics["train_accuracy"] == float((world.outputs(delta).argmax(dim=1) == CLASSES).double().mean())
    assert metrics["base_train_accuracy"] == float((world.outputs().argmax(dim=1) == CLASSES).double().mean())
    assert job["history"][0] == [1, pytest.approx(cross_entropy(), rel=1e-5)]
    assert metrics["train_loss"] < metrics["base_train_loss"]


@pytest.mark.parametrize("method", ["adamw", "closed_form"])
def test_a_split_measures_every_row_once_on_one_side(client: httpx.Client, method: str) -> None:
    held_out = 6
    job = _train(client, f"split-{method}", method=method, validation_fraction=held_out / ROWS)
    metrics, delta = job["metrics"], published_delta(client, f"split-{method}")
    for base, over_all in (("", mse(delta)), ("base_", mse())):
        train_loss, validation_loss = metrics[f"{base}train_loss"], metrics[f"{base}validation_loss"]
        together = ((ROWS - held_out) * train_loss + held_out * validation_loss) / ROWS
        assert together == pytest.approx(over_all, rel=1e-12)
        assert train_loss != validation_loss


def test_held_out_rows_do_not_reach_the_factors(client: httpx.Client) -> None:
    seed, held_out = 5, 8
    first = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:held_out]
    changed = world.Y.clone()
    changed[first] += 100
    split = {"seed": seed, "validation_fraction": held_out / ROWS, "epochs": 3, "batch_size": 4}
    plain = _train(client, "held-out", NUMBERS, **split)
    other = _train(client, "held-out", NUMBERS | {"targets": changed.tolist()}, **split)
    assert plain["result"]["digest"] == other["result"]["digest"]
    assert plain["metrics"]["train_loss"] == other["metrics"]["train_loss"]
    assert plain["metrics"]["validation_loss"] < other["metrics"]["validation_loss"]


@pytest.mark.parametrize(
    ("settings", "steps", "kept"),
    [
        ({"epochs": 3, "batch_size": 5}, 15, range(1, 16)),
        ({"epochs": 1000, "batch_size": None}, 1000, range(1, 1001)),
        ({"epochs": 1001, "batch_size": None}, 1001, [*range(2, 1001, 2), 1001]),
        ({"epochs": 500, "batch_size": 5}, 2500, [*range(3, 2500, 3), 2500]),
    ],
)
def test_the_history_has_every_step_up_to_1000_and_then_every_so_many_and_the_last(
    client: httpx.Client, settings: dict[str, Any], steps: int, kept: range | list[int]
) -> None:
    job = _train(client, "history", **settings)
    assert [step for step, _ in job["history"]] == list(kept)
    assert job["progress"] == {"step": steps, "steps": steps, "loss": job["history"][-1][1]}


def test_a_version_says_where_it_came_from(client: httpx.Client) -> None:
    job = _train(client, "origin")
    version = client.get(f"/adapters/origin/versions/{job['result']['version']}").json()
    assert (version["source"], version["job"], version["metrics"]) == ("job", job["id"], job["metrics"])
    assert (version["digest"], version["rank"], version["alpha"]) == (job["result"]["digest"], RANK, RANK)
    wanted = float(published_delta(client, "origin").norm() / world.WEIGHT.double().norm())
    assert version["effect"]["relative_norm"] == pytest.approx(wanted, rel=1e-12)


def test_the_job_shows_its_settings_in_full_and_its_data_by_digest(client: httpx.Client) -> None:
    job = _train(client, "spec", epochs=2)
    data = job["spec"].pop("data")
    assert job["spec"] == {
        "name": "spec",
        "rank": RANK,
        "alpha": RANK,
        "publish": "always",
        "training": {
            "method": "adamw",
            "loss": "mse",
            "epochs": 2,
            "learning_rate": 0.01,
            "batch_size": 64,
            "seed": 0,
            "init": "zero_delta",
            "validation_fraction": 0,
        },
    }
    assert data["rows"] == ROWS
    assert data["digest"].startswith("sha256:")
    assert len(data["digest"]) == 71
    again = _train(client, "spec", epochs=3)["spec"]["data"]
    other = _train(client, "spec", {"inputs": (world.X + 1).tolist(), "targets": NUMBERS["targets"]})["spec"]["data"]
    assert again == data
    assert other != data


def test_the_closed_form_s_settings_are_those_that_it_uses(client: httpx.Client) -> None:
    training = _train(client, "spec-closed", method="closed_form", ridge=0.5)["spec"]["training"]
    assert training == {
        "method": "closed_form",
        "loss": "mse",
        "seed": 0,
        "validation_fraction": 0,
        "ridge": 0.5,
    }


def test_a_job_answers_from_the_moment_it_is_queued(client: httpx.Client) -> None:
    answer = client.post("/adapters", json={"name": "queued", "rank": RANK, "data": NUMBERS})
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert (job["adapter"], job["attempt"], job["result"], job["error"]) == ("queued", 0, None, None)
    assert (job["status"], job["history"], job["started_at"], job["finished_at"]) == ("queued", [], None, None)
    assert set(client.get(answer.headers["location"]).json()) == set(job)


def test_a_training_that_diverges_says_at_which_step_and_publishes_nothing(client: httpx.Client) -> None:
    training = {"method": "sgd", "learning_rate": 1e5, "batch_size": None, "init": "randn"}
    job = train(client, name="diverged", rank=RANK, data=NUMBERS, training=training)
    assert (job["status"], job["result"], job["metrics"]) == ("failed", None, None)
    assert job["error"]["code"] == "diverged"
    assert 1 < job["error"]["step"] < 10
    assert f"step {job['error']['step']}" in job["error"]["detail"]
    assert "status" not in job["error"]
    assert client.get("/adapters/diverged").status_code == 404


def test_publish_never_makes_a_version_that_only_its_number_reaches(client: httpx.Client) -> None:
    for version in (1, 2):
        job = train(client, name="never", rank=RANK, data=NUMBERS, publish="never")
        assert job["result"]["version"] == version
    for refused in (
        client.post("/predict", json={"adapter": "never", "inputs": [[0] * 5]}),
        client.get("/adapters/never/download"),
    ):
        assert (refused.status_code, refused.json()["code"]) == (404, "adapter_not_live")
        assert "never@1" in refused.json()["detail"]
        assert "never@2" in refused.json()["detail"]
    shown = client.get("/adapters/never").json()
    assert (shown["aliases"], shown["live"], shown["versions"]) == ({}, None, 2)
    assert client.post("/predict", json={"adapter": "never@1", "inputs": [[0] * 5]}).status_code == 200
    assert client.put("/adapters/never/aliases/live", json={"version": 1}).json()["aliases"] == {"live": 1}


def test_publish_never_leaves_live_where_it_is(client: httpx.Client) -> None:
    first = _train(client, "shadow")
    train(client, name="shadow", rank=RANK, data=NUMBERS, publish="never", training={"seed": 1})
    shown = client.get("/adapters/shadow").json()
    assert (shown["aliases"], shown["live"]["digest"]) == ({"live": 1}, first["result"]["digest"])
    assert shown["versions"] == 2


def test_the_base_has_the_same_bytes_after_any_training(running: Running) -> None:
    client, service = running

    def state() -> object:
        assert service.base.bias_O is not None
        held = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (service.base.weight_OI, service.base.bias_O)]
        with open(service.settings.base, "rb") as file:
            stored = hashlib.sha256(file.read()).hexdigest()
        answer = client.post("/predict", json={"adapter": None, "inputs": NUMBERS["inputs"]}).json()
        return held, stored, answer, client.get("/base").json()

    before = state()
    for method in ("adamw", "sgd", "closed_form"):
        _train(client, "frozen", method=method)
        assert state() == before


def test_what_was_trained_answers_as_its_factors_say(client: httpx.Client) -> None:
    _train(client, "answers", method="closed_form")
    given = client.post("/predict", json={"adapter": "answers", "inputs": NUMBERS["inputs"]}).json()["outputs"]
    wanted = world.outputs(published_delta(client, "answers"))
    assert float((torch.tensor(given, dtype=torch.float64) - wanted).abs().max() / wanted.abs().max()) < 1e-5


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
    client: httpx.Client, method: str, field: str, value: object
) -> None:
    body = {"name": "ignored", "rank": RANK, "data": NUMBERS, "training": {"method": method, field: value}}
    answer = client.post("/adapters", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "ignored_field")
    assert answer.json()["field"] == f"training.{field}"
    assert method in answer.json()["detail"]


def test_cross_entropy_in_closed_form_is_refused_with_the_reason(client: httpx.Client) -> None:
    body = {"method": "closed_form", "loss": "cross_entropy"}
    answer = client.post("/adapters", json={"name": "a", "rank": 1, "data": LABELS, "training": body})
    assert answer.status_code == 422
    assert "squared error" in answer.json()["detail"]
    assert math.isclose(OUTPUTS, 3)
