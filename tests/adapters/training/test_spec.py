"""How many rows are held out, how many steps that makes, and what is too many or too few."""

import json
from dataclasses import asdict, replace

import pytest

from adapters.errors import OutOfRange
from adapters.training.spec import Init, Loss, Method, TrainingSpec

SPEC = TrainingSpec(rank=2, alpha=2.0)


def test_what_is_left_out_is_the_contract_s_default() -> None:
    assert asdict(SPEC) == {
        "rank": 2,
        "alpha": 2.0,
        "rslora": False,
        "method": "adamw",
        "loss": "mse",
        "epochs": 50,
        "learning_rate": 0.01,
        "batch_size": 64,
        "seed": 0,
        "init": "zero_delta",
        "validation_fraction": 0.0,
        "ridge": 0.0,
    }


def test_a_spec_survives_json() -> None:
    spec = replace(SPEC, method=Method.SGD, loss=Loss.CROSS_ENTROPY, init=Init.RANDN, batch_size=None, rslora=True)
    again = TrainingSpec.from_json(json.loads(json.dumps(asdict(spec))))
    assert again == spec
    assert isinstance(again.method, Method)


@pytest.mark.parametrize(
    ("rows", "fraction", "held_out"),
    [(10, 0.0, 0), (10, 0.3, 3), (10, 0.25, 3), (10, 0.24, 2), (3, 0.5, 2), (7, 0.9, 6)],
)
def test_the_fraction_of_the_rows_is_rounded_half_up(rows: int, fraction: float, held_out: int) -> None:
    assert replace(SPEC, validation_fraction=fraction).validation_rows(rows) == held_out


@pytest.mark.parametrize(
    ("rows", "batch_size", "fraction", "steps"),
    [
        (64, 64, 0.0, 3),
        (65, 64, 0.0, 6),
        (100, None, 0.0, 3),
        (100, 10**9, 0.0, 3),
        (100, 10, 0.5, 15),
        (1, 64, 0.0, 3),
    ],
)
def test_a_step_is_a_batch_of_the_rows_that_are_not_held_out(
    rows: int, batch_size: int | None, fraction: float, steps: int
) -> None:
    spec = replace(SPEC, epochs=3, batch_size=batch_size, validation_fraction=fraction)
    assert spec.steps(rows) == steps
    assert replace(spec, method=Method.CLOSED_FORM).steps(rows) == 1


@pytest.mark.parametrize(("rows", "fraction"), [(1, 0.5), (2, 0.1), (10, 0.999), (10, 0.01)])
def test_neither_part_of_a_split_may_be_empty(rows: int, fraction: float) -> None:
    with pytest.raises(OutOfRange) as caught:
        replace(SPEC, validation_fraction=fraction).check_rows(rows)
    assert caught.value.field == "training.validation_fraction"


def test_ten_million_steps_are_the_most() -> None:
    replace(SPEC, epochs=10_000_000).check_rows(64)
    replace(SPEC, method=Method.CLOSED_FORM, epochs=10_000_000).check_rows(65)
    with pytest.raises(OutOfRange) as caught:
        replace(SPEC, epochs=10_000_000).check_rows(65)
    assert caught.value.field == "training.epochs"
