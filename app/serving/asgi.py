"""What the calls share that the edge hands over before the framework sees them: plain ASGI, nothing made per header."""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from adapters.errors import LoraplexError, OutOfRange, WrongType
from adapters.lora.base_layer import BaseLayer
from adapters.names import MAX_REFERENCE_CHARACTERS
from app.http.bodies import JSON, LEAST_LIMIT_BYTES, NUMBER_BYTES, content_type
from app.http.dependencies import ServiceOf
from app.http.errors import problem, too_large
from app.service import Service
from app.serving.queue_entry import InferenceResult, QueueEntry
from app.serving.request import InferenceRequest, count_lists, read_fast, request_from_json
from app.serving.response import MEMBERS, write_answer, write_many_numbers, write_options

EndpointHandler = Callable[[Service, Scope, Receive, Send], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Small(NamedTuple):
    """A request that can be answered at once, without the framework and without ASGI."""

    question: InferenceRequest
    written: Callable[[InferenceResult], tuple[bytes, Headers]]
    """An outcome → the body and the headers of its 200."""
    route: str
    """The template of its path."""


class AsgiResponse(Response):
    """For the framework's router, which documents these calls: the same call, as a response."""

    def __init__(self, call: EndpointHandler, service: Service) -> None:
        super().__init__()
        self._call = call
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._call(self._service, scope, receive, send)


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, *, max_bytes: int, hint: str = "") -> bytes:
    """The whole body; raises `BodyTooLarge` past `max_bytes`, and `ClientDisconnect`."""
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


async def answer(send: Send, body: bytes, headers: Headers) -> None:
    """A 200 with these headers and its length."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


def check_feature_space(service: Service, headers: Mapping[bytes, bytes], scope: Scope) -> None:
    """Raises `FeatureSpaceMismatch` where `X-Feature-Space` names another encoder than this layer's."""
    if b"x-feature-space" in headers:
        # It may be there twice. A client that names its encoder in UTF-8 means UTF-8.
        given = [value for name, value in scope["headers"] if name == b"x-feature-space"]
        service.check_feature_space([value.decode("utf-8", "replace") for value in given])


def timeout_seconds(headers: Mapping[bytes, bytes]) -> float | None:
    """How long the client waits, from `X-Request-Timeout`; raises `WrongType` or `OutOfRange`."""
    given = headers.get(b"x-request-timeout")
    if given is None:
        return None
    text, field, expected = given.decode("latin-1").strip(), "X-Request-Timeout", "seconds, more than 0"
    if not _NUMBER.fullmatch(text):
        raise WrongType(f"{field} is not a number of seconds", field=field, given=text, expected=expected)
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise OutOfRange(f"{field} is out of range", field=field, given=text, expected=expected)
    return seconds


def server_timing(outcome: InferenceResult) -> tuple[bytes, bytes]:
    """The `Server-Timing` header of an answer."""
    spent = outcome.queue_seconds * 1e3, outcome.forward_seconds * 1e3
    return b"server-timing", b"queue;dur=%.3f, forward;dur=%.3f" % spent


def remember(scope: Scope) -> Callable[[QueueEntry], None]:
    """For `Batcher.ask`: keeps the ticket where whoever observes this request looks for it."""
    return partial(scope["state"].__setitem__, "ticket")


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


ROUTE = "/predict"
URL = ROUTE.encode()
_JSON = JSON.encode()
_CONTENT_TYPE = (b"content-type", _JSON)
_HINT = ": send fewer rows in each request, or the binary form (POST /v2/models/{name}/infer with binary tensors)"


async def predict(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a `POST /predict`, which the edge hands over as it came."""
    headers = dict(scope["headers"])
    try:
        if headers.get(b"content-type") != _JSON:
            content_type(headers.get(b"content-type", b"").decode("latin-1"), JSON)
        check_feature_space(service, headers, scope)
        timeout = timeout_seconds(headers)
        await service.batcher.admit(timeout_seconds=timeout)
        body = await read_body(headers, receive, max_bytes=most_json_bytes(service), hint=_HINT)
        question = await read_question(service, body)
        outcome = await service.batcher.ask(
            question, timeout_seconds=timeout, gone=partial(disconnected, receive), entered=remember(scope)
        )
        if question.wanted is None:
            body = write_answer(question, outcome, await write_many_numbers(outcome.outputs_NO))
        else:
            members = await asyncio.to_thread(write_options, question.wanted, outcome)
            body = write_answer(question, outcome, members, MEMBERS)
    except LoraplexError as error:
        await problem(error)(scope, receive, send)
        return
    except ClientDisconnect:
        return
    await answer(send, body, response_headers(outcome))


def response_headers(outcome: InferenceResult) -> Headers:
    return _CONTENT_TYPE, server_timing(outcome)


async def post_predict(service: ServiceOf) -> Response:
    """One adapter for all rows (`adapter`), or each row its own (`adapters`); `null` is the bare base layer.

    Requests that wait are computed together, whatever adapters they name. `return` asks for probabilities and labels,
    and `top_k` for so many of them.
    """
    return AsgiResponse(predict, service)


BYTES_AT_ONCE = 2**18
"""About half a millisecond of parsing: more is done by a thread."""


MOST_QUICK_BYTES = 2**24
"""The fast parser holds the interpreter lock for some 60 ms of this: more is read by another process."""


async def read_question(service: Service, body: bytes) -> InferenceRequest:
    """What a body asks; raises the `InvalidInput` or `NotJson` that says what is wrong with it."""
    base, max_rows = service.base, service.settings.max_rows
    if len(body) <= BYTES_AT_ONCE:
        question = read_fast(body, base, max_rows=max_rows, parser=service.parser)
    elif len(body) <= MOST_QUICK_BYTES:
        question = await asyncio.to_thread(_read_on_thread, body, base, max_rows=max_rows)
    else:
        question = None
    if question is None:
        value = await service.json.parse(body, longest=max_rows)
        question = await asyncio.to_thread(request_from_json, value, base, max_rows=max_rows)
    return question


def _read_on_thread(body: bytes, base: BaseLayer, *, max_rows: int) -> InferenceRequest | None:
    # The rows, the list of them, and the adapters. A text with more lists would only hold up others in the parser.
    if count_lists(body) > max_rows + 2:
        return None
    return read_fast(body, base, max_rows=max_rows)


def most_json_bytes(service: Service) -> int:
    """Return how long the JSON of a predict or infer request may be: what its shapes can need, or the setting."""
    settings = service.settings
    numbers = settings.max_rows * service.base.in_features
    needed = LEAST_LIMIT_BYTES + numbers * NUMBER_BYTES + settings.max_rows * MAX_REFERENCE_CHARACTERS
    return min(settings.max_predict_json_bytes, needed)
