"""The notebook that this service grew out of, through the API: the same losses, and the minimum below them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from app.settings import Settings
from tests.support.service import serving, train

# What the notebook prints after 20, 40 … 200 epochs.
LOSSES = [13.3993, 12.5641, 11.6848, 10.4612, 9.0434, 7.6665, 6.5079, 5.6370, 5.0343, 4.6353]


def _notebook() -> dict[str, torch.Tensor]:
    """The notebook's numbers, drawn in its order; its base layer is the first."""
    torch.manual_seed(42)
    weight, a_start, b_start = torch.randn(2, 10), torch.randn(2, 2), torch.randn(2, 10)
    inputs, true_weight, true_bias = torch.randn(100, 10), torch.randn(2, 10), torch.randn(2)
    targets = inputs @ true_weight.T + true_bias
    return {"W": weight, "A": a_start, "B": b_start, "X": inputs, "Y": targets}


NUMBERS = _notebook()
DATA = {"inputs": NUMBERS["X"].tolist(), "targets": NUMBERS["Y"].tolist()}
START = {"A": NUMBERS["A"].tolist(), "B": NUMBERS["B"].tolist()}
SGD = {"method": "sgd", "epochs": 200, "learning_rate": 0.01, "batch_size": None, "init": START}
MINI_BATCHES = {"epochs": 6, "batch_size": 16, "validation_fraction": 0.2, "init": "randn", "seed": 3}


def _settings(folder: Path) -> Settings:
    return Settings(base="random:10,2,42", data_dir=folder)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(_settings(tmp_path_factory.mktemp("data")), trainer=True) as (client, _):
        yield client


def _train(client: httpx.Client, name: str, training: dict[str, Any]) -> dict[str, Any]:
    job = train(client, name=name, rank=2, data=DATA, training=training)
    assert job["status"] == "succeeded", job["error"]
    return job


def test_the_base_layer_is_the_notebook_s(client: httpx.Client) -> None:
    answer = client.post("/predict", json={"adapter": None, "inputs": torch.eye(10).tolist()}).json()
    torch.testing.assert_close(torch.tensor(answer["outputs"]), NUMBERS["W"].T, rtol=0, atol=0)


def test_sgd_takes_the_notebook_s_losses_to_four_decimals(client: httpx.Client) -> None:
    job = _train(client, "notebook", SGD)
    losses = dict(job["history"])
    assert sorted(losses) == list(range(1, 201))
    assert [round(losses[step], 4) for step in range(20, 201, 20)] == LOSSES


def test_the_closed_form_ends_at_the_minimum_of_the_same_data(client: httpx.Client) -> None:
    job = _train(client, "minimum", {"method": "closed_form"})
    assert 2.699 < job["metrics"]["train_loss"] < 2.700
    assert job["history"][-1] == [1, job["metrics"]["train_loss"]]


@pytest.mark.parametrize(
    "training", [SGD, MINI_BATCHES, {"method": "closed_form", "ridge": 0.5}], ids=["sgd", "mini-batches", "closed form"]
)
def test_the_same_training_again_has_the_same_digest(client: httpx.Client, training: dict[str, Any]) -> None:
    first, second = (_train(client, name, training) for name in ("first", "second"))
    assert first["result"]["digest"] == second["result"]["digest"]
    assert (first["history"], first["metrics"]) == (second["history"], second["metrics"])


def test_the_same_training_in_another_service_has_the_same_digest(client: httpx.Client, tmp_path: Path) -> None:
    trainings: list[dict[str, Any]] = [MINI_BATCHES, {"method": "closed_form"}]
    here = [_train(client, "here", training)["result"]["digest"] for training in trainings]
    with serving(_settings(tmp_path), trainer=True) as (elsewhere, _):
        assert [_train(elsewhere, "there", training)["result"]["digest"] for training in trainings] == here
