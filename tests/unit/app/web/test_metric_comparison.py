"""Metrics as the page shows them: which rows they are of, and what is marked as the best."""

from typing import Any

import pytest

from app.web.pages.formatting import Headline, headline, held_out

FLEET = {"train_loss": 0.73, "base_train_loss": 9.93, "validation_loss": 77.5, "base_validation_loss": 15.6}


def _metrics(**metrics: list[float]) -> dict[str, Any]:
    sides = ("adapter", "base", "trivial")
    return {"held_out": {"rows": 50} | {side: {n: v[at] for n, v in metrics.items()} for at, side in enumerate(sides)}}


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        (FLEET, Headline("held-out", "loss", 77.5, 15.6)),
        (FLEET | {"validation_accuracy": 0.5}, Headline("held-out", "accuracy", 0.5, None)),
        (FLEET | {"validation_loss": None}, Headline("training", "loss", 0.73, 9.93)),
        (FLEET | _metrics(accuracy=[0.9, 0.2, 0.1]), Headline("held-out", "accuracy", 0.9, 0.2)),
        (None, None),
    ],
)
def test_the_headline_is_of_held_out_rows_if_there_are_any(metrics: Any, shown: Headline | None) -> None:
    assert headline(metrics) == shown


def test_held_out_losses_alone_are_compared_too() -> None:
    held = held_out(FLEET)
    assert held is not None
    assert (held.rows, held.models) == (None, ["Adapter", "Base layer"])
    (loss,) = held.measures
    assert (loss.name, loss.values, loss.best) == ("loss", (77.5, 15.6), 1)


def test_no_guess_is_the_best_calibrated() -> None:
    held = held_out(_metrics(accuracy=[0.3, 0.2, 0.4], calibration_error=[0.2, 0.1, 0.0]))
    assert held is not None
    assert {measure.name: measure.best for measure in held.measures} == {"accuracy": 2, "calibration_error": 1}
