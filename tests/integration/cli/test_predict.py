"""`loraplex predict`: rows from files, from standard input and from the command line itself."""

import csv
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from tests.integration.cli.conftest import DIGITS, SECONDS, Ended, Run
from tests.support.service import LORAPLEX, ServiceProcess, environment, free_port

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
    names = {name: x_NI[:, place] for place, name in enumerate(lines[0])}
    labels = {"digit": np.arange(len(x_NI)), "even": np.arange(len(x_NI)) % 2 == 0}
    np.savez(tmp_path / "columns.npz", **names, **labels)
    np.savez(tmp_path / "embedded.npz", id=np.array([f"r{n}" for n in range(len(x_NI))]), embedding=x_NI)
    columns = pa.table(names | labels)
    embedded = pa.table({"id": pa.array(map(str, range(len(x_NI)))).dictionary_encode(), "x": list(x_NI)})
    for kind, table in (("columns", columns), ("embedded", embedded)):
        pq.write_table(table, tmp_path / f"{kind}.parquet", row_group_size=3)
        with pa.ipc.new_stream(tmp_path / f"{kind}.arrows", table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
        with pa.ipc.new_file(tmp_path / f"{kind}.arrow", table.schema) as file:
            file.write_table(table)
    tables = [f"{kind}.{end}" for kind in ("columns", "embedded") for end in ("npz", "parquet", "arrows", "arrow")]
    for name in ("rows.npy", "objects.jsonl", "lists.ndjson", "whole.json", "embedded.jsonl", *tables):
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
    for name in ("out.csv", "out.jsonl", "out.npy", "OUT.NPY"):
        ended = run("predict", "acme", DIGITS, "--limit", 10, "--out", tmp_path / name)
        assert ended.stdout == f"10 rows are in {tmp_path / name}\n"
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["label"]) for row in rows] == [labels[0] for labels in expected["labels"]]
    assert [row["digit"] for row in rows] == [str(n % 10) for n in range(10)]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert _labels({"predictions": lines}) == expected["labels"]
    for name in ("out.npy", "OUT.NPY"):
        np.testing.assert_allclose(np.load(tmp_path / name), expected["outputs"], rtol=1e-5, atol=1e-5)


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
        (("acme", DIGITS, "--limit", "1", "--labels", "--out", "x.npy"), 2, "x.npy takes numbers only"),
        (("acme", DIGITS, "--limit", "1", "--top-k", "1", "--out", "x.npy"), 2, "x.npy takes numbers only"),
        (("--base", "acme", DIGITS), 2, "leave the adapter out"),
        ((), 2, "Say which adapter"),
        (("acme", DIGITS, "--top-k", "1", "--outputs"), 2, "--top-k counts classes"),
    ],
)
def test_what_cannot_be_asked_says_why(
    run: Run, trained: Ended, tmp_path: Path, arguments: tuple[object, ...], status: int, said: str
) -> None:
    assert said in run("predict", *arguments, status=status, cwd=tmp_path).stderr


def test_a_table_of_numbers_tells_how_often_it_is_right(run: Run, trained: Ended, tmp_path: Path) -> None:
    table = pa.csv.read_csv(DIGITS)
    pq.write_table(table, tmp_path / "digits.parquet")
    ended = run("predict", "acme", tmp_path / "digits.parquet", "--limit", 5)
    assert ended.stdout == run("predict", "acme", DIGITS, "--limit", 5).stdout
    assert ended.stderr == "inputs: pixel_0, pixel_1 … pixel_63 (64 columns); not used: digit\n"


def test_what_train_takes_predict_is_offered_for(run: Run, trained: Ended, tmp_path: Path) -> None:
    pq.write_table(pa.csv.read_csv(DIGITS), tmp_path / "digits.parquet")
    how = ("--rank", 2, "--method", "adamw", "--loss", "cross_entropy", "--epochs", 1)
    ended = run("train", tmp_path / "digits.parquet", "--name", "columnar", "--target", "digit", *how)
    assert f"next: loraplex predict columnar {tmp_path / 'digits.parquet'} --limit 5" in ended.stderr


def test_a_table_that_cannot_be_read_says_why(run: Run, trained: Ended, tmp_path: Path) -> None:
    for name in ("rows.parquet", "rows.arrow", "rows.arrows", "rows.npz"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 3)
        assert f"Cannot read {name}: " in run("predict", "acme", name, status=1, cwd=tmp_path).stderr
        assert "No such file" in run("predict", "acme", f"no-{name}", status=1, cwd=tmp_path).stderr
    np.savez(tmp_path / "uneven.npz", a=np.ones(2), b=np.ones(3))
    assert "differ in length: a has 2, b has 3" in run("predict", "acme", tmp_path / "uneven.npz", status=1).stderr
    np.savez(tmp_path / "objects.npz", a=np.array([None, {}], object))
    assert "Cannot read objects.npz" in run("predict", "acme", tmp_path / "objects.npz", status=1).stderr
    pq.write_table(pa.table({"x": [[1.0] * 64, None]}), tmp_path / "gap.parquet")
    assert (
        "gap.parquet, row 1, column x: not a number: 'None'"
        in run("predict", "acme", tmp_path / "gap.parquet", status=1).stderr
    )


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from loraplex.cli.rows import read_rows\n"
        "read_rows('rows.parquet', limit=None, expected=None)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Cannot read rows.parquet without pyarrow: pip install 'loraplex[arrow]'" in ended.stderr


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
    how = ("--rank", 2, "--method", "adamw", "--loss", "cross_entropy", "--epochs", 1, "--publish", "never")
    made = run("train", DIGITS, "--name", "unborn", "--target", "digit", *how)
    assert "unborn@1 was made, and live did not move" in made.stdout
    assert "none of the versions of unborn is live" in run("predict", "unborn", DIGITS, status=1).stderr


def test_what_a_file_cannot_hold_is_not_asked_for(run: Run) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    run("predict", "acme", DIGITS, "--labels", "--out", "x.npy", "--url", nowhere, status=2)


def test_answers_come_whole_or_not_at_all(url: str, trained: Ended, tmp_path: Path) -> None:
    (tmp_path / "kept.csv").write_text("of before\n")
    for name in ("kept.csv", "new.csv"):
        ended = subprocess.run(
            ["bash", "-c", f"ulimit -f 1; {LORAPLEX} predict acme {DIGITS} --out {name}"],  # files of 1 KiB at most
            cwd=tmp_path,
            env=environment(url=url),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert ended.returncode == 1
        assert f"loraplex: Cannot write {name}: File too large\n" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept.csv"]
    assert (tmp_path / "kept.csv").read_text() == "of before\n"


def test_a_file_that_is_written_again_stays_what_it_was(run: Run, trained: Ended, tmp_path: Path) -> None:
    private, pipe = tmp_path / "private.csv", tmp_path / "pipe.csv"
    private.touch(mode=0o600)
    (tmp_path / "link.csv").symlink_to(private)
    run("predict", "acme", DIGITS, "--limit", 1, "--out", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    os.mkfifo(pipe)
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()), daemon=True)
    reader.start()
    run("predict", "acme", DIGITS, "--limit", 1, "--out", pipe)
    reader.join(SECONDS)
    assert heard == [private.read_text()]


@pytest.mark.parametrize(("number", "given"), [("1e39", 1e39), ("1e400", "Infinity"), ("nan", "NaN")])
def test_a_number_that_no_row_may_have_is_told_in_json(run: Run, trained: Ended, number: str, given: object) -> None:
    ended = run("predict", "acme", "--row", " ".join([number, *["0"] * 63]), "--json", status=1)
    problem = json.loads(ended.stderr, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (problem["code"], problem["row"], problem["given"]) == ("not_finite", 0, given)


def test_the_row_of_a_problem_is_that_of_the_file(run: Run, trained: Ended, tmp_path: Path) -> None:
    rows = np.zeros((4500, 64), np.float32)
    rows[4400] = 3e38
    np.save(tmp_path / "rows.npy", rows)  # which goes in two requests
    problem = json.loads(run("predict", "acme", tmp_path / "rows.npy", "--json", status=1).stderr)
    assert (problem["code"], problem["row"]) == ("output_not_finite", 4400)


def test_an_integer_past_all_floats_is_named(run: Run, trained: Ended, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps([10**400, *[0] * 63]))
    ended = run("predict", "acme", tmp_path / "rows.jsonl", status=1)
    assert "rows.jsonl, row 0, column 0: not a number: '1000" in ended.stderr


def test_the_target_is_no_input_wherever_it_stands(run: Run, trained: Ended, tmp_path: Path) -> None:
    _, *rows = DIGITS.read_text().splitlines()
    turned = [",".join([row[-1], *row.split(",")[:-1]]) for row in rows[:5]]
    head = ",".join(["digit", *(f"{n}th" for n in range(64))])
    (tmp_path / "rows.csv").write_text("\n".join([head, *turned]) + "\n")
    ended = run("predict", "acme", tmp_path / "rows.csv")
    assert ended.stderr == "inputs: 0th, 1th … 63th (64 columns); not used: digit\n"
    assert "digit is right in" in ended.stdout


def test_columns_that_are_called_by_numbers_are_known_from_the_training(run: Run, ask: Ask, tmp_path: Path) -> None:
    _, *rows = DIGITS.read_text().splitlines()
    (tmp_path / "numbered.csv").write_text("\n".join([",".join(map(str, range(65))), *rows]) + "\n")
    how = ("--method", "adamw", "--loss", "cross_entropy", "--epochs", 1)
    run("train", tmp_path / "numbered.csv", "--name", "numbered", "--target", "64", *how)
    ended = run("predict", "numbered", tmp_path / "numbered.csv", "--limit", 5)
    assert ended.stderr == "inputs: 0, 1 … 63 (64 columns); not used: 64\n"
    assert "64 is right in" in ended.stdout
    assert len(ask("predict", "numbered", tmp_path / "numbered.csv")["predictions"]) == len(rows)
    named = ("--inputs", ",".join(map(str, range(64))))
    assert len(ask("predict", "--base", tmp_path / "numbered.csv", *named)["predictions"]) == len(rows)
    nameless = "\n".join(row.rpartition(",")[0] for row in rows[:3])
    assert len(ask("predict", "numbered", "-", stdin=nameless)["predictions"]) == 3
