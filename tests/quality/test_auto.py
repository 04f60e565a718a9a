"""Everything left to the data: about as good on other rows as settings by hand, and the job says what and why."""

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from scipy.special import log_softmax

from app.settings import Settings
from tests.harness import serving, train
from tests.quality.real_data import Array, Split, classes, numbers

OPEN = {"method": "auto", "learning_rate": "auto", "epochs": "auto", "batch_size": "auto"}
DESCENT = {
    "epochs": 60,
    "learning_rate": 0.01,
    "schedule": "cosine",
    "batch_size": 64,
    "early_stopping": {"patience": 15},
}
BY_HAND: dict[str, tuple[str, int, dict[str, Any]]] = {
    "digits": ("zeros:64,10", 10, DESCENT),
    "cancer": ("zeros:30,2", 2, DESCENT),
    "diabetes": ("zeros:10,1", 1, {"method": "closed_form", "ridge": 10}),
}


def _train(client: httpx.Client, rows: Split, rank: Any, training: dict[str, Any], **more: Any) -> dict[str, Any]:
    loss = "cross_entropy" if rows.targets.ndim == 1 else "mse"
    job = train(
        client,
        name="acme",
        rank=rank,
        data={"inputs": rows.inputs.tolist(), "targets": rows.targets.tolist()},
        training={"loss": loss, "bias": True, **training},
        **more,
    )
    assert job["status"] == "succeeded", job["error"]
    return job


def _test_loss(client: httpx.Client, split: Split) -> float:
    """Of the live version, on rows that neither side of any training had."""
    body = {"adapter": "acme", "inputs": split.test_inputs.tolist()}
    outputs_NO: Array = np.array(client.post("/predict", json=body).raise_for_status().json()["outputs"])
    if split.targets.ndim == 2:
        return float(((outputs_NO - split.test_targets) ** 2).mean())
    return float(-log_softmax(outputs_NO, axis=1)[np.arange(len(outputs_NO)), split.test_targets].mean())


@pytest.mark.parametrize("name", BY_HAND)
def test_it_is_within_a_few_percent_of_settings_by_hand(tmp_path: Path, name: str) -> None:
    base, rank, training = BY_HAND[name]
    split = numbers(name, 0) if name == "diabetes" else classes(name, 0)
    ridge = {"ridge": "auto"} if name == "diabetes" else {}
    with serving(Settings(base=base, data_dir=tmp_path), trainer=True) as (client, _):
        by_hand = _train(client, split, rank, training, split={"by": "rows"})
        loss_by_hand = _test_loss(client, split)
        job = _train(client, split, "auto", OPEN | ridge)
        loss = _test_loss(client, split)
        version = client.get("/adapters/acme").json()["live"]
    told = {who: each["metrics"]["validation_loss"] for who, each in (("by hand", by_hand), ("auto", job))}
    print(f"{name}: loss on other rows, auto {loss:.4f}, by hand {loss_by_hand:.4f}; held out {told}")
    for line in job["log"]:
        print("   ", line["text"])
    assert told["auto"] < 1.05 * told["by hand"]
    assert loss < 1.1 * loss_by_hand
    assert version["lineage"]["spec"]["rank"] == version["rank"]
