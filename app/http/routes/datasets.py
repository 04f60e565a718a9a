"""Handlers of `/datasets`: upload, list, show, preview and delete."""

from dataclasses import replace
from typing import Annotated

from fastapi import Query, Request, Response
from pydantic import Field

from adapters.datasets.table import Table
from adapters.names import Reference, check_name, check_prefix
from app.http.paging import NamePage, Page, QueryFields, QueryInteger, read_cursor, version_in_path
from app.http.preconditions import etag, precondition
from app.http.schemas.datasets import DatasetBody, DatasetPage, DatasetVersionBody, DatasetVersionPage, PreviewBody
from app.http.uploads import read_dataset
from app.service import ServiceOf


class PreviewQuery(QueryFields):
    """Query of a preview: the version and the rows."""

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


def list_datasets(query: Annotated[NamePage, Query()], service: ServiceOf) -> DatasetPage:
    """List data sets in byte order of name, without their reports."""
    list_key = f"datasets {check_prefix(query.prefix)}"
    after = read_cursor(list_key, query.cursor) or ""
    page = service.datasets.list(prefix=query.prefix, after=after, limit=query.limit + 1)
    return query.answer(DatasetPage, list_key, page, "name")


def show_dataset(name: str, service: ServiceOf) -> DatasetBody:
    """Show one data set and its newest version."""
    dataset = service.datasets.get(check_name(name))
    newest = service.datasets.find(Reference(name, version=dataset.newest.version), field="name")
    return DatasetBody.of(replace(dataset, newest=newest))


def list_dataset_versions(name: str, query: Annotated[Page, Query()], service: ServiceOf) -> DatasetVersionPage:
    """List a data set's versions, newest first, without their reports."""
    list_key = f"dataset versions {check_name(name)}"
    before = read_cursor(list_key, query.cursor)
    page = service.datasets.versions(name, before=before, limit=query.limit + 1)
    return query.answer(DatasetVersionPage, list_key, page, "version")


def show_dataset_version(name: str, version: str, service: ServiceOf) -> DatasetVersionBody:
    """Show one version."""
    reference = Reference(check_name(name), version=version_in_path(version))
    return DatasetVersionBody.of(service.datasets.find(reference, field="version"))


def preview_dataset(name: str, query: Annotated[PreviewQuery, Query()], service: ServiceOf) -> PreviewBody:
    """Show some rows of a version. Numbers that are not finite are null."""
    reference = Reference(check_name(name), version=query.version)
    version = service.datasets.find(reference, field="name" if query.version is None else "version")
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
