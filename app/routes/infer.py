"""`POST /v2/models/{name}[/versions/{version}]/infer`: a plain ASGI callable, because every µs of it counts."""

import re

from starlette.types import Receive, Scope, Send

from adapters.errors import InvalidCombination, LoraplexError, WrongType
from app.batching import Outcome, Question
from app.edge import too_large
from app.inference_header import HEADER_LENGTH, Header
from app.inference_models import reference_of
from app.inference_protocol import check_named, read_request, write_answer
from app.problems import BodyTooLarge, RouteNotFound, UnsupportedMediaType, protocol_error
from app.service import Service

INFER_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
"""The paths that this answers; what else there is under `/v2` is FastAPI's."""
_HINT = ": send fewer rows in each request, or the numbers as binary data"
_MOST_DIGITS = 12
_HEADER_LENGTH = HEADER_LENGTH.lower().encode()
_JSON, _BINARY = (b"content-type", b"application/json"), (b"content-type", b"application/octet-stream")


class _Gone(Exception):
    """Whoever asked has gone: nobody would read an answer."""


async def infer(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer an infer request, whether well or in the protocol's own shape of an error."""
    try:
        model, version = _model(scope["path"])
        reference = reference_of(model, version)
        header_length, length = _headers(service, scope["headers"])
        body = await _body(service, receive, header_length, length)
        header, inputs_NI = read_request(
            body, header_length, columns=service.base.in_features, max_rows=service.settings.max_rows
        )
        check_named(header, model)
        outcome = await service.batcher.ask(Question(inputs_NI, [reference]), timeout_seconds=header.timeout_seconds)
    except _Gone:
        return
    except LoraplexError as error:
        await protocol_error(error)(scope, receive, send)
        return
    await _answer(header, model, outcome, send)


def _model(path: str) -> tuple[str, str | None]:
    """The model and perhaps its version that a path names; raises `RouteNotFound`."""
    named = INFER_PATH.fullmatch(path)
    if named is None:
        raise RouteNotFound(f"there is nothing at {path[:100]}")
    return named[1], named[2]


def _headers(service: Service, headers: list[tuple[bytes, bytes]]) -> tuple[int | None, int]:
    """How many bytes of the body are JSON, where that is said, and how many it has, where that is said, else 0."""
    header_length, length = None, 0
    spaces = []
    for name, value in headers:
        if name == _HEADER_LENGTH:
            if header_length is not None:
                raise InvalidCombination(f"{HEADER_LENGTH} is there twice", field=HEADER_LENGTH, expected="one of it")
            header_length = _whole_number(value)
        elif name == b"content-length":
            length = int(value)
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            encoding = value.decode("latin-1")
            raise UnsupportedMediaType(
                f"the body's Content-Encoding is {encoding[:100]}; send it as it is",
                field="Content-Encoding",
                given=encoding,
                expected="none, or identity",
            )
        elif name == b"x-feature-space":
            spaces.append(value.decode("utf-8", "replace"))
    if spaces:
        service.check_feature_space(spaces)
    return header_length, length


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


async def _body(service: Service, receive: Receive, header_length: int | None, length: int) -> bytes:
    """The whole body; raises `BodyTooLarge` before more of it is in memory than may be."""
    limit = service.settings.max_predict_json_bytes
    if header_length is not None:
        if header_length > limit:
            raise BodyTooLarge(
                f"{HEADER_LENGTH} is {header_length}, and the JSON may have {limit} bytes",
                field=HEADER_LENGTH,
                given=header_length,
                expected=f"at most {limit} bytes",
            )
        limit = service.settings.max_body_bytes
    if length > limit:
        raise too_large(limit, hint=_HINT)
    parts: list[bytes] = []
    read = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise _Gone
        part = message.get("body", b"")
        read += len(part)
        if read > limit:
            raise too_large(limit, hint=_HINT)
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def _answer(header: Header, model: str, outcome: Outcome, send: Send) -> None:
    answered_by = outcome.versions[0]
    body, text_length = write_answer(
        header, model, None if answered_by is None else answered_by.version, outcome.outputs_NO
    )
    timing = f"queue;dur={outcome.queue_seconds * 1e3:.3f}, forward;dur={outcome.forward_seconds * 1e3:.3f}"
    headers = [(b"content-length", b"%d" % len(body)), (b"server-timing", timing.encode())]
    if text_length is None:
        headers.append(_JSON)
    else:
        headers += (_BINARY, (_HEADER_LENGTH, b"%d" % text_length))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
