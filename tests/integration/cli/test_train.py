"""`loraplex train`: from a file to an adapter, with nothing else said, and with everything."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cli.conftest import DIGITS, Ended, Run

Ask = Callable[..., Any]
MODELS = ("adapter", "base layer", "trivial guess")
OF_DIGITS = ("--name", "digits", "--target", "digit")
EXACTLY = ("--method", "adamw", "--loss", "cross_entropy")


def test_a_file_a_name_and_a_target_make_an_adapter_that_is_right_most_of_the_time(trained: Ended) -> None:
    text = trained.stdout
    figures = (re.findall(rf"^{model} +([0-9.]+) +[0-9.]+ – [0-9.]+ *$", text, re.MULTILINE) for model in MODELS)
    adapter, base, guess = (float(figure) for (figure,) in figures)
    assert adapter > 0.8
    assert base < 0.3
    assert guess < 0.3
    assert re.search(r"^Accuracy on \d+ held-out rows", text, re.MULTILINE)
    assert "gain over the base layer: +0." in text
    assert re.search(r"^acme@1 is live: ", text, re.MULTILINE)
    assert re.search(r"^\* taken: ", text, re.MULTILINE)


def test_what_is_inferred_is_said_and_what_to_do_next(trained: Ended) -> None:
    said = trained.stderr
    assert "data set: turned-digits@1, 500 rows, 65 columns" in said
    assert "loss: cross_entropy (another one: --loss)" in said
    assert "inputs: pixel_0, pixel_1 … pixel_63 (64 columns): all columns of numbers besides digit" in said
    assert f"next: loraplex predict acme {DIGITS} --limit 5" in said


def test_a_machine_gets_the_job_as_it_ended(ask: Ask) -> None:
    how = ("--rank", 8, "--epochs", 20, "--learning-rate", 0.01, "--seed", 3, "--split", "rows")
    job = ask("train", DIGITS, *OF_DIGITS, *EXACTLY, *how)
    assert job["status"] == "succeeded"
    assert job["spec"]["rank"] == 8
    assert job["spec"]["data"]["inputs"] == {"columns": [f"pixel_{n}" for n in range(64)]}
    training = job["spec"]["training"]
    assert (training["epochs"], training["learning_rate"], training["seed"]) == (20, 0.01, 3)
    split = job["spec"]["split"]
    assert (split["by"], split["fraction"]) == ("rows", 0.2)
    assert job["result"]["name"] == "digits"
    assert job["metrics"]["held_out"]["rows"] == 100


def test_a_dry_run_trains_nothing_and_says_what_would_be(run: Run, ask: Ask) -> None:
    before = ask("jobs")
    how = ("--dry-run", "--split", "time", "--split-column", "digit", "--held-out", 0.5)
    plan = ask("train", DIGITS, *OF_DIGITS, *how)
    assert plan.keys() == {"spec", "estimate", "adapters"}
    assert plan["adapters"] == 1
    assert plan["estimate"].keys() == {"memory_bytes", "seconds", "scratch_bytes"}
    assert plan["spec"]["split"]["held_out"]["rows"] == 250
    shown = run("train", DIGITS, *OF_DIGITS, *how).stdout
    assert "250 of them, by time" in shown
    assert "validation_fraction" not in shown
    assert ask("jobs") == before


def test_a_gate_that_is_not_passed_says_why_live_did_not_move(run: Run, trained: Ended) -> None:
    gate = ("--publish", "if-better", "--metric", "accuracy", "--margin", 0.01)
    how = (*EXACTLY, "--split", "rows", "--rank", 1, "--epochs", 1, "--learning-rate", 0.0001)
    ended = run("train", "--dataset", "turned-digits@1", "--name", "acme", "--target", "digit", *how, *gate)
    (made,) = re.findall(r"acme@(\d+) was made, and live did not move: its accuracy does not beat", ended.stdout)
    assert f"To make it live: loraplex rollback acme {made}" in ended.stdout
    assert "live before" in ended.stdout
    assert f"next: loraplex predict acme@{made} FILE" in ended.stderr


def test_one_that_is_not_waited_for_says_how_to_follow_it(run: Run, ask: Ask) -> None:
    ended = run("train", DIGITS, *OF_DIGITS, *EXACTLY, "--epochs", 1, "--no-wait")
    (followed,) = re.findall(r"loraplex jobs --follow (\w+)", ended.stdout)
    run("jobs", "--follow", followed)
    assert ask("job", followed)["status"] == "succeeded"


def test_a_fleet_is_one_adapter_for_each_group(run: Run, tmp_path: Path, ask: Ask) -> None:
    head, *rows = DIGITS.read_text().splitlines()[:121]
    lines = [f"{head},tenant", *(f"{row},{('eu', 'us')[n % 2]}" for n, row in enumerate(rows))]
    (tmp_path / "of tenants.csv").write_text("\n".join(lines) + "\n")
    ended = run(
        *("train", "of tenants.csv", "--name", "fleet", "--target", "digit", "--group-by", "tenant", "--epochs", 5),
        cwd=tmp_path,
    )
    assert "names: fleet-{tenant}, one adapter for each tenant" in ended.stderr
    assert "published 2 of 2 adapters, 0 failed" in ended.stdout
    assert [adapter["name"] for adapter in ask("adapters", "fleet-")] == ["fleet-eu", "fleet-us"]
    assert [found["name"] for found in ask("dataset", "list")].count("of-tenants") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--target", "digit"), "--name"),
        (("--name", "x"), "--target"),
        ((*OF_DIGITS, "--rank", "many"), "a whole number, or auto"),
        ((*OF_DIGITS, "--dataset", "turned-digits"), "One of the two"),
        ((*OF_DIGITS, "--metric", "accuracy"), "--publish if-better"),
        ((*OF_DIGITS, "--inputs", "a,b", "--input-prefix", "p"), "give one of them"),
        (("--name", "x", "--target", "digits"), "There is no column digits"),
        (("--name", "x", "--target", "digit", "--weight", "pixel_0"), "--inputs, --input-prefix or --input-column"),
    ],
)
def test_a_wrong_command_line_says_what_to_give(
    run: Run, trained: Ended, arguments: tuple[str, ...], said: str
) -> None:
    assert said in " ".join(run("train", DIGITS, *arguments, status=2).stderr.replace("│", " ").split())


def test_a_file_that_is_not_there_is_named(run: Run) -> None:
    assert "nowhere.csv" in run("train", "nowhere.csv", *OF_DIGITS, status=1).stderr


def test_rows_that_cannot_be_trained_on_are_named(run: Run, tmp_path: Path) -> None:
    lines = DIGITS.read_text().splitlines()[:30]
    lines[3] = "," + lines[3].partition(",")[2]
    (tmp_path / "holes.csv").write_text("\n".join(lines) + "\n")
    ended = run("train", tmp_path / "holes.csv", "--name", "holes", "--target", "digit", status=1)
    assert "row 2, column pixel_0: null" in ended.stderr


def test_a_refusal_of_the_service_names_the_field(run: Run, trained: Ended) -> None:
    data = ("--dataset", "turned-digits")
    assert "training.ridge" in run("train", *data, *OF_DIGITS, *EXACTLY, "--ridge", 1, status=1).stderr


def test_an_update_of_what_is_trained_is_another_version(run: Run, ask: Ask) -> None:
    for rate in ("0.01", "0.02"):
        run("train", DIGITS, "--name", "twice", "--target", "digit", *EXACTLY, "--learning-rate", rate)
    assert ask("adapter", "twice")["adapter"]["aliases"] == {"live": 2}
