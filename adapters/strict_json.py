"""JSON read exactly: UTF-8 only, a key twice is an error, and nothing is guessed."""

import json

from adapters.errors import DuplicateKey, NotJson

_MAX_DIGITS = 400
"""Digits: more are past float64 anyway, and Python refuses to convert past 4,300."""


def parse(text: bytes | bytearray, *, what: str = "the body") -> object:
    """Objects, lists, strings, ints, floats, bools and None, as the standard library reads them.

    `NaN`, `Infinity` and numbers too large for float64 come out as non-finite floats, so that the caller can
    refuse them by the name of their field. Raises `NotJson` and `DuplicateKey`.
    """
    return parse_text(decode(text, what=what), what=what)


def decode(text: bytes | bytearray, *, what: str = "the body") -> str:
    """Return the characters of UTF-8 bytes; raise `NotJson` for other bytes."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJson(f"{what} is not UTF-8 text at byte {error.start}", expected="JSON in UTF-8") from None


def parse_text(text: str, *, what: str = "the body") -> object:
    """Do the same as `parse` for text that is decoded."""
    try:
        return DECODER.decode(_checked_start(text))
    except json.JSONDecodeError as error:
        raise NotJson(
            f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}", expected="JSON"
        ) from None
    except RecursionError:
        raise nested_too_deeply(what) from None


def whole_number(digits: str) -> int | float:
    """The number that `digits` say; as a float, and so infinite, where they are too many to count in."""
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def nested_too_deeply(what: str) -> NotJson:
    """Return the error for a text with too many levels of lists and objects."""
    return NotJson(f"{what} is nested too deeply", expected="JSON nested a few levels deep")


def repeated_key(key: str) -> DuplicateKey:
    """Return the error for a key that one object has twice."""
    return DuplicateKey(f"the key {key!r} stands twice in one object", field=key)


def _checked_start(text: str) -> str:
    if text.startswith("\ufeff"):
        # As `json.loads` does.
        raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
    return text


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise repeated_key(key)
            seen.add(key)
    return result


DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_int=whole_number)
"""The decoder behind `parse`."""
