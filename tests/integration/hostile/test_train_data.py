"""`POST /adapters` with data that does not fit, and with factors that cannot be started from."""

from typing import Any

import pytest

from tests.integration.hostile.bodies import (
    IN,
    JSON,
    NOT_FINITE,
    NOT_NUMBERS,
    OUT,
    ROW,
    TEN_THOUSAND_DIGITS,
    to_json,
    with_number,
)
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.conftest import MAX_RANK
from tests.integration.hostile.test_references import INVALID_NAMES, INVALID_REFERENCES, UNANSWERABLE
from tests.integration.hostile.training_cases import by_adamw

TARGET = [1.0] * OUT
A, B = [[1.0, 0.5]] * OUT, [[1.0] * IN] * 2


def _case(title: str, code: str, /, *says: str, field: str | None = None, row: int | None = None, **body: Any) -> Case:
    content = {"name": "fresh", "rank": 2, "data": {"inputs": [ROW] * 3, "targets": [TARGET] * 3}} | body
    content["training"] = by_adamw(body.get("training", {}))
    return Case(
        name=title,
        method="POST",
        path="/adapters",
        code=code,
        says=says,
        field=field,
        row=row,
        body=to_json(content),
        headers={"Content-Type": JSON},
    )


def _inputs(title: str, code: str, /, *says: str, row: int | None = None, inputs: object) -> Case:
    data = {"inputs": inputs, "targets": [TARGET] * 3}
    return _case(title, code, *says, field="data.inputs", row=row, data=data)


def _targets(title: str, code: str, /, *says: str, row: int | None = None, targets: object) -> Case:
    data = {"inputs": [ROW] * 3, "targets": targets}
    return _case(title, code, *says, field="data.targets", row=row, data=data)


def _classes(title: str, code: str, /, *says: str, row: int | None = None, targets: object) -> Case:
    data = {"inputs": [ROW] * 3, "targets": targets}
    training = {"loss": "cross_entropy"}
    return _case(title, code, *says, field="data.targets", row=row, data=data, training=training)


def _init(
    title: str, code: str, /, *says: str, field: str = "training.init", row: int | None = None, init: Any
) -> Case:
    return _case(title, code, *says, field=field, row=row, training={"init": init})


INPUTS = [
    *(
        _inputs(f"train on {name}", "not_finite", "column 4", row=2, inputs=with_number(3, 2, 4, number))
        for name, number in NOT_FINITE.items()
    ),
    *(
        _inputs(f"train on {name}", "wrong_type", "column 4", row=2, inputs=with_number(3, 2, 4, value))
        for name, value in NOT_NUMBERS.items()
    ),
    _inputs("take null for inputs", "wrong_type", "null", inputs=None),
    _inputs("train on no rows", "wrong_shape", "0 rows", inputs=[]),
    _inputs("train on empty rows", "wrong_shape", "0 numbers", row=0, inputs=[[], [], []]),
    _inputs("train on ragged rows", "wrong_shape", "9 numbers", row=1, inputs=[ROW, ROW[:-1], ROW]),
    _inputs("train on wide rows", "wrong_shape", "11 numbers", row=0, inputs=[[*ROW, 1]] * 3),
]

TARGETS = [
    *(
        _targets(f"reach for {name}", "not_finite", "column 1", row=1, targets=[TARGET, [1, number], TARGET])
        for name, number in NOT_FINITE.items()
    ),
    _targets("take null for targets", "wrong_type", "null", targets=None),
    _targets("take null for a target", "wrong_type", "column 0", row=1, targets=[TARGET, [None, 1], TARGET]),
    _targets("take a boolean for a target", "wrong_type", "column 0", row=1, targets=[TARGET, [True, 1], TARGET]),
    _targets("train on fewer targets than inputs", "wrong_shape", "2 rows", targets=[TARGET] * 2),
    _targets("train on more targets than inputs", "wrong_shape", "4 rows", targets=[TARGET] * 4),
    _targets("train on narrow targets", "wrong_shape", "1 numbers", row=0, targets=[[1]] * 3),
    _targets("train on wide targets", "wrong_shape", "3 numbers", row=0, targets=[[1, 1, 1]] * 3),
    _targets("take classes where numbers are wanted", "wrong_type", row=0, targets=[0, 1, 0]),
]

CLASSES = [
    _classes("take rows where classes are wanted", "wrong_type", row=0, targets=[TARGET] * 3),
    _classes("take an object for classes", "wrong_type", targets={"0": 1}),
    _classes("train on fewer classes than rows", "wrong_shape", "2 rows", targets=[0, 1]),
    _classes("train on more classes than rows", "wrong_shape", "4 rows", targets=[0, 1, 0, 1]),
    _classes("train on a class past the last", "out_of_range", str(OUT), row=1, targets=[0, OUT, 1]),
    _classes("train on a negative class", "out_of_range", "-1", row=2, targets=[0, 1, -1]),
    _classes("train on class 10^30", "out_of_range", str(10**30), row=0, targets=[10**30, 1, 1]),
    _classes("train on class 1.0", "wrong_type", "1.0", row=1, targets=[0, 1.0, 1]),
    _classes("train on class 0.5", "wrong_type", "0.5", row=1, targets=[0, 0.5, 1]),
    _classes("train on class true", "wrong_type", "true", row=1, targets=[0, True, 1]),
    _classes("train on class null", "wrong_type", "null", row=1, targets=[0, None, 1]),
    _classes("train on a class in a string", "wrong_type", "1", row=1, targets=[0, "1", 1]),
    _classes("train on class NaN", "not_finite", "NaN", row=1, targets=[0, NOT_FINITE["NaN"], 1]),
    _classes("train on class 1e400", "not_finite", row=1, targets=[0, NOT_FINITE["1e400"], 1]),
    _classes("train on a class of 10,000 digits", "not_finite", row=1, targets=[0, TEN_THOUSAND_DIGITS, 1]),
]

STARTS = [
    _init("start from an unknown word", "wrong_type", "zeros", init="zeros"),
    _init("start from its own word for factors", "wrong_type", "factors", init="factors"),
    _init("start from null", "wrong_type", "null", init=None),
    _init("start from a number", "wrong_type", "0", init=0),
    _init("start from a list", "wrong_type", init=[A, B]),
    _init("start from an empty object", "missing_field", field="training.init.A", init={}),
    _init("start from A alone", "missing_field", field="training.init.B", init={"A": A}),
    _init("start from a bias", "unknown_field", field="training.init.bias", init={"A": A, "B": B, "bias": [0, 0]}),
    _init("start from an alpha", "unknown_field", field="training.init.alpha", init={"A": A, "B": B, "alpha": 1}),
    _init("start from two things", "unknown_field", field="training.init.A", init={"adapter": "acme", "A": A}),
    _init("start from a lower rank", "wrong_shape", "rank 1", init={"A": [[1]] * OUT, "B": [[1] * IN]}),
    _init("start from a higher rank", "wrong_shape", "rank 3", init={"A": [[1] * 3] * OUT, "B": [[1] * IN] * 3}),
    _init(
        "start from a rank past the limit",
        "rank_too_large",
        field="training.init.B",
        init={"A": [[1] * (MAX_RANK + 1)] * OUT, "B": [[1] * IN] * (MAX_RANK + 1)},
    ),
    _init(
        "start from a NaN",
        "not_finite",
        "column 1",
        field="training.init.A",
        row=0,
        init={"A": with_number(OUT, 0, 1, NOT_FINITE["NaN"]), "B": B},
    ),
    _init("start from a boolean", "wrong_type", field="training.init.B", row=1, init={"A": A, "B": [ROW, [True] * IN]}),
    _init("start from null factors", "wrong_type", "null", field="training.init.A", init={"A": None, "B": B}),
    _init("start from a ragged B", "wrong_shape", field="training.init.B", row=1, init={"A": A, "B": [ROW, ROW[1:]]}),
    _init("start from factors that do not meet", "wrong_shape", field="training.init.B", init={"A": A, "B": [ROW]}),
    _init("start from swapped factors", "wrong_shape", "swapped", field="training.init.B", init={"A": B, "B": A}),
    _init("start from no adapter", "wrong_type", "null", field="training.init.adapter", init={"adapter": None}),
    _init("start from two adapters", "wrong_type", field="training.init.adapter", init={"adapter": ["acme"]}),
    _case(
        "start with a negative alpha",
        "out_of_range",
        "-2",
        "negative@1",
        field="alpha",
        training={"init": {"adapter": "negative"}},
    ),
    *(
        _case(
            f"grow the factors for alpha {alpha}",
            "out_of_range",
            field="alpha",
            alpha=alpha,
            training={"init": {"adapter": "acme"}},
        )
        for alpha in (5e-324, 1e-320, 1e-40)
    ),
    _case(
        "start from another rank than it has", "wrong_shape", "rank 2", rank=1, training={"init": {"adapter": "acme"}}
    ),
]

REFERENCES = [
    *(
        _init(f"start from {name}", code, text[:90], field="training.init.adapter", init={"adapter": text})
        for table, code in ((INVALID_NAMES, "invalid_name"), (INVALID_REFERENCES, "invalid_reference"))
        for name, text in table.items()
    ),
    *(
        _case(f"start from {name}", code, says, training={"init": {"adapter": text}})
        for name, text, code, says in UNANSWERABLE
    ),
]

NAMES = [
    *(
        _case(f"train {name}", "invalid_name", text[:90], field="name", name=text)
        for name, text in INVALID_NAMES.items()
    ),
    _case("train a version", "invalid_name", "acme@1", field="name", name="acme@1"),
    _case("train an alias", "invalid_name", "acme@live", field="name", name="acme@live"),
    *(
        _case(f"train the name {value}", "wrong_type", field="name", name=value)
        for value in (None, 7, 1.5, True, ["acme"], {"name": "acme"})
    ),
]


@pytest.mark.parametrize("case", INPUTS + TARGETS + CLASSES + STARTS + REFERENCES + NAMES, ids=lambda case: case.name)
def test_training_refuses_to(target: Target, case: Case) -> None:
    target.refuses(case)
