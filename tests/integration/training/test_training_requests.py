"""What a job, and a dry run, say of a request to train: its settings, and what was decided for it."""

# N rows
from typing import Any

import httpx
import pytest
import torch

from tests.conftest import Serve
from tests.integration.training.conftest import Running
from tests.support.service import train, wait_for_job
from tests.support.training_columns import COLUMNS, DATA, GROUPS, HALF, UNEVALUATED, plan_of, put, spec_of
from tests.support.training_oracle import INPUTS, LABELS, NUMBERS, OUTPUTS, RANK, ROWS, X, Y

PLAIN = {
    "method": "adamw",
    "loss": "mse",
    "epochs": 50,
    "learning_rate": 0.01,
    "batch_size": 64,
    "seed": 0,
    "init": "zero_delta",
    "validation_fraction": 0,
}


def test_a_dry_run_says_what_the_job_then_says_and_stores_nothing(serve: Serve) -> None:
    client, service = serve(base=f"random:{INPUTS},{OUTPUTS},1")
    folder = service.settings.data_dir
    before = [service.catalog.revision(), sorted((folder / "blobs").iterdir()), client.get("/jobs").json()["data"]]
    body = {"name": "plan", "rank": RANK, "data": NUMBERS, "split": HALF, "training": {"batch_size": "auto"}}
    plan = client.post("/adapters?dry_run=true", json=body)
    assert [
        service.catalog.revision(),
        sorted((folder / "blobs").iterdir()),
        client.get("/jobs").json()["data"],
    ] == before
    assert plan.json().keys() == {"spec", "estimate", "adapters"}
    assert plan.json()["adapters"] == 1
    estimate = plan.json()["estimate"]
    assert estimate.pop("scratch_bytes") == 0
    assert estimate.keys() == {"memory_bytes", "seconds"}
    assert all(value > 0 for value in estimate.values())
    for query in ("", "?dry_run=false"):
        job = client.post(f"/adapters{query}", json=body)
        assert job.status_code == 202
        assert job.json()["spec"] == plan.json()["spec"]


def test_a_plain_request_shows_what_it_always_has(trained: httpx.Client) -> None:
    spec = spec_of(trained)
    assert spec.pop("data").keys() == {"rows", "digest"}
    rest = {"publish": "if_not_worse", "warnings": [UNEVALUATED]}
    assert spec == {"name": "plan", "rank": RANK, "alpha": RANK, "training": PLAIN} | rest


def test_a_request_that_names_a_method_has_the_plain_values_of_what_it_leaves_out(trained: httpx.Client) -> None:
    body = {"name": "plan", "data": NUMBERS, "training": {"method": "adamw"}}
    spec = trained.post("/adapters?dry_run=true", json=body).json()["spec"]
    assert (spec["rank"], spec["alpha"], spec["training"]) == (4, 4.0, PLAIN)
    assert "split" not in spec
    # Numbers are not classes then.
    classes = trained.post("/adapters?dry_run=true", json=body | {"data": LABELS}).json()
    assert (classes["code"], classes["field"]) == ("wrong_type", "data.targets")


def test_a_request_of_a_name_and_rows_alone_compares_and_evaluates(trained: httpx.Client) -> None:
    spec = trained.post("/adapters?dry_run=true", json={"name": "plan", "data": LABELS}).json()["spec"]
    assert (spec["rank"], spec["alpha"], spec["publish"]) == ("auto", "auto", "if_not_worse")
    candidates = ["base", "ridge", "ridge_in_base_metric", "own_head"]
    training = {"method": "auto", "loss": "cross_entropy", "bias": "auto", "seed": 0, "candidates": candidates}
    assert spec["training"] == training
    assert spec["split"]["by"] == "cross_validation"
    assert (spec["split"]["folds"], spec["split"]["train"]["rows"]) == (5, ROWS)
    assert spec["auto"] == {"adamw": f"{ROWS} rows are fewer than 100"}
    assert "warnings" not in spec


def test_a_hundred_rows_are_held_out_by_their_hash(trained: httpx.Client) -> None:
    x_NI = torch.randn(200, INPUTS, generator=torch.Generator().manual_seed(1))
    data: dict[str, Any] = {"inputs": x_NI.tolist(), "targets": x_NI[:, :OUTPUTS].tolist()}
    spec = trained.post("/adapters?dry_run=true", json={"name": "plan", "data": data}).json()["spec"]
    assert spec["training"]["loss"] == "mse"
    assert spec["training"]["candidates"][-1] == "adamw"
    split = spec["split"]
    assert (split["by"], split["fraction"]) == ("hash", 0.2)
    assert split["train"]["rows"] + split["held_out"]["rows"] == 200
    assert 20 < split["held_out"]["rows"] < 60
    # Of a fleet, only the groups of a hundred rows.
    fleet = {"name": "plan-{group}", "data": data | {"groups": ["a"] * 150 + ["b"] * 50}}
    split = trained.post("/adapters?dry_run=true", json=fleet).json()["spec"]["split"]
    assert (split["by"], split["cross_validated"]) == ("hash", {"adapters": 1, "rows": 50})
    assert split["train"]["rows"] + split["held_out"]["rows"] == 200


def test_a_hash_keeps_groups_and_equal_rows_on_one_side(trained: httpx.Client) -> None:
    x_NI = torch.randn(150, INPUTS, generator=torch.Generator().manual_seed(2)).tolist()
    data: dict[str, Any] = {"inputs": x_NI * 2, "targets": [row[:OUTPUTS] for row in x_NI] * 2}
    for grouped in (data, data | {"groups": [f"g{row % 50}" for row in range(300)]}):
        spec = trained.post("/adapters?dry_run=true", json={"name": "plan", "data": grouped}).json()["spec"]
        assert "warnings" not in spec
        assert spec["split"]["held_out"]["rows"] > 0
    assert spec["split"]["train"]["groups"] + spec["split"]["held_out"]["groups"] == 50


@pytest.mark.parametrize(
    "body", [{"split": None}, {"training": {"validation_fraction": 0}}, {"training": {"method": "adamw"}}], ids=str
)
def test_without_held_out_rows_the_job_warns_that_nothing_is_evaluated(
    trained: httpx.Client, body: dict[str, Any]
) -> None:
    spec = trained.post("/adapters?dry_run=true", json={"name": "plan", "data": NUMBERS} | body).json()["spec"]
    assert spec["warnings"] == [UNEVALUATED]
    asked = {"name": "plan", "data": NUMBERS, "publish": "always"} | body
    assert "warnings" not in trained.post("/adapters?dry_run=true", json=asked).json()["spec"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"bias": True}, {}),
        ({"weight_decay": 0.1}, {}),
        ({"method": "sgd", "momentum": 0.9}, {}),
        ({"clip_norm": 1.0}, {}),
        ({"schedule": "cosine", "warmup_steps": 3}, {}),
        ({"max_steps": 7, "max_seconds": 5.0}, {}),
        ({"loss": "huber", "huber_delta": 0.5}, {}),
        ({"loss": "cosine"}, {}),
        ({"loss": "multiple_negatives", "batch_size": 8, "temperature": 0.1}, {}),
        ({"max_steps": None}, {}),
        (
            {"early_stopping": {"patience": 3}},
            {"early_stopping": {"patience": 3, "min_delta": 0.0, "evaluate_every": None}},
        ),
    ],
    ids=str,
)
def test_a_setting_is_shown_where_it_was_given(
    trained: httpx.Client, given: dict[str, Any], shown: dict[str, Any]
) -> None:
    assert spec_of(trained, training=given, split=HALF)["training"] == PLAIN | given | shown


@pytest.mark.parametrize(
    "given", [{"label_smoothing": 0.1}, {"class_weights": "balanced"}, {"class_weights": [1, 2.5, 0.5]}], ids=str
)
def test_a_setting_of_classes_is_shown_where_it_was_given(trained: httpx.Client, given: dict[str, Any]) -> None:
    training = {"loss": "cross_entropy"} | given
    assert spec_of(trained, data=LABELS, training=training)["training"] == PLAIN | training


def test_the_closed_form_s_own_settings_are_shown_where_they_were_given(trained: httpx.Client) -> None:
    trained.put("/adapters/prior", json={"A": [[1.0]] * OUTPUTS, "B": [[1.0] * INPUTS]}).raise_for_status()
    exact = {"method": "closed_form", "loss": "mse", "seed": 0, "validation_fraction": 0, "ridge": 0}
    given = {"method": "closed_form", "bias": True, "keep_statistics": True, "prior": {"adapter": "prior"}}
    assert spec_of(trained, training={"method": "closed_form"})["training"] == exact
    assert spec_of(trained, training=given)["training"] == exact | given | {"prior": {"adapter": "prior@1"}}


def test_a_gate_is_shown_as_it_was_given(trained: httpx.Client) -> None:
    gate = {"when": "if_better", "metric": "rmse", "margin": 0.1}
    assert spec_of(trained, split=HALF, publish=gate)["publish"] == gate


def test_a_setting_that_some_methods_use_leaves_these(trained: httpx.Client) -> None:
    def candidates(data: dict[str, Any] = NUMBERS, **training: Any) -> Any:
        spec = spec_of(trained, data=data, training={"method": "auto"} | training)
        return spec["training"]["candidates"], spec.get("auto")

    descent = ["base", "adamw"]
    assert candidates(epochs=3) == (descent, {"method": "epochs was given, and only gradient descent uses it"})
    assert candidates(loss="huber") == (descent, {"method": "huber has no exact solution"})
    smoothed = candidates(LABELS, label_smoothing=0.1)
    assert smoothed == (descent, {"method": "label_smoothing was given, and only gradient descent uses it"})
    exact, reasons = candidates(ridge=0.5)
    assert exact == ["base", "ridge", "ridge_in_base_metric"]
    assert reasons.keys() == {"adamw", "own_head"}
    assert reasons["own_head"] == f"it needs rank {OUTPUTS}, and at most {RANK} is allowed"
    # What only the exact minimum has is not compared.
    spec = spec_of(trained, training={"method": "auto", "keep_statistics": True})["training"]
    assert (spec["method"], "candidates" in spec) == ("closed_form", False)


def test_the_closed_form_takes_classes_as_a_ridge(trained: httpx.Client) -> None:
    training = {"method": "closed_form", "loss": "cross_entropy", "ridge": 0.5}
    spec = spec_of(trained, data=LABELS, training=training)
    shown = {"method": "closed_form", "loss": "cross_entropy", "seed": 0, "validation_fraction": 0, "ridge": 0.5}
    assert (spec["rank"], spec["training"], spec["warnings"]) == (RANK, shown, [UNEVALUATED])
    assert spec_of(trained, data=LABELS, training=training | {"ridge": "auto"})["training"]["ridge"] == "auto"


def test_what_held_out_rows_decide_stays_open_until_they_have(trained: httpx.Client) -> None:
    training = {"method": "closed_form", "ridge": "auto"}
    spec = spec_of(trained, rank="auto", training=training, split=HALF)
    assert (spec["rank"], spec["alpha"], spec["training"]["ridge"]) == ("auto", "auto", "auto")
    assert spec["auto"].keys() == {"rank", "ridge"}
    assert spec_of(trained, rank="auto", alpha=3, training=training, split=HALF)["alpha"] == 3
    rates = spec_of(trained, training={"learning_rate": "auto"}, split=HALF)
    assert (rates["rank"], rates["training"]["learning_rate"]) == (RANK, "auto")
    job = train(trained, name="open", rank="auto", data=NUMBERS, training=training, split=HALF)
    version = trained.get("/adapters/open/versions/1").json()
    assert job["status"] == "succeeded", job["error"]
    assert version["lineage"]["spec"]["rank"] == version["rank"]
    assert version["lineage"]["spec"]["ridge"] >= 0
    assert [line["text"] for line in job["log"] if line["text"].startswith(f"rank {version['rank']} of ")]


def test_a_job_keeps_its_request_if_its_rows_are_in_a_data_set(running: Running) -> None:
    client, service = running
    put(client, "kept", {name: COLUMNS[name] for name in ("x", "y", "tenant")})
    rows = DATA | {"dataset": "kept", "group_by": "tenant"}
    body: dict[str, Any] = {"name": "kept-{tenant}", "data": rows, "training": {"method": "sgd", "epochs": 1}}
    factors = {"init": {"A": [[0.0]] * OUTPUTS, "B": [[0.0] * INPUTS]}}
    for sent, kept in (
        (body, body),
        ({"name": "kept", "data": NUMBERS}, None),
        (body | {"training": {"method": "sgd", "epochs": 1} | factors}, None),
    ):
        job_id = client.post("/adapters", json=sent).raise_for_status().json()["id"]
        assert service.queue.get(job_id, tenant="default").training.request == kept


def test_a_rank_that_is_left_open_stays_within_the_service_s_limit(serve: Serve) -> None:
    client, _ = serve(base="random:12,9,1", max_rank=3, trainer=True)
    generator = torch.Generator().manual_seed(3)
    x_NI = torch.randn(60, 12, generator=generator)
    rows = {"inputs": x_NI.tolist(), "targets": (3 * x_NI[:, :9]).tolist()}
    body = {"name": "limited", "rank": "auto", "data": rows, "split": HALF, "training": {"method": "closed_form"}}
    assert (
        client.post("/adapters?dry_run=true", json=body)
        .json()["spec"]["auto"]["rank"]
        .startswith("the smallest of 1, 2, 3 ")
    )
    job = wait_for_job(client, client.post("/adapters", json=body).json()["id"])
    assert job["status"] == "succeeded", job["error"]
    assert client.get("/adapters/limited/versions/1").json()["rank"] == 3


def test_the_epochs_of_a_fleet_are_decided_for_one_of_its_groups(trained: httpx.Client) -> None:
    # 12 rows each make one step an epoch; all 24 together would not need as many epochs in batches of 12.
    rows = NUMBERS | {"groups": [row % 2 for row in range(ROWS)]}
    body = {"data": rows, "training": {"epochs": "auto", "batch_size": 12}}
    one = spec_of(trained, name="auto-{group}", **body)
    alone = spec_of(trained, data={"inputs": X[::2].tolist(), "targets": Y[::2].tolist()}, training=body["training"])
    assert one["training"]["epochs"] == alone["training"]["epochs"]
    whole = spec_of(trained, data=NUMBERS, training=body["training"])
    assert one["training"]["epochs"] == 2 * whole["training"]["epochs"]


def test_a_fleet_says_how_many_adapters_and_about_how_many_rows_each_side_has(trained: httpx.Client) -> None:
    plan = plan_of(
        trained, name="fleet-{group}", data=NUMBERS | {"groups": GROUPS}, split={"by": "rows", "fraction": 0.25}
    )
    assert plan["adapters"] == 6
    assert plan["spec"]["name"] == "fleet-{group}"
    assert plan["spec"]["split"] == {
        "by": "rows",
        "fraction": 0.25,
        "stratify": False,
        "train": {"rows": 18},
        "held_out": {"rows": 6},
    }


def test_the_job_says_what_held_out_rows_decided(trained: httpx.Client) -> None:
    settings = {"method": "closed_form", "ridge": "auto"}
    job = train(trained, name="chosen", rank="auto", data=NUMBERS, training=settings, split={"by": "rows"})
    chosen = job["metrics"]["chosen"]
    live = trained.get("/adapters/chosen").json()["live"]
    assert chosen == {name: live["lineage"]["spec"][name] for name in ("rank", "ridge")}
    assert chosen["rank"] == live["rank"]
    assert any(f"rank {chosen['rank']} " in line["text"] for line in job["log"])
    assert "chosen" not in train(trained, name="unchosen", rank=1, data=NUMBERS, training={})["metrics"]


def test_one_number_a_row_is_a_target_of_a_layer_with_one_output(serve: Serve) -> None:
    client, _ = serve(base=f"random:{INPUTS},1,1")
    flat = Y[:, 0].tolist()
    rows = {"inputs": X.tolist(), "targets": [[number] for number in flat]}
    assert spec_of(client, rank=1, data=rows | {"targets": flat}) == spec_of(client, rank=1, data=rows)
    for wrong, where in (
        ([*flat[:-1], "high"], ROWS - 1),
        ([*flat[:-1], [1.0, 2.0]], 0),
        ([*flat[:-1], None], ROWS - 1),
    ):
        body = {"name": "plan", "rank": 1, "data": rows | {"targets": wrong}}
        problem = client.post("/adapters?dry_run=true", json=body).json()
        assert (problem["status"], problem["field"], problem["row"]) == (422, "data.targets", where)
