"""What the service answers with about data sets, as values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from loraplex.errors import BadRow


class Column(NamedTuple):
    """A column of a data set."""

    name: str
    type: str
    width: int | None
    nulls: int
    not_finite: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetVersion:
    """One immutable version of a data set."""

    dataset: str
    version: int
    digest: str
    created_at: str
    content_type: str
    rows: int
    bytes: int
    columns: Sequence[Column] = ()
    """Empty in a list."""
    bad_rows: Sequence[BadRow] = ()
    """The first 20 that cannot be trained on where their column is used; empty in a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One data set."""

    name: str
    created_at: str
    versions: int
    newest: DatasetVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """Some rows of a data set."""

    dataset: str
    version: int
    offset: int
    rows: Sequence[Mapping[str, Any]]
    next_offset: int | None
