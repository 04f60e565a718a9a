"""What the form to train offers for the columns of a table."""

import pytest

from adapters.datasets.validation import Column
from app.web.pages.datasets import group_choices, input_choices, target_choices


def _column(name: str, type: str = "float64", width: int | None = None) -> Column:
    return Column(name=name, type=type, width=width, nulls=0, not_finite=0)


PIXELS = [_column(f"pixel_{number}", "int64") for number in range(64)]


def test_numbered_columns_that_make_a_row_come_first() -> None:
    columns = [*PIXELS, _column("e_0"), _column("e_1"), _column("digit", "int64")]
    chosen = input_choices(columns, 64)
    assert [(choice.selection.prefix, choice.fits) for choice in chosen] == [("pixel_", True), ("e_", False)]
    assert chosen[0].json == '{"prefix": "pixel_"}'


def test_a_list_of_the_right_width_is_offered_and_one_of_another_is_not_fit() -> None:
    columns = [_column("text", "string"), _column("other", "list<float>", 3), _column("e", "list<float>", 8)]
    chosen = input_choices(columns, 8)
    assert [(choice.selection.column, choice.fits) for choice in chosen] == [("e", True), ("other", False)]


def test_where_nothing_is_numbered_all_columns_of_numbers_are_offered_if_they_are_as_many() -> None:
    columns = [_column("age"), _column("height"), _column("class", "string")]
    (choice,) = input_choices(columns, 2)
    assert choice.selection.columns == ("age", "height")
    assert input_choices(columns, 5) == []


def test_numbers_beside_a_class_of_whole_numbers_are_told_apart_from_it() -> None:
    columns = [_column("age"), _column("height"), _column("class", "int64")]
    (choice,) = input_choices(columns, 2)
    assert choice.selection.columns == ("age", "height")


@pytest.mark.parametrize(
    ("type", "width", "outputs"),
    [
        ("int64", None, 10),
        ("string", None, 10),
        ("bool", None, 2),
        ("float64", None, 1),
        ("int64", None, 1),
        ("list<float>", 10, 10),
        ("list<string>", None, 10),
    ],
)
def test_what_the_layer_can_give_is_a_target(type: str, width: int | None, outputs: int) -> None:
    inputs = input_choices(PIXELS, 64)[0].names
    (choice,) = target_choices([*PIXELS, _column("target", type, width)], inputs, outputs)
    assert choice.selection.column == "target"


def test_what_cannot_be_a_target_of_the_layer_is_not_offered() -> None:
    inputs = input_choices(PIXELS, 64)[0].names
    columns = [*PIXELS, _column("price"), _column("e", "list<float>", 7), _column("customer", "string")]
    assert [choice.label for choice in target_choices(columns, inputs, 10)] == ["customer"]
    assert group_choices(columns, inputs) == ["customer"]


def test_ten_thousand_columns_are_looked_through_at_once() -> None:
    columns = [_column(f"c{number}_0") for number in range(16_384)]
    assert input_choices(columns, 64) == []
