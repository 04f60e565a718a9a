"""Settings of a named method left to the data: about as good as settings by hand, and the job says what and why."""

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from scipy.special import log_softmax

from app.settings import Settings
from tests.acceptance.quality.real_data import Array, Split, classes, numbers
from tests.support.service import serving, train

pytestmark = pytest.mark.slow

OPEN = {"learning_rate": "auto", "epochs": "auto", "batch_size": "auto"}
DESCENT = {"epochs": 150, "learning_rate": 0.005, "batch_size": 64, "early_stopping": {"patience": 15}}
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
        publish="always",
        **more,
    )
    assert job["status"] == "succeeded", job["error"]
    return job


def _wrong(client: httpx.Client, split: Split) -> float:
    """The share of wrong answers of the live version on such rows."""
    body = {"adapter": "acme", "inputs": split.test_inputs.tolist()}
    outputs_NO = np.array(client.post("/predict", json=body).raise_for_status().json()["outputs"])
    return float((outputs_NO.argmax(axis=1) != split.test_targets).mean())


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
    exact = training.get("method") == "closed_form"
    by_hand, auto = [], []
    with serving(Settings(base=base, data_dir=tmp_path), trainer=True) as (client, _):
        for seed in range(3):
            split = numbers(name, seed) if exact else classes(name, seed)
            _train(client, split, rank, training, split={"by": "rows"})
            by_hand.append(_test_loss(client, split))
            job = _train(client, split, "auto", {"method": "closed_form", "ridge": "auto"} if exact else OPEN)
            auto.append(_test_loss(client, split))
        version = client.get("/adapters/acme").json()["live"]
    print(f"{name}: loss on other rows, auto {np.mean(auto):.4f}, by hand {np.mean(by_hand):.4f}")
    assert np.mean(auto) < 1.08 * np.mean(by_hand)
    told, log = job["spec"]["auto"], " ".join(line["text"] for line in job["log"])
    assert told["split"].endswith("by held-out loss: a fifth of the rows")
    assert set(told) == {"split", "rank", *({"ridge"} if exact else {"learning_rate", "epochs", "batch_size"})}
    # What was chosen is in the log with its reason, and in the version as it is.
    chosen = version["lineage"]["spec"]
    assert chosen["rank"] == version["rank"]
    assert f"rank {version['rank']}" in log
    assert (f"ridge {chosen['ridge']:g}" if exact else f"learning_rate {chosen['learning_rate']:g}") in log


FEW: dict[str, tuple[str, float]] = {"digits": ("zeros:64,10", 0.98), "wine": ("zeros:13,3", 0.83)}


@pytest.mark.parametrize("name", FEW)
def test_of_a_few_dozen_rows_with_classes_all_are_trained_on(tmp_path: Path, name: str) -> None:
    """On other rows that is better than a fifth kept away to choose and to stop by."""
    base, test = FEW[name]
    kept_away, auto = [], []
    with serving(Settings(base=base, data_dir=tmp_path), trainer=True) as (client, _):
        for seed in range(4):
            split = classes(name, seed, test=test)
            assert len(split.inputs) < 50
            _train(client, split, "auto", OPEN, split={"by": "rows"})
            kept_away.append(_wrong(client, split))
            job = _train(client, split, "auto", OPEN)
            auto.append(_wrong(client, split))
    print(f"{name}: wrong on other rows: with all {np.mean(auto):.3f}, with a fifth held out {np.mean(kept_away):.3f}")
    assert np.mean(auto) < 0.95 * np.mean(kept_away)
    rows = len(split.inputs)
    assert "split" not in job["spec"]
    assert job["spec"]["auto"]["epochs"] == (
        f"about 200 steps, at least 5 epochs: {rows} rows are too few to hold some out and stop by them"
    )
    assert job["spec"]["auto"]["learning_rate"] == f"{rows} rows, too few to choose by: 0.01"
    assert len(job["history"]) == 200
