"""Data sets as clients see them."""

from typing import Any

from pydantic import BaseModel

from adapters.datasets import store as domain


class ColumnBody(BaseModel):
    """Column of a data set."""

    name: str
    type: str
    width: int | None
    nulls: int
    not_finite: int


class BadRowBody(BaseModel):
    """Row that cannot be used for training with its column."""

    row: int
    column: str | None
    reason: str


class DatasetEntryBody(BaseModel):
    """Version of a data set in a list."""

    dataset: str
    version: int
    digest: str
    created_at: str
    content_type: str
    rows: int
    bytes: int

    @classmethod
    def of(cls, version: domain.DatasetEntry) -> "DatasetEntryBody":
        """Return a version as clients see it in a list."""
        return cls(**{name: getattr(version, name) for name in DatasetEntryBody.model_fields})


class DatasetVersionBody(DatasetEntryBody):
    """Immutable version of a data set with its report."""

    columns: list[ColumnBody]
    bad_rows: list[BadRowBody]

    @classmethod
    def of(cls, version: domain.DatasetEntry) -> "DatasetVersionBody":
        """Return a version as clients see it by itself."""
        assert isinstance(version, domain.DatasetVersion)
        return cls(
            **dict(DatasetEntryBody.of(version)),
            columns=[ColumnBody.model_validate(column, from_attributes=True) for column in version.columns],
            bad_rows=[BadRowBody(**bad._asdict()) for bad in version.bad_rows],
        )


class DatasetSummaryBody(BaseModel):
    """Data set in a list."""

    name: str
    created_at: str
    versions: int
    newest: DatasetEntryBody

    @classmethod
    def of(cls, dataset: domain.DatasetSummary) -> "DatasetSummaryBody":
        """Return a data set as clients see it in a list."""
        return cls(
            name=dataset.name,
            created_at=dataset.created_at,
            versions=dataset.versions,
            newest=DatasetEntryBody.of(dataset.newest),
        )


class DatasetBody(BaseModel):
    """Data set with its newest version."""

    name: str
    created_at: str
    versions: int
    newest: DatasetVersionBody


class DatasetPage(BaseModel):
    """Page of the list of data sets."""

    data: list[DatasetSummaryBody]
    next_cursor: str | None


class DatasetVersionPage(BaseModel):
    """Page of a data set's list of versions."""

    data: list[DatasetEntryBody]
    next_cursor: str | None


class PreviewBody(BaseModel):
    """Rows of a version."""

    dataset: str
    version: int
    offset: int
    rows: list[dict[str, Any]]
    next_offset: int | None
