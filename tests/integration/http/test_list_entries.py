"""Lists are summaries: an entry does not grow with the columns that an adapter was trained on."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from app.settings import Settings
from tests.support.service import serving, train
from tests.support.training_columns import put

INPUTS, OUTPUTS, ROWS = 384, 100, 120
NAMES = [f"embedding_component_number_{number}" for number in range(INPUTS)]
MOST_BYTES = 4096
"""Of one entry, which has the metrics of several sides."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service with one adapter that was trained on 384 columns, towards 100."""
    settings = Settings(base=f"zeros:{INPUTS},{OUTPUTS}", data_dir=tmp_path_factory.mktemp("wide") / "data")
    with serving(settings, trainer=True) as (client, _):
        x_NI = np.random.default_rng(0).normal(size=(ROWS, INPUTS)).astype(np.float32)
        targets = pa.FixedSizeListArray.from_arrays(pa.array(x_NI[:, :OUTPUTS].reshape(-1)), OUTPUTS)
        put(client, "wide", {name: x_NI[:, place] for place, name in enumerate(NAMES)} | {"y": targets})
        data = {"dataset": "wide", "inputs": {"columns": NAMES}, "targets": {"column": "y"}}
        how = {"method": "closed_form", "ridge": 1.0}
        for _ in range(2):
            train(client, name="acme", rank=4, data=data, training=how, split={"by": "rows", "fraction": 0.2})
        yield client


@pytest.mark.parametrize("path", ["/adapters", "/adapters/acme/versions"])
def test_an_entry_stays_small_whatever_the_columns(client: httpx.Client, path: str) -> None:
    answer = client.get(path).raise_for_status()
    assert "embedding_component" not in answer.text
    entries = answer.json()["data"]
    assert entries
    assert max(len(json.dumps(entry)) for entry in entries) < MOST_BYTES


def test_an_entry_has_the_metrics_that_are_one_number(client: httpx.Client) -> None:
    (adapter,) = client.get("/adapters").json()["data"]
    sides = adapter["live"]["metrics"]["held_out"]
    assert {"adapter", "base", "trivial"} <= set(sides)
    assert isinstance(sides["adapter"]["rmse"], float)
    assert "r2_per_output" not in sides["adapter"]
    lineage = adapter["live"]["lineage"]
    assert (lineage["loss"], lineage["data"]["inputs"]) == ("mse", {})


def test_a_version_and_an_adapter_by_themselves_have_everything(client: httpx.Client) -> None:
    version: dict[str, Any] = client.get("/adapters/acme/versions/2").json()
    assert version["lineage"]["data"]["inputs"]["columns"] == NAMES
    assert len(version["metrics"]["held_out"]["adapter"]["r2_per_output"]) == OUTPUTS
    assert client.get("/adapters/acme").json()["live"] == version
    again = client.put("/adapters/acme/aliases/live", json={"version": 2}).json()
    assert again["live"] == version


def test_jobs_are_found_by_how_their_ids_begin(client: httpx.Client) -> None:
    newest, oldest = (job["id"] for job in client.get("/jobs").json()["data"])
    for wanted in (newest, oldest):
        for size in (10, len(wanted)):
            found = client.get("/jobs", params={"prefix": wanted[:size]}).json()["data"]
            assert [job["id"] for job in found] == [wanted]
    assert client.get("/jobs", params={"prefix": newest[:10], "status": "failed"}).json()["data"] == []
    assert client.get("/jobs", params={"prefix": "zzzz"}).json()["data"] == []
    short = client.get("/jobs", params={"prefix": newest[:3]})
    assert (short.status_code, short.json()["field"]) == (422, "prefix")
