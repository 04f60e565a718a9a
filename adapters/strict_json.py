"""Strict JSON parser: UTF-8 only, and a duplicate key is an error."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from adapters.errors import DuplicateKey, NotJson

# Most digits of an integer. Longer ones exceed float64 anyway, and Python refuses to convert more than 4,300.
_MAX_DIGITS = 400


def parse(text: bytes | bytearray, *, what: str = "the body") -> object:
    """Parse UTF-8 bytes into objects, lists, strings, ints, floats, bools and None, as the standard library does.

    `NaN`, `Infinity` and numbers too large for float64 become non-finite floats, so that the caller's error can name
    their field. `what` names the text in errors. Raises `NotJson` and `DuplicateKey`.
    """
    with json_errors(what):
        return DECODER.decode(text.decode())


@contextmanager
def json_errors(what: str) -> Iterator[None]:
    """Raise `NotJson` in place of the errors of a decoder."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise NotJson(f"{what} is not UTF-8 text at byte {error.start}", expected="JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        location = f"line {error.lineno}, column {error.colno}"
        raise NotJson(f"{what} is not JSON: {error.msg} at {location}", expected="JSON") from None
    except RecursionError:
        raise nested_too_deeply(what) from None


def whole_number(digits: str) -> int | float:
    """Return an integer as int, or as an infinite float if it has more than `_MAX_DIGITS` digits."""
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def replace_nan(value: object) -> Any:
    """Return a value for JSON with None in place of NaN and infinities."""
    if isinstance(value, Mapping):
        return {key: replace_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def nested_too_deeply(what: str) -> NotJson:
    """Return the error for a text with too many levels of lists and objects."""
    return NotJson(f"{what} is nested too deeply", expected="JSON nested a few levels deep")


def repeated_key(key: str) -> DuplicateKey:
    """Return the error for a key that one object has twice."""
    return DuplicateKey(f"the key {key!r} is twice in one object", field=key)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise repeated_key(key)
            seen.add(key)
    return result


# Decoder that `parse` and `adapters.large_json.parser` use.
DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_int=whole_number)
