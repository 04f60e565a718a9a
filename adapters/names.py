"""The rule for names, aliases and references."""

import re
from functools import lru_cache
from typing import NamedTuple

from adapters.errors import InvalidName, InvalidReference, WrongType

LIVE = "live"
"""The alias that a bare name means."""

NAME_RULE = "1 to 128 characters of A-Z a-z 0-9 . _ -, the first a letter or digit"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]*")
MAX_REFERENCE_CHARACTERS = 256
MAX_VERSION = 2**31 - 1
"""No adapter has a version past this; a larger number in a request names none."""


def check_name(name: object, *, field: str = "name") -> str:
    """`name` itself where it follows the rule; raises `WrongType` or `InvalidName`."""
    if not isinstance(name, str):
        raise WrongType(f"{field} must be a string", field=field, given=name, expected="a name")
    if not _NAME.fullmatch(name):
        raise InvalidName(f"{field} must be {NAME_RULE}", field=field, given=name, expected=NAME_RULE)
    return name


def check_prefix(prefix: str) -> str:
    """`prefix` itself where a name could begin with it; raises `InvalidName`."""
    if prefix and not _NAME.fullmatch(prefix):
        detail = f"prefix must be the beginning of a name: {NAME_RULE}"
        raise InvalidName(detail, field="prefix", given=prefix, expected=NAME_RULE)
    return prefix


class Reference(NamedTuple):
    """What a request asks for: a name with a version number or an alias (`live` where neither is said)."""

    name: str
    version: int | None = None
    alias: str = LIVE

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.name}@{self.version}"
        return self.name if self.alias == LIVE else f"{self.name}@{self.alias}"


def parse_reference(text: object, *, field: str = "adapter", row: int | None = None) -> Reference:
    """`name`, `name@3` or `name@alias` → Reference; raises `WrongType`, `InvalidName`, `InvalidReference`."""
    expected = "name, name@3 or name@alias"
    if not isinstance(text, str):
        raise WrongType(
            f"{field} must be a string, or null for the bare base layer",
            field=field,
            row=row,
            given=text,
            expected=expected,
        )
    reference = _reference(text) if len(text) <= MAX_REFERENCE_CHARACTERS else None
    if reference is not None:
        return reference
    if not _NAME.fullmatch(text.partition("@")[0]):
        raise InvalidName(
            f"{field} must begin with a name: {NAME_RULE}",
            field=field,
            row=row,
            given=text,
            expected=NAME_RULE,
        )
    raise InvalidReference(
        f"after the @ of {field} comes a version number from 1 on or an alias",
        field=field,
        row=row,
        given=text,
        expected=expected,
    )


# Most requests name what others named before.
@lru_cache(2**15)
def _reference(text: str) -> Reference | None:
    name, at, selector = text.partition("@")
    if not _NAME.fullmatch(name):
        return None
    if not at:
        return Reference(name)
    if _VERSION.fullmatch(selector):
        return Reference(name, version=int(selector))
    return Reference(name, alias=selector) if _ALIAS.fullmatch(selector) else None
