"""`POST /predict` as a plain ASGI callable, and the steps that it shares with the infer calls of `app.serving.oip`.

These calls bypass FastAPI's routing and validation, which take longer than a forward pass of one row. FastAPI only
documents them.
"""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from adapters.access.rates import Rate
from adapters.errors import OutOfRange, WrongType
from adapters.names import MAX_REFERENCE_CHARACTERS
from app.http import preconditions
from app.http.bodies import JSON, LEAST_LIMIT_BYTES, NUMBER_BYTES, content_type
from app.http.errors import too_large
from app.service import Service
from app.serving.queue_entry import InferenceResult
from app.serving.request import InferenceRequest, read_fast, request_from_json
from app.serving.response import MEMBERS_FORMAT, write_many_numbers, write_options, write_response

EndpointHandler = Callable[[Service, Scope, Receive, Send], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

# Largest body, about half a millisecond of parsing, that is read on the event loop. A thread reads larger ones.
MAX_INLINE_BYTES = 2**18
# Largest body for the fast parser, which holds the interpreter lock for about 60 ms then. A process reads larger ones.
MAX_FAST_JSON_BYTES = 2**24
JSON_TYPE = JSON.encode()
_CONTENT_TYPE = (b"content-type", JSON_TYPE)
# Value of the `Server-Timing` header of an answer, in milliseconds.
TIMING = b"queue;dur=%.3f, forward;dur=%.3f"
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_HINT = ": send fewer rows in each request, or the binary form (POST /v2/models/{name}/infer with binary tensors)"


async def post_predict() -> Response:
    """One adapter for all rows (`adapter`), or each row its own (`adapters`); `null` is the bare base layer.

    Requests that wait are computed together, whatever adapters they name. `return` asks for probabilities and labels;
    `top_k` limits them to that number of the most probable classes.
    """
    raise NotImplementedError("the middleware calls `predict`")


async def predict(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a `POST /predict`."""
    headers = dict(scope["headers"])
    if headers.get(b"content-type") != JSON_TYPE:
        content_type(headers.get(b"content-type", b"").decode("latin-1"), JSON)
    check_feature_space(service, headers, scope)
    timeout = timeout_seconds(headers)
    await service.batcher.admit(scope["state"]["grant"].caller.tenant, timeout_seconds=timeout)
    request = await _read_request(
        service, await read_body(headers, receive, max_bytes=max_json_bytes(service), hint=_HINT)
    )
    result = await submit(service, scope, receive, request, timeout_seconds=timeout)
    if request.options is None:
        content = write_response(request, result, await write_many_numbers(result.outputs_NO))
    else:
        members = await asyncio.to_thread(write_options, request.options, result, service.base.labels)
        content = write_response(request, result, members, MEMBERS_FORMAT)
    await send_response(send, content, predict_headers(result))


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, *, max_bytes: int, hint: str = "") -> bytes:
    """Return the whole body; raise `BodyTooLarge` if it has more than `max_bytes`, and `ClientDisconnect`."""
    if int(headers.get(b"content-length", b"0")) > max_bytes:
        raise too_large(max_bytes, hint=hint)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise too_large(max_bytes, hint=hint)
        if not message.get("more_body", False):
            return b"".join([*chunks, chunk]) if chunks else chunk
        chunks.append(chunk)


async def send_response(send: Send, body: bytes, headers: Headers) -> None:
    """Send a 200 with these headers and a Content-Length."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


def check_feature_space(service: Service, headers: Mapping[bytes, bytes], scope: Scope) -> None:
    """Raise `FeatureSpaceMismatch` if `X-Feature-Space` names another encoder than that of the base layer."""
    if b"x-feature-space" in headers:
        preconditions.check_feature_space(scope["headers"], service.settings.feature_space)


def timeout_seconds(headers: Mapping[bytes, bytes]) -> float | None:
    """Return the value of `X-Request-Timeout`; raise `WrongType` or `OutOfRange`."""
    value = headers.get(b"x-request-timeout")
    if value is None:
        return None
    text, field, expected = value.decode("latin-1").strip(), "X-Request-Timeout", "seconds, more than 0"
    is_number = _NUMBER.fullmatch(text) is not None
    if not is_number or not 0 < float(text) < math.inf:
        kind = OutOfRange if is_number else WrongType
        raise kind(f"{field} is not a number of {expected}", field=field, given=text, expected=expected)
    return float(text)


def submit(
    service: Service, scope: Scope, receive: Receive, request: InferenceRequest, *, timeout_seconds: float | None
) -> Awaitable[InferenceResult]:
    """Put a request, whose body has been read, into the queue, and return its awaitable result.

    Raises `RateLimited`.
    """
    service.rates.take(scope["state"]["grant"].caller.tenant, Rate.ROWS, len(request.inputs_NI))
    return service.batcher.infer(
        request,
        scope["state"]["grant"],
        timeout_seconds=timeout_seconds,
        disconnected=partial(wait_for_disconnect, receive),
        on_entry=partial(scope["state"].__setitem__, "queue_entry"),
    )


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def predict_headers(result: InferenceResult) -> Headers:
    """Return the headers of a successful answer to `POST /predict`, without its length."""
    return _CONTENT_TYPE, *result_headers(result)


def result_headers(result: InferenceResult) -> Headers:
    """Return the `Server-Timing` header of an answer, in milliseconds, and its `Age` if it has one."""
    timing = b"server-timing", TIMING % (result.queue_seconds * 1e3, result.forward_seconds * 1e3)
    return (timing, (b"age", b"%d" % math.ceil(result.age_seconds))) if result.age_seconds else (timing,)


def max_json_bytes(service: Service) -> int:
    """Return the largest JSON of a predict or infer request: what its largest shape can need, or the setting."""
    settings = service.settings
    numbers = settings.max_rows * service.base.in_features
    needed = LEAST_LIMIT_BYTES + numbers * NUMBER_BYTES + settings.max_rows * MAX_REFERENCE_CHARACTERS
    return min(settings.max_predict_json_bytes, needed)


async def _read_request(service: Service, body: bytes) -> InferenceRequest:
    """Read a body on the event loop, in a thread or in a process, by its size; raise `InvalidInput` or `NotJson`."""
    base, max_rows = service.base, service.settings.max_rows
    if len(body) <= MAX_INLINE_BYTES:
        request = read_fast(body, base, max_rows=max_rows, parser=service.parser)
    elif len(body) <= MAX_FAST_JSON_BYTES:
        request = await asyncio.to_thread(read_fast, body, base, max_rows=max_rows)
    else:
        request = None
    if request is None:
        value = await service.json.parse(body, longest=max_rows)
        request = await asyncio.to_thread(request_from_json, value, base, max_rows=max_rows)
    return request
