"""What is known of a stored data set: its columns, and the first rows that cannot be trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adapters.errors import BadRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a data set."""

    name: str
    type: str
    """`int64`, `float32`, `float64`, `bool`, `string`, or `list<…>` of the first three or of `string`."""
    width: int | None
    """How many numbers each list has; of lists of floats of several lengths, the most common one."""
    nulls: int
    not_finite: int
    """Rows with a number that is not finite as float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A file that was read and written again in the stored form."""

    rows: int
    columns: tuple[Column, ...]
    bad_rows: tuple[BadRow, ...]
    digest: str
    """`sha256:` + hex over the stored form: the same for the same names, types and values in the same order."""
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {
            "columns": columns_to_json(self.columns),
            "bad_rows": bad_rows_to_json(self.bad_rows),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Report":
        """What `to_json` made."""
        lists = {"columns": columns_from_json(value["columns"]), "bad_rows": bad_rows_from_json(value["bad_rows"])}
        return cls(**{**value, **lists})


def columns_to_json(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Columns as the catalogue keeps them."""
    return [asdict(column) for column in columns]


def columns_from_json(value: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """What `columns_to_json` made."""
    return tuple(Column(**column) for column in value)


def bad_rows_to_json(bad_rows: Sequence[BadRow]) -> list[dict[str, Any]]:
    """Bad rows as the catalogue keeps them."""
    return [bad._asdict() for bad in bad_rows]


def bad_rows_from_json(value: Sequence[Mapping[str, Any]]) -> tuple[BadRow, ...]:
    """What `bad_rows_to_json` made."""
    return tuple(BadRow(**bad) for bad in value)
