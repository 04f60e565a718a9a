"""Calls below `/v2`, the Open Inference Protocol. Each adapter is a model; the bare base layer is `__base__`.

The infer calls are plain ASGI callables, as `app.serving.asgi` explains.
"""

import asyncio
import re
from collections.abc import Mapping
from enum import StrEnum
from functools import partial
from importlib.metadata import version as version_of

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from adapters.arrays import Float32
from adapters.catalog.versions import AdapterSummary
from adapters.errors import InvalidCombination, LoraplexError, WrongType
from adapters.lora.base_layer import BaseLayer
from adapters.lora.labels import Labels
from app.http.authentication import CallerOf
from app.http.bodies import parse_object, read_as, read_bytes
from app.http.errors import BodyTooLarge, UnsupportedMediaType
from app.http.routes.status import check_ready
from app.service import Service, ServiceOf
from app.serving import asgi
from app.serving.oip.request import (
    BASE_MODEL,
    BASE_VERSION,
    HEADER_LENGTH,
    INPUT,
    JSON_SUBJECT,
    OUTPUT,
    InferHeader,
    check_model_name,
    json_bytes,
    parse_model,
    read_exactly,
    read_infer_fast,
)
from app.serving.oip.response import write_classes, write_infer_response
from app.serving.queue_entry import InferenceResult
from app.serving.request import InferenceRequest
from app.serving.response import write_many_numbers

# Paths of the infer calls.
INFER_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_HINT = ": send fewer rows in each request, or the numbers as binary data"
_MAX_DIGITS = 12
_JSON_INLINE = 2**14
_BINARY_INLINE = 2**18
INFERENCE_HEADER_NAME = HEADER_LENGTH.lower().encode()
BINARY_TYPE = b"application/octet-stream"
_JSON, _BINARY = (b"content-type", b"application/json"), (b"content-type", BINARY_TYPE)


async def post_infer(name: str, version: str | None = None) -> Response:
    """Answer rows: the tensor `inputs`, in JSON or as binary data after the JSON (binary tensor data extension).

    `Inference-Header-Content-Length` is the number of bytes of the JSON. With `classification` in the parameters of
    `outputs`, the answer has Triton's classes.
    """
    raise NotImplementedError("the middleware calls `infer`")


async def infer(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer an infer request."""
    match = INFER_PATH.fullmatch(scope["path"])
    assert match is not None
    model, version = match.groups()
    reference = parse_model(model, version)
    headers = dict(scope["headers"])
    asgi.check_feature_space(service, headers, scope)
    header_length = _header_length(scope["headers"])
    timeout = asgi.timeout_seconds(headers)
    await service.batcher.admit(scope["state"]["grant"].caller.tenant, timeout_seconds=timeout)
    body = await _body(service, headers, receive, header_length)
    header, inputs_NI = await _read(service, body, header_length)
    check_model_name(header, model)
    waits = [seconds for seconds in (timeout, header.timeout_seconds) if seconds is not None]
    request = InferenceRequest(inputs_NI, [reference])
    result = await asgi.submit(service, scope, receive, request, timeout_seconds=min(waits, default=None))
    content, text_length = await _write(header, model, result, service.base.labels)
    await asgi.send_response(send, content, infer_headers(result, text_length))


async def _read(service: Service, body: bytes, header_length: int | None) -> tuple[InferHeader, Float32]:
    columns, max_rows = service.base.in_features, service.settings.max_rows
    is_inline, read = is_small(body, header_length), None
    if header_length is None and len(body) <= asgi.MAX_FAST_JSON_BYTES:
        fast = partial(read_infer_fast, body, columns, max_rows)
        read = fast() if is_inline else await asyncio.to_thread(fast)
    if read is not None or is_inline:
        return read or read_exactly(body, header_length, columns, max_rows)
    text, value = json_bytes(body, header_length), None
    if len(text) > _JSON_INLINE:
        value = await service.json.parse(text, longest=max_rows * columns, what=JSON_SUBJECT)
    # `null` is None too, and is parsed again. It is small.
    return await asyncio.to_thread(read_exactly, body, header_length, columns, max_rows, value)


def is_small(body: bytes, header_length: int | None) -> bool:
    """Return whether a body is read on the event loop."""
    # The exact reading of JSON takes half a millisecond for 16 KiB.
    text_bytes = len(body) if header_length is None else header_length
    return len(body) <= _BINARY_INLINE and text_bytes <= _JSON_INLINE


async def _write(
    header: InferHeader, model: str, result: InferenceResult, base_labels: Labels | None
) -> tuple[bytes, int | None]:
    version, outputs_NO = result.versions[0], result.outputs_NO
    if header.classes is not None:
        return await asyncio.to_thread(write_classes, header, model, version, outputs_NO, base_labels)
    data = None if header.binary_output else await write_many_numbers(outputs_NO.reshape(-1))
    return write_infer_response(header, model, version, outputs_NO, data)


def infer_headers(result: InferenceResult, text_length: int | None) -> asgi.Headers:
    """Return the headers of a successful answer, without its length."""
    if text_length is None:
        return _JSON, *asgi.result_headers(result)
    return _BINARY, (INFERENCE_HEADER_NAME, b"%d" % text_length), *asgi.result_headers(result)


def _header_length(headers: list[tuple[bytes, bytes]]) -> int | None:
    """Return the length of the JSON part in bytes, or None if the header is missing; check the Content-Encoding."""
    length = None
    for name, value in headers:
        if name == INFERENCE_HEADER_NAME:
            if length is not None:
                raise InvalidCombination(f"{HEADER_LENGTH} is there twice", field=HEADER_LENGTH, expected="one of it")
            length = parse_length(value)
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            encoding, expected = value.decode("latin-1")[:100], "none, or identity"
            detail = f"the body's Content-Encoding is {encoding}; send it as it is"
            raise UnsupportedMediaType(detail, field="Content-Encoding", given=encoding, expected=expected)
    return length


def parse_length(value: bytes) -> int:
    """Return the value of `Inference-Header-Content-Length`; raise `WrongType`."""
    if not value.isdigit() or len(value) > _MAX_DIGITS:
        text, expected = value.decode("latin-1")[:100], "how many bytes of the body are JSON"
        detail = f"{HEADER_LENGTH} is {text!r}, not a number of bytes"
        raise WrongType(detail, field=HEADER_LENGTH, given=text, expected=expected)
    return int(value)


async def _body(service: Service, headers: Mapping[bytes, bytes], receive: Receive, header_length: int | None) -> bytes:
    """Return the whole body; raise `BodyTooLarge` before more than the limit is in memory."""
    limit = asgi.max_json_bytes(service)
    if header_length is None:
        return await asgi.read_body(headers, receive, max_bytes=limit, hint=_HINT)
    if header_length > limit:
        detail = f"{HEADER_LENGTH} is {header_length}, and the JSON may have {limit} bytes"
        raise BodyTooLarge(detail, field=HEADER_LENGTH, given=header_length, expected=f"at most {limit} bytes")
    return await asgi.read_body(headers, receive, max_bytes=service.settings.max_body_bytes, hint=_HINT)


_EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository"]
# Platform and backend of every model.
_PLATFORM = "loraplex"
_PAGE = 1000


class ServerMetadata(BaseModel):
    """This service."""

    name: str
    version: str
    extensions: list[str]


class Tensor(BaseModel):
    """A tensor of a model; -1 in its shape is any number of rows."""

    name: str
    datatype: str
    shape: list[int]


class Metadata(BaseModel):
    """A model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class ConfiguredTensor(BaseModel):
    """A tensor of a model, as a configuration has it: `dims` are those of one row."""

    name: str
    data_type: str
    dims: list[int]


class Configuration(BaseModel):
    """A model's configuration, as far as it has a meaning here: rows are what Triton calls a batch."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]


class ModelReady(BaseModel):
    """Whether a model answers."""

    name: str
    ready: bool


class State(StrEnum):
    """Whether a model answers."""

    READY = "READY"
    """The model answers."""
    UNAVAILABLE = "UNAVAILABLE"
    """No version is live, or the live one was made for another base or feature space."""


class IndexEntry(BaseModel):
    """A model in the index; `version` is the one that its bare name means, empty where there is none."""

    name: str
    version: str
    state: State = State.READY
    reason: str = ""


class IndexRequest(BaseModel):
    """Which models to list."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ready: bool = Field(False, description="Only those that answer.")


async def show_server() -> ServerMetadata:
    """Return the metadata of the service, with the protocol extensions that it supports."""
    return ServerMetadata(name="loraplex", version=version_of("loraplex-server"), extensions=_EXTENSIONS)


async def server_live() -> dict[str, bool]:
    """As `/healthz`."""
    return {"live": True}


async def server_ready(service: ServiceOf) -> dict[str, bool]:
    """As `/readyz`."""
    await check_ready(service)
    return {"ready": True}


def show_model(name: str, service: ServiceOf, caller: CallerOf, version: str | None = None) -> Metadata:
    """Return the metadata of a model: its inputs, its outputs and its versions."""
    _require(service, caller.tenant, name, version)
    base, versions = service.base, [BASE_VERSION]
    if name != BASE_MODEL:
        versions = list(map(str, service.catalog.version_numbers(name, tenant=caller.tenant)))
    return Metadata(
        name=name,
        versions=versions,
        platform=_PLATFORM,
        inputs=[Tensor(name=INPUT, datatype="FP32", shape=[-1, base.in_features])],
        outputs=[Tensor(name=OUTPUT, datatype="FP32", shape=[-1, base.out_features])],
    )


def show_configuration(name: str, service: ServiceOf, caller: CallerOf, version: str | None = None) -> Configuration:
    """Return the configuration of a model, in the form of Triton's."""
    _require(service, caller.tenant, name, version)
    base = service.base
    return Configuration(
        name=name,
        platform=_PLATFORM,
        backend=_PLATFORM,
        max_batch_size=service.settings.max_rows,
        input=[ConfiguredTensor(name=INPUT, data_type="TYPE_FP32", dims=[base.in_features])],
        output=[ConfiguredTensor(name=OUTPUT, data_type="TYPE_FP32", dims=[base.out_features])],
    )


def model_ready(name: str, service: ServiceOf, caller: CallerOf, version: str | None = None) -> ModelReady:
    """Confirm that a model answers. A model that is missing, or made for another base, gives a 4xx error."""
    _require(service, caller.tenant, name, version)
    return ModelReady(name=name, ready=True)


def list_models(service: ServiceOf, caller: CallerOf) -> list[IndexEntry]:
    """Return the models, each with its live version."""
    entries = [IndexEntry(name=BASE_MODEL, version=BASE_VERSION)]
    after = ""
    while page := service.catalog.adapters(tenant=caller.tenant, after=after, limit=_PAGE):
        entries += [_index_entry(adapter, service.base, service.settings.feature_space) for adapter in page]
        after = page[-1].name
    return entries


async def post_list_models(request: Request, service: ServiceOf, caller: CallerOf) -> list[IndexEntry]:
    """Return the models, or only those that are ready; the body is optional."""
    body = await read_bytes(request)
    index_request = read_as(IndexRequest, parse_object(body) if body.strip() else {})
    entries = await run_in_threadpool(list_models, service, caller)
    return [entry for entry in entries if entry.state is State.READY or not index_request.ready]


def _require(service: Service, tenant: str, name: str, version: str | None) -> None:
    """Raise the error that an infer request for the model would get."""
    reference = parse_model(name, version)
    if reference is not None:
        found = service.catalog.find(reference, tenant=tenant)
        found.check_servable(service.base, service.settings.feature_space)


def _index_entry(adapter: AdapterSummary, base: BaseLayer, feature_space: str | None) -> IndexEntry:
    """Return the index entry of an adapter: its live version, and the reason if it cannot answer."""
    if adapter.live is None:
        return IndexEntry(name=adapter.name, version="", state=State.UNAVAILABLE, reason="no version is live")
    entry = IndexEntry(name=adapter.name, version=str(adapter.live.version))
    try:
        adapter.live.check_servable(base, feature_space)
    except LoraplexError as error:
        entry.state, entry.reason = State.UNAVAILABLE, error.detail
    return entry
