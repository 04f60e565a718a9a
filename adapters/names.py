"""Names, aliases and references of adapters and data sets: their syntax and its checks."""

import re
from functools import lru_cache
from typing import NamedTuple

from adapters.errors import InvalidName, InvalidReference, LoraplexError, WrongType

# The alias that a bare name refers to.
LIVE = "live"

NAME_RULE = "1 to 128 characters of A-Z a-z 0-9 . _ -, the first a letter or digit"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]*")
MAX_REFERENCE_CHARACTERS = 256
# Largest version number. A larger number in a request names no version.
MAX_VERSION = 2**31 - 1


def check_name(name: object, *, field: str = "name") -> str:
    """Return the name if it is valid; raise `WrongType` or `InvalidName` if not."""
    if not isinstance(name, str):
        raise WrongType(f"{field} must be a string", field=field, given=name, expected="a name")
    if not _NAME.fullmatch(name):
        raise InvalidName(f"{field} must be {NAME_RULE}", field=field, given=name, expected=NAME_RULE)
    return name


def check_prefix(prefix: str) -> str:
    """Return the prefix if a valid name can begin with it; raise `InvalidName` if not."""
    return prefix and check_name(prefix, field="prefix")


class Reference(NamedTuple):
    """Reference to a version: a name with a version number or an alias (`live` by default)."""

    name: str
    version: int | None = None
    alias: str = LIVE

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.name}@{self.version}"
        return self.name if self.alias == LIVE else f"{self.name}@{self.alias}"


def parse_reference(text: object, *, field: str = "adapter", row: int | None = None) -> Reference:
    """Parse `name`, `name@3` or `name@alias`; raise `WrongType`, `InvalidName` or `InvalidReference`."""
    if isinstance(text, str) and len(text) <= MAX_REFERENCE_CHARACTERS and (reference := _parse(text)) is not None:
        return reference
    expected = "name, name@3 or name@alias"
    error: LoraplexError
    if not isinstance(text, str):
        error = WrongType(f"{field} must be a string, or null for the bare base layer", expected=expected)
    elif not _NAME.fullmatch(text.partition("@")[0]):
        error = InvalidName(f"{field} must begin with a name: {NAME_RULE}", expected=NAME_RULE)
    else:
        detail = f"after the @ of {field} comes a version number from 1 on or an alias"
        error = InvalidReference(detail, expected=expected)
    raise error.at(field=field, row=row, given=text)


# Cached, because most requests repeat the references of earlier ones.
@lru_cache(2**15)
def _parse(text: str) -> Reference | None:
    name, at, selector = text.partition("@")
    if not _NAME.fullmatch(name):
        return None
    if not at:
        return Reference(name)
    if _VERSION.fullmatch(selector):
        return Reference(name, version=int(selector))
    return Reference(name, alias=selector) if _ALIAS.fullmatch(selector) else None
