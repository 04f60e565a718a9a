"""Calls below `/v2`, the Open Inference Protocol. Each adapter is a model; the bare base layer is `__base__`.

The infer calls are plain ASGI callables, as `app.serving.asgi` explains.
"""

import asyncio
import re
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version as version_of

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from adapters.arrays import Float32
from adapters.errors import InvalidCombination, LoraplexError, WrongType
from app.http.bodies import parse_object, read_as, read_bytes
from app.http.errors import BodyTooLarge, RouteNotFound, UnsupportedMediaType, protocol_error
from app.http.routes.status import check_ready
from app.service import Service, ServiceOf
from app.serving.asgi import (
    MAX_FAST_JSON_BYTES,
    AsgiResponse,
    Headers,
    check_feature_space,
    max_json_bytes,
    read_body,
    send_response,
    server_timing,
    timeout_seconds,
    wait_for_disconnect,
)
from app.serving.oip import models as models
from app.serving.oip.models import Configuration, IndexEntry, Metadata, State, check_model_name, parse_model
from app.serving.oip.request import (
    HEADER_LENGTH,
    JSON_SUBJECT,
    InferHeader,
    json_bytes,
    read_exactly,
    read_infer_fast,
    read_infer_request,
)
from app.serving.oip.response import write_classes, write_infer_response
from app.serving.queue_entry import InferenceResult
from app.serving.request import InferenceRequest
from app.serving.response import write_many_numbers

# Paths of the infer calls.
INFER_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
ROUTE, VERSION_ROUTE = "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"
_HINT = ": send fewer rows in each request, or the numbers as binary data"
_MAX_DIGITS = 12
_JSON_INLINE = 2**14
_BINARY_INLINE = 2**18
INFERENCE_HEADER_NAME = HEADER_LENGTH.lower().encode()
_JSON, _BINARY = (b"content-type", b"application/json"), (b"content-type", b"application/octet-stream")


async def infer(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer an infer request; errors have the form of the protocol."""
    try:
        model, version = _model(scope["path"])
        reference = parse_model(model, version)
        headers = dict(scope["headers"])
        check_feature_space(service, headers, scope)
        header_length = _header_length(scope["headers"])
        timeout = timeout_seconds(headers)
        await service.batcher.admit(timeout_seconds=timeout)
        body = await _body(service, headers, receive, header_length)
        header, inputs_NI = await _read(service, body, header_length)
        check_model_name(header, model)
        waits = [seconds for seconds in (timeout, header.timeout_seconds) if seconds is not None]
        result = await service.batcher.infer(
            InferenceRequest(inputs_NI, [reference]),
            timeout_seconds=min(waits, default=None),
            disconnected=partial(wait_for_disconnect, receive),
            on_entry=partial(scope["state"].__setitem__, "queue_entry"),
        )
        content, text_length = await _write(header, model, result)
    except ClientDisconnect:
        return
    except LoraplexError as error:
        await protocol_error(error)(scope, receive, send)
        return
    await send_response(send, content, infer_headers(result, text_length))


async def _read(service: Service, body: bytes, header_length: int | None) -> tuple[InferHeader, Float32]:
    columns, max_rows = service.base.in_features, service.settings.max_rows
    if is_small(body, header_length):
        return read_infer_request(body, header_length, columns, max_rows)
    if header_length is None and len(body) <= MAX_FAST_JSON_BYTES:
        read = await asyncio.to_thread(read_infer_fast, body, columns, max_rows)
        if read is not None:
            return read
    text = json_bytes(body, header_length)
    # `null` is None too. It is small, so that it is parsed again.
    value = (
        await service.json.parse(text, longest=max_rows * columns, what=JSON_SUBJECT)
        if len(text) > _JSON_INLINE
        else None
    )
    return await asyncio.to_thread(read_exactly, body, header_length, columns, max_rows, value)


def is_small(body: bytes, header_length: int | None) -> bool:
    """Return whether a body is read on the event loop."""
    # The exact reading of JSON takes half a millisecond for 16 KiB.
    text_bytes = len(body) if header_length is None else header_length
    return len(body) <= _BINARY_INLINE and text_bytes <= _JSON_INLINE


async def _write(header: InferHeader, model: str, result: InferenceResult) -> tuple[bytes, int | None]:
    version, outputs_NO = result.versions[0], result.outputs_NO
    if header.classes is not None:
        return await asyncio.to_thread(write_classes, header, model, version, outputs_NO)
    data = None if header.binary_output else await write_many_numbers(outputs_NO.reshape(-1))
    return write_infer_response(header, model, version, outputs_NO, data)


def infer_headers(result: InferenceResult, text_length: int | None) -> Headers:
    """Return the headers of a successful answer, without its length."""
    if text_length is None:
        return _JSON, server_timing(result)
    return _BINARY, (INFERENCE_HEADER_NAME, b"%d" % text_length), server_timing(result)


def _model(path: str) -> tuple[str, str | None]:
    """Return the model and the version, if any, of a path; raise `RouteNotFound`."""
    match = INFER_PATH.fullmatch(path)
    if match is None:
        raise RouteNotFound(f"there is nothing at {path[:100]}")
    return match[1], match[2]


def _header_length(headers: list[tuple[bytes, bytes]]) -> int | None:
    """Return the length of the JSON part in bytes, or None if the header is missing; check the Content-Encoding."""
    length = None
    for name, value in headers:
        if name == INFERENCE_HEADER_NAME:
            if length is not None:
                raise InvalidCombination(f"{HEADER_LENGTH} is there twice", field=HEADER_LENGTH, expected="one of it")
            length = parse_length(value)
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            encoding = value.decode("latin-1")
            raise UnsupportedMediaType(
                f"the body's Content-Encoding is {encoding[:100]}; send it as it is",
                field="Content-Encoding",
                given=encoding,
                expected="none, or identity",
            )
    return length


def parse_length(value: bytes) -> int:
    """Return the value of `Inference-Header-Content-Length`; raise `WrongType`."""
    if not value.isdigit() or len(value) > _MAX_DIGITS:
        given = value.decode("latin-1")
        raise WrongType(
            f"{HEADER_LENGTH} is {given[:100]!r}, not a number of bytes",
            field=HEADER_LENGTH,
            given=given,
            expected="how many bytes of the body are JSON",
        )
    return int(value)


async def _body(service: Service, headers: Mapping[bytes, bytes], receive: Receive, header_length: int | None) -> bytes:
    """Return the whole body; raise `BodyTooLarge` before more than the limit is in memory."""
    limit = max_json_bytes(service)
    if header_length is not None:
        if header_length > limit:
            raise BodyTooLarge(
                f"{HEADER_LENGTH} is {header_length}, and the JSON may have {limit} bytes",
                field=HEADER_LENGTH,
                given=header_length,
                expected=f"at most {limit} bytes",
            )
        limit = service.settings.max_body_bytes
    return await read_body(headers, receive, max_bytes=limit, hint=_HINT)


_PAGE = 1000


class ServerMetadata(BaseModel):
    """This service."""

    name: str
    version: str
    extensions: list[str]


class ModelReady(BaseModel):
    """Whether a model answers."""

    name: str
    ready: bool


class IndexRequest(BaseModel):
    """Which models to list."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ready: bool = Field(False, description="Only those that answer.")


async def show_server() -> ServerMetadata:
    """Return the metadata of the service, with the protocol extensions that it supports."""
    return ServerMetadata(name="loraplex", version=version_of("loraplex-server"), extensions=models.EXTENSIONS)


async def live() -> dict[str, bool]:
    """As `/healthz`."""
    return {"live": True}


async def ready(service: ServiceOf) -> dict[str, bool]:
    """As `/readyz`."""
    await check_ready(service)
    return {"ready": True}


def show_model(name: str, service: ServiceOf, version: str | None = None) -> Metadata:
    """Return the metadata of a model: its inputs, its outputs and its versions."""
    _require(service, name, version)
    versions = [models.BASE_VERSION] if name == models.BASE_MODEL else service.catalog.version_numbers(name)
    return models.metadata(name, versions, service.base)


def show_configuration(name: str, service: ServiceOf, version: str | None = None) -> Configuration:
    """Return the configuration of a model, in the form of Triton's."""
    _require(service, name, version)
    return models.configuration(name, service.base, max_rows=service.settings.max_rows)


def model_ready(name: str, service: ServiceOf, version: str | None = None) -> ModelReady:
    """Whether a model answers; one that does not, because it is not there or was made for another base, is a 4xx."""
    _require(service, name, version)
    return ModelReady(name=name, ready=True)


async def post_infer(name: str, service: ServiceOf, version: str | None = None) -> Response:  # noqa: ARG001
    """Answer rows: the tensor `inputs`, in JSON or as binary data after the JSON (binary tensor data extension).

    `Inference-Header-Content-Length` is the number of bytes of the JSON. With `classification` in the parameters of
    `outputs`, the answer has Triton's classes.
    """
    return AsgiResponse(infer, service)


def list_models(service: ServiceOf) -> list[IndexEntry]:
    """Return the models, each with its live version."""
    return _index(service, only_ready=False)


async def post_list_models(request: Request, service: ServiceOf) -> list[IndexEntry]:
    """Return the models, or only those that are ready; the body is optional."""
    body = await read_bytes(request)
    index_request = read_as(IndexRequest, parse_object(body) if body.strip() else {})
    return await run_in_threadpool(_index, service, only_ready=index_request.ready)


def _require(service: Service, name: str, version: str | None) -> None:
    """Raise the error that an infer request for the model would get."""
    reference = models.parse_model(name, version)
    if reference is not None:
        service.catalog.find(reference).check_servable(service.base, service.settings.feature_space)


def _index(service: Service, *, only_ready: bool) -> list[IndexEntry]:
    entries = [models.base_entry()]
    after = ""
    while page := service.catalog.adapters(after=after, limit=_PAGE):
        entries += [models.index_entry(adapter, service.base, service.settings.feature_space) for adapter in page]
        after = page[-1].name
    return [entry for entry in entries if not only_ready or entry.state is State.READY]
