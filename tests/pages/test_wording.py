"""Numbers as people read them."""

import pytest

from app.pages.wording import figure


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0.0, "0"),
        (1.2e-5, "1.2e-05"),
        (0.06612, "0.0661"),
        (15.94, "15.9"),
        (999.4, "999"),
        (999.5, "1,000"),
        (-999.7, "-1,000"),
        (12_345.6, "12,346"),
        (1000, "1,000"),
        (float("nan"), "–"),
        (float("inf"), "–"),
        (None, "–"),
        (True, "–"),
    ],
)
def test_a_figure_has_three_digits_or_all_before_the_point(number: object, shown: str) -> None:
    assert figure(number) == shown
