"""What the calls share that the edge hands over before the framework sees them: plain ASGI, nothing made per header."""

import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from adapters.errors import OutOfRange, WrongType
from app.http.errors import too_large
from app.service import Service
from app.serving.queue_entry import Outcome, Ticket
from app.serving.request import Question

HotCall = Callable[[Service, Scope, Receive, Send], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Small(NamedTuple):
    """A request that can be answered at once, without the framework and without ASGI."""

    question: Question
    written: Callable[[Outcome], tuple[bytes, Headers]]
    """An outcome → the body and the headers of its 200."""
    route: str
    """The template of its path."""


class Handed(Response):
    """For the framework's router, which documents these calls: the same call, as a response."""

    def __init__(self, call: HotCall, service: Service) -> None:
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


def server_timing(outcome: Outcome) -> tuple[bytes, bytes]:
    """The `Server-Timing` header of an answer."""
    spent = outcome.queue_seconds * 1e3, outcome.forward_seconds * 1e3
    return b"server-timing", b"queue;dur=%.3f, forward;dur=%.3f" % spent


def remember(scope: Scope) -> Callable[[Ticket], None]:
    """For `Batcher.ask`: keeps the ticket where whoever observes this request looks for it."""
    return partial(scope["state"].__setitem__, "ticket")


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
