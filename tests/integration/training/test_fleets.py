"""Fleets over HTTP: one table, an adapter a group; what becomes of each, and what cancels, deletes and reverts do."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch

from adapters.training.planning import planner
from adapters.training.planning.estimate import Estimate, estimate_fleet
from adapters.training.planning.planner import submit
from app.http.schemas.trainings import training_request
from tests.conftest import Serve
from tests.integration.training.conftest import Running
from tests.support.catalog_factories import stored_files
from tests.support.service import eventually, train, wait_for_job
from tests.support.training_columns import put
from tests.support.training_oracle import BIAS, INPUTS, NUMBERS, OUTPUTS, RANK, WEIGHT, A, B, X, Y, published_delta

SIZES = {"ann": 9, "ben": 4, "cy": 21, "dee": 9}
TRAINING = {"epochs": 8, "batch_size": 8, "learning_rate": 0.05}
_SLOW = 40
"""Groups of a slow fleet, each of a size of its own, so that each is a batch of its own."""


def _rows(sizes: Sequence[int], seed: int = 0) -> tuple[list[list[float]], list[list[float]], list[int]]:
    """Inputs, targets and the number of the group of each row, in no order."""
    generator = np.random.default_rng(seed)
    groups = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    inputs, targets = (generator.normal(size=(len(groups), width)).round(3).tolist() for width in (INPUTS, OUTPUTS))
    return inputs, targets, groups.tolist()


def _inline(sizes: dict[str, int] = SIZES) -> dict[str, Any]:
    inputs, targets, groups = _rows(list(sizes.values()))
    return {"inputs": inputs, "targets": targets, "groups": [list(sizes)[group] for group in groups]}


def _of_group(data: dict[str, Any], group: object) -> dict[str, Any]:
    """The rows of one group, as they are sent to train it alone."""
    mine = [row for row, each in enumerate(data["groups"]) if each == group]
    return {name: [data[name][row] for row in mine] for name in ("inputs", "targets")}


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:8]


def _adapters(client: httpx.Client, job: dict[str, Any], **query: Any) -> dict[str, dict[str, Any]]:
    """What the job says of each, by its group."""
    page = client.get(f"/jobs/{job['id']}/adapters", params={"limit": 1000} | query).raise_for_status().json()
    return {each["group"]: each for each in page["data"]}


def _live(client: httpx.Client, name: str) -> int | None:
    aliases: dict[str, int] = client.get(f"/adapters/{name}").raise_for_status().json()["aliases"]
    return aliases.get("live")


def _submit_slow(client: httpx.Client, name: str) -> dict[str, Any]:
    """A fleet that lasts until something has been done to it; its groups are trained in the order of their numbers."""
    inputs, targets, groups = _rows([16 * (1 + number) for number in range(_SLOW)])
    data = {"inputs": inputs, "targets": targets, "groups": groups}
    training = {"epochs": 400, "batch_size": None}
    body = {"name": name, "rank": 1, "data": data, "training": {"method": "adamw"} | training}
    answer = client.post("/adapters", json=body)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def _wait_until_some_are_published(client: httpx.Client, job: dict[str, Any]) -> None:
    eventually(lambda: len(_adapters(client, job, status="published")) >= 2, what="the first adapters")


@pytest.fixture(scope="module")
def fleet(running: Running) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A fleet's job and its adapters."""
    client, _ = running
    job = train(client, name="acme-{group}", rank=RANK, data=_inline(), training=TRAINING)
    return job, _adapters(client, job)


def test_each_group_gets_the_adapter_that_it_gets_alone(trained: httpx.Client, fleet: Any) -> None:
    job, adapters = fleet
    assert (job["status"], job["result"], job["adapter"]) == ("succeeded", None, "acme-{group}"), job
    assert job["metrics"] == {"published": 4, "failed": 0, "total": 4}
    assert job["progress"]["adapters"] == job["metrics"]
    assert (job["progress"]["step"], job["progress"]["steps"]) == (4, 4)
    assert list(adapters) == sorted(SIZES)
    data = _inline()
    for group, size in SIZES.items():
        told = adapters[group]
        assert (told["name"], told["rows"], told["version"], told["error"]) == (f"acme-{group}", size, 1, None)
        alone = train(trained, name=f"alone-{group}", rank=RANK, data=_of_group(data, group), training=TRAINING)
        assert told["digest"] == alone["result"]["digest"]
        assert set(told["metrics"]) == {
            f"{who}{side}_loss" for who in ("", "base_") for side in ("train", "validation")
        }
        for name, value in told["metrics"].items():
            wanted = alone["metrics"][name]
            assert value is None if wanted is None else value == pytest.approx(wanted, rel=1e-9)


def _estimate_scratch(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Plan fleets as if they did not fit in memory."""

    def on_disk(*arguments: Any, **names: Any) -> Estimate:
        return replace(estimate_fleet(*arguments, **names), scratch_bytes=size)

    monkeypatch.setattr(planner, "estimate_fleet", on_disk)


@pytest.mark.parametrize("method", ["adamw", "closed_form", "auto"])
def test_a_fleet_that_does_not_fit_in_memory_gets_the_same_adapters(
    trained: httpx.Client, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    body: dict[str, Any] = {"rank": RANK, "data": _inline(), "training": {"method": method}, "publish": "always"}
    in_memory = train(trained, name=f"memory-{method}-{{group}}", **body)
    _estimate_scratch(monkeypatch, 2**20)
    on_disk = train(trained, name=f"disk-{method}-{{group}}", **body)
    assert on_disk["metrics"] == in_memory["metrics"] == {"published": 4, "failed": 0, "total": 4}
    digests = [
        {group: told["digest"] for group, told in _adapters(trained, job).items()} for job in (in_memory, on_disk)
    ]
    assert digests[0] == digests[1]
    said = ["sorted by group on disk" in " ".join(line["text"] for line in job["log"]) for job in (in_memory, on_disk)]
    assert said == [False, True]


def test_a_fleet_for_which_the_disk_is_too_small_fails_before_it_begins(
    trained: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    _estimate_scratch(monkeypatch, 2**60)
    job = train(trained, name="huge-{group}", rank=RANK, data=_inline(), training=TRAINING)
    assert (job["status"], job["error"]["code"]) == ("failed", "storage_full")
    assert job["error"]["expected"] == f"about {2**60} free bytes"


def test_a_fleet_s_adapters_answer_with_their_own_layer(trained: httpx.Client, fleet: Any) -> None:
    data = _inline()
    names = [f"acme-{group}" for group in data["groups"]]
    answer = trained.post("/predict", json={"adapters": names, "inputs": data["inputs"]}).raise_for_status().json()
    for group in SIZES:
        mine = [row for row, each in enumerate(data["groups"]) if each == group]
        weight_OI = WEIGHT.double() + published_delta(trained, f"acme-{group}")
        wanted = torch.tensor(data["inputs"]).double()[mine] @ weight_OI.T + BIAS.double()
        np.testing.assert_allclose(np.array(answer["outputs"])[mine], wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_each_version_tells_its_own_rows_and_metrics_and_the_job_of_all(trained: httpx.Client, fleet: Any) -> None:
    job, adapters = fleet
    for group, size in SIZES.items():
        version = trained.get(f"/adapters/acme-{group}/versions/1").raise_for_status().json()
        assert (version["source"], version["job"], version["digest"]) == ("job", job["id"], adapters[group]["digest"])
        assert version["metrics"] == adapters[group]["metrics"]
        assert version["lineage"]["rows"] == size
        assert version["lineage"]["data"]["rows"] == sum(SIZES.values())
    assert [each["id"] for each in trained.get("/jobs", params={"adapter": "acme-cy"}).json()["data"]] == [job["id"]]


@pytest.mark.parametrize("column", ["tenant", "number"])
def test_a_column_of_a_data_set_says_whose_each_row_is(trained: httpx.Client, column: str) -> None:
    data = _inline()
    numbers = [sorted(SIZES).index(group) for group in data["groups"]]
    put(
        trained,
        f"table-{column}",
        {
            "x": pa.array(data["inputs"], pa.list_(pa.float32(), INPUTS)),
            "y": pa.array(data["targets"], pa.list_(pa.float32(), OUTPUTS)),
            "tenant": pa.array(data["groups"]),
            "number": pa.array(numbers),
        },
    )
    rows = {"dataset": f"table-{column}", "inputs": {"column": "x"}, "targets": {"column": "y"}, "group_by": column}
    job = train(trained, name=f"of-{{{column}}}", rank=RANK, data=rows, training=TRAINING)
    assert job["status"] == "succeeded", job["error"]
    adapters = _adapters(trained, job)
    values = sorted(SIZES) if column == "tenant" else ["0", "1", "2", "3"]
    assert [(each["name"], each["group"]) for each in adapters.values()] == [(f"of-{one}", one) for one in values]
    inline = train(trained, name="same-{group}", rank=RANK, data=data, training=TRAINING)
    same = [each["digest"] for each in _adapters(trained, inline).values()]
    assert [each["digest"] for each in adapters.values()] == same
    assert job["spec"]["data"]["group_by"] == column


def test_the_columns_of_a_csv_make_a_fleet(trained: httpx.Client) -> None:
    inputs, targets, groups = _rows([5, 7])
    names = [f"x{n}" for n in range(INPUTS)] + [f"y{n}" for n in range(OUTPUTS)] + ["who"]
    lines = [",".join(map(str, [*x, *y, f"w{who}"])) for x, y, who in zip(inputs, targets, groups, strict=True)]
    csv = "\n".join([",".join(names), *lines]) + "\n"
    trained.put("/datasets/csv", content=csv.encode(), headers={"Content-Type": "text/csv"}).raise_for_status()
    rows = {"dataset": "csv@1", "inputs": {"prefix": "x"}, "targets": {"prefix": "y"}, "group_by": "who"}
    job = train(trained, name="{who}.csv", rank=1, data=rows, training={"method": "closed_form", "ridge": 1})
    assert {each["name"]: each["rows"] for each in _adapters(trained, job).values()} == {"w0.csv": 5, "w1.csv": 7}
    x, y = (np.array(each)[np.array(groups) == 1] for each in (inputs, targets))
    residual = y - x @ WEIGHT.double().numpy().T - BIAS.double().numpy()
    gram = x.T @ x + np.eye(INPUTS)
    full = np.linalg.solve(gram, x.T @ residual).T
    left, strength, right = np.linalg.svd(full @ np.linalg.cholesky(gram))
    wanted = strength[0] * np.outer(left[:, 0], right[0]) @ np.linalg.inv(np.linalg.cholesky(gram))
    np.testing.assert_allclose(published_delta(trained, "w1.csv").numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_groups_that_cannot_be_trained_are_told_and_hurt_nobody(trained: httpx.Client) -> None:
    sizes = {"large": 20, "one": 1, "two": 2, "wild": 12}
    data = _inline(sizes)
    for row, group in enumerate(data["groups"]):
        if group == "wild":
            data["targets"][row] = [3e38, -3e38, 3e38]
    body = {"name": "mixed-{group}", "rank": 1, "data": data, "split": {"by": "rows", "fraction": 0.25}}
    job = train(trained, **body, training={"method": "sgd"})
    assert (job["status"], job["error"]) == ("succeeded", None)
    assert job["metrics"] == {"published": 2, "failed": 2, "total": 4}
    failed = _adapters(trained, job, status="failed")
    assert {group: each["error"]["code"] for group, each in failed.items()} == {
        "one": "out_of_range",
        "wild": "diverged",
    }
    assert "1 rows" in failed["one"]["error"]["detail"]
    assert failed["wild"]["error"]["step"] == 1
    assert all(each["version"] is each["metrics"] is None for each in failed.values())
    assert list(_adapters(trained, job, status="published")) == ["large", "two"]
    assert trained.get("/adapters/mixed-one").status_code == 404


def test_a_fleet_of_which_no_group_can_be_trained_has_failed(trained: httpx.Client) -> None:
    data = _inline() | {"targets": [[3e38, -3e38, 3e38]] * sum(SIZES.values())}
    job = train(trained, name="none-{group}", rank=1, data=data, training=TRAINING)
    assert (job["status"], job["error"]["code"]) == ("failed", "fleet_failed")
    assert job["id"] in job["error"]["detail"]
    assert {each["error"]["code"] for each in _adapters(trained, job).values()} == {"diverged"}
    assert trained.get("/adapters", params={"prefix": "none-"}).json()["data"] == []


def test_a_split_that_no_group_stands_is_refused_at_once(trained: httpx.Client) -> None:
    body = {"name": "none-{group}", "rank": 1, "data": _inline({"a": 1, "b": 2}), "split": {"by": "rows"}}
    answer = trained.post("/adapters", json=body)
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (422, "out_of_range", "split")


def test_never_makes_versions_that_are_not_live(trained: httpx.Client) -> None:
    job = train(trained, name="draft-{group}", rank=RANK, data=_inline(), training=TRAINING, publish="never")
    assert [each["version"] for each in _adapters(trained, job).values()] == [1] * 4
    assert {_live(trained, f"draft-{group}") for group in SIZES} == {None}
    assert not any(each["moved_live"] for each in _adapters(trained, job).values())


def test_a_cancel_keeps_what_is_published_and_a_revert_takes_it_back(trained: httpx.Client) -> None:
    trained.put("/adapters/slow-1", json={"A": A.tolist(), "B": B.tolist()}).raise_for_status()
    job = _submit_slow(trained, "slow-{group}")
    early = trained.post(f"/jobs/{job['id']}/revert")
    assert (early.status_code, early.json()["code"]) == (409, "job_not_ended")
    _wait_until_some_are_published(trained, job)
    cancelled = trained.post(f"/jobs/{job['id']}/cancel").raise_for_status().json()
    assert (cancelled["status"], cancelled["result"]) == ("cancelled", None)
    published = _adapters(trained, job, status="published")
    assert 2 <= len(published) < _SLOW
    names = {each["name"] for each in published.values()}
    listed = trained.get("/adapters", params={"prefix": "slow-", "limit": 1000}).json()["data"]
    assert {each["name"] for each in listed} == names
    waiting = _adapters(trained, job, status="waiting")
    assert len(waiting) == _SLOW - len(published)
    assert all(each["version"] is each["error"] is None for each in waiting.values())
    # Another fleet is trained meanwhile: the trainer has left this one.
    assert train(trained, name="next-{group}", rank=1, data=_inline(), training=TRAINING)["status"] == "succeeded"
    assert _adapters(trained, job, status="published") == published

    assert _live(trained, "slow-1") == published["1"]["version"] == 2
    done = trained.post(f"/jobs/{job['id']}/revert").raise_for_status().json()
    assert {(each["name"], each["from"], each["to"]) for each in done["reverted"]} == {
        (name, 2, 1) if name == "slow-1" else (name, 1, None) for name in names
    }
    assert len(done["skipped"]) == len(waiting)
    assert {_live(trained, name) for name in names} == {1, None}


def test_an_adapter_that_is_deleted_while_its_fleet_trains_fails_alone(trained: httpx.Client) -> None:
    name = f"kept-{_SLOW - 1}"
    for _ in range(2):
        trained.put(f"/adapters/{name}", json={"A": A.tolist(), "B": B.tolist()}).raise_for_status()
    job = _submit_slow(trained, "kept-{group}")
    _wait_until_some_are_published(trained, job)
    trained.delete(f"/adapters/{name}").raise_for_status()
    assert str(_SLOW - 1) in _adapters(trained, job, status="waiting")
    ended = wait_for_job(trained, job["id"])
    assert ended["status"] == "succeeded"
    assert ended["metrics"] == {"published": _SLOW - 1, "failed": 1, "total": _SLOW}
    ((group, failed),) = _adapters(trained, job, status="failed").items()
    assert (group, failed["error"]["code"]) == (str(_SLOW - 1), "adapter_deleted")
    assert trained.get(f"/adapters/{name}").status_code == 404


def test_what_a_fleet_made_is_deleted_and_made_again_one_by_one(trained: httpx.Client) -> None:
    body = {"name": "again-{group}", "rank": RANK, "data": _inline(), "training": TRAINING}
    first = _adapters(trained, train(trained, **body))
    trained.delete("/adapters/again-ben").raise_for_status()
    # Versions of a batch share a file, which stays for the others.
    answer = trained.get("/adapters/again-ann/download")
    assert answer.status_code == 200
    second = _adapters(trained, train(trained, **body))
    # A number is never given twice; the same rows give the same bytes.
    assert {group: each["version"] for group, each in second.items()} == dict.fromkeys(SIZES, 2)
    assert {group: each["digest"] for group, each in second.items()} == {
        group: each["digest"] for group, each in first.items()
    }
    assert [trained.get("/adapters/again-ben").json()["versions"], _live(trained, "again-ben")] == [1, 2]
    assert trained.get("/adapters/again-ann").json()["versions"] == 2


@pytest.fixture(scope="module")
def grouped(running: Running) -> dict[str, Any]:
    """A request's words for a data set with a column of groups."""
    columns = {
        "x": pa.array([[0.0] * INPUTS] * 3, pa.list_(pa.float32(), INPUTS)),
        "y": pa.array([[0.0] * OUTPUTS] * 3, pa.list_(pa.float32(), OUTPUTS)),
        "tenant": pa.array(["a", "b c", "d"]),
    }
    put(running[0], "grouped", columns)
    return {"dataset": "grouped", "inputs": {"column": "x"}, "targets": {"column": "y"}, "group_by": "tenant"}


@pytest.mark.parametrize(
    ("name", "changed", "code", "field", "says"),
    [
        ("acme", {}, "invalid_combination", "name", "{tenant}"),
        ("acme-{tenant}", {"group_by": None}, "wrong_type", "data.group_by", "null"),
        ("acme-{tenant}", {"group_by": "tennant"}, None, "data.group_by", "tennant"),
        ("acme-{group}", {}, "invalid_name", "name", "{tenant}"),
        ("{tenant}-{tenant}", {}, "invalid_name", "name", "once"),
        ("{tenant}-{x}", {}, "invalid_name", "name", "no other"),
        ("acme {tenant}", {}, "invalid_name", None, "'a'"),
    ],
)
def test_a_template_that_does_not_go_with_the_data_is_refused(
    trained: httpx.Client,
    grouped: dict[str, Any],
    name: str,
    changed: dict[str, Any],
    code: str | None,
    field: str | None,
    says: str,
) -> None:
    answer = trained.post("/adapters", json={"name": name, "rank": 1, "data": grouped | changed})
    problem = answer.json()
    assert answer.status_code == 422, problem
    assert code in (None, problem["code"])
    assert field in (None, problem["field"])
    assert says in f"{problem['detail']} {problem.get('given')}"


def test_a_group_whose_value_makes_no_name_has_its_slug_and_its_hash_in_every_job(trained: httpx.Client) -> None:
    names = {
        "Kunde 0": f"acme-kunde-0-{_hash('Kunde 0')}",
        "Müller & Söhne": f"acme-muller-sohne-{_hash('Müller & Söhne')}",
        "日本": f"acme-group-{_hash('日本')}",
        "plain": "acme-plain",
    }
    for groups in (list(names), [*names, "another"]):
        rows = len(groups) * 2
        data = {"inputs": X[:rows].tolist(), "targets": Y[:rows].tolist(), "groups": groups * 2}
        job = train(trained, name="acme-{group}", data=data, publish="never")
        assert {group: each["name"] for group, each in _adapters(trained, job).items()}.items() >= names.items()
        assert {entry["group"]: entry["name"] for entry in job["spec"]["renamed"]}.items() < names.items()
        assert job["spec"]["renamed_count"] == 3


def test_a_fleet_prior_is_one_more_adapter_of_the_job(trained: httpx.Client) -> None:
    body = {"name": "some-{group}", "data": _inline(), "training": {"method": "auto"}, "fleet_prior": "start"}
    plan = trained.post("/adapters?dry_run=true", json=body).raise_for_status().json()
    assert (plan["adapters"], plan["spec"]["fleet_prior"]) == (len(SIZES) + 1, "start")
    for changed, says in (
        ({"fleet_prior": "some-ann"}, "some-ann"),
        ({"name": "some", "data": NUMBERS}, "no fleet"),
        ({"training": {"epochs": 3}}, "candidates"),
        ({"training": {"method": "adamw"}}, "candidates"),
    ):
        problem = trained.post("/adapters", json=body | changed).json()
        assert (problem["code"], problem["field"]) == ("invalid_combination", "fleet_prior")
        assert says in problem["detail"]


@pytest.mark.parametrize("training", [{"method": "adamw"} | TRAINING, {"method": "auto"}], ids=["adamw", "auto"])
def test_some_groups_of_a_fleet_are_trained_again_beside_the_others_rows(
    running: Running, training: dict[str, Any]
) -> None:
    client, service = running
    body = {"name": f"part-{training['method']}-{{group}}", "data": _inline(), "training": training}
    first = _adapters(client, train(client, **body))
    planner = service.planner("default")
    plan = planner.plan(training_request(body), only_groups={"ben", "dee"})
    assert [(each.group, each.position) for each in plan.adapters] == [("ben", 1), ("dee", 3)]
    queued = submit(plan, service.queue, job_id=service.new_id(), planner=planner, max_queued=10)
    job = wait_for_job(client, queued.id)
    assert job["status"] == "succeeded", job["error"]
    second = _adapters(client, job)
    assert {group: each["version"] for group, each in second.items()} == {"ben": 2, "dee": 2}
    assert {group: each["digest"] for group, each in second.items()} == {
        group: first[group]["digest"] for group in second
    }


def test_a_fleet_of_too_many_groups_is_refused_before_anything_is_stored(serve: Serve) -> None:
    client, service = serve(max_groups=3)
    data = {"inputs": [[0.0] * 10] * 4, "targets": [[0.0] * 2] * 4, "groups": [1, 2, 3, 4]}
    answer = client.post("/adapters", json={"name": "acme-{group}", "rank": 1, "data": data})
    assert (answer.status_code, answer.json()["code"]) == (422, "out_of_range")
    assert "LORAPLEX_MAX_GROUPS" in answer.json()["detail"]
    assert client.get("/jobs").json()["data"] == []
    assert stored_files(service.settings.data_dir) == set()
