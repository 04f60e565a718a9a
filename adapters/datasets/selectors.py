"""Column selectors: which columns of a data set a training reads as numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.errors import InvalidCombination, MissingField, OutOfRange, UnknownField, WrongType

_EXPECTED = '{"column": name}, {"columns": [names]} or {"prefix": text}'
_KEYS = ("column", "columns", "prefix")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSelector:
    """One column of lists or numbers, several columns of numbers, or all columns with a prefix.

    Exactly one of the three fields is not None.
    """

    column: str | None = None
    columns: tuple[str, ...] | None = None
    prefix: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON that `parse_selector` parses."""
        if self.columns is not None:
            return {"columns": list(self.columns)}
        return {"column": self.column} if self.column is not None else {"prefix": self.prefix}


def parse_selector(value: object, *, field: str) -> ColumnSelector:
    """Parse `{"column": name}`, `{"columns": [names]}` or `{"prefix": text}`.

    Raises `WrongType`, `UnknownField`, `MissingField`, `InvalidCombination` (two keys) or `OutOfRange` (an empty list,
    or a duplicate name), with the field.
    """
    if not isinstance(value, Mapping):
        raise WrongType(f"{field} must be an object", field=field, given=value, expected=_EXPECTED)
    for key in value:
        if key not in _KEYS:
            raise UnknownField(
                f"{field}.{key} is not a field here", field=f"{field}.{key}", given=key, expected=_EXPECTED
            )
    if not value:
        raise MissingField(f"{field} must name a column", field=field, expected=_EXPECTED)
    if len(value) > 1:
        raise InvalidCombination(
            f"{field} says {' and '.join(value)}; one of them is enough", field=field, expected=_EXPECTED
        )
    ((key, argument),) = value.items()
    if key == "columns":
        return ColumnSelector(columns=_parse_names(argument, field=f"{field}.columns"))
    if not isinstance(argument, str):
        raise WrongType(f"{field}.{key} must be a string", field=f"{field}.{key}", given=argument, expected=_EXPECTED)
    if key == "prefix" and not argument:
        raise OutOfRange(
            f"{field}.prefix is empty", field=f"{field}.prefix", given=argument, expected="some characters"
        )
    return ColumnSelector(column=argument) if key == "column" else ColumnSelector(prefix=argument)


def _parse_names(value: object, *, field: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise WrongType(f"{field} must be a list of names", field=field, given=value, expected=_EXPECTED)
    if not value:
        raise OutOfRange(
            f"{field} must name at least one column", field=field, given=value, expected="one or more names"
        )
    if len(set(value)) != len(value):
        twice = next(name for position, name in enumerate(value) if name in value[:position])
        raise OutOfRange(f"{field} names {twice!r} twice", field=field, given=twice, expected="each name once")
    return tuple(value)
