"""`PUT /adapters/{name}` as JSON: factors that are no factors."""

from typing import Any

import pytest

from tests.integration.hostile.bodies import (
    IN,
    JSON,
    LEFT_OUT,
    NOT_FINITE,
    NOT_NUMBERS,
    OUT,
    ROW,
    Raw,
    to_json,
    with_number,
)
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.conftest import MAX_RANK

A, B = [[1.0, 0.5]] * OUT, [ROW] * 2


def _case(title: str, code: str, /, *says: str, field: str | None = None, row: int | None = None, **body: Any) -> Case:
    """Ours, with changes; PEFT's where `lora_A` is among them."""
    own = {"lora_A": B, "lora_B": A} if "lora_A" in body else {"A": A, "B": B}
    return Case(
        name=title,
        method="PUT",
        path="/adapters/fresh",
        code=code,
        says=says,
        field=field,
        row=row,
        body=to_json(own | body),
        headers={"Content-Type": JSON},
    )


NUMBERS = [
    *(
        _case(f"take {name} in B", "not_finite", "column 7", field="B", row=1, B=with_number(2, 1, 7, number))
        for name, number in NOT_FINITE.items()
    ),
    *(
        _case(f"take {name} in B", "wrong_type", "column 7", field="B", row=1, B=with_number(2, 1, 7, value))
        for name, value in (NOT_NUMBERS | {"null": None}).items()
    ),
    _case("take NaN in A", "not_finite", "column 0", field="A", row=1, A=[[1, 1], [Raw("NaN"), 1]]),
    _case("take 1e39 in lora_A", "not_finite", field="lora_A", row=0, lora_A=with_number(2, 0, 0, 1e39)),
    _case("take a string in lora_B", "wrong_type", field="lora_B", row=0, lora_A=B, lora_B=[["1", 1], [1, 1]]),
    *(_case(f"take {name} as alpha", "not_finite", field="alpha", alpha=number) for name, number in NOT_FINITE.items()),
    *(_case(f"take {name} for alpha", "wrong_type", field="alpha", alpha=value) for name, value in NOT_NUMBERS.items()),
    _case("take null for alpha", "wrong_type", "null", field="alpha", alpha=None),
    _case("take an alpha of 1,000,001", "out_of_range", "1000001", field="alpha", alpha=1_000_001),
    _case("take an alpha of -1,000,001", "out_of_range", "-1000001", field="alpha", alpha=-1_000_001),
    _case("take an alpha of 10^30", "out_of_range", str(10**30), field="alpha", alpha=10**30),
    _case("take NaN as lora_alpha", "not_finite", field="lora_alpha", lora_A=B, lora_alpha=Raw("NaN")),
    _case("take a string for lora_alpha", "wrong_type", "2", field="lora_alpha", lora_A=B, lora_alpha="2"),
    _case("take null for a bias", "wrong_type", "null", field="bias", bias=None),
    _case("take a number for a bias", "wrong_type", "0", field="bias", bias=0),
    _case("take NaN in a bias", "not_finite", "position 1", field="bias", bias=[0, Raw("NaN")]),
    _case("take 10^400 in a bias", "not_finite", "position 0", field="bias", bias=[10**400, 0]),
    _case("take a boolean in a bias", "wrong_type", "position 0", field="bias", bias=[True, 0]),
    _case("take rows for a bias", "wrong_type", "position 0", field="bias", bias=[[0], [0]]),
]

SHAPES = [
    _case("take a short bias", "wrong_shape", "1 numbers", field="bias", bias=[0]),
    _case("take a long bias", "wrong_shape", "3 numbers", field="bias", bias=[0, 0, 0]),
    _case("take an empty bias", "wrong_shape", "0 numbers", field="bias", bias=[]),
    _case("take null for A", "wrong_type", "null", field="A", A=None),
    _case("take a string for B", "wrong_type", field="B", B="B"),
    _case("take no rows of A", "wrong_shape", "0 rows", field="A", A=[]),
    _case("take empty rows of A", "wrong_shape", "0 numbers", field="A", row=0, A=[[], []]),
    _case("take rank 0", "wrong_shape", "0 rows", field="B", B=[]),
    _case("take a ragged A", "wrong_shape", "1 numbers", field="A", row=1, A=[[1, 1], [1]]),
    _case("take a ragged B", "wrong_shape", "9 numbers", field="B", row=1, B=[ROW, ROW[1:]]),
    _case("take a list of numbers for A", "wrong_type", field="A", row=0, A=[1, 1]),
    _case("take a cube for B", "wrong_type", field="B", row=0, B=[[[n] for n in ROW]] * 2),
    _case("take an A for another layer", "wrong_shape", "(3, 2)", field="A", A=[[1, 1]] * 3),
    _case("take a B for another layer", "wrong_shape", "(2, 11)", field="B", B=[[*ROW, 1]] * 2),
    _case("take factors of two ranks", "wrong_shape", "(1, 10)", field="B", B=[ROW]),
    _case("take A and B swapped", "wrong_shape", "swapped", A=B, B=A),
    _case("take PEFT's factors swapped", "wrong_shape", "swapped", lora_A=A, lora_B=B),
    _case(
        "take a rank past the limit",
        "rank_too_large",
        str(MAX_RANK),
        field="B",
        A=[[1] * (MAX_RANK + 1)] * OUT,
        B=[ROW] * (MAX_RANK + 1),
    ),
]

FIELDS = [
    _case("take no A", "missing_field", field="A", A=LEFT_OUT),
    _case("take no B", "missing_field", field="B", B=LEFT_OUT),
    _case("take nothing", "missing_field", field="A", A=LEFT_OUT, B=LEFT_OUT),
    _case("take no lora_B", "missing_field", field="lora_B", lora_A=B, lora_B=LEFT_OUT),
    _case("take a rank", "unknown_field", field="rank", rank=2),
    _case("take a name", "unknown_field", field="name", name="fresh"),
    _case("take a in small letters", "unknown_field", field="a", a=A),
    _case("take a Cyrillic A", "unknown_field", field="А", А=A),
    _case("take both kinds of names", "unknown_field", "lora_A", A=A, lora_A=B),
    _case("take PEFT's alpha with our names", "unknown_field", "lora_alpha", lora_alpha=2),
    _case("take our alpha with PEFT's names", "unknown_field", "alpha", lora_A=B, alpha=2),
    _case("take our bias with PEFT's names", "unknown_field", "bias", lora_A=B, bias=[0] * OUT),
    _case("take rslora with PEFT's names", "unknown_field", field="use_rslora", lora_A=B, use_rslora=True),
]


@pytest.mark.parametrize("case", NUMBERS + SHAPES + FIELDS, ids=lambda case: case.name)
def test_an_upload_as_json_refuses_to(target: Target, case: Case) -> None:
    target.refuses(case)


def test_a_factor_of_a_hundred_ranks_is_refused_before_it_is_stored(target: Target) -> None:
    target.refuses(_case("take rank 100", "rank_too_large", "100", A=[[1] * 100] * OUT, B=[[1] * IN] * 100))
