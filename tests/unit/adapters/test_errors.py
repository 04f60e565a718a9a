"""Errors that cross processes."""

import pickle
from collections.abc import Iterator

import pytest

from adapters.errors import BadRow, BadRows, Diverged, LoraplexError, OutOfRange, QuotaExceeded, RateLimited

# Classes whose `__init__` has other parameters than that of `LoraplexError`.
SPECIAL: list[LoraplexError] = [
    BadRows("two rows", rows=[BadRow(3, "a", "it is empty")], field="rows"),
    RateLimited("wait", policy="requests", per_second=2.0, wait_seconds=1.5, expected="at most 2"),
    QuotaExceeded("adapters", value=5, used=5),
    Diverged("the loss is infinite", step=7),
]


def _sent(error: LoraplexError) -> LoraplexError:
    arrived: LoraplexError = pickle.loads(pickle.dumps(error))  # noqa: S301 - its own bytes
    return arrived


def _classes(kind: type[LoraplexError] = LoraplexError) -> Iterator[type[LoraplexError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _classes(child)


def _errors() -> Iterator[LoraplexError]:
    special = [type(error) for error in SPECIAL]
    yield from SPECIAL
    # Ray makes subclasses of its own.
    for kind in _classes():
        if kind.__module__ == LoraplexError.__module__ and kind not in special:
            yield kind("it failed")
            yield kind("it failed", field="x", row=0, given=None, expected="y", outcome_unknown=True)


@pytest.mark.parametrize("error", [*_errors()], ids=lambda error: error.code)
def test_an_error_is_the_same_after_a_journey(error: LoraplexError) -> None:
    arrived = _sent(error)
    assert type(arrived) is type(error)
    assert arrived.members() == error.members()
    assert vars(arrived) == vars(error)
    assert str(arrived) == str(error)


def test_what_was_added_to_an_error_arrives() -> None:
    error = _sent(OutOfRange("too large").at(field="rank").explain(before="1: "))
    assert (error.detail, error.field, "given" in error.members()) == ("1: too large", "rank", False)
