"""What the command line says of a fleet: held-out figures, and a summary over its adapters."""

from collections.abc import Callable
from typing import Any

import pytest
from loraplex.cli.job_summary import summarize
from loraplex.cli.output import console
from loraplex.errors import LoraplexError
from loraplex.results import JobAdapter

from tests.integration.cli.conftest import DIGITS, Ended, Run
from tests.support.service import ServiceProcess

Ask = Callable[..., Any]
TEAMS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def fleet(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A fleet of three, of which each has rows that were held out."""
    file = tmp_path_factory.mktemp("fleet") / "teams.csv"
    head, *rows = DIGITS.read_text().splitlines()
    lines = [f"{row},{TEAMS[place % len(TEAMS)]}" for place, row in enumerate(rows)]
    file.write_text("\n".join([f"{head},team", *lines]) + "\n")
    how = ("--rank", 4, "--epochs", 40, "--method", "adamw", "--loss", "cross_entropy", "--split", "rows")
    return run("train", file, "--name", "team", "--target", "digit", "--group-by", "team", *how)


@pytest.fixture(scope="module")
def reached(service: ServiceProcess, fleet: Ended) -> dict[str, dict[str, float]]:
    """The metrics of each of its adapters, as the API has them."""
    data = service.client.get("/adapters", params={"prefix": "team-"}).json()["data"]
    return {adapter["name"]: adapter["live"]["metrics"] for adapter in data}


def test_a_list_shows_held_out_figures_and_says_so(run: Run, reached: dict[str, dict[str, float]]) -> None:
    for command in (("adapters", "team-red"), ("adapter", "team-red")):
        text = " ".join(run(*command).stdout.split())
        metrics = reached["team-red"]
        own, base = metrics["validation_accuracy"], metrics["base_validation_accuracy"]
        assert f"held-out accuracy {own:.4g} (base {base:.4g})" in text
        assert "train_loss" not in text


def test_a_job_of_a_fleet_shows_what_its_adapters_reached(
    run: Run, ask: Ask, fleet: Ended, reached: dict[str, dict[str, float]]
) -> None:
    (job,) = ask("jobs", "--adapter", "team-red")
    accuracies = sorted(metrics["validation_accuracy"] for metrics in reached.values())
    for shown in (fleet.stdout, run("job", job["id"]).stdout):
        text = " ".join(shown.split())
        assert "3 published, 0 failed" in text
        assert f"held-out accuracy median {accuracies[1]:.4g}" in text
        assert "Least gain over the base layer" in text


def _adapter(name: str, **fields: Any) -> JobAdapter:
    usual: dict[str, Any] = {"group": name, "rows": 50, "version": 1, "digest": "", "metrics": None, "error": None}
    return JobAdapter(name=name, moved_live=True, replaced=None, **usual | fields)


def _told(adapters: list[JobAdapter]) -> str:
    printer = console(stderr=False)
    with printer.capture() as capture:
        for part in summarize(adapters):
            printer.print(part, crop=False)
    return " ".join(capture.get().split())


def test_a_summary_names_the_worst_by_held_out_figures_and_the_failures() -> None:
    figures = {"good": (1.0, 9.0, 0.5), "fair": (8.0, 9.0, 0.1), "bad": (77.5, 15.6, 0.7), "even": (9.0, 9.0, 0.2)}
    adapters = [
        _adapter(
            name,
            metrics={
                "validation_loss": own,
                "base_validation_loss": base,
                "train_loss": training,
                "base_train_loss": 9.93,
            },
        )
        for name, (own, base, training) in figures.items()
    ]
    adapters += [
        _adapter("few", metrics={"validation_loss": None, "train_loss": 1e9, "base_train_loss": 1.0}),
        _adapter("broken", version=None, error=LoraplexError("the loss is infinite")),
        _adapter("later", version=None),
    ]
    text = _told(adapters)
    assert "5 published, 1 failed, 1 waiting" in text
    assert "held-out loss median 8.5 (base 9), of 4 adapters" in text
    assert "better than base 2 of 4" in text
    assert "broken failed: the loss is infinite" in text
    table = text.partition("Least gain")[2]
    assert table.index("bad 50 77.5 15.6") < table.index("even 50") < table.index("fair 50")
    assert "good" not in table
    assert "few" not in table


def test_a_summary_of_training_losses_says_what_they_are() -> None:
    metrics = {"validation_loss": None, "train_loss": 2.0, "base_train_loss": 3.0}
    assert "training loss median 2 (base 3), of 1 adapter" in _told([_adapter("one", metrics=metrics)])


def test_a_summary_of_a_fleet_that_waits_has_counts_alone() -> None:
    assert _told([_adapter("one", version=None)]) == "adapters 0 published, 0 failed, 1 waiting"
