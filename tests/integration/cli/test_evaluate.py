"""`evaluate` and `suspects`: adapters side by side, and rows with doubtful labels."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cli.conftest import DIGITS, Ended, Run

Ask = Callable[..., Any]
QUICK = ("--method", "adamw", "--loss", "cross_entropy", "--rank", 2, "--epochs", 3)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last hundred rows of the example."""
    lines = DIGITS.read_text().splitlines(keepends=True)
    file = tmp_path_factory.mktemp("rows") / "fresh.csv"
    file.write_text("".join([lines[0], *lines[-100:]]))
    return file


@pytest.fixture(scope="module")
def compared(run: Run) -> Ended:
    """An adapter with one version."""
    return run("train", DIGITS, "--name", "compared", "--target", "digit", *QUICK)


def test_adapters_and_the_base_layer_are_compared_on_a_file(run: Run, ask: Ask, compared: Ended, fresh: Path) -> None:
    job = ask("evaluate", "compared@1", "base", fresh, "--target", "digit")
    assert (job["kind"], job["status"]) == ("evaluation", "succeeded")
    own, base = job["result"]["adapters"]
    assert (own["adapter"], base["adapter"], job["result"]["rows"]) == ("compared@1", None, 100)
    with fresh.open(newline="") as file:
        truth = [int(row["digit"]) for row in csv.DictReader(file)]
    answers = ask("predict", "compared@1", fresh, "--top-k", 1)["predictions"]
    right = [answer["labels"][0]["label"] == digit for answer, digit in zip(answers, truth, strict=True)]
    assert own["figure"] == pytest.approx(sum(right) / 100)
    text = run("evaluate", "compared@1", "-", "--dataset", "fresh", "--target", "digit").stdout
    assert "On 100 rows" in text
    assert "gain over compared@1" in text
    assert f"{base['gain']:+.4g} ± {base['gain_error']:.2g}" in text
    assert "Precision / recall" in text
    shown = run("job", job["id"]).stdout
    assert "On 100 rows" in shown


def test_what_cannot_be_compared_is_said_below_the_table(run: Run, compared: Ended, tmp_path: Path) -> None:
    rows = list(csv.reader(DIGITS.read_text().splitlines()))
    file = tmp_path / "named.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([rows[0], *([*row[:-1], f"digit {row[-1]}"] for row in rows[1:30])])
    text = run("evaluate", "compared", file, "--target", "digit").stdout
    assert "compared@1 could not be evaluated: it has none of the labels" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((DIGITS,), "Say which adapters"),
        (("compared", "--dataset", "fresh", DIGITS), "One of the two"),
        (("compared", DIGITS, "--target", "color"), "There is no column color"),
    ],
)
def test_a_wrong_command_line_says_what_is_missing(run: Run, arguments: tuple[Any, ...], said: str) -> None:
    target = () if "--target" in arguments else ("--target", "digit")
    assert said in run("evaluate", *arguments, *target, status=2).stderr


def test_an_evaluation_need_not_be_waited_for(run: Run, compared: Ended, fresh: Path) -> None:
    assert "To follow it" in run("evaluate", "compared", fresh, "--target", "digit", "--no-wait").stdout


def test_a_job_without_suspects_says_so(run: Run, ask: Ask, compared: Ended) -> None:
    (job,) = ask("jobs", "--adapter", "compared", "--limit", 1)
    assert "has no suspects" in run("suspects", job["id"], status=1).stderr
