"""`POST /adapters` with settings that cannot be trained with."""

from typing import Any

import pytest

from tests.integration.hostile.bodies import JSON, LEFT_OUT, NOT_FINITE, NOT_NUMBERS, OUT, ROW, Raw, to_json
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.conftest import MAX_RANK
from tests.integration.hostile.training_cases import by_adamw

DATA = {"inputs": [ROW] * 4, "targets": [[1.0] * OUT] * 4}
WHOLE_NUMBERS = {"a fraction": 1.5, "2.0": 2.0, "2e0": Raw("2e0"), "a string of digits": "2"} | NOT_NUMBERS


def _case(
    title: str, code: str, /, *says: str, field: str | None = None, training: Any = LEFT_OUT, **body: Any
) -> Case:
    content = {"name": "fresh", "rank": 2, "data": DATA, "training": by_adamw(training)} | body
    return Case(
        name=title,
        method="POST",
        path="/adapters",
        code=code,
        says=says,
        field=field,
        body=to_json(content),
        headers={"Content-Type": JSON},
    )


def _setting(title: str, code: str, /, *says: str, **training: Any) -> Case:
    """A case whose first setting is the culprit."""
    return _case(title, code, *says, field=f"training.{next(iter(training))}", training=training)


FIELDS = [
    _case("train without a name", "missing_field", field="name", name=LEFT_OUT),
    _case("train without data", "missing_field", field="data", data=LEFT_OUT),
    _case("train without inputs", "missing_field", field="data.inputs", data={"targets": DATA["targets"]}),
    _case("train without targets", "missing_field", field="data.targets", data={"inputs": DATA["inputs"]}),
    _case("take null for data", "wrong_type", "null", field="data", data=None),
    _case("take a list for data", "wrong_type", field="data", data=[[ROW], [[1, 1]]]),
    _case("take null for training", "wrong_type", "null", field="training", training=None),
    _case("take a list for training", "wrong_type", "[]", field="training", training=[]),
    _case("take a string for training", "wrong_type", "adamw", field="training", training="adamw"),
    _case("take a field that it does not know", "unknown_field", field="ranks", ranks=2),
    _case("take a field in other letters", "unknown_field", field="Rank", Rank=2),
    _case("take a setting beside training", "unknown_field", field="epochs", epochs=2),
    _case("take unknown data", "unknown_field", field="data.weight", data=DATA | {"weight": "w"}),
    _setting("take an unknown setting", "unknown_field", nesterov=True),
    _setting("take a rank in training", "unknown_field", rank=2),
    _case("take a lone surrogate as a setting", "wrong_type", "\ud800", field="training", training={"\ud800": 1}),
    _case("publish sometimes", "out_of_range", "sometimes", field="publish", publish="sometimes"),
    _case("publish as a boolean", "wrong_type", "true", field="publish", publish=True),
    _case("publish null", "wrong_type", "null", field="publish", publish=None),
    _case("publish in capitals", "out_of_range", "ALWAYS", field="publish", publish="ALWAYS"),
]

RANKS = [
    *(
        _case(f"take {name} as the rank", "not_finite", field="rank", rank=number)
        for name, number in NOT_FINITE.items()
        if name not in ("1e39", "10^39", "10^350")
    ),
    *(
        _case(f"take {name} for the rank", "wrong_type", field="rank", rank=value)
        for name, value in WHOLE_NUMBERS.items()
    ),
    _case("take null for the rank", "wrong_type", "null", field="rank", rank=None),
    _case("train rank 0", "out_of_range", "0", field="rank", rank=0),
    _case("train rank -1", "out_of_range", "-1", field="rank", rank=-1),
    _case("train a rank past the limit", "rank_too_large", str(MAX_RANK), field="rank", rank=MAX_RANK + 1),
    _case("train rank 10^30", "rank_too_large", str(10**30), field="rank", rank=10**30),
    _case("train rank 10^350", "rank_too_large", "digits", field="rank", rank=10**350),
]

ALPHAS = [
    *(_case(f"take {name} as alpha", "not_finite", field="alpha", alpha=number) for name, number in NOT_FINITE.items()),
    *(_case(f"take {name} for alpha", "wrong_type", field="alpha", alpha=value) for name, value in NOT_NUMBERS.items()),
    _case("take null for alpha", "wrong_type", "null", field="alpha", alpha=None),
    _case("train alpha 0", "out_of_range", "0", field="alpha", alpha=0),
    _case("train alpha -0.0", "out_of_range", "-0.0", field="alpha", alpha=-0.0),
    _case("train alpha -1", "out_of_range", "-1", field="alpha", alpha=-1),
    _case("train alpha 1,000,001", "out_of_range", "1000001", field="alpha", alpha=1_000_001),
    _case("train alpha 10^30", "out_of_range", str(10**30), field="alpha", alpha=10**30),
]

OUTSIDE: dict[str, list[Any]] = {
    "method": ["adam", "AdamW", "", "lbfgs"],
    "loss": ["mae", "MSE", ""],
    "epochs": [0, -1, 10_000_001, 10**30],
    "batch_size": [0, -1, 10**30],
    "seed": [-1, 2**63, 10**30],
    "learning_rate": [0, -0.01, -1],
    "validation_fraction": [-0.1, 1, 1.0, 2, -1],
}

BOUNDS = [
    _setting(f"take {value!r} as {name}", "out_of_range", str(value), **{name: value})
    for name, values in OUTSIDE.items()
    for value in values
] + [
    _setting("take a number for the method", "wrong_type", "1", method=1),
    _setting("take null for the method", "wrong_type", "null", method=None),
    _setting("take a boolean for the loss", "wrong_type", "true", loss=True),
    _setting("take a negative ridge", "out_of_range", "-1", ridge=-1, method="closed_form"),
    _setting("take more steps than fit", "out_of_range", "10000000", epochs=10_000_000, batch_size=1),
    _setting("leave nothing to validate on", "out_of_range", "4 rows", validation_fraction=0.01),
    _setting("leave nothing to train on", "out_of_range", "4 rows", validation_fraction=0.99),
    _setting("leave nothing to fit on", "out_of_range", "4 rows", validation_fraction=0.99, method="closed_form"),
]

TYPES = [
    *(
        _setting(f"take {name} for {setting}", "wrong_type", **{setting: value})
        for setting in ("epochs", "batch_size", "seed")
        for name, value in WHOLE_NUMBERS.items()
    ),
    *(
        _setting(f"take {name} for {setting}", "wrong_type", **{setting: value})
        for setting in ("learning_rate", "validation_fraction", "ridge")
        for name, value in NOT_NUMBERS.items()
    ),
    *(
        _setting(f"take {name} as {setting}", "not_finite", **{setting: number})
        for setting in ("learning_rate", "validation_fraction", "ridge")
        for name, number in NOT_FINITE.items()
    ),
    *(
        _setting(f"take {name} as {setting}", "not_finite", **{setting: NOT_FINITE[name]})
        for setting in ("epochs", "batch_size", "seed")
        for name in ("NaN", "Infinity", "1e400", "10^400", "an integer of 10,000 digits")
    ),
    *(
        _setting(f"take null for {setting}", "wrong_type", "null", **{setting: None})
        for setting in ("epochs", "seed", "learning_rate", "validation_fraction", "ridge")
    ),
]

COMBINATIONS = [
    *(
        _setting(
            f"ignore {setting} with closed_form",
            "ignored_field",
            "closed_form",
            **{setting: value},
            method="closed_form",
        )
        for setting, value in {"epochs": 50, "learning_rate": 0.01, "batch_size": 64, "init": "zero_delta"}.items()
    ),
    _setting(
        "ignore a null batch_size with closed_form", "ignored_field", "null", batch_size=None, method="closed_form"
    ),
    *(
        _setting(f"ignore ridge with {method}", "ignored_field", method, ridge=0, method=method)
        for method in ("adamw", "sgd")
    ),
    _setting("ignore ridge where auto comes to adamw", "ignored_field", "adamw", ridge=0.5, epochs=3, method="auto"),
]


@pytest.mark.parametrize("case", FIELDS + RANKS + ALPHAS + BOUNDS + TYPES + COMBINATIONS, ids=lambda case: case.name)
def test_training_refuses_to(target: Target, case: Case) -> None:
    target.refuses(case)
