"""`POST /adapters` with settings past their bounds or of the wrong type."""

from typing import Any

import pytest

from tests.integration.hostile.bodies import NOT_FINITE, NOT_NUMBERS
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.training_cases import CLASSES, CROSS, HALF, NOT_WHOLE, beside, case, setting

OUTSIDE: dict[str, list[Any]] = {
    "weight_decay": [-1, -0.1, 1001],
    "momentum": [-0.1, 1, 1.0, 2],
    "clip_norm": [0, -1, 1e31],
    "warmup_steps": [-1, 10_000_001],
    "max_steps": [0, -1, 10_000_001],
    "max_seconds": [0, -1, 1e8],
    "learning_rate": [1e7],
    "huber_delta": [0, -1, 1e31],
    "label_smoothing": [-0.1, 1, 1.5],
    "temperature": [0, -1, 9e-5, 10001],
}
OUTSIDE_STOPPING: dict[str, list[Any]] = {
    "patience": [0, -1, 1_000_001],
    "min_delta": [-0.1, -1, 1e31],
    "evaluate_every": [0, -1, 10_000_001],
}
WHOLE = ("warmup_steps", "max_steps")


def _stopping(title: str, code: str, /, *says: str, **early_stopping: Any) -> Case:
    """A case whose first field is the culprit."""
    field = f"training.early_stopping.{next(iter(early_stopping))}"
    return case(title, code, *says, field=field, split=HALF, training={"early_stopping": early_stopping})


BOUNDS = [
    *(
        setting(f"take {value!r} as {name}", "out_of_range", str(value), **beside(name, value))
        for name, values in OUTSIDE.items()
        for value in values
    ),
    *(
        setting(f"take {kind} for {name}", "wrong_type", **beside(name, value))
        for name in OUTSIDE
        for kind, value in (NOT_WHOLE if name in WHOLE else NOT_NUMBERS).items()
    ),
    *(
        setting(f"take {number} as {name}", "not_finite", **beside(name, NOT_FINITE[number]))
        for name in OUTSIDE
        for number in ("NaN", "Infinity", "1e400", "10^400")
    ),
    *(
        setting(f"take null for {name}", "wrong_type", "null", **beside(name, None))
        for name in OUTSIDE
        if name not in ("clip_norm", "max_steps", "max_seconds")
    ),
    setting("take an unknown schedule", "out_of_range", "step", schedule="step"),
    setting("take a number for the schedule", "wrong_type", "1", schedule=1),
    setting("take null for the schedule", "wrong_type", "null", schedule=None),
    *(
        setting(f"take {value!r} for {name}", "wrong_type", **{name: value}, method="closed_form")
        for name in ("bias", "keep_statistics")
        for value in (1, 0, "true", None, [True], 1.0)
    ),
]


STOPPING = [
    *(
        setting(f"take {title} for early_stopping", "wrong_type", early_stopping=value, split=HALF)
        for title, value in NOT_NUMBERS.items()
        if title != "an object"
    ),
    case("stop early without held-out rows", "missing_field", field="split", training={"early_stopping": {}}),
    _stopping("take an unknown field of early_stopping", "unknown_field", metric="loss"),
    *(
        _stopping(f"take {value!r} as {name}", "out_of_range", str(value), **{name: value})
        for name, values in OUTSIDE_STOPPING.items()
        for value in values
    ),
    *(
        _stopping(f"take {title} for {name}", "wrong_type", **{name: value})
        for name in ("patience", "evaluate_every")
        for title, value in NOT_WHOLE.items()
    ),
    *(_stopping(f"take {title} for min_delta", "wrong_type", min_delta=value) for title, value in NOT_NUMBERS.items()),
    *(
        _stopping(f"take {number} as {name}", "not_finite", **{name: NOT_FINITE[number]})
        for name in ("patience", "min_delta", "evaluate_every")
        for number in ("NaN", "Infinity", "1e400")
    ),
    *(_stopping(f"take null for {name}", "wrong_type", "null", **{name: None}) for name in ("patience", "min_delta")),
]


CLASS_WEIGHTS = [
    *(
        setting(title, code, *says, class_weights=given, data=CLASSES, **CROSS)
        for title, code, says, given in (
            ("weigh one of two classes", "wrong_shape", ["1 numbers"], [1]),
            ("weigh three of two classes", "wrong_shape", ["3 numbers"], [1, 1, 1]),
            ("weigh no class", "wrong_shape", ["0 numbers"], []),
            ("weigh a class 0", "out_of_range", ["above 0"], [0, 1]),
            ("weigh a class -1", "out_of_range", ["-1"], [1, -1]),
            ("weigh a class less than float32 can", "out_of_range", ["1e-60"], [1, 1e-60]),
            ("weigh a class 1e31", "out_of_range", ["1e+31"], [1, 1e31]),
            ("weigh classes by name", "wrong_type", ["equal"], "equal"),
            ("weigh classes in an object", "wrong_type", ["0"], {"0": 1, "1": 2}),
            ("weigh classes by one number", "wrong_type", ["2"], 2),
            ("weigh classes by a boolean", "wrong_type", ["true"], True),
        )
    ),
    *(
        setting(f"weigh a class {title}", "wrong_type", "position 1", class_weights=[1, value], data=CLASSES, **CROSS)
        for title, value in (NOT_NUMBERS | {"null": None}).items()
    ),
    *(
        setting(f"weigh a class {title}", "not_finite", "position 0", class_weights=[number, 1], data=CLASSES, **CROSS)
        for title, number in NOT_FINITE.items()
    ),
]


@pytest.mark.parametrize("case", BOUNDS + STOPPING + CLASS_WEIGHTS, ids=lambda case: case.name)
def test_training_refuses_to(target: Target, case: Case) -> None:
    target.refuses(case)
