"""A gate compares the live version with a new one whose labels are in another order, as what both answer."""

# N rows · I in_features · O out_features · R rank · L labels of a version
import json
import struct
import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load
from safetensors.torch import save_file

from app.settings import Settings
from tests.support.dense_oracle import Float64
from tests.support.service import serving, train
from tests.support.training_columns import put

I, O, ROWS = 6, 5, 500
DRAW = np.random.default_rng(4)
HEAD = ["zulu", "mike", "alpha", "tango", "bravo"]
"""What the base layer's outputs are, in their order."""
TRUE = DRAW.normal(size=(O, I))
WEIGHT = (TRUE + 0.5 * DRAW.normal(size=(O, I))).astype(np.float32)
X = DRAW.normal(size=(ROWS, I)).astype(np.float32)
NAMES = np.array(HEAD)[(X @ TRUE.T + 0.7 * DRAW.normal(size=(ROWS, O))).argmax(1)]
HELD = np.arange(ROWS) % 2 == 0
DATA: dict[str, Any] = {"dataset": "rows", "inputs": {"column": "x"}, "targets": {"column": "name"}}
SPLIT = {"by": "column", "column": "held"}
BRIEF = {"loss": "cross_entropy", "epochs": 1, "learning_rate": 1e-4, "batch_size": None}
LONGER = BRIEF | {"epochs": 30, "learning_rate": 0.05}
METRICS = ["accuracy", "macro_f1", "loss"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("gate")
    save_file({"weight": torch.from_numpy(WEIGHT)}, folder / "base.safetensors")
    with serving(Settings(base=str(folder / "base.safetensors"), data_dir=folder / "data"), trainer=True) as (c, _):
        columns = {"x": pa.array(X.tolist(), pa.list_(pa.float32(), I)), "name": NAMES.tolist(), "held": HELD}
        put(c, "rows", columns)
        yield c


def _train(client: httpx.Client, name: str, training: dict[str, Any], **body: Any) -> dict[str, Any]:
    data = DATA | body.pop("data", {})
    job = train(client, name=name, rank=2, data=data, split=SPLIT, training=training, **body)
    assert job["status"] == "succeeded", job["error"]
    return job


def _gate(metric: str) -> dict[str, Any]:
    return {"when": "if_better", "metric": metric}


def _downloaded(client: httpx.Client, name: str, version: int) -> tuple[Float64, list[Any]]:
    """(O, I) W + s·A·B, and the labels, from what PEFT would load."""
    content = client.get(f"/adapters/{name}/download", params={"version": version}).raise_for_status().content
    with zipfile.ZipFile(BytesIO(content)) as archive:
        file = archive.read("adapter_model.safetensors")
        config = json.loads(archive.read("adapter_config.json"))
    (length,) = struct.unpack("<Q", file[:8])
    about = json.loads(json.loads(file[8 : 8 + length])["__metadata__"]["loraplex"])
    tensors = load(file)
    a_OR, b_RI = (tensors[f"base_model.model.linear.lora_{kind}.weight"].astype(np.float64) for kind in "BA")
    scaling = config["lora_alpha"] / config["r"]
    return WEIGHT.astype(np.float64) + scaling * a_OR @ b_RI, about.get("labels")


def _reached(client: httpx.Client, name: str, version: int) -> dict[str, float]:
    """Accuracy and cross-entropy of a version on the held-out rows, of what it answers by its own labels."""
    weight_OI, labels = _downloaded(client, name, version)
    y_NL = (X[HELD].astype(np.float64) @ weight_OI.T)[:, : len(labels)]
    said = [labels[place] for place in y_NL.argmax(1)]
    log_p_NL = y_NL - np.log(np.exp(y_NL).sum(1, keepdims=True))
    own = [log_p[labels.index(name)] for name, log_p in zip(NAMES[HELD], log_p_NL, strict=True)]
    return {"accuracy": float(np.mean(said == NAMES[HELD])), "loss": -float(np.mean(own))}


@pytest.mark.parametrize("metric", METRICS)
def test_a_worse_version_with_sorted_labels_does_not_replace_one_with_the_labels_of_the_head(
    client: httpx.Client, metric: str
) -> None:
    name = f"worse-{metric}"
    _train(client, name, BRIEF, data={"labels": HEAD})
    job = _train(client, name, LONGER | {"epochs": 4}, publish=_gate(metric))
    live, made = _reached(client, name, 1), _reached(client, name, 2)
    assert live["accuracy"] > 0.5 > made["accuracy"]
    assert client.get(f"/adapters/{name}/versions/2").json()["labels"] == sorted(HEAD)
    held_out, gate = job["metrics"]["held_out"], job["metrics"]["gate"]
    for who, wanted in (("live", live), ("adapter", made)):
        assert held_out[who]["accuracy"] == pytest.approx(wanted["accuracy"])
        assert held_out[who]["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert gate["compared"]["live"] == held_out["live"][metric]
    assert (gate["moves_live"], "the live version 1" in gate["reason"]) == (False, True)
    assert client.get(f"/adapters/{name}").json()["aliases"] == {"live": 1}


def test_a_better_version_does_whatever_the_order_of_its_labels(client: httpx.Client) -> None:
    turned = HEAD[2:] + HEAD[:2]
    _train(client, "better", BRIEF, data={"labels": turned})
    job = _train(client, "better", LONGER, data={"labels": HEAD}, publish=_gate("accuracy"))
    live, made = _reached(client, "better", 1), _reached(client, "better", 2)
    assert live["accuracy"] < made["accuracy"]
    assert job["metrics"]["gate"]["compared"]["live"] == pytest.approx(live["accuracy"])
    assert job["metrics"]["gate"]["moves_live"] is True
    assert client.get("/adapters/better").json()["aliases"] == {"live": 2}


def test_a_class_that_the_live_version_lacks_counts_as_wrong_for_it(client: httpx.Client) -> None:
    factors = {"A": [[0.0]] * O, "B": [[0.0] * I], "labels": HEAD[:4]}
    client.put("/adapters/fewer", json=factors).raise_for_status()
    job = _train(client, "fewer", LONGER, data={"labels": HEAD}, publish=_gate("accuracy"))
    y_NL = X[HELD].astype(np.float64) @ WEIGHT[:4].T
    said = np.array(HEAD[:4])[y_NL.argmax(1)]
    assert job["metrics"]["gate"]["compared"]["live"] == pytest.approx(float(np.mean(said == NAMES[HELD])))
    assert job["metrics"]["gate"]["moves_live"] is True


@pytest.mark.parametrize(("live", "why"), [(None, "it has no labels"), (["yes", "no"], "it has none of the labels")])
def test_live_stays_if_nothing_of_it_can_be_matched(client: httpx.Client, live: list[str] | None, why: str) -> None:
    name = f"unmatched-{'none' if live is None else 'others'}"
    factors = {"A": [[0.0]] * O, "B": [[0.0] * I]} | ({} if live is None else {"labels": live})
    client.put(f"/adapters/{name}", json=factors).raise_for_status()
    job = _train(client, name, LONGER, data={"labels": HEAD}, publish=_gate("accuracy"))
    gate = job["metrics"]["gate"]
    assert gate["moves_live"] is False
    assert gate["reason"].startswith("it cannot be compared with the live version 1: ")
    assert why in gate["reason"]
    assert set(gate["compared"]) == {"adapter", "base"}
    assert "live" not in job["metrics"]["held_out"]
    assert client.get(f"/adapters/{name}").json()["aliases"] == {"live": 1}
    # And what was made can be made live by hand.
    client.put(f"/adapters/{name}/aliases/live", json={"version": 2}).raise_for_status()


def test_one_class_a_row_is_not_compared_with_sets_of_labels(client: httpx.Client) -> None:
    rows = {"inputs": X.tolist(), "targets": [[name] for name in NAMES.tolist()], "labels": HEAD}
    training = {"loss": "binary_cross_entropy", "epochs": 1}
    assert train(client, name="sets", rank=2, data=rows, training=training)["status"] == "succeeded"
    job = _train(client, "sets", LONGER, data={"labels": HEAD}, publish=_gate("accuracy"))
    assert job["metrics"]["gate"]["moves_live"] is False
    assert "it was trained with binary_cross_entropy" in job["metrics"]["gate"]["reason"]


def test_a_training_does_not_start_from_an_adapter_whose_labels_are_of_other_outputs(client: httpx.Client) -> None:
    _train(client, "start", BRIEF, data={"labels": HEAD})
    body = {"name": "started", "rank": 2, "training": BRIEF | {"init": {"adapter": "start"}}}
    refused = client.post("/adapters", json=body | {"data": DATA})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_combination")
    assert (refused.json()["field"], refused.json()["given"]) == ("training.init.adapter", "start@1")
    assert "'alpha' is the label of output 2 of start@1, and of output 0 in this training" in refused.json()["detail"]
    assert "give data.labels" in refused.json()["detail"]
    for labels in (HEAD, [*HEAD[:4], "other"]):
        rows = {"inputs": X[:4].tolist(), "targets": HEAD[:4], "labels": labels}
        assert client.post("/adapters?dry_run=true", json=body | {"data": rows}).status_code == 200


def test_the_page_shows_why_live_stayed(client: httpx.Client) -> None:
    client.put("/adapters/page", json={"A": [[0.0]] * O, "B": [[0.0] * I]}).raise_for_status()
    job = _train(client, "page", BRIEF, publish=_gate("loss"))
    assert "cannot be compared with the live version 1" in client.get(f"/ui/jobs/{job['id']}").text
