"""A base layer whose outputs have names: it is matched, evaluated and answered by label."""

# N rows · I in_features · O out_features
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from app.bootstrap import load_base
from app.settings import EXIT_CONFIG, Settings, exit_if_unusable
from tests.support.service import serving, train, wait_for_job

I, O, ROWS = 6, 5, 300
DRAW = np.random.default_rng(4)
HEAD = ["zulu", "mike", "alpha"]
"""The last two outputs of the base layer have no label."""
WEIGHT = DRAW.normal(size=(O, I)).astype(np.float32)
WEIGHT[len(HEAD) :] *= 0.01
X = DRAW.normal(size=(ROWS, I)).astype(np.float32)
SAID = np.array(HEAD)[(X @ WEIGHT.T)[:, : len(HEAD)].argmax(1)]
SPLIT = {"by": "rows", "fraction": 0.25}
BRIEF = {"method": "adamw", "loss": "cross_entropy", "epochs": 1, "learning_rate": 1e-5, "batch_size": None}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("labels")
    file = folder / "base.safetensors"
    save_file({"weight": torch.from_numpy(WEIGHT)}, file, metadata={"labels": json.dumps(HEAD)})
    with serving(Settings(base=str(file), data_dir=folder / "data"), trainer=True) as (connected, _):
        yield connected


def _held_out(client: httpx.Client, name: str, targets: Any, **data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics on the held-out rows of a training that changes next to nothing, and its version."""
    rows = {"inputs": X.tolist(), "targets": list(targets), **data}
    job = train(client, name=name, rank=1, data=rows, split=SPLIT, training=BRIEF, publish="always")
    assert job["status"] == "succeeded", job["error"]
    version = client.get(f"/adapters/{name}").raise_for_status().json()["live"]
    return job["metrics"], version


def test_the_base_layer_shows_its_labels(client: httpx.Client) -> None:
    assert client.get("/base").json()["labels"] == HEAD


def test_the_base_layer_is_right_about_its_own_labels_in_whatever_order_they_come(client: httpx.Client) -> None:
    metrics, version = _held_out(client, "own", SAID)
    assert version["labels"] == HEAD
    assert (metrics["held_out"]["base"]["accuracy"], metrics["base_validation_accuracy"]) == (1, 1)
    # The order of the request moves the classes to other outputs, and the base layer is still matched by label.
    metrics, version = _held_out(client, "moved", SAID, labels=sorted(HEAD))
    assert version["labels"] == sorted(HEAD)
    assert (metrics["held_out"]["base"]["accuracy"], metrics["base_validation_accuracy"]) == (1, 1)
    assert metrics["held_out"]["adapter"]["accuracy"] < 0.6


def test_a_new_label_takes_a_free_output_and_the_base_layer_never_says_it(client: httpx.Client) -> None:
    new = np.where(X[:, 0] > 0, "new", SAID)
    metrics, version = _held_out(client, "new", new)
    assert version["labels"] == [*HEAD, "new"]
    known = metrics["held_out"]["base"]["accuracy"]
    assert 0.3 < known < 0.7


def test_a_base_layer_without_any_of_the_labels_is_never_right(client: httpx.Client) -> None:
    metrics, version = _held_out(client, "other", np.where(X[:, 0] > 0, "yes", "no"))
    assert version["labels"] == ["no", "yes"]
    assert metrics["held_out"]["base"]["accuracy"] == 0
    assert metrics["held_out"]["base"]["loss"] == pytest.approx(-np.log(np.finfo(np.float64).eps))


@pytest.mark.parametrize(
    ("targets", "accuracies"),
    [(SAID, (1, 1)), (np.where(X[:, 0] > 0, "new", SAID), (0.1, 0.9)), (np.where(X[:, 0] > 0, "yes", "no"), (0, 0))],
    ids=["its own", "known and new", "other"],
)
def test_the_base_layer_is_matched_by_label_for_each_adapter_of_a_fleet(
    client: httpx.Client, targets: Any, accuracies: tuple[float, float]
) -> None:
    groups = [f"g{row % 3}" for row in range(ROWS)]
    rows = {"inputs": X.tolist(), "targets": list(targets), "groups": groups}
    job = train(client, name="fleet-{group}", rank=1, data=rows, split=SPLIT, training=BRIEF, publish="always")
    assert job["status"] == "succeeded", job["error"]
    for adapter in client.get(f"/jobs/{job['id']}/adapters").raise_for_status().json()["data"]:
        low, high = accuracies
        assert low <= adapter["metrics"]["base_validation_accuracy"] <= high
        if high == 0:
            assert adapter["metrics"]["base_train_loss"] == pytest.approx(-np.log(np.finfo(np.float64).eps))


def test_an_evaluation_matches_the_base_layer_and_versions_without_labels_by_its_labels(client: httpx.Client) -> None:
    client.put("/adapters/silent", json={"A": [[0.0]] * O, "B": [[1.0] * I]}).raise_for_status()
    rows = {"inputs": X.tolist(), "targets": SAID.tolist()}
    body = {"adapters": [None, "silent"], "data": rows}
    job = client.post("/evaluations", json=body).raise_for_status().json()
    ended = wait_for_job(client, job["id"])
    assert [entry["figure"] for entry in ended["result"]["adapters"]] == [1, 1]


def test_answers_name_the_classes_of_the_base_layer(client: httpx.Client) -> None:
    factors = {"A": [[0.0]] * O, "B": [[1.0] * I]}
    client.put("/adapters/unlabelled", json=factors).raise_for_status()
    for adapter in (None, "unlabelled"):
        body = {"adapter": adapter, "inputs": X.tolist(), "return": ["labels", "probabilities"]}
        answer = client.post("/predict", json=body).raise_for_status().json()
        assert answer["labels"] == SAID.tolist()
        assert {len(row) for row in answer["probabilities"]} == {len(HEAD)}
        tensor = {"name": "inputs", "shape": [ROWS, I], "datatype": "FP32", "data": X.tolist()}
        output = {"name": "outputs", "parameters": {"classification": 1}}
        infer = {"inputs": [tensor], "outputs": [output]}
        model = client.post(f"/v2/models/{adapter or '__base__'}/infer", json=infer).raise_for_status().json()
        assert [element.split(":")[2] for element in model["outputs"][0]["data"]] == SAID.tolist()


def test_labels_that_cannot_name_the_outputs_end_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:

    with pytest.raises(SystemExit) as caught, exit_if_unusable():
        load_base(Settings(base="random:3,2,1", base_labels='["a", "a"]', data_dir=tmp_path))
    assert caught.value.code == EXIT_CONFIG
    assert "the labels of the base layer, position 1" in capfd.readouterr().err
