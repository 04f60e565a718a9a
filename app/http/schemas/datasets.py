"""Data sets as clients see them."""

from typing import Any

from pydantic import BaseModel

from app.http.errors import BadRowBody
from app.http.schemas.fields import AnswerBody, PageBody


class ColumnBody(AnswerBody):
    """Column of a data set."""

    name: str
    type: str
    width: int | None
    nulls: int
    not_finite: int


class DatasetEntryBody(AnswerBody):
    """Version of a data set in a list."""

    dataset: str
    version: int
    digest: str
    created_at: str
    content_type: str
    rows: int
    bytes: int


class DatasetVersionBody(DatasetEntryBody):
    """Immutable version of a data set with its report."""

    columns: list[ColumnBody]
    bad_rows: list[BadRowBody]


class DatasetSummaryBody(AnswerBody):
    """Data set in a list."""

    name: str
    created_at: str
    versions: int
    newest: DatasetEntryBody


class DatasetBody(DatasetSummaryBody):
    """Data set with its newest version."""

    newest: DatasetVersionBody


class DatasetPage(PageBody[DatasetSummaryBody]):
    """Page of the list of data sets."""


class DatasetVersionPage(PageBody[DatasetEntryBody]):
    """Page of a data set's list of versions."""


class PreviewBody(BaseModel):
    """Rows of a version."""

    dataset: str
    version: int
    offset: int
    rows: list[dict[str, Any]]
    next_offset: int | None
