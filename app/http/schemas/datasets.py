"""Data sets as clients see them."""

from typing import Any

from pydantic import BaseModel

from adapters.datasets import store as domain


class ColumnBody(BaseModel):
    """One column."""

    name: str
    type: str
    width: int | None
    nulls: int
    not_finite: int


class BadRowBody(BaseModel):
    """A row that cannot be trained on, where its column is used."""

    row: int
    column: str | None
    reason: str


class DatasetEntryBody(BaseModel):
    """One immutable version, as it stands in a list."""

    dataset: str
    version: int
    digest: str
    created_at: str
    content_type: str
    rows: int
    bytes: int

    @classmethod
    def of(cls, version: domain.DatasetEntry) -> "DatasetEntryBody":
        """A version as its clients see it in a list."""
        return cls(**{name: getattr(version, name) for name in DatasetEntryBody.model_fields})


class DatasetVersionBody(DatasetEntryBody):
    """One immutable version with its report."""

    columns: list[ColumnBody]
    bad_rows: list[BadRowBody]

    @classmethod
    def of(cls, version: domain.DatasetEntry) -> "DatasetVersionBody":
        """A version as its clients see it by itself."""
        assert isinstance(version, domain.DatasetVersion)
        return cls(
            **dict(DatasetEntryBody.of(version)),
            columns=[ColumnBody.model_validate(column, from_attributes=True) for column in version.columns],
            bad_rows=[BadRowBody(**bad._asdict()) for bad in version.bad_rows],
        )


class DatasetSummaryBody(BaseModel):
    """One data set, as it stands in a list."""

    name: str
    created_at: str
    versions: int
    newest: DatasetEntryBody

    @classmethod
    def of(cls, dataset: domain.DatasetSummary) -> "DatasetSummaryBody":
        """A data set as its clients see it in a list."""
        return cls(
            name=dataset.name,
            created_at=dataset.created_at,
            versions=dataset.versions,
            newest=DatasetEntryBody.of(dataset.newest),
        )


class DatasetBody(BaseModel):
    """One data set with its newest version."""

    name: str
    created_at: str
    versions: int
    newest: DatasetVersionBody


class DatasetPage(BaseModel):
    """A part of the list of data sets."""

    data: list[DatasetSummaryBody]
    next_cursor: str | None


class DatasetVersionPage(BaseModel):
    """A part of a data set's list of versions."""

    data: list[DatasetEntryBody]
    next_cursor: str | None


class PreviewBody(BaseModel):
    """Some rows of a version."""

    dataset: str
    version: int
    offset: int
    rows: list[dict[str, Any]]
    next_offset: int | None
