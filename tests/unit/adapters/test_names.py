"""Names, and what a reference says."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import InvalidName, InvalidReference, WrongType
from adapters.names import MAX_VERSION, Reference, check_name, check_prefix, parse_reference

FIRST = string.ascii_letters + string.digits
NAMES = st.builds(str.__add__, st.sampled_from(FIRST), st.text(FIRST + "._-", max_size=127))

BAD_NAMES = [
    "",
    ".a",
    "-a",
    "_a",
    "__base__",
    "a b",
    "a/b",
    "../x",
    "a\n",
    "\na",
    "a\0",
    "a@1",
    "é",
    "\u0430",  # Cyrillic: it looks like an a
    "\uff41",  # full width
    "٣",
    "a" * 129,
]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(name=NAMES)
def test_every_name_within_the_rule_is_taken_as_it_is(name: str) -> None:
    assert check_name(name) == name
    assert check_prefix(name) == name
    assert parse_reference(name) == Reference(name)
    assert str(parse_reference(f"{name}@7")) == f"{name}@7"


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_every_other_name_is_refused_wherever_it_is_said(name: str) -> None:
    with pytest.raises(InvalidName):
        check_name(name)
    for reference in (name.replace("@1", ""), f"{name}@1", f"{name}@live") if "@" not in name else ():
        with pytest.raises(InvalidName):
            parse_reference(reference)


@pytest.mark.parametrize("value", [None, 1, 1.5, True, ["a"], {"name": "a"}, b"a"])
def test_what_is_no_string_is_no_name(value: object) -> None:
    with pytest.raises(WrongType):
        check_name(value)
    with pytest.raises(WrongType):
        parse_reference(value)


def test_a_bare_name_means_live() -> None:
    assert parse_reference("acme") == parse_reference("acme@live") == Reference("acme", alias="live")
    assert str(parse_reference("acme@live")) == "acme"


def test_digits_are_a_version_and_never_an_alias() -> None:
    assert parse_reference("acme@12") == Reference("acme", version=12)
    assert parse_reference("acme@canary-2") == Reference("acme", alias="canary-2")


def test_a_version_too_large_to_exist_stays_so() -> None:
    for digits in ("2147483648", "9" * 100):
        version = parse_reference(f"acme@{digits}").version
        assert version is not None
        assert version > MAX_VERSION


@pytest.mark.parametrize(
    "selector",
    ["", "0", "01", "-1", "+1", "1.0", "1e3", " 1", "1 ", "٣", "Live", "_x", "-x", "a.b", "live@1", "@", "a" * 65],
    ids=ascii,
)
def test_after_the_at_sign_comes_a_version_or_an_alias(selector: str) -> None:
    with pytest.raises(InvalidReference):
        parse_reference(f"acme@{selector}")


def test_an_error_names_its_field_and_row() -> None:
    with pytest.raises(InvalidName) as caught:
        parse_reference("../x", field="adapters", row=3)
    assert (caught.value.field, caught.value.row, caught.value.given) == ("adapters", 3, "../x")


def test_an_error_says_what_a_name_is() -> None:
    with pytest.raises(InvalidName, match=r"^name must be 1 to 128 characters of A-Z"):
        check_name("a b")
    with pytest.raises(InvalidName, match=r"^adapter must begin with a name: 1 to 128"):
        parse_reference("a b@1")
