"""Handlers of `/adapters`: train, upload, show, roll back, download and delete."""

import time
from functools import partial
from operator import attrgetter
from typing import Annotated

from fastapi import Query, Request, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from adapters.catalog.adapter_cache import find_adapter
from adapters.catalog.versions import AdapterSummary, Publication, Source
from adapters.jobs.job import Job
from adapters.names import Reference, check_name, check_prefix
from adapters.peft.archive import pack
from adapters.peft.weights import DEFAULT_MODULE, check_module, write_peft
from adapters.training.planning.planner import Plan, submit
from app.http.bodies import object_of_body, read_as, read_json
from app.http.paging import NamePage, Page, QueryFields, QueryFlag, QueryInteger, page_of, read_cursor, version_in_path
from app.http.preconditions import etag, precondition
from app.http.schemas.adapters import AdapterBody, AdapterEntryBody, AdapterPage, LiveRequest, VersionBody, VersionPage
from app.http.schemas.jobs import JobWithHistory
from app.http.schemas.trainings import training_request, update_request
from app.http.uploads import ZIP, read_adapter
from app.service import Service, ServiceOf


class DownloadQuery(QueryFields):
    """Query of a download: the version, and the module path in the files."""

    version: QueryInteger | None = Field(None, ge=1)
    module: str | None = Field(None, description="Path of the linear layer in the model that loads it.")


class TrainQuery(QueryFields):
    """Query of a training: whether it is a dry run."""

    dry_run: QueryFlag = Field(False, description="Check the request and plan the training, but queue nothing.")


async def train_adapter(
    query: Annotated[TrainQuery, Query()], request: Request, response: Response, service: ServiceOf
) -> JobWithHistory | JSONResponse:
    """Check the whole request, then queue a job, which is the answer.

    The rows are in the request, or in a stored data set. A `name` such as `acme-{tenant}` trains one adapter for each
    value of `data.group_by`. docs/training.md describes every field.
    """
    body = await _read_json(request, service)
    async with service.writes.turn(service.plannings):
        if query.dry_run:
            plan = await run_in_threadpool(_plan_training, service, body)
            return JSONResponse(plan.to_json())
        job = await service.writes.run(_queue_training, service, body)
    response.headers["Location"] = f"/jobs/{job.id}"
    return JobWithHistory.of(job)


async def upload_adapter(name: str, request: Request, response: Response, service: ServiceOf) -> VersionBody:
    """Create a version from PEFT files, a zip of them, or JSON (201); if live has the same bytes, return it (200)."""
    check_name(name)
    condition = precondition(request)
    adapter, module = await read_adapter(request, service)
    publication = Publication(name=name, adapter=adapter, base=service.base, source=Source.UPLOAD, module=module)
    started_at = time.perf_counter()
    version, is_new = await service.writes.run(service.catalog.put, publication, precondition=condition)
    service.observer.finish_publish(request.scope, started_at, is_new=is_new)
    response.status_code = 201 if is_new else 200
    response.headers["ETag"] = etag(version.digest)
    return VersionBody.of(version)


def list_adapters(query: Annotated[NamePage, Query()], service: ServiceOf) -> AdapterPage:
    """List adapters in byte order of name, without the lists in metrics and lineage.

    `GET /adapters/{name}` includes these lists.
    """
    list_key = f"adapters {check_prefix(query.prefix)}"
    after = read_cursor(list_key, query.cursor) or ""
    page = service.catalog.adapters(prefix=query.prefix, after=after, limit=query.limit + 1)
    data, next_cursor = page_of(list_key, page, query.limit, attrgetter("name"))
    body = partial(AdapterEntryBody.served_by, service.base, service.settings.feature_space)
    return AdapterPage(data=[body(adapter) for adapter in data], next_cursor=next_cursor)


def show_adapter(name: str, service: ServiceOf) -> AdapterBody:
    """Show one adapter and its live version."""
    return _body(service.catalog.adapter(check_name(name)), service)


def list_adapter_versions(name: str, query: Annotated[Page, Query()], service: ServiceOf) -> VersionPage:
    """List an adapter's versions, newest first, without the lists in metrics and lineage.

    `GET /adapters/{name}/versions/{version}` includes these lists.
    """
    list_key = f"versions {check_name(name)}"
    before = read_cursor(list_key, query.cursor)
    page = service.catalog.versions(name, before=before, limit=query.limit + 1)
    return query.answer(VersionPage, list_key, page, "version")


def show_adapter_version(name: str, version: str, service: ServiceOf) -> VersionBody:
    """Show one version."""
    return VersionBody.of(service.catalog.find(Reference(check_name(name), version=version_in_path(version))))


def download_adapter(name: str, query: Annotated[DownloadQuery, Query()], service: ServiceOf) -> Response:
    """Download a zip; `PeftModel.from_pretrained` loads its files."""
    reference = Reference(check_name(name), version=query.version)
    version, adapter = find_adapter(service.catalog, reference)
    module = check_module(query.module) if query.module is not None else version.module or DEFAULT_MODULE
    archive = pack(write_peft(adapter, module=module, base_fingerprint=version.base))
    disposition = f'attachment; filename="{name}-{version.version}.zip"'
    return Response(archive, media_type=ZIP, headers={"Content-Disposition": disposition})


async def set_live(name: str, request: Request, service: ServiceOf) -> AdapterBody:
    """Make another version live. Every later request for the bare name uses it."""
    check_name(name)
    body = read_as(LiveRequest, object_of_body(await _read_json(request, service)))
    adapter = await service.writes.run(service.catalog.set_live, name, body.version, precondition=precondition(request))
    return _body(adapter, service)


async def update_adapter(name: str, request: Request, response: Response, service: ServiceOf) -> JobWithHistory:
    """Refit an adapter exactly with rows added and rows removed. It must be trained with `keep_statistics`."""
    body = await _read_json(request, service)
    async with service.writes.turn(service.plannings):
        job = await service.writes.run(_queue_update, service, name, body)
    response.headers["Location"] = f"/jobs/{job.id}"
    return JobWithHistory.of(job)


async def delete_adapter(name: str, request: Request, service: ServiceOf) -> None:
    """Delete an adapter with all its versions. If the name is created again, version numbers continue."""
    check_name(name)
    await service.writes.run(service.catalog.delete, name, precondition=precondition(request))


async def _read_json(request: Request, service: Service) -> object:
    """Return the parsed body, whose bytes are freed by then."""
    return await service.json.parse(await read_json(request))


def _plan_training(service: Service, body: object) -> Plan:
    return service.planner.plan(training_request(body))


def _queue_training(service: Service, body: object) -> Job:
    return _submit(service, _plan_training(service, body))


def _queue_update(service: Service, name: str, body: object) -> Job:
    version = service.planner.updatable_version(name)
    return _submit(service, service.planner.plan_update(version, update_request(body)))


def _submit(service: Service, plan: Plan) -> Job:
    limit = service.settings.max_queued_jobs
    return submit(plan, service.queue, job_id=service.new_id(), planner=service.planner, max_queued=limit)


def _body(adapter: AdapterSummary, service: Service) -> AdapterBody:
    return AdapterBody.served_by(service.base, service.settings.feature_space, adapter)
