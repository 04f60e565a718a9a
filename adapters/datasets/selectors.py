"""Column selectors: which columns of a data set a training reads as numbers."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.errors import InvalidCombination, MissingField, OutOfRange, UnknownField, WrongType

_EXPECTED = '{"column": name}, {"columns": [names]} or {"prefix": text}'


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
    if unknown := [key for key in value if key not in ColumnSelector.__dataclass_fields__]:
        field = f"{field}.{unknown[0]}"
        raise UnknownField(f"{field} is not a field here", field=field, given=unknown[0], expected=_EXPECTED)
    if not value:
        raise MissingField(f"{field} must name a column", field=field, expected=_EXPECTED)
    if len(value) > 1:
        detail = f"{field} says {' and '.join(value)}; one of them is enough"
        raise InvalidCombination(detail, field=field, expected=_EXPECTED)
    ((key, argument),) = value.items()
    field, names = f"{field}.{key}", argument if key == "columns" else [argument]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        what = "a list of names" if key == "columns" else "a string"
        raise WrongType(f"{field} must be {what}", field=field, given=argument, expected=_EXPECTED)
    if not argument and key != "column":
        raise OutOfRange(f"{field} is empty", field=field, given=argument, expected="one or more names or characters")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        detail = f"{field} names {repeated[0]!r} twice"
        raise OutOfRange(detail, field=field, given=repeated[0], expected="each name once")
    selected: dict[str, Any] = {key: tuple(names) if key == "columns" else argument}
    return ColumnSelector(**selected)
