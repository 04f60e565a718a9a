"""Handlers of `/datasets`: upload, list, show, preview and delete."""

from typing import Annotated

from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from adapters.datasets.store import DatasetVersion
from adapters.datasets.table import Table
from adapters.errors import WrongType
from adapters.names import Reference, check_name, check_prefix
from adapters.strict_json import whole_number
from app.http.dependencies import ServiceOf
from app.http.paging import Page, QueryInteger, page_of, read_cursor
from app.http.preconditions import etag, precondition
from app.http.schemas.datasets import (
    DatasetBody,
    DatasetEntryBody,
    DatasetPage,
    DatasetSummaryBody,
    DatasetVersionBody,
    DatasetVersionPage,
    PreviewBody,
)
from app.http.uploads import read_dataset
from app.service import Service


class DatasetQuery(Page):
    """Query of the list of data sets."""

    prefix: str = Field("", description="Only names with this prefix.")


class PreviewQuery(BaseModel):
    """Query of a preview: the version and the rows."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: QueryInteger | None = Field(None, ge=1, description="The newest version if omitted.")
    offset: QueryInteger = Field(0, ge=0, description="First row, from 0.")
    limit: QueryInteger = Field(10, ge=1, le=100, description="Maximum number of rows.")


async def upload_dataset(name: str, request: Request, response: Response, service: ServiceOf) -> DatasetVersionBody:
    """Create a version from a file (201); if the newest version has the same content, return it (200).

    The answer reports the columns, and the rows that cannot be used for training.
    """
    check_name(name)
    version, is_new = await read_dataset(name, request, service, precondition(request))
    response.status_code = 201 if is_new else 200
    response.headers["ETag"] = etag(version.digest)
    return DatasetVersionBody.of(version)


def list_datasets(query: Annotated[DatasetQuery, Query()], service: ServiceOf) -> DatasetPage:
    """List data sets in byte order of name, without their reports."""
    list_key = f"datasets {check_prefix(query.prefix)}"
    after = read_cursor(list_key, query.cursor) or ""
    page = list(service.datasets.list(prefix=query.prefix, after=after, limit=query.limit + 1))
    data, next_cursor = page_of(list_key, page, query.limit, lambda dataset: dataset.name)
    return DatasetPage(data=[DatasetSummaryBody.of(dataset) for dataset in data], next_cursor=next_cursor)


def show_dataset(name: str, service: ServiceOf) -> DatasetBody:
    """Show one data set and its newest version."""
    dataset = service.datasets.get(check_name(name))
    newest = _find(service, name, dataset.newest.version)
    return DatasetBody(
        name=name, created_at=dataset.created_at, versions=dataset.versions, newest=DatasetVersionBody.of(newest)
    )


def list_versions(name: str, query: Annotated[Page, Query()], service: ServiceOf) -> DatasetVersionPage:
    """List a data set's versions, newest first, without their reports."""
    list_key = f"dataset versions {check_name(name)}"
    before = read_cursor(list_key, query.cursor)
    page = list(service.datasets.versions(name, before=before, limit=query.limit + 1))
    data, next_cursor = page_of(list_key, page, query.limit, lambda version: version.version)
    return DatasetVersionPage(data=[DatasetEntryBody.of(version) for version in data], next_cursor=next_cursor)


def show_version(name: str, version: str, service: ServiceOf) -> DatasetVersionBody:
    """Show one version."""
    check_name(name)
    if not (version.isascii() and version.isdigit()):
        raise WrongType(
            "the version is not a whole number", field="version", given=version, expected="a version's number"
        )
    return DatasetVersionBody.of(_find(service, name, whole_number(version)))


def preview_dataset(name: str, query: Annotated[PreviewQuery, Query()], service: ServiceOf) -> PreviewBody:
    """Show some rows of a version. Numbers that are not finite are null."""
    version = _find(service, check_name(name), query.version)
    rows = Table.open(service.datasets.local(version)).preview(query.offset, query.limit)
    end = query.offset + len(rows)
    return PreviewBody(
        dataset=name,
        version=version.version,
        offset=query.offset,
        rows=rows,
        next_offset=end if rows and end < version.rows else None,
    )


async def delete_dataset(name: str, request: Request, service: ServiceOf) -> None:
    """Delete a data set with all its versions. If the name is created again, version numbers continue."""
    check_name(name)
    await service.writes.run(service.datasets.delete, name, precondition=precondition(request))


def _find(service: Service, name: str, number: int | float | None) -> DatasetVersion:
    # `whole_number` returns a float for digits that are too long to be a version.
    exact = number if number is None or isinstance(number, int) else 2**63
    return service.datasets.find(Reference(name, version=exact), field="version" if number is not None else "name")
