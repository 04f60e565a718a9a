"""One ASGI callable around everything: request id, hosts and origins, body limit, last-resort error; each request is
observed."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.body_memory import BodyMemory
from app.http.errors import InternalError, TooManyBytes, answer_at, known_failure, too_large
from app.http.host_policy import HostPolicy
from app.observability.observer import Observer
from app.observability.records import NOT_ANSWERED, OTHER

REQUEST_ID = b"x-request-id"
_TOO_LARGE = 413
_LINGER_SECONDS = 2.0
_OURS = secrets.token_hex(10).encode()
"""Of this process: its ids are this and a count, which costs less than as many random bytes for each."""
_COUNT = count()
_CLIENTS_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
NO_ANSWER = "not_answered"
"""The code of a request whose client had gone."""

log = logging.getLogger(__name__)


class Edge:
    """Passes requests on to `app`, or to what `hot` has for them, none with more bytes than `most_bytes` says.

    A client's own `X-Request-Id` is kept where it is 1 to 64 characters of A-Z a-z 0-9 . _ -; each answer has one.
    """

    def __init__(
        self,
        app: ASGIApp,
        hot: Callable[[Scope], tuple[str, ASGIApp] | None],
        *,
        most_bytes: Callable[[Scope], int],
        is_streamed: Callable[[Scope], bool],
        bodies: BodyMemory,
        observer: Observer,
        host_policy: HostPolicy,
    ) -> None:
        """`hot` gives the route's template with what answers there; a body that `is_streamed` is not in memory."""
        self._app = app
        self._hot = hot
        self._most_bytes = most_bytes
        self._is_streamed = is_streamed
        self._bodies = bodies
        self._observer = observer
        self._host_policy = host_policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        # A request that `Direct` has left to us began before this.
        began = state.get("began") or time.perf_counter()
        headers = dict(scope["headers"])
        request_id = request_id_of(headers)
        state["request_id"] = request_id.decode()
        status, ended = 0, False
        read, most_bytes = 0, self._most_bytes(scope)
        bodies, held = None if self._is_streamed(scope) else self._bodies, 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                left_unread = status == _TOO_LARGE or state.get("code") == TooManyBytes.code
                if left_unread and not ended and (read or b"expect" not in headers):
                    await _discard(receive, most_bytes)
                message["headers"] = [*message["headers"], (REQUEST_ID, request_id)]
            await send(message)

        async def receive_bounded() -> Message:
            nonlocal read, ended, held
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                read += size
                ended = not message.get("more_body", False)
                if "refusal" in state:  # how the body goes on is no HTTP
                    raise state["refusal"]
                if read > most_bytes:
                    raise too_large(most_bytes)
                if bodies is not None:
                    try:
                        bodies.take(size)
                    except TooManyBytes:
                        # At once, and not after the answer: other bodies that come now need the room.
                        bodies.release(held)
                        held = 0
                        raise
                    held += size
            return message

        try:
            if "refusal" in state:  # see `GuardedHttp`
                await answer_at(scope["path"], state["refusal"])(scope, receive, send_with_id)
                return
            self._host_policy.check(
                scope["method"],
                scope["path"],
                scope["headers"],
                http_version=scope["http_version"],
                target_authority=state.get("target_authority"),
            )
            length = int(headers.get(b"content-length", b"0"))
            if length > most_bytes:
                await answer_at(scope["path"], too_large(most_bytes))(scope, receive, send_with_id)
                return
            if bodies is not None and not bodies.has_room(length):
                await answer_at(scope["path"], bodies.full())(scope, receive, send_with_id)
                return
            state["route"], app = self._hot(scope) or (None, self._app)
            await app(scope, receive_bounded, send_with_id)
        except Exception as error:
            failed = known_failure(error)
            if failed is None or status:
                extra = {"request_id": request_id.decode()}
                log.exception("%s %s failed", scope["method"], _route(scope), extra=extra)
                failed = InternalError(f"the service failed on this request; its id is {request_id.decode()}")
            state["code"] = failed.code
            if not status:
                await answer_at(scope["path"], failed)(scope, receive, send_with_id)
        finally:
            if held and bodies is not None:
                bodies.release(held)
            self._observe(scope, headers, status, began, request_id)

    def _observe(
        self, scope: Scope, headers: Mapping[bytes, bytes], status: int, began: float, request_id: bytes
    ) -> None:
        state = scope["state"]
        ticket, code = state.get("ticket"), state.get("code")
        if status in (0, NOT_ANSWERED):
            status, code = NOT_ANSWERED, NO_ANSWER
        route, method, path = _route(scope), scope["method"], scope["path"]
        publish = state.get("publish")
        self._observer.answered(route, method, status, began, request_id, path, code, ticket, headers, publish)


def _route(scope: Scope) -> str:
    """The template of the route that took a request: paths are the clients', and without number."""
    hot: str | None = scope["state"].get("route")
    if hot is not None:
        return hot
    template: str | None = getattr(scope.get("route"), "path", None)
    if template is not None:
        return template
    mounted: str = scope.get("root_path", "")
    return f"{mounted}/{{path}}" if mounted else OTHER


def request_id_of(headers: Mapping[bytes, bytes]) -> bytes:
    """The client's own where it is fit to be sent back, else a new one."""
    theirs = headers.get(REQUEST_ID)
    return theirs if theirs and _CLIENTS_ID.fullmatch(theirs) else b"%b%012x" % (_OURS, next(_COUNT))


async def _discard(receive: Receive, most_bytes: int) -> None:
    """Read on for a moment: a client that still sends when the connection is closed never reads the answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while most_bytes > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                most_bytes -= len(message.get("body", b""))
