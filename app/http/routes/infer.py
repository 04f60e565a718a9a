"""`POST /v2/models/{name}[/versions/{version}]/infer`: a plain ASGI callable, because every µs of it counts."""

import asyncio
import re
from collections.abc import Mapping
from functools import partial

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from adapters.arrays import Float32
from adapters.errors import InvalidCombination, LoraplexError, WrongType
from app.http.errors import BodyTooLarge, RouteNotFound, UnsupportedMediaType, protocol_error
from app.service import Service
from app.serving.asgi import (
    Headers,
    Small,
    answer,
    check_feature_space,
    disconnected,
    read_body,
    remember,
    server_timing,
    timeout_seconds,
)
from app.serving.oip.classes import write_classes
from app.serving.oip.fast_json import read_json_quickly
from app.serving.oip.header import HEADER_LENGTH, WHAT, Header
from app.serving.oip.models import reference_of
from app.serving.oip.tensors import check_named, json_part, read_exactly, read_request, write_answer
from app.serving.queue_entry import Outcome
from app.serving.request import Question
from app.serving.response import MOST_QUICK_BYTES, most_json_bytes, write_many_numbers, write_numbers

INFER_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
"""The paths that this answers; what else there is under `/v2` is FastAPI's."""
PLAIN_URL = re.compile(rb"/v2/models/([A-Za-z0-9._-]{1,128})(?:/versions/([0-9]{1,20}))?/infer")
"""Of these, the ones with nothing in them to decode or to refuse."""
ROUTE, VERSION_ROUTE = "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"
_HINT = ": send fewer rows in each request, or the numbers as binary data"
_MOST_DIGITS = 12
_JSON_INLINE = 2**14
_BINARY_INLINE = 2**18
_HEADER_LENGTH = HEADER_LENGTH.lower().encode()
_JSON, _BINARY = (b"content-type", b"application/json"), (b"content-type", b"application/octet-stream")


async def infer(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer an infer request, whether well or in the protocol's own shape of an error."""
    try:
        model, version = _model(scope["path"])
        reference = reference_of(model, version)
        headers = dict(scope["headers"])
        check_feature_space(service, headers, scope)
        header_length = _header_length(scope["headers"])
        timeout = timeout_seconds(headers)
        await service.batcher.admit(timeout_seconds=timeout)
        body = await _body(service, headers, receive, header_length)
        header, inputs_NI = await _read(service, body, header_length)
        check_named(header, model)
        waits = [seconds for seconds in (timeout, header.timeout_seconds) if seconds is not None]
        outcome = await service.batcher.ask(
            Question(inputs_NI, [reference]),
            timeout_seconds=min(waits, default=None),
            gone=partial(disconnected, receive),
            entered=remember(scope),
        )
        content, text_length = await _write(header, model, outcome)
    except ClientDisconnect:
        return
    except LoraplexError as error:
        await protocol_error(error)(scope, receive, send)
        return
    await answer(send, content, _headers(outcome, text_length))


def read_small(service: Service, url: bytes, headers: Mapping[bytes, bytes], body: bytes) -> Small | None:
    """A small infer request, where it has the form that most have."""
    named = PLAIN_URL.fullmatch(url)
    if named is None:
        return None
    model, version = named[1].decode(), None if named[2] is None else named[2].decode()
    try:
        reference = reference_of(model, version)
        read = _read_small(service, headers.get(_HEADER_LENGTH), body)
        if read is None or not read[0].plain:
            return None
        header, inputs_NI = read
        check_named(header, model)
    except LoraplexError:
        return None

    def written(outcome: Outcome) -> tuple[bytes, Headers]:
        data = None if header.binary_output else write_numbers(outcome.outputs_NO.reshape(-1))
        content, text_length = write_answer(header, model, outcome.versions[0], outcome.outputs_NO, data)
        return content, _headers(outcome, text_length)

    return Small(Question(inputs_NI, [reference]), written, ROUTE if version is None else VERSION_ROUTE)


async def _read(service: Service, body: bytes, header_length: int | None) -> tuple[Header, Float32]:
    columns, max_rows = service.base.in_features, service.settings.max_rows
    if _is_quick(body, header_length):
        return read_request(body, header_length, columns, max_rows)
    if header_length is None and len(body) <= MOST_QUICK_BYTES:
        read = await asyncio.to_thread(read_json_quickly, body, columns, max_rows)
        if read is not None:
            return read
    text = json_part(body, header_length)
    # None is what `null` says: it is read again, being small.
    value = await service.json.parse(text, longest=max_rows * columns, what=WHAT) if len(text) > _JSON_INLINE else None
    return await asyncio.to_thread(read_exactly, body, header_length, columns, max_rows, value)


def _read_small(service: Service, length: bytes | None, body: bytes) -> tuple[Header, Float32] | None:
    columns, max_rows = service.base.in_features, service.settings.max_rows
    if length is None:
        return read_json_quickly(body, columns, max_rows, parser=service.parser)
    header_length = _whole_number(length)
    return read_request(body, header_length, columns, max_rows) if _is_quick(body, header_length) else None


def _is_quick(body: bytes, header_length: int | None) -> bool:
    # The exact reading of JSON takes half a millisecond for 16 KiB.
    text_bytes = len(body) if header_length is None else header_length
    return len(body) <= _BINARY_INLINE and text_bytes <= _JSON_INLINE


async def _write(header: Header, model: str, outcome: Outcome) -> tuple[bytes, int | None]:
    version, outputs_NO = outcome.versions[0], outcome.outputs_NO
    if header.classes is not None:
        return await asyncio.to_thread(write_classes, header, model, version, outputs_NO)
    data = None if header.binary_output else await write_many_numbers(outputs_NO.reshape(-1))
    return write_answer(header, model, version, outputs_NO, data)


def _headers(outcome: Outcome, text_length: int | None) -> Headers:
    if text_length is None:
        return _JSON, server_timing(outcome)
    return _BINARY, (_HEADER_LENGTH, b"%d" % text_length), server_timing(outcome)


def _model(path: str) -> tuple[str, str | None]:
    """The model and perhaps its version that a path names; raises `RouteNotFound`."""
    named = INFER_PATH.fullmatch(path)
    if named is None:
        raise RouteNotFound(f"there is nothing at {path[:100]}")
    return named[1], named[2]


def _header_length(headers: list[tuple[bytes, bytes]]) -> int | None:
    """How many bytes of the body are JSON, where that is said."""
    found = None
    for name, value in headers:
        if name == _HEADER_LENGTH:
            if found is not None:
                raise InvalidCombination(f"{HEADER_LENGTH} is there twice", field=HEADER_LENGTH, expected="one of it")
            found = _whole_number(value)
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            encoding = value.decode("latin-1")
            raise UnsupportedMediaType(
                f"the body's Content-Encoding is {encoding[:100]}; send it as it is",
                field="Content-Encoding",
                given=encoding,
                expected="none, or identity",
            )
    return found


def _whole_number(value: bytes) -> int:
    if not value.isdigit() or len(value) > _MOST_DIGITS:
        given = value.decode("latin-1")
        raise WrongType(
            f"{HEADER_LENGTH} is {given[:100]!r}, not a number of bytes",
            field=HEADER_LENGTH,
            given=given,
            expected="how many bytes of the body are JSON",
        )
    return int(value)


async def _body(service: Service, headers: Mapping[bytes, bytes], receive: Receive, header_length: int | None) -> bytes:
    """The whole body; raises `BodyTooLarge` before more of it is in memory than may be."""
    limit = most_json_bytes(service)
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
