"""What a training does and says, each number against the test's own computation."""

import hashlib
from typing import Any

import httpx
import pytest
import torch

from tests.integration.training.conftest import Running
from tests.support import training_oracle as world
from tests.support.service import train
from tests.support.training_columns import UNEVALUATED
from tests.support.training_oracle import CLASSES, LABELS, NUMBERS, RANK, ROWS, cross_entropy, mse, published_delta


def _train(client: httpx.Client, name: str, data: dict[str, Any] = NUMBERS, **training: Any) -> dict[str, Any]:
    job = train(client, name=name, rank=RANK, data=data, training=training)
    assert job["status"] == "succeeded", job["error"]
    return job


def test_the_metrics_are_those_of_the_factors_as_published(trained: httpx.Client) -> None:
    for method in ("adamw", "sgd", "closed_form"):
        metrics = _train(trained, f"metrics-{method}", method=method)["metrics"]
        wanted = mse(published_delta(trained, f"metrics-{method}"))
        assert metrics["train_loss"] == pytest.approx(wanted, rel=1e-12)
        assert metrics["base_train_loss"] == pytest.approx(mse(), rel=1e-12)
        assert (metrics["validation_loss"], metrics["base_validation_loss"]) == (None, None)
        assert wanted < mse()


def test_the_train_loss_leaves_the_ridge_out(trained: httpx.Client) -> None:
    job = _train(trained, "ridge", method="closed_form", ridge=5)
    assert job["metrics"]["train_loss"] == pytest.approx(mse(published_delta(trained, "ridge")), rel=1e-12)
    assert job["metrics"]["train_loss"] > _train(trained, "no-ridge", method="closed_form")["metrics"]["train_loss"]


def test_the_closed_form_s_history_is_the_loss_before_and_after(trained: httpx.Client) -> None:
    job = _train(trained, "before-after", method="closed_form")
    assert job["history"] == [[0, job["metrics"]["base_train_loss"]], [1, job["metrics"]["train_loss"]]]
    assert job["progress"] == {"step": 1, "steps": 1, "loss": job["metrics"]["train_loss"]}


def test_cross_entropy_is_torch_s_mean_over_rows(trained: httpx.Client) -> None:
    job = _train(trained, "classes", LABELS, loss="cross_entropy", epochs=80, learning_rate=0.05)
    delta = published_delta(trained, "classes")
    metrics = job["metrics"]
    assert metrics["train_loss"] == pytest.approx(cross_entropy(delta), rel=1e-12)
    assert metrics["base_train_loss"] == pytest.approx(cross_entropy(), rel=1e-12)
    assert metrics["train_accuracy"] == float((world.outputs(delta).argmax(dim=1) == CLASSES).double().mean())
    assert metrics["base_train_accuracy"] == float((world.outputs().argmax(dim=1) == CLASSES).double().mean())
    assert job["history"][0] == [1, pytest.approx(cross_entropy(), rel=1e-5)]
    assert metrics["train_loss"] < metrics["base_train_loss"]


@pytest.mark.parametrize("method", ["adamw", "closed_form"])
def test_a_split_measures_every_row_once_on_one_side(trained: httpx.Client, method: str) -> None:
    held_out = 6
    training = {"method": method, "validation_fraction": held_out / ROWS}
    # Random targets: on the held-out rows, the adapter may be worse than the base layer.
    job = train(trained, name=f"split-{method}", rank=RANK, data=NUMBERS, training=training, publish="always")
    metrics, delta = job["metrics"], published_delta(trained, f"split-{method}")
    for base, over_all in (("", mse(delta)), ("base_", mse())):
        train_loss, validation_loss = metrics[f"{base}train_loss"], metrics[f"{base}validation_loss"]
        together = ((ROWS - held_out) * train_loss + held_out * validation_loss) / ROWS
        assert together == pytest.approx(over_all, rel=1e-12)
        assert train_loss != validation_loss


def test_held_out_rows_do_not_reach_the_factors(trained: httpx.Client) -> None:
    seed, held_out = 5, 8
    first = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:held_out]
    changed = world.Y.clone()
    changed[first] += 100
    split = {"seed": seed, "validation_fraction": held_out / ROWS, "epochs": 3, "batch_size": 4}
    plain = _train(trained, "held-out", NUMBERS, **split)
    other = _train(trained, "held-out", NUMBERS | {"targets": changed.tolist()}, **split)
    assert plain["result"]["digest"] == other["result"]["digest"]
    assert plain["metrics"]["train_loss"] == other["metrics"]["train_loss"]
    assert plain["metrics"]["validation_loss"] < other["metrics"]["validation_loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "steps", "kept"),
    [
        ({"epochs": 3, "batch_size": 5}, 15, range(1, 16)),
        ({"epochs": 1001, "batch_size": None}, 1001, [*range(2, 1001, 2), 1001]),
    ],
)
def test_the_history_has_every_step_up_to_1000_and_then_every_so_many_and_the_last(
    trained: httpx.Client, settings: dict[str, Any], steps: int, kept: range | list[int]
) -> None:
    job = _train(trained, "history", **settings)
    assert [step for step, _ in job["history"]] == list(kept)
    assert job["progress"] == {"step": steps, "steps": steps, "loss": job["history"][-1][1]}


def test_the_job_shows_its_settings_in_full_and_its_data_by_digest(trained: httpx.Client) -> None:
    job = _train(trained, "spec", epochs=2)
    data = job["spec"].pop("data")
    assert job["spec"] == {
        "name": "spec",
        "rank": RANK,
        "alpha": RANK,
        "publish": "if_not_worse",
        "warnings": [UNEVALUATED],
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
    again = _train(trained, "spec", epochs=3)["spec"]["data"]
    other = _train(trained, "spec", {"inputs": (world.X + 1).tolist(), "targets": NUMBERS["targets"]})["spec"]["data"]
    assert again == data
    assert other != data


def test_the_closed_form_s_settings_are_those_that_it_uses(trained: httpx.Client) -> None:
    training = _train(trained, "spec-closed", method="closed_form", ridge=0.5)["spec"]["training"]
    assert training == {"method": "closed_form", "loss": "mse", "seed": 0, "validation_fraction": 0, "ridge": 0.5}


def test_a_job_answers_from_the_moment_it_is_queued(trained: httpx.Client) -> None:
    answer = trained.post("/adapters", json={"name": "queued", "data": NUMBERS})
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert (job["adapter"], job["attempt"], job["result"], job["error"]) == ("queued", 0, None, None)
    assert (job["status"], job["history"], job["started_at"], job["finished_at"]) == ("queued", [], None, None)
    assert set(trained.get(answer.headers["location"]).json()) == set(job)


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


def test_what_was_trained_answers_as_its_factors_say(trained: httpx.Client) -> None:
    _train(trained, "answers", method="closed_form")
    given = trained.post("/predict", json={"adapter": "answers", "inputs": NUMBERS["inputs"]}).json()["outputs"]
    wanted = world.outputs(published_delta(trained, "answers"))
    assert float((torch.tensor(given, dtype=torch.float64) - wanted).abs().max() / wanted.abs().max()) < 1e-5
