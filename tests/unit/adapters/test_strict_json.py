"""JSON as the standard library reads it, less what it lets pass."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import DuplicateKey, NotJson
from adapters.strict_json import parse

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(value=VALUES, ascii_only=st.booleans(), indent=st.sampled_from([None, 2]))
def test_what_is_written_is_read(value: object, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    try:
        content = text.encode()
    except UnicodeEncodeError:
        return  # a lone surrogate, which UTF-8 cannot say
    assert parse(content) == value


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" ",
        b"{",
        b"[1,]",
        b"{'a':1}",
        b"[1] [2]",
        b"01",
        b"+1",
        b".5",
        b"1.",
        b"0x10",
        b"[nan]",
        b"tru",
        b"// no\n1",
        b'"\t"',
        b"\xef\xbb\xbf{}",
        b'"\xff"',
        '{"a":1}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_not_json_in_utf_8_is_refused(content: bytes) -> None:
    with pytest.raises(NotJson):
        parse(content)


@pytest.mark.parametrize(
    "content", [b'{"a":1,"a":1}', b'[{"x":{"a":1,"b":2,"a":3}}]', b'{"a":1,"\\u0061":2}', b'{"":0,"":0}']
)
def test_a_key_twice_is_refused_by_its_name(content: bytes) -> None:
    with pytest.raises(DuplicateKey) as caught:
        parse(content)
    assert caught.value.field == ("a" if b"a" in content else "")


def test_the_same_key_in_two_objects_is_fine() -> None:
    assert parse(b'[{"a":1},{"a":{"a":2}}]') == [{"a": 1}, {"a": {"a": 2}}]


@pytest.mark.parametrize("text", ["Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, "-" + "9" * 5000])
def test_numbers_past_float64_come_out_infinite_for_the_field_to_refuse(text: str) -> None:
    number = parse(text.encode())
    assert isinstance(number, float)
    assert math.isinf(number)
    assert (number < 0) == text.startswith("-")


def test_nan_comes_out_as_nan() -> None:
    number = parse(b"NaN")
    assert isinstance(number, float)
    assert math.isnan(number)


def test_whole_numbers_stay_whole_and_others_do_not_become_so() -> None:
    assert [type(value) for value in (parse(b"3"), parse(b"3.0"), parse(b"3e0"), parse(b"-0"))] == [
        int,
        float,
        float,
        int,
    ]
