"""Numbers and sentences as people read them."""

import re

import pytest

from app.web.pages import formatting
from app.web.pages.formatting import figure, inline, sentence
from app.web.pages.rendering import STATIC_FOLDER


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("there is no adapter 'acme'", "There is no adapter 'acme'."),
        ("diabetes has no columns", "diabetes has no columns."),
        ("data.inputs must name a column", "data.inputs must name a column."),
        ("acme@3 was made for another base layer!", "acme@3 was made for another base layer!"),
        ("", "."),
    ],
)
def test_a_name_at_the_beginning_of_a_sentence_stays_as_it_is(text: str, shown: str) -> None:
    assert sentence(text) == shown


def test_the_scripts_capitalise_the_same_words() -> None:
    listed = re.search(r'new Set\("([a-z ]+)"\.split', (STATIC_FOLDER / "js" / "wording.js").read_text())
    assert listed is not None
    assert listed[1].split() == formatting._CAPITALISED.split("|")


@pytest.mark.parametrize(("name", "shown"), [("Accuracy", "accuracy"), ("RMSE", "RMSE"), ("R², mean", "R², mean")])
def test_a_metric_within_a_sentence_keeps_what_is_an_acronym(name: str, shown: str) -> None:
    assert inline(name) == shown
