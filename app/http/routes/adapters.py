"""Handlers of `/adapters`: train, upload, show, roll back, download and delete."""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Annotated

import torch
from fastapi import Query, Request, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from adapters.arrays import matrix, vector
from adapters.catalog.adapter_cache import find_adapter
from adapters.catalog.versions import AdapterSummary, Publication, Source
from adapters.errors import InvalidUpload, UnknownField, WrongShape
from adapters.lora.adapter import Adapter, check_alpha, check_factors
from adapters.lora.base_layer import BaseLayer
from adapters.lora.labels import MAX_LABEL_CHARACTERS, check_labels
from adapters.names import Reference, check_name, check_prefix
from adapters.peft.archive import pack, unpack
from adapters.peft.config import CONFIG_FILE, MAX_CONFIG_BYTES
from adapters.peft.weights import DEFAULT_MODULE, TENSOR_FILE, check_module, read_peft, write_peft
from adapters.training.planning.evaluation_plan import plan_evaluation
from adapters.training.planning.planner import Plan, Planner
from app.http.authentication import CallerOf
from app.http.bodies import JSON, LEAST_LIMIT_BYTES, NUMBER_BYTES, content_type, object_of_body, read_as, read_bytes
from app.http.job_submission import SubmissionOf
from app.http.paging import NamePage, Page, QueryFields, QueryFlag, QueryInteger, page_of, read_cursor, version_in_path
from app.http.preconditions import etag, precondition
from app.http.schemas import adapters as schemas
from app.http.schemas.jobs import JobWithHistory
from app.http.schemas.trainings import evaluation_request, training_request, update_request
from app.service import Service, ServiceOf
from app.serving.request import count_lists

MULTIPART, ZIP = "multipart/form-data", "application/zip"
_FILES = (TENSOR_FILE, CONFIG_FILE)
_IGNORED_FILE = "README.md"
_MAX_FORM_PARTS = 8
# Longest JSON of a label: a character outside the basic plane is written in twelve bytes.
_LABEL_BYTES = 16 * MAX_LABEL_CHARACTERS
# Lists are counted only in larger bodies, because smaller ones are parsed quickly.
_UNCOUNTED_BYTES = 2**19


class DownloadQuery(QueryFields):
    """Query of a download: the version, and the module path in the files."""

    version: QueryInteger | None = Field(None, ge=1)
    module: str | None = Field(None, description="Path of the linear layer in the model that loads it.")


class TrainQuery(QueryFields):
    """Query of a training: whether it is a dry run."""

    dry_run: QueryFlag = Field(False, description="Check the request and plan the training, but queue nothing.")


class DeleteQuery(QueryFields):
    """Query of a deletion: whether the bytes are kept."""

    purge: QueryFlag = Field(
        False,
        description="Remove the bytes at once, and those of the name that are in the trash. The name may be one that "
        "only the trash has.",
    )


async def train_adapter(
    query: Annotated[TrainQuery, Query()], request: Request, service: ServiceOf, submission: SubmissionOf
) -> JobWithHistory | JSONResponse:
    """Check the whole request, then queue a job, which is the answer.

    The rows are in the request, or in a stored data set. A `name` such as `acme-{tenant}` trains one adapter for each
    value of `data.group_by`. docs/training.md describes every field.
    """
    if not query.dry_run:
        return await submission.queue_once(_plan_training)
    body = await service.json.read(request)
    async with service.writes.turn(service.plannings):
        plan = await run_in_threadpool(_plan_training, submission.planner, body)
        return JSONResponse(plan.to_json())


async def upload_adapter(
    name: str, request: Request, response: Response, service: ServiceOf, caller: CallerOf
) -> schemas.VersionBody:
    """Create a version from PEFT files, a zip of them, or JSON (201); if live has the same bytes, return it (200)."""
    check_name(name)
    condition = precondition(request)
    adapter, module = await _read_adapter(request, service)
    publication = Publication(name=name, adapter=adapter, base=service.base, source=Source.UPLOAD, module=module)
    started_at = time.perf_counter()
    put = partial(service.catalog.put, publication, tenant=caller.tenant, precondition=condition)
    version, is_new = await service.writes.run(put)
    service.observer.finish_publish(request.scope, started_at, is_new=is_new)
    response.status_code = 201 if is_new else 200
    response.headers["ETag"] = etag(version.digest)
    return schemas.VersionBody.of(version)


def list_adapters(query: Annotated[NamePage, Query()], service: ServiceOf, caller: CallerOf) -> schemas.AdapterPage:
    """List adapters in byte order of name, without the lists in metrics and lineage.

    `GET /adapters/{name}` includes these lists.
    """
    list_key = f"adapters {check_prefix(query.prefix)}"
    after = read_cursor(list_key, query.cursor, str) or ""
    page = service.catalog.adapters(tenant=caller.tenant, prefix=query.prefix, after=after, limit=query.limit + 1)
    data, next_cursor = page_of(list_key, page, query.limit, attrgetter("name"))
    body = partial(schemas.AdapterEntryBody.served_by, service.base, service.settings.feature_space)
    return schemas.AdapterPage(data=[body(adapter) for adapter in data], next_cursor=next_cursor)


def show_adapter(name: str, service: ServiceOf, caller: CallerOf) -> schemas.AdapterBody:
    """Show one adapter and its live version."""
    return _body(service.catalog.adapter(check_name(name), tenant=caller.tenant), service)


def list_adapter_versions(
    name: str, query: Annotated[Page, Query()], service: ServiceOf, caller: CallerOf
) -> schemas.VersionPage:
    """List an adapter's versions, newest first, without the lists in metrics and lineage.

    `GET /adapters/{name}/versions/{version}` includes these lists.
    """
    list_key = f"versions {check_name(name)}"
    before = read_cursor(list_key, query.cursor, int)
    page = service.catalog.versions(name, tenant=caller.tenant, before=before, limit=query.limit + 1)
    return query.answer(schemas.VersionPage, list_key, page, "version")


def show_adapter_version(name: str, version: str, service: ServiceOf, caller: CallerOf) -> schemas.VersionBody:
    """Show one version."""
    reference = Reference(check_name(name), version=version_in_path(version))
    return schemas.VersionBody.of(service.catalog.find(reference, tenant=caller.tenant))


def download_adapter(
    name: str, query: Annotated[DownloadQuery, Query()], service: ServiceOf, caller: CallerOf
) -> Response:
    """Download a zip; `PeftModel.from_pretrained` loads its files."""
    reference = Reference(check_name(name), version=query.version)
    version, adapter = find_adapter(service.catalog, reference, tenant=caller.tenant)
    module = check_module(query.module) if query.module is not None else version.module or DEFAULT_MODULE
    archive = pack(write_peft(adapter, module=module, base_fingerprint=version.base))
    disposition = f'attachment; filename="{name}-{version.version}.zip"'
    return Response(archive, media_type=ZIP, headers={"Content-Disposition": disposition})


async def set_live(name: str, request: Request, service: ServiceOf, caller: CallerOf) -> schemas.AdapterBody:
    """Make another version live. Every later request for the bare name uses it."""
    check_name(name)
    body = read_as(schemas.LiveRequest, object_of_body(await service.json.read(request)))
    point = partial(service.catalog.set_live, tenant=caller.tenant, precondition=precondition(request))
    return _body(await service.writes.run(point, name, body.version), service)


async def update_adapter(name: str, submission: SubmissionOf) -> JobWithHistory:
    """Refit an adapter exactly with rows added and rows removed. It must be trained with `keep_statistics`."""
    return await submission.queue_once(partial(_plan_update, name))


async def evaluate_adapters(submission: SubmissionOf) -> JobWithHistory:
    """Compare adapters, and the base layer, on the same labelled rows. Nothing is published.

    The result has the metrics of each, the figures of each class, and the gain over the first.
    """
    return await submission.queue_once(_plan_evaluation)


async def delete_adapter(
    name: str, query: Annotated[DeleteQuery, Query()], request: Request, service: ServiceOf, caller: CallerOf
) -> None:
    """Delete an adapter with all its versions. If the name is created again, version numbers continue.

    The bytes are kept for `TRASH_DAYS`, and `POST /adapters/{name}/restore` brings them back; kept statistics are
    removed at once.
    """
    check_name(name)
    delete = partial(service.catalog.delete, tenant=caller.tenant, purge=query.purge)
    await service.writes.run(delete, name, precondition=precondition(request))


async def restore_adapter(name: str, service: ServiceOf, caller: CallerOf) -> schemas.AdapterBody:
    """Bring back a deleted adapter with all its versions that are in the trash, and with its live version."""
    restore = partial(service.catalog.restore, tenant=caller.tenant)
    return _body(await service.writes.run(restore, check_name(name)), service)


async def _read_adapter(request: Request, service: Service) -> tuple[Adapter, str | None]:
    """Return the adapter in a request's body, and the path of its module if the body names one."""
    form = content_type(request.headers.get("content-type", ""), MULTIPART, ZIP, JSON)
    read: Callable[[], tuple[Adapter, str | None]]
    if form == MULTIPART:
        read = partial(_from_peft, await _read_multipart(request), service)
    elif form == ZIP:
        read = partial(_from_zip, bytes(await read_bytes(request)), service)
    else:
        read = partial(_from_json, await _read_factors(request, service), service)
    async with service.uploads:
        return await run_in_threadpool(read)


async def _read_factors(request: Request, service: Service) -> dict[str, object]:
    """Return the parsed body, whose bytes are freed by then."""
    base, max_rank = service.base, service.settings.max_rank
    hint = f": an adapter of rank {max_rank}, the largest accepted here, needs fewer"
    # Numbers of bounded length, and labels.
    numbers = max_rank * (base.in_features + base.out_features) + base.out_features
    max_bytes = LEAST_LIMIT_BYTES + numbers * NUMBER_BYTES + base.out_features * _LABEL_BYTES
    body = await read_bytes(request, max_bytes=max_bytes, hint=hint)
    await asyncio.to_thread(_check_list_count, body, base, max_rank)
    return object_of_body(await service.json.parse(body))


def _check_list_count(body: bytearray, base: BaseLayer, max_rank: int) -> None:
    """Raise `WrongShape` if the body has more opening brackets than its lists and labels can have.

    The limit allows factors that are transposed, because `check_factors` has a better error for them.
    """
    if len(body) <= _UNCOUNTED_BYTES:
        return
    max_rows = 2 * (base.in_features + base.out_features + max_rank)
    lists = count_lists(body)
    if lists > max_rows + (base.out_features + 1) * MAX_LABEL_CHARACTERS:
        count, expected = f"{lists} lists", f"at most {max_rows // 2} rows"
        detail = f"the body has {count}; the factors of an adapter of this layer have {expected}"
        raise WrongShape(detail, field="body", given=count, expected=expected)


async def _read_multipart(request: Request) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        async with request.form(max_files=_MAX_FORM_PARTS, max_fields=_MAX_FORM_PARTS) as form:
            for field, part in form.multi_items():
                if isinstance(part, UploadFile) and part.filename == _IGNORED_FILE:
                    continue
                file = _check_part(field[:80], part, files)
                files[file.filename or ""] = await file.read()
    except (HTTPException, ValueError) as error:  # ValueError: the parser does not support the charset
        reason = error.detail if isinstance(error, HTTPException) else error
        raise InvalidUpload(f"the multipart body cannot be read: {reason}", field="body") from None
    for name in _FILES:
        if name not in files:
            raise InvalidUpload(f"the file {name} is missing", field=name, expected=" and ".join(_FILES))
    return files


def _check_part(field: str, part: UploadFile | str, files: Mapping[str, bytes]) -> UploadFile:
    """Return a part; raise `InvalidUpload` if it is not one of the two files, or too large."""
    expected = " and ".join(_FILES)
    if not isinstance(part, UploadFile):
        raise InvalidUpload(f"the part {field!r} is not a file", field=field, expected=expected)
    name = part.filename or ""
    if name not in _FILES or name in files:
        reason = "is there twice" if name in files else "is not one that is taken"
        raise InvalidUpload(f"the file {name[:80]!r} {reason}", field=field, given=name, expected=expected)
    if name == CONFIG_FILE and (part.size or 0) > MAX_CONFIG_BYTES:
        size, expected = f"{part.size} bytes", f"at most {MAX_CONFIG_BYTES} bytes"
        raise InvalidUpload(f"{name} has {size}", field=name, given=size, expected=expected)
    return part


def _from_zip(body: bytes, service: Service) -> tuple[Adapter, str]:
    return _from_peft(unpack(body, max_bytes=service.settings.max_body_bytes), service)


def _from_peft(files: dict[str, bytes], service: Service) -> tuple[Adapter, str]:
    return read_peft(
        files[CONFIG_FILE],
        files[TENSOR_FILE],
        base=service.base,
        feature_space=service.settings.feature_space,
        max_rank=service.settings.max_rank,
    )


def _from_json(value: dict[str, object], service: Service) -> tuple[Adapter, None]:
    own_names = sorted(value.keys() & {"A", "B", "alpha", "bias"})
    peft_names = sorted(value.keys() & {"lora_A", "lora_B", "lora_alpha"})
    if own_names and peft_names:
        name = peft_names[0]
        detail = f"{name} does not go with {own_names[0]}: send A and B, or PEFT's lora_A and lora_B"
        raise UnknownField(detail, field=name, given=name, expected="one set of names")
    upload: schemas.FactorsUpload | schemas.PeftUpload
    if peft_names:
        upload, names = read_as(schemas.PeftUpload, value), ("lora_B", "lora_A", "bias")
    else:
        upload, names = read_as(schemas.FactorsUpload, value), ("A", "B", "bias")
    a_OR = torch.from_numpy(matrix(upload.A, field=names[0]))
    b_RI = torch.from_numpy(matrix(upload.B, field=names[1]))
    outputs = service.base.out_features
    bias = upload.bias
    bias_O = None if bias is None else torch.from_numpy(vector(bias, field="bias", length=outputs))
    check_factors(a_OR, b_RI, bias_O, service.base, max_rank=service.settings.max_rank, names=names)
    checked_alpha = check_alpha(b_RI.shape[0] if upload.alpha is None else upload.alpha)
    labels = check_labels(upload.labels, field="labels", outputs=outputs) if upload.gave("labels") else None
    feature_space = service.settings.feature_space
    return Adapter(a_OR, b_RI, bias_O, checked_alpha, feature_space=feature_space, labels=labels), None


def _plan_training(planner: Planner, body: object) -> Plan:
    return planner.plan(training_request(body))


def _plan_update(name: str, planner: Planner, body: object) -> Plan:
    version = planner.updatable_version(name)
    return planner.plan_update(version, update_request(body))


def _plan_evaluation(planner: Planner, body: object) -> Plan:
    return plan_evaluation(planner, evaluation_request(body))


def _body(adapter: AdapterSummary, service: Service) -> schemas.AdapterBody:
    return schemas.AdapterBody.served_by(service.base, service.settings.feature_space, adapter)
