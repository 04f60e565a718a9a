"""`loraplex predict`: rows from files, from standard input and from the command line itself."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.conftest import DIGITS, Ended, Run
from tests.harness import ServiceProcess

Ask = Callable[..., Any]


@pytest.fixture(name="x_NI", scope="module")
def first_rows() -> Any:
    """The first ten rows of the example, without the target: (10, I)."""
    return np.loadtxt(DIGITS, delimiter=",", skiprows=1, max_rows=10)[:, :-1]


@pytest.fixture(scope="module")
def expected(service: ServiceProcess, trained: Ended, x_NI: Any) -> dict[str, Any]:
    """What the HTTP API says about them."""
    body = {"adapter": "acme", "inputs": x_NI.tolist(), "return": ["outputs", "labels", "probabilities"], "top_k": 3}
    found: dict[str, Any] = service.client.post("/predict", json=body).raise_for_status().json()
    return found


def _labels(answer: Any) -> list[list[Any]]:
    return [[each["label"] for each in row["labels"]] for row in answer["predictions"]]


def test_people_see_labels_with_probabilities_beside_what_the_file_says(run: Run, trained: Ended) -> None:
    ended = run("predict", "acme", DIGITS, "--limit", 5)
    head, _, *rows, right = ended.stdout.splitlines()
    assert head.split()[:4] == ["row", "digit", "label", "probability"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3", "4"]
    assert sum(row.split()[1] == row.split()[2] for row in rows) >= 4
    assert right.startswith("digit is right in ")
    assert ended.stderr == "inputs: pixel_0, pixel_1 … pixel_63 (64 columns); not used: digit\n"


def test_machines_get_what_the_api_says(ask: Ask, expected: dict[str, Any]) -> None:
    answer = ask("predict", "acme", DIGITS, "--limit", 10)
    assert answer["adapter"] == f"acme@{expected['adapter']['version']}"
    assert _labels(answer) == expected["labels"]
    found = [[each["probability"] for each in row["labels"]] for row in answer["predictions"]]
    np.testing.assert_allclose(found, expected["probabilities"], rtol=1e-6)
    outputs = ask("predict", "acme", DIGITS, "--limit", 10, "--outputs")
    np.testing.assert_allclose(
        [row["outputs"] for row in outputs["predictions"]], expected["outputs"], rtol=1e-5, atol=1e-5
    )


def test_the_same_rows_in_every_form_have_the_same_answer(
    ask: Ask, tmp_path: Path, x_NI: Any, expected: dict[str, Any]
) -> None:
    np.save(tmp_path / "rows.npy", x_NI)
    lines = [dict(zip([f"pixel_{n}" for n in range(64)], row, strict=True)) for row in x_NI.tolist()]
    (tmp_path / "objects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "lists.ndjson").write_text("".join(json.dumps(row) + "\n" for row in x_NI.tolist()))
    (tmp_path / "whole.json").write_text(json.dumps(x_NI.tolist(), indent=1))
    (tmp_path / "embedded.jsonl").write_text(
        "".join(json.dumps({"id": f"r{n}", "embedding": row}) + "\n" for n, row in enumerate(x_NI.tolist()))
    )
    for name in ("rows.npy", "objects.jsonl", "lists.ndjson", "whole.json", "embedded.jsonl"):
        assert _labels(ask("predict", "acme", tmp_path / name)) == expected["labels"], name
    piped = "\n".join(",".join(map(str, row)) for row in x_NI.tolist())
    assert _labels(ask("predict", "acme", "-", stdin=piped)) == expected["labels"]
    assert _labels(ask("predict", "acme", "-", stdin=(tmp_path / "objects.jsonl").read_text())) == expected["labels"]
    rows = [option for row in x_NI.tolist() for option in ("--row", " ".join(map(str, row)))]
    assert _labels(ask("predict", "acme", *rows)) == expected["labels"]


def test_the_bare_base_layer_answers_where_it_is_asked_for(ask: Ask, service: ServiceProcess, x_NI: Any) -> None:
    body = {"adapter": None, "inputs": x_NI[:2].tolist()}
    outputs = service.client.post("/predict", json=body).raise_for_status().json()["outputs"]
    answer = ask("predict", "--base", DIGITS, "--limit", 2)
    assert answer["adapter"] is None
    found = [row["outputs"] for row in answer["predictions"]]
    np.testing.assert_allclose(found, outputs, rtol=1e-5, atol=1e-5)


def test_how_many_classes_means_classes_of_the_base_too(ask: Ask) -> None:
    answer = ask("predict", "--base", DIGITS, "--limit", 2, "--top-k", 1)
    assert [len(row["labels"]) for row in answer["predictions"]] == [1, 1]


def test_a_version_answers_where_it_is_named(ask: Ask, trained: Ended) -> None:
    assert ask("predict", "acme@1", DIGITS, "--limit", 1)["adapter"] == "acme@1"


def test_answers_are_written_to_files(run: Run, tmp_path: Path, trained: Ended, expected: dict[str, Any]) -> None:
    for name in ("out.csv", "out.jsonl", "out.npy"):
        ended = run("predict", "acme", DIGITS, "--limit", 10, "--out", tmp_path / name)
        assert ended.stdout == f"10 rows are in {tmp_path / name}\n"
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["label"]) for row in rows] == [labels[0] for labels in expected["labels"]]
    assert [row["digit"] for row in rows] == [str(n % 10) for n in range(10)]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert _labels({"predictions": lines}) == expected["labels"]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected["outputs"], rtol=1e-5, atol=1e-5)


def test_labels_of_text_come_back_by_name(run: Run, tmp_path: Path, ask: Ask) -> None:
    head, *rows = DIGITS.read_text().splitlines()
    named = [f"{row.rpartition(',')[0]},{'even' if int(row[-1]) % 2 == 0 else 'odd'}" for row in rows]
    (tmp_path / "parity.csv").write_text("\n".join([head, *named]) + "\n")
    run("train", tmp_path / "parity.csv", "--name", "parity", "--target", "digit", "--rank", 2, "--epochs", 20)
    answer = ask("predict", "parity", tmp_path / "parity.csv", "--limit", 50)
    right = [row["labels"][0]["label"] == ("even", "odd")[n % 2] for n, row in enumerate(answer["predictions"])]
    assert sum(right) > 35


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("nobody", DIGITS), 1, "there is no adapter 'nobody'"),
        (("acme@99", DIGITS), 1, "99"),
        (("acme@best", DIGITS), 1, "no alias best"),
        (("acme",), 2, "Give the rows"),
        (("acme", "rows.txt"), 2, "rows come from .csv"),
        (("acme", "nowhere.csv"), 1, "Cannot read nowhere.csv: No such file"),
        (("acme", "--row", "1,2,3"), 1, "64"),
        (("acme", "--row", "1,two,3"), 1, "row 0, column 1: not a number: 'two'"),
        (("acme", DIGITS, "--input-prefix", "px"), 1, "no column that begins with px"),
        (("acme", DIGITS, "--limit", "1", "--out", "x.txt"), 2, ".csv, .jsonl or .npy"),
        (("acme", DIGITS, "--limit", "1", "--labels", "--out", "x.npy"), 2, "--outputs"),
        (("--base", "acme", DIGITS), 2, "leave the adapter out"),
        ((), 2, "Say which adapter"),
        (("acme", DIGITS, "--top-k", "1", "--outputs"), 2, "--top-k counts classes"),
    ],
)
def test_what_cannot_be_asked_says_why(
    run: Run, trained: Ended, tmp_path: Path, arguments: tuple[object, ...], status: int, said: str
) -> None:
    assert said in run("predict", *arguments, status=status, cwd=tmp_path).stderr


def test_rows_of_two_widths_are_named(run: Run, trained: Ended, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("[1, 2]\n[1, 2, 3]\n")
    assert "row 1: 3 numbers, where row 0 has 2" in run("predict", "acme", tmp_path / "rows.jsonl", status=1).stderr
    (tmp_path / "rows.jsonl").write_text("[1, 2]\nnothing\n")
    assert "line 2: it is not JSON: nothing" in run("predict", "acme", tmp_path / "rows.jsonl", status=1).stderr
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n3\n")
    assert "row 1: 1 cells, expected 2" in run("predict", "acme", tmp_path / "rows.csv", status=1).stderr


def test_an_adapter_without_a_live_version_is_said_to_have_none(
    run: Run, service: ServiceProcess, trained: Ended
) -> None:
    how = ("--rank", 2, "--method", "adamw", "--epochs", 1, "--publish", "never")
    made = run("train", DIGITS, "--name", "unborn", "--target", "digit", *how)
    assert "unborn@1 was made, and live did not move" in made.stdout
    assert "none of the versions of unborn is live" in run("predict", "unborn", DIGITS, status=1).stderr
