"""Handlers of `/datasets`: upload, list, show, preview and delete."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import IO, Annotated

from fastapi import Query, Request, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from adapters.datasets.ingest import CONTENT_TYPES, Ingestion, upload_file
from adapters.datasets.store import DatasetVersion
from adapters.datasets.table import Table
from adapters.names import Reference, check_name, check_prefix
from app.http.authentication import CallerOf
from app.http.bodies import content_type
from app.http.paging import NamePage, Page, QueryFields, QueryInteger, read_cursor, version_in_path
from app.http.preconditions import etag, precondition
from app.http.schemas import datasets as schemas
from app.service import Service, ServiceOf
from app.serving.asgi import wait_for_disconnect

_WRITE_BYTES = 2**20
# `Datasets.add` with all but what is read from the body.
_Add = Callable[..., tuple[DatasetVersion, bool]]


class PreviewQuery(QueryFields):
    """Query of a preview: the version and the rows."""

    version: QueryInteger | None = Field(None, ge=1, description="The newest version if omitted.")
    offset: QueryInteger = Field(0, ge=0, description="First row, from 0.")
    limit: QueryInteger = Field(10, ge=1, le=100, description="Maximum number of rows.")


async def upload_dataset(
    name: str, request: Request, response: Response, service: ServiceOf, caller: CallerOf
) -> schemas.DatasetVersionBody:
    """Create a version from a file (201); if the newest version has the same content, return it (200).

    The answer reports the columns, and the rows that cannot be used for training.
    """
    check_name(name)
    add = partial(service.datasets.add, name, tenant=caller.tenant, precondition=precondition(request))
    version, is_new = await _read_dataset(request, service, add)
    response.status_code = 201 if is_new else 200
    response.headers["ETag"] = etag(version.digest)
    return schemas.DatasetVersionBody.of(version)


def list_datasets(query: Annotated[NamePage, Query()], service: ServiceOf, caller: CallerOf) -> schemas.DatasetPage:
    """List data sets in byte order of name, without their reports."""
    list_key = f"datasets {check_prefix(query.prefix)}"
    after = read_cursor(list_key, query.cursor, str) or ""
    page = service.datasets.list(tenant=caller.tenant, prefix=query.prefix, after=after, limit=query.limit + 1)
    return query.answer(schemas.DatasetPage, list_key, page, "name")


def show_dataset(name: str, service: ServiceOf, caller: CallerOf) -> schemas.DatasetBody:
    """Show one data set and its newest version."""
    dataset = service.datasets.get(check_name(name), tenant=caller.tenant)
    reference = Reference(name, version=dataset.newest.version)
    newest = service.datasets.find(reference, tenant=caller.tenant, field="name")
    return schemas.DatasetBody.of(replace(dataset, newest=newest))


def list_dataset_versions(
    name: str, query: Annotated[Page, Query()], service: ServiceOf, caller: CallerOf
) -> schemas.DatasetVersionPage:
    """List a data set's versions, newest first, without their reports."""
    list_key = f"dataset versions {check_name(name)}"
    before = read_cursor(list_key, query.cursor, int)
    page = service.datasets.versions(name, tenant=caller.tenant, before=before, limit=query.limit + 1)
    return query.answer(schemas.DatasetVersionPage, list_key, page, "version")


def show_dataset_version(name: str, version: str, service: ServiceOf, caller: CallerOf) -> schemas.DatasetVersionBody:
    """Show one version."""
    reference = Reference(check_name(name), version=version_in_path(version))
    return schemas.DatasetVersionBody.of(service.datasets.find(reference, tenant=caller.tenant, field="version"))


def preview_dataset(
    name: str, query: Annotated[PreviewQuery, Query()], service: ServiceOf, caller: CallerOf
) -> schemas.PreviewBody:
    """Show some rows of a version. Numbers that are not finite are null."""
    reference = Reference(check_name(name), version=query.version)
    field = "name" if query.version is None else "version"
    version = service.datasets.find(reference, tenant=caller.tenant, field=field)
    rows = Table.open(service.datasets.local(version)).preview(query.offset, query.limit)
    end = query.offset + len(rows)
    return schemas.PreviewBody(
        dataset=name,
        version=version.version,
        offset=query.offset,
        rows=rows,
        next_offset=end if rows and end < version.rows else None,
    )


async def delete_dataset(name: str, request: Request, service: ServiceOf, caller: CallerOf) -> None:
    """Delete a data set with all its versions. If the name is created again, version numbers continue."""
    check_name(name)
    delete = partial(service.datasets.delete, tenant=caller.tenant, precondition=precondition(request))
    await service.writes.run(delete, name)


async def _read_dataset(request: Request, service: Service, add: _Add) -> tuple[DatasetVersion, bool]:
    """Read the body into a version of a data set; return it and whether it is new.

    Raises `UnsupportedMediaType`, the errors of the reader, and `ClientDisconnect`, which leaves nothing behind.
    """
    kind = content_type(request.headers.get("content-type", ""), *CONTENT_TYPES)
    with upload_file(service.settings.data_dir / "tmp") as raw:
        await _receive(request, raw)
        reading = Ingestion(
            raw,
            CONTENT_TYPES[kind],
            memory_bytes=service.settings.trainer_memory_bytes,
            max_bytes=service.settings.max_dataset_bytes,
        )
        adding = asyncio.create_task(_add_dataset(reading, service, partial(add, content_type=kind)))
        disconnect = asyncio.create_task(wait_for_disconnect(request.receive))
        try:
            await asyncio.wait((adding, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not adding.done():
                raise ClientDisconnect
            return adding.result()
        finally:
            disconnect.cancel()
            adding.cancel()
            # The file must stay open until the reader has ended.
            await asyncio.wait((adding,))


async def _add_dataset(reading: Ingestion, service: Service, add: _Add) -> tuple[DatasetVersion, bool]:
    async with service.writes.turn(service.readings):
        thread = asyncio.create_task(service.writes.run(add, reading))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            # A thread cannot be cancelled, but it ends when its child process does.
            await asyncio.to_thread(reading.cancel)
            await asyncio.wait((thread,))
            thread.exception()
            raise


async def _receive(request: Request, raw: IO[bytes]) -> None:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size >= _WRITE_BYTES:
            await run_in_threadpool(_write, raw, b"".join(parts))
            parts, size = [], 0
    await run_in_threadpool(_write, raw, b"".join(parts))


def _write(raw: IO[bytes], content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[raw.write(view) :]
