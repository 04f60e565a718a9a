"""Lists of numbers become what numpy makes of them, and nothing that is not a number does."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.arrays import matrix, vector
from adapters.errors import LoraplexError, NotFinite, OutOfRange, WrongShape, WrongType

LARGEST = float(np.finfo(np.float32).max)
NUMBERS = st.floats(-LARGEST, LARGEST) | st.integers(-(2**100), 2**100)
RECTANGLES = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(NUMBERS, min_size=width, max_size=width), min_size=1, max_size=5)
)

NOT_NUMBERS: list[Any] = ["1", "", "NaN", True, False, None, [], [1.0], {}, {"1": 1}]
NOT_FINITE: list[Any] = [
    math.nan,
    math.inf,
    -math.inf,
    1e39,
    -1e39,
    1.7976931348623157e308,
    10**39,
    -(10**39),
    10**400,
    2**128,
]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(rows=RECTANGLES)
def test_a_rectangle_of_numbers_is_numpy_s_float32_array(rows: list[list[float]]) -> None:
    wanted = np.array([[np.float32(float(number)) for number in row] for row in rows])
    given_array = matrix(rows, field="x")
    assert given_array.dtype == np.float32
    np.testing.assert_array_equal(given_array, wanted)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(numbers=st.lists(NUMBERS, min_size=1, max_size=8))
def test_a_list_of_numbers_is_numpy_s_float32_vector(numbers: list[float]) -> None:
    wanted = np.array([np.float32(float(number)) for number in numbers])
    np.testing.assert_array_equal(vector(numbers, field="x", length=len(numbers)), wanted)


@pytest.mark.parametrize("bad", NOT_NUMBERS, ids=repr)
def test_what_is_not_a_number_is_never_taken_for_one(bad: object) -> None:
    with pytest.raises(WrongType) as caught:
        matrix([[1.0, 2.0], [3.0, bad]], field="inputs")
    assert (caught.value.field, caught.value.row) == ("inputs", 1)
    with pytest.raises(WrongType, match="position 1"):
        vector([1.0, bad], field="bias", length=2)


@pytest.mark.parametrize("bad", NOT_FINITE, ids=lambda bad: repr(bad)[:12])
def test_what_is_not_finite_as_float32_is_refused_by_its_place(bad: float) -> None:
    with pytest.raises(NotFinite, match="row 2, column 0") as caught:
        matrix([[1, 2], [3, 4], [bad, 6]], field="inputs")
    assert (caught.value.field, caught.value.row) == ("inputs", 2)
    assert caught.value.given == bad or math.isnan(bad)
    with pytest.raises(NotFinite, match="position 0"):
        vector([bad], field="bias", length=1)


@pytest.mark.parametrize("edge", [LARGEST, -LARGEST, 1e-320, -0.0, 5e-324, int(LARGEST)])
def test_the_largest_and_the_smallest_numbers_are_taken(edge: float) -> None:
    assert matrix([[edge]], field="x")[0, 0] == np.float32(edge)


def test_the_first_bad_place_is_named_and_the_nearest_kind() -> None:
    with pytest.raises(WrongType, match="row 0, column 1"):
        matrix([[1.0, None], [math.nan, 1.0]], field="x")
    with pytest.raises(NotFinite, match="row 0, column 0"):
        matrix([[10**400, 1.0], [True, 1.0]], field="x")


@pytest.mark.parametrize("value", [None, 1, "[[1]]", {}, [1.0], [[1.0], 2.0], [[1.0], None], [[1.0], "ab"], ((1.0,),)])
def test_what_is_not_a_list_of_lists_is_the_wrong_type(value: object) -> None:
    with pytest.raises(WrongType):
        matrix(value, field="x")


@pytest.mark.parametrize(
    ("value", "bounds", "error", "row"),
    [
        ([], {}, WrongShape, None),
        ([[]], {}, WrongShape, 0),
        ([[1, 2], [3]], {}, WrongShape, 1),
        ([[1], [2, 3, 4]], {"columns": 2}, WrongShape, 0),
        ([[1, 2], [1, 2, 3]], {"columns": 2}, WrongShape, 1),
        ([[1], [2]], {"rows": 3}, WrongShape, None),
        ([[1], [2], [3]], {"max_rows": 2}, OutOfRange, None),
    ],
)
def test_a_shape_that_does_not_fit_is_named(
    value: object, bounds: dict[str, int], error: type[LoraplexError], row: int | None
) -> None:
    with pytest.raises(error) as caught:
        matrix(value, field="x", **bounds)
    assert (caught.value.field, caught.value.row) == ("x", row)
