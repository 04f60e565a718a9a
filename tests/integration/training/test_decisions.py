"""What a job reports of its evaluation, whether live moves, what it is compared with, and the retry of a job."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import torch

from adapters.training.execution.fit_client import Done, FitterDied, Outcomes
from adapters.training.execution.publisher import Publisher
from tests.support import training_oracle as world
from tests.support.service import train, wait_for_job

AUTO: dict[str, Any] = {"rank": "auto", "split": "auto", "publish": "if_not_worse"}
CLASSES: dict[str, Any] = AUTO | {"training": {"method": "auto", "loss": "cross_entropy"}}
_DRAW = torch.Generator().manual_seed(5)


def _rows(count: int) -> dict[str, Any]:
    """Rows whose classes the base layer names, each by the next number."""
    x_NI = torch.randn(count, world.INPUTS, generator=_DRAW)
    classes_N = (x_NI @ world.WEIGHT.T + world.BIAS).argmax(dim=1)
    return {"inputs": x_NI.tolist(), "targets": ((classes_N + 1) % world.OUTPUTS).tolist()}


def _upload(client: httpx.Client, name: str, rows: dict[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*(f"x{number}" for number in range(world.INPUTS)), "y", "tenant"])
    writer.writerows([*x, y, group] for x, y, group in zip(rows["inputs"], rows["targets"], groups, strict=True))
    client.put(f"/datasets/{name}", content=text.getvalue(), headers={"Content-Type": "text/csv"}).raise_for_status()
    return {"dataset": name, "inputs": {"prefix": "x"}, "targets": {"column": "y"}, "group_by": "tenant"}


def test_few_rows_are_judged_by_the_evidence_that_the_live_version_keeps(trained: httpx.Client) -> None:
    rows = _rows(60)
    first = train(trained, name="few", data=rows, **CLASSES)
    assert first["evaluation"]["by"] == "cross_validation"
    assert (first["evaluation"]["live"], first["decision"]["outcome"], first["decision"]["moved"]) == (
        None,
        "better",
        True,
    )
    again = train(trained, name="few", data=rows, **CLASSES)
    # The same rows give the same adapter. Live is judged by its out-of-sample errors, not by those of its training.
    assert again["evaluation"]["live"] == again["evaluation"]["adapter"] == first["evaluation"]["adapter"]
    assert (again["decision"]["outcome"], again["decision"]["gain"]) == ("same", 0)
    assert again["decision"]["moved"]


def test_a_version_that_is_not_made_live_names_its_job(trained: httpx.Client) -> None:
    rows = _rows(120)
    good = {"inputs": rows["inputs"], "targets": [(label - 1) % world.OUTPUTS for label in rows["targets"]]}
    body = {"rank": 2, "split": {"by": "rows", "fraction": 0.5}, "publish": "if_not_worse"}
    training = {"method": "adamw", "loss": "cross_entropy", "learning_rate": 1.0, "epochs": 20, "init": "randn"}
    job = train(trained, name="worse", data=good, training=training, **body)
    assert job["evaluation"]["base"] == 1
    assert (job["decision"]["outcome"], job["decision"]["moved"]) == ("worse", False)
    answer = trained.post("/predict", json={"adapter": "worse", "inputs": [[0] * world.INPUTS]})
    assert (answer.status_code, answer.json()["code"]) == (404, "adapter_not_live")
    assert job["id"] in answer.json()["detail"]


def test_a_fleet_decides_for_each_adapter_and_is_trained_again_in_part(trained: httpx.Client) -> None:
    rows = _rows(80)
    data = _upload(trained, "fleet-rows", rows, [f"t{number % 4}" for number in range(80)])
    first = train(trained, name="fleet-{tenant}", data=data, fleet_prior="fleet-start", **CLASSES)
    assert (first["status"], first["evaluation"], first["decision"]) == ("succeeded", None, None)
    assert first["summary"] == {"better": 4, "same": 0, "worse": 0, "failed": 0, "moved": 4}
    assert trained.get("/adapters/fleet-start").json()["live"]["version"] == 1
    listed = trained.get(f"/jobs/{first['id']}/adapters", params={"outcome": "better"}).json()["data"]
    assert [one["name"] for one in listed] == [f"fleet-t{number}" for number in range(4)]
    assert all(one["evaluation"]["by"] == "cross_validation" and one["auto"]["taken"] for one in listed)
    nothing = trained.post(f"/jobs/{first['id']}/retry", json={})
    assert (nothing.status_code, nothing.json()["code"]) == (409, "conflict")
    answer = trained.post(f"/jobs/{first['id']}/retry", json={"outcomes": ["better"], "training": {"seed": 1}})
    assert answer.status_code == 202, answer.text
    again = wait_for_job(trained, answer.json()["id"])
    assert (again["status"], again["spec"]["training"]["seed"]) == ("succeeded", 1)
    names = [one["name"] for one in trained.get(f"/jobs/{again['id']}/adapters").json()["data"]]
    assert names == [f"fleet-t{number}" for number in range(4)]
    trained.delete("/datasets/fleet-rows").raise_for_status()
    gone = trained.post(f"/jobs/{first['id']}/retry", json={"outcomes": ["better"]})
    assert (gone.status_code, gone.json()["code"]) == (409, "data_gone")


def _fleet(client: httpx.Client, name: str, data: dict[str, Any]) -> dict[str, Any]:
    """Train adapters whose names begin with `name`; return what each ended with, by group."""
    job = train(client, name=f"{name}-{{tenant}}", data=data, **CLASSES)
    assert job["status"] == "succeeded", job["error"]
    adapters = client.get(f"/jobs/{job['id']}/adapters", params={"limit": 1000}).raise_for_status().json()["data"]
    return {"attempt": job["attempt"]} | {
        one["group"]: (one["version"], one["digest"], one["evaluation"], one["decision"]) for one in adapters
    }


def test_a_fleet_that_dies_between_two_stacks_decides_as_if_it_had_not(
    trained: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [f"t{number % 70}" for number in range(350)]
    first, second = (_upload(trained, name, _rows(350), groups) for name in ("stack-rows", "more-stack-rows"))
    assert _fleet(trained, "calm", first) == _fleet(trained, "died", first)
    calm, published = _fleet(trained, "calm", second), list[int]()
    publish = Publisher.publish_outcomes

    def publish_and_die(publisher: Publisher, frame: Outcomes) -> int:
        published.append(publish(publisher, frame))
        if len(published) == 1:
            raise FitterDied
        return published[-1]

    monkeypatch.setattr(Publisher, "publish_outcomes", publish_and_die)
    died = _fleet(trained, "died", second)
    # The stack that was published before is not published again, and the version before it is still compared.
    assert published == [64, 0, 6]
    assert died == calm | {"attempt": 2}
    assert {died[group][0] for group in groups} == {2}


def test_live_that_moves_while_a_job_runs_stays(trained: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(60)
    train(trained, name="overtaken", data=rows, **CLASSES)
    other = train(trained, name="overtaken", data=rows, **CLASSES | {"publish": "never"})
    finish = Publisher.finish

    def finish_after_another(publisher: Publisher, frame: Done) -> bool:
        version = {"version": other["result"]["version"]}
        trained.put("/adapters/overtaken/aliases/live", json=version).raise_for_status()
        return finish(publisher, frame)

    monkeypatch.setattr(Publisher, "finish", finish_after_another)
    job = train(trained, name="overtaken", data=rows, **CLASSES)
    assert (job["status"], job["decision"]["moved"], job["decision"]["outcome"]) == ("succeeded", False, "same")
    assert "another version has become live" in job["decision"]["reason"]
    assert trained.get("/adapters/overtaken").json()["aliases"] == {"live": other["result"]["version"]}


def test_rows_in_the_request_cannot_be_trained_on_again(trained: httpx.Client) -> None:
    job = train(trained, name="inline", data=_rows(60), **CLASSES)
    answer = trained.post(f"/jobs/{job['id']}/retry", json={"outcomes": ["better"]})
    assert (answer.status_code, answer.json()["code"]) == (409, "data_gone")


@pytest.mark.parametrize("count", [60, 130])
def test_wrong_labels_are_the_first_suspects(trained: httpx.Client, count: int) -> None:
    rows = _rows(count)
    flipped = [3, 17, 40]
    right = [rows["targets"][row] for row in flipped]
    for row in flipped:
        rows["targets"][row] = (rows["targets"][row] + 1) % world.OUTPUTS
    job = train(trained, name=f"suspect-{count}", data=rows, **CLASSES)
    suspects = trained.get(f"/jobs/{job['id']}/suspects").json()["data"]
    scores = [one["score"] for one in suspects]
    assert scores == sorted(scores, reverse=True)
    suggested = {one["row"]: one["suggested"] for one in suspects}
    assert sum(suggested.get(row) == label for row, label in zip(flipped, right, strict=True)) >= 2
    regression = train(trained, name="no-suspects", rank=1, data=world.NUMBERS, training={"method": "closed_form"})
    answer = trained.get(f"/jobs/{regression['id']}/suspects")
    assert (answer.status_code, answer.json()["code"]) == (409, "no_suspects")
