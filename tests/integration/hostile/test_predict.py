"""`POST /predict` with bad rows and bad fields."""

from typing import Any

import pytest

from tests.integration.hostile.bodies import (
    IN,
    JSON,
    LEFT_OUT,
    NOT_FINITE,
    NOT_NUMBERS,
    ROW,
    TEN_THOUSAND_DIGITS,
    Raw,
    to_json,
    with_number,
)
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.conftest import MAX_ROWS


def _case(title: str, code: str, /, *says: str, field: str | None = None, row: int | None = None, **body: Any) -> Case:
    content = to_json({"adapter": "acme", "inputs": [ROW]} | body)
    return Case(
        name=title,
        method="POST",
        path="/predict",
        code=code,
        says=says,
        field=field,
        row=row,
        body=content,
        headers={"Content-Type": JSON},
    )


def _inputs(title: str, code: str, /, *says: str, row: int | None = None, inputs: object) -> Case:
    return _case(title, code, *says, field="inputs", row=row, inputs=inputs)


UNSPEAKABLE: dict[str, Any] = {"\ud800": 1}
ENDLESS: dict[str, Any] = {"x" * 400_000: 1}

NUMBERS = [
    _inputs(f"take {name} as a number", "not_finite", "column 3", row=1, inputs=with_number(3, 1, 3, number))
    for name, number in NOT_FINITE.items()
] + [
    _inputs(f"take {name} for a number", "wrong_type", "column 3", row=1, inputs=with_number(3, 1, 3, value))
    for name, value in (NOT_NUMBERS | {"null": None, "a lone surrogate": "\ud800"}).items()
]

SHAPES = [
    _inputs("take null for rows", "wrong_type", "null", inputs=None),
    _inputs("take a string for rows", "wrong_type", "[[1]]", inputs="[[1]]"),
    _inputs("take a number for rows", "wrong_type", "7", inputs=7),
    _inputs("take an object for rows", "wrong_type", inputs={"0": ROW}),
    _inputs("answer no rows", "wrong_shape", "0 rows", inputs=[]),
    _inputs("answer an empty row", "wrong_shape", "0 numbers", row=0, inputs=[[]]),
    _inputs("answer an empty row after a good one", "wrong_shape", "0 numbers", row=1, inputs=[ROW, []]),
    _inputs("answer ragged rows, the second short", "wrong_shape", "9 numbers", row=1, inputs=[ROW, ROW[:-1]]),
    _inputs("answer ragged rows, the third long", "wrong_shape", "11 numbers", row=2, inputs=[ROW, ROW, [*ROW, 1]]),
    _inputs("answer ragged rows that add up", "wrong_shape", row=0, inputs=[ROW[:-1], [*ROW, 1]]),
    _inputs("answer narrow rows", "wrong_shape", "9 numbers", row=0, inputs=[ROW[:-1]] * 2),
    _inputs("answer wide rows", "wrong_shape", "11 numbers", row=0, inputs=[[*ROW, 1]] * 2),
    _inputs("take one row without its list", "wrong_type", row=0, inputs=ROW),
    _inputs("take null for a row", "wrong_type", "null", row=1, inputs=[ROW, None]),
    _inputs("take a string for a row", "wrong_type", row=1, inputs=[ROW, "0123456789"]),
    _inputs("take an object for a row", "wrong_type", row=0, inputs=[{str(n): 1 for n in range(IN)}]),
    _inputs("take lists for numbers", "wrong_type", "column 0", row=0, inputs=[[[n] for n in ROW]]),
    _inputs("answer too many rows", "out_of_range", f"{MAX_ROWS + 1} rows", inputs=[ROW] * (MAX_ROWS + 1)),
    _case("give an answer past float32", "output_not_finite", row=1, field="inputs", inputs=[ROW, [3e38] * IN]),
]

FIELDS = [
    _case("guess an adapter that was left out", "missing_field", "null", field="adapter", adapter=LEFT_OUT),
    _case("guess inputs that were left out", "missing_field", field="inputs", inputs=LEFT_OUT),
    _case("take adapter and adapters together", "invalid_combination", field="adapters", adapters=["acme"]),
    _case("take a null adapter and adapters together", "invalid_combination", "adapter", adapter=None, adapters=[None]),
    _case("take a field that it does not know", "unknown_field", field="alpha", alpha=1),
    _case("take a field in other letters", "unknown_field", field="Inputs", Inputs=[ROW]),
    _case("take a field of Python's", "unknown_field", field="__class__", __class__=1),
    _case("take a look-alike of a field", "unknown_field", "аdapter", аdapter=None),
    _case("take a lone surrogate as a field", "wrong_type", "\ud800", **UNSPEAKABLE),
    _case("repeat a field of a megabyte", "unknown_field", "x" * 50, **ENDLESS),
    _case("repeat a value of a megabyte", "wrong_type", field="inputs", inputs="x" * 400_000),
    _case("take null for adapters", "wrong_type", "null", field="adapters", adapter=LEFT_OUT, adapters=None),
    _case("take an object for adapters", "wrong_type", "{}", field="adapters", adapter=LEFT_OUT, adapters={}),
    _case("take a number for adapters", "wrong_type", "0", field="adapters", adapter=LEFT_OUT, adapters=0),
    _case("take a string for adapters", "wrong_type", "acme", field="adapters", adapter=LEFT_OUT, adapters="acme"),
    _case("take too few adapters", "wrong_shape", "0 entries", field="adapters", adapter=LEFT_OUT, adapters=[]),
    _case(
        "take too many adapters",
        "wrong_shape",
        "2 entries",
        field="adapters",
        adapter=LEFT_OUT,
        adapters=[None, "acme"],
    ),
]


@pytest.mark.parametrize("case", NUMBERS + SHAPES + FIELDS, ids=lambda case: case.name)
def test_predict_refuses_to(target: Target, case: Case) -> None:
    target.refuses(case)


@pytest.mark.parametrize("number", [1e30, 10**30, Raw("1E+30"), 3.4028235e38, 5e-324, -0.0], ids=str)
def test_predict_takes_whatever_float32_holds(target: Target, number: object) -> None:
    body = to_json({"adapter": None, "inputs": with_number(1, 0, 3, number)})
    answer = target.client.post("/predict", content=body, headers={"Content-Type": JSON})
    assert answer.status_code in (200, 422), answer.text
    assert answer.status_code == 200 or answer.json()["code"] == "output_not_finite"


def test_a_bad_number_is_shown_in_a_hundred_characters(target: Target) -> None:
    body = to_json({"adapter": None, "inputs": with_number(1, 0, 3, TEN_THOUSAND_DIGITS)})
    given = target.client.post("/predict", content=body, headers={"Content-Type": JSON}).json()["given"]
    assert 0 < len(given) <= 100
