"""A gain that is none: the target says only which group a row is of, so that new groups are no better than guessed."""

# N rows · I in_features · O out_features
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupShuffleSplit

from app.settings import Settings
from tests.support.service import serving, train

pytestmark = pytest.mark.slow

PEOPLE, VISITS = 70, 4
IF_BETTER = {"when": "if_better", "metric": "rmse"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("groups")
    with serving(Settings(base="zeros:64,1", data_dir=folder / "data"), trainer=True) as (client, _):
        yield client


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    """A person is one real image, seen at every visit, at two of them to the last pixel, and one number by chance."""
    draw = np.random.default_rng(3)
    images_NI = load_digits().data[:PEOPLE].repeat(VISITS, axis=0) / 16
    noise_NI = draw.normal(scale=0.05, size=images_NI.shape)
    noise_NI[::VISITS] = noise_NI[1::VISITS] = 0
    person_N = np.arange(PEOPLE).repeat(VISITS)
    return {
        "inputs": (images_NI + noise_NI).tolist(),
        "targets": draw.normal(size=PEOPLE)[person_N][:, None].tolist(),
        "groups": [f"person-{number}" for number in person_N],
    }


def _train(client: httpx.Client, data: dict[str, Any], name: str, by: str, publish: Any) -> dict[str, Any]:
    training = {"method": "closed_form", "ridge": 1, "bias": True}
    job = train(client, name=name, rank=1, data=data, split={"by": by}, training=training, publish=publish)
    assert job["status"] == "succeeded", job["error"]
    return job


def test_a_split_by_group_shows_no_gain_and_live_stays(client: httpx.Client, data: dict[str, Any]) -> None:
    first = {**data, "targets": [[0.0] for _ in data["targets"]]}
    _train(client, first, "by-group", "group", "always")
    job = _train(client, data, "by-group", "group", IF_BETTER)
    held_out, gate = job["metrics"]["held_out"], job["metrics"]["gate"]
    for name, gain in (("rmse", 1), ("mae_mean", 1), ("r2_mean", -1)):
        assert gain * held_out["adapter"][name] > gain * held_out["base"][name]
    assert held_out["adapter"]["r2_mean"] < 0
    assert gate["moves_live"] is False
    assert gate["compared"]["base"] == held_out["base"]["rmse"]
    assert gate["reason"] == "its rmse does not beat that of the base layer"
    assert "warnings" not in job["spec"]
    adapter = client.get("/adapters/by-group").json()
    assert (adapter["live"]["version"], adapter["versions"]) == (1, 2)


def test_a_split_by_rows_shows_a_gain_that_leaks_and_warns_of_rows_on_both_sides(
    client: httpx.Client, data: dict[str, Any]
) -> None:
    job = _train(client, data, "by-rows", "rows", IF_BETTER)
    held_out = job["metrics"]["held_out"]
    assert held_out["adapter"]["r2_mean"] > 0.3
    assert job["metrics"]["gate"]["moves_live"] is True
    about_groups, warning = job["spec"]["warnings"]
    assert "groups have rows on both sides" in about_groups
    repeated = int(warning.split()[0])
    assert warning == f"{repeated} held-out rows have the inputs of a row that is trained on"
    assert 10 < repeated <= held_out["rows"]


def test_scikit_learn_sees_the_same_of_these_rows(data: dict[str, Any]) -> None:
    x_NI, y_N = np.array(data["inputs"]), np.array(data["targets"])[:, 0]
    train_K, held_K = next(GroupShuffleSplit(1, test_size=0.2, random_state=0).split(x_NI, y_N, data["groups"]))
    assert Ridge(1).fit(x_NI[train_K], y_N[train_K]).score(x_NI[held_K], y_N[held_K]) < 0
