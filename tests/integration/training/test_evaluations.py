"""`POST /evaluations` finds what scikit-learn finds in the answers of `/predict`."""

# N rows · I in_features · O out_features
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, confusion_matrix, mean_squared_error, precision_recall_fscore_support

from adapters.training.execution.fit_client import FitRequest
from adapters.training.execution.publisher import Publisher
from app.settings import Settings
from tests.support.service import serving, train, wait_for_job

I, O = 6, 5
DRAW = np.random.default_rng(4)
HEAD = ["zulu", "mike", "alpha", "tango", "bravo"]
"""What the base layer's outputs are, in their order."""
TRUE = DRAW.normal(size=(O, I))
WEIGHT = (TRUE + 0.7 * DRAW.normal(size=(O, I))).astype(np.float32)
# Few training rows, so that the adapters are not equally good.
X, FRESH = (DRAW.normal(size=(rows, I)).astype(np.float32) for rows in (60, 240))
CLASSES = [HEAD[place] for place in (X @ TRUE.T).argmax(1)]
TRUTH = [HEAD[place] for place in (FRESH @ TRUE.T + 0.3 * DRAW.normal(size=(240, O))).argmax(1)]
BRIEF = {"method": "adamw", "loss": "cross_entropy", "epochs": 40, "learning_rate": 0.05}
FRESH_ROWS: dict[str, Any] = {"inputs": FRESH.tolist(), "targets": TRUTH}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("evaluations")
    save_file({"weight": torch.from_numpy(WEIGHT)}, folder / "base.safetensors")
    with serving(Settings(base=str(folder / "base.safetensors"), data_dir=folder / "data"), trainer=True) as (c, _):
        rows = {"inputs": X.tolist(), "targets": CLASSES, "labels": HEAD}
        sorted_rows = {"inputs": X[:25].tolist(), "targets": CLASSES[:25], "labels": sorted(HEAD)}
        for name, data, rank in (("one", rows, 4), ("other", sorted_rows, 2)):
            job = train(c, name=name, rank=rank, data=data, training=BRIEF)
            assert job["status"] == "succeeded", job["error"]
        yield c


def _evaluate(client: httpx.Client, adapters: Sequence[str | None], data: dict[str, Any]) -> Any:
    answer = client.post("/evaluations", json={"adapters": adapters, "data": data})
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"
    job = wait_for_job(client, answer.json()["id"])
    assert job["status"] == "succeeded", job["error"]
    return job


def _outputs(client: httpx.Client, adapter: str | None, x_NI: Any) -> Any:
    answer = client.post("/predict", json={"adapter": adapter, "inputs": x_NI.tolist()}).raise_for_status()
    return np.array(answer.json()["outputs"])


def _said(client: httpx.Client, adapter: str | None) -> list[str]:
    """What an adapter answers by its own labels, and the base layer by those of its outputs."""
    if adapter is None:
        return [HEAD[place] for place in _outputs(client, None, FRESH).argmax(1)]
    body = {"adapter": adapter, "inputs": FRESH.tolist(), "return": ["labels"]}
    answers = client.post("/predict", json=body).raise_for_status().json()["labels"]
    return [answer["label"] if isinstance(answer, dict) else answer for answer in answers]


def test_adapters_and_the_base_layer_are_compared_by_what_they_answer(client: httpx.Client) -> None:
    versions = {name: client.get(f"/adapters/{name}").json()["versions"] for name in ("one", "other")}
    job = _evaluate(client, ["one", "other@1", None], FRESH_ROWS | {"labels": HEAD})
    assert (job["kind"], job["metrics"]) == ("evaluation", None)
    assert job["spec"]["adapters"] == ["one@1", "other@1", None]
    assert job["spec"]["loss"] == "cross_entropy"
    assert job["progress"]["step"] == job["progress"]["steps"] == 3
    result = job["result"]
    assert (result["metric"], result["rows"]) == ("accuracy", len(TRUTH))
    first = np.array(_said(client, "one@1")) == TRUTH
    for entry, adapter in zip(result["adapters"], ["one@1", "other@1", None], strict=True):
        said = _said(client, adapter)
        assert entry["adapter"] == adapter
        assert entry["figure"] == entry["metrics"]["accuracy"] == pytest.approx(accuracy_score(TRUTH, said))
        names = [figures["label"] for figures in entry["classes"]]
        precision, recall, f1, support = precision_recall_fscore_support(TRUTH, said, labels=names)
        for number, figures in enumerate(entry["classes"]):
            wanted = (precision[number], recall[number], f1[number], support[number])
            assert [figures[name] for name in ("precision", "recall", "f1", "rows")] == pytest.approx(wanted)
        np.testing.assert_array_equal(entry["confusion"], confusion_matrix(TRUTH, said, labels=names))
        gains = (np.array(said) == TRUTH).astype(float) - first
        if adapter != "one@1":
            assert entry["gain"] == pytest.approx(gains.mean())
            assert entry["gain_error"] == pytest.approx(gains.std(ddof=1) / np.sqrt(len(TRUTH)))
    # The adapters differ, or the comparison of labels would not be tested.
    assert len({entry["figure"] for entry in result["adapters"]}) == 3
    assert versions == {name: client.get(f"/adapters/{name}").json()["versions"] for name in versions}
    assert client.get(f"/jobs/{job['id']}/adapters").json()["data"] == []
    assert client.post(f"/jobs/{job['id']}/revert").json() == {"reverted": [], "skipped": []}


def test_without_labels_the_base_layer_cannot_be_matched_and_says_so(client: httpx.Client) -> None:
    entries = _evaluate(client, [None, "one"], FRESH_ROWS)["result"]["adapters"]
    assert "none of the labels" in entries[0]["problem"]
    assert entries[1]["figure"] == pytest.approx(accuracy_score(TRUTH, _said(client, "one")))


def test_rows_with_a_label_that_no_adapter_has_are_never_right(client: httpx.Client) -> None:
    targets = ["quebec" if row % 3 == 0 else label for row, label in enumerate(TRUTH)]
    (entry,) = _evaluate(client, ["one"], FRESH_ROWS | {"targets": targets})["result"]["adapters"]
    assert entry["figure"] == pytest.approx(accuracy_score(targets, _said(client, "one")))
    assert (entry["missing_labels"], entry["missing_rows"]) == (["quebec"], 80)


def test_numbers_are_compared_by_squared_error(client: httpx.Client) -> None:
    numbers = FRESH @ TRUE.T
    data = {"inputs": FRESH.tolist(), "targets": numbers.tolist()}
    for entry, adapter in zip(_evaluate(client, [None, "one"], data)["result"]["adapters"], (None, "one"), strict=True):
        assert entry["figure"] == pytest.approx(mean_squared_error(numbers, _outputs(client, adapter, FRESH)), rel=1e-5)


def test_a_data_set_with_weights_may_hold_the_rows(client: httpx.Client) -> None:
    lines = [",".join([*(f"x{place}" for place in range(I)), "name", "weight"])]
    weights = [row % 4 for row in range(len(TRUTH))]
    for x_I, name, weight in zip(FRESH.tolist(), TRUTH, weights, strict=True):
        lines.append(",".join([*map(repr, x_I), name, str(weight)]))
    client.put("/datasets/fresh", content="\n".join(lines), headers={"Content-Type": "text/csv"}).raise_for_status()
    data = {"dataset": "fresh", "inputs": {"prefix": "x"}, "targets": {"column": "name"}, "weight": "weight"}
    job = _evaluate(client, ["other"], data)
    assert job["spec"]["data"]["dataset"] == "fresh@1"
    assert "warnings" not in job["spec"]
    (entry,) = job["result"]["adapters"]
    assert entry["figure"] == pytest.approx(accuracy_score(TRUTH, _said(client, "other"), sample_weight=weights))


def test_a_version_that_was_deleted_while_the_job_waited_leaves_the_others(tmp_path: Path) -> None:
    settings = Settings(base="random:10,2,42", data_dir=tmp_path / "data")
    rows = {"inputs": DRAW.normal(size=(8, 10)).tolist(), "targets": [0, 1] * 4}
    with serving(settings) as (client, _):
        for name in ("gone", "kept"):
            client.put(f"/adapters/{name}", json={"A": [[1.0], [0.0]], "B": [[1.0] * 10]}).raise_for_status()
        queued = client.post("/evaluations", json={"adapters": ["gone", "kept", None], "data": rows}).json()
        client.delete("/adapters/gone").raise_for_status()
        # Another adapter under the name is not the version that was meant.
        client.put("/adapters/gone", json={"A": [[0.0], [1.0]], "B": [[1.0] * 10]}).raise_for_status()
    with serving(settings, trainer=True) as (client, _):
        job = wait_for_job(client, queued["id"])
    gone, kept, base = job["result"]["adapters"]
    assert (gone["adapter"], gone["figure"]) == ("gone@1", None)
    assert "deleted" in gone["problem"]
    assert (kept["problem"], base["problem"]) == (None, None)
    assert kept["figure"] is not None


@pytest.mark.parametrize("is_deleted", [True, False])
def test_a_version_whose_file_is_gone_while_the_job_runs_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_deleted: bool
) -> None:
    settings = Settings(base="random:10,2,42", data_dir=tmp_path / "data", trash_days=0)
    rows = {"inputs": DRAW.normal(size=(8, 10)).tolist(), "targets": [0, 1] * 4}
    with serving(settings, trainer=True) as (client, _):
        request = Publisher.request

        def request_and_delete(publisher: Publisher, **options: Any) -> FitRequest:
            asked = request(publisher, **options)
            (tmp_path / "data" / "blobs" / asked.compared[0].blob).unlink()
            if is_deleted:
                client.delete("/adapters/gone").raise_for_status()
            return asked

        monkeypatch.setattr(Publisher, "request", request_and_delete)
        for name in ("gone", "kept"):
            client.put(f"/adapters/{name}", json={"A": [[1.0], [0.0]], "B": [[1.0] * 10]}).raise_for_status()
        gone, kept = _evaluate(client, ["gone", "kept"], rows)["result"]["adapters"]
    assert ("was deleted" in gone["problem"], "cannot be read" in gone["problem"]) == (is_deleted, not is_deleted)
    assert (gone["figure"], kept["problem"]) == (None, None)


def test_a_page_shows_the_entries_and_offers_nothing_to_try_or_revert(client: httpx.Client) -> None:
    job = _evaluate(client, ["one", None], FRESH_ROWS)
    page = client.get(f"/ui/jobs/{job['id']}").raise_for_status().text
    for text in (
        "Evaluation of one@1, base layer",
        "On 240 rows",
        'href="/ui/adapters/one"',
        "It has none of the labels",
    ):
        assert text in page
    assert "Show adapter" not in page
    assert "Revert…" not in page


def test_an_adapter_that_was_trained_on_the_rows_is_named_in_a_warning(client: httpx.Client) -> None:
    rows = {"inputs": X.tolist(), "targets": CLASSES, "labels": HEAD}
    (warning,) = _evaluate(client, ["other", "one", None, "one"], rows)["spec"]["warnings"]
    assert warning.startswith("one@1 was trained on")


def test_a_list_of_jobs_leaves_the_figures_by_class_out(client: httpx.Client) -> None:
    _evaluate(client, ["one"], FRESH_ROWS)
    (entry,) = client.get("/jobs", params={"limit": 1}).json()["data"][0]["result"]["adapters"]
    assert (entry["adapter"], entry["classes"], entry["confusion"]) == ("one@1", None, None)
    assert entry["figure"] is not None


@pytest.mark.parametrize(
    ("body", "status", "code", "field", "row"),
    [
        ({"adapters": ["one", "nobody"]}, 404, "adapter_not_found", "adapters", 1),
        ({"adapters": [None, "one@9"]}, 404, "version_not_found", "adapters", 1),
        ({"adapters": [None, 3]}, 422, "wrong_type", "adapters", 1),
        ({"adapters": ["one@@"]}, 422, "invalid_reference", "adapters", 0),
        ({"adapters": []}, 422, "out_of_range", "adapters", None),
        ({"adapters": [None] * 101}, 422, "out_of_range", "adapters", None),
        ({"adapters": "one"}, 422, "wrong_type", "adapters", None),
        ({"data": FRESH_ROWS | {"groups": TRUTH}}, 422, "ignored_field", "data.groups", None),
        ({"data": {"inputs": [[0.0] * I], "targets": ["a", "b"]}}, 422, "wrong_shape", "data.targets", None),
        ({"data": {"inputs": [[0.0] * (I - 1)], "targets": ["a"]}}, 422, "wrong_shape", "data.inputs", 0),
        ({"name": "acme"}, 422, "unknown_field", "name", None),
    ],
)
def test_a_request_that_cannot_be_evaluated_is_refused(
    client: httpx.Client, body: dict[str, Any], status: int, code: str, field: str, row: int | None
) -> None:
    answer = client.post("/evaluations", json={"adapters": ["one"], "data": FRESH_ROWS} | body)
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code), problem
    assert (problem["field"], problem.get("row")) == (field, row), problem
