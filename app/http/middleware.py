"""One ASGI callable around the whole application: request id, hosts, keys, body limit, last-resort error, telemetry."""

import asyncio
import logging
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import count

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.access.audit import Actor, acting_as
from adapters.access.grants import Grant
from adapters.access.keys import Scope as KeyScope
from adapters.access.rates import Rate
from adapters.errors import LoraplexError, shorten
from app.http.bodies import BodyMemory
from app.http.endpoints import ENDPOINTS, OPEN_PATHS, Endpoint, find_endpoint
from app.http.errors import InternalError, RouteNotFound, TooManyBytes, known_failure, too_large
from app.http.host_policy import HEALTH_PREFIX
from app.observability.records import NO_ANSWER, NOT_ANSWERED, OTHER, RequestRecord
from app.service import Service

_REQUEST_ID = b"x-request-id"
_CLIENT_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# A request id is this prefix of the process and a count, which costs less than random bytes for each request.
_PROCESS_PREFIX = secrets.token_hex(10).encode()
_REQUEST_COUNT = count()
_TOO_LARGE = 413
_LINGER_SECONDS = 2.0
# A key is checked again at the end of a body that takes longer: its client could wait for days with the last byte.
_LONGEST_BODY_SECONDS = 1.0
# Returns the answer to a request that failed.
AnswerError = Callable[[Scope, LoraplexError], Response]
_Header = tuple[bytes, bytes]
# Headers of every answer of the ASGI application that does not set them itself, as pages do. An answer to a prediction
# has none of them: it is numbers or JSON for a program, and its bytes are those of the fast path.
_SECURITY_HEADERS: tuple[_Header, ...] = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    # Answers belong to a tenant, and change. A conditional request names the ETag itself.
    (b"cache-control", b"no-store"),
)
# Only of answers over the service's own TLS: a proxy that ends TLS decides this for its host. One year.
_STRICT_TRANSPORT = (b"strict-transport-security", b"max-age=31536000")

log = logging.getLogger(__name__)


class Middleware:
    """Wraps `app`, and calls the ASGI callables of the endpoint table in place of it.

    A client's own `X-Request-Id` is kept if it is 1 to 64 characters of A-Z a-z 0-9 . _ -; every answer has one.
    """

    def __init__(
        self, app: ASGIApp, service: Service, *, is_open_page: Callable[[str], bool], answer: AnswerError
    ) -> None:
        """Create the callable. `is_open_page` says which paths outside the endpoint table need no key."""
        self._app = app
        self._is_open_page = is_open_page
        self._answer = answer
        self._authenticator = service.authenticator
        self._rates = service.rates
        self._asgi_calls = {call.path: partial(call.asgi, service) for call in ENDPOINTS if call.asgi is not None}
        self._settings = service.settings
        self._memory = service.bodies
        # Bodies that are streamed to a file.
        self._uncounted = BodyMemory(sys.maxsize)
        self._observer = service.observer
        self._host_policy = service.host_policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = find_endpoint(scope["method"], scope["path"])
        limit, memory = self._settings.max_body_bytes, self._memory
        if endpoint is not None and endpoint.is_streamed:
            limit, memory = self._settings.max_dataset_bytes, self._uncounted
        elif endpoint is not None and endpoint.body_limit is not None:
            limit = min(limit, endpoint.body_limit)
        renew = self._authenticator.renew
        exchange = _Exchange(scope, receive, send, body_limit=limit, memory=memory, renew=renew)
        try:
            # Checks that need only the head: they refuse a request before its body is read.
            if "refusal" in exchange.state:  # set by the connection, which found the request malformed
                raise exchange.state["refusal"]
            self._host_policy.check(scope)
            await self._authorize(scope, endpoint)
            exchange.check_length()
            # The framework also matches a path with a line feed at its end.
            if endpoint is None and find_endpoint(scope["method"], scope["path"].removesuffix("\n")):
                raise RouteNotFound(f"there is nothing at {shorten(scope['path'])}")
            exchange.endpoint = endpoint
            self._check_rate(scope, endpoint)
            predict = None if endpoint is None else self._asgi_calls.get(endpoint.path)
            if predict is not None:  # it changes nothing, so that it needs no actor
                await predict(scope, exchange.receive, exchange.send)
                return
            with acting_as(exchange.actor):
                await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            pass  # observed as a request without an answer
        except Exception as error:
            await exchange.answer_error(error, self._answer)
        finally:
            exchange.release_memory()
            self._observe(exchange)

    async def _authorize(self, scope: Scope, endpoint: Endpoint | None) -> None:
        """Put the grant of a request into its state; raise `Unauthenticated` or `Forbidden`.

        A path outside the endpoint table needs a key too, whether or not there is anything.
        """
        path = scope["path"]
        if path in OPEN_PATHS or (endpoint is None and (path.startswith(HEALTH_PREFIX) or self._is_open_page(path))):
            return
        grant = scope["state"]["grant"] = await self._authenticator.authenticate(scope["headers"])
        if endpoint is not None and endpoint.scope is not None:
            grant.caller.require(endpoint.scope)

    def _check_rate(self, scope: Scope, endpoint: Endpoint | None) -> None:
        """Count a request of a tenant; raise `RateLimited`.

        What only an operator may call is not counted, so that a limit can always be changed.
        """
        grant = scope["state"].get("grant")
        if grant is None or (endpoint is not None and endpoint.scope is KeyScope.OPERATOR):
            return
        self._rates.refresh()
        self._rates.take(grant.caller.tenant, Rate.REQUESTS)

    def _observe(self, exchange: "_Exchange") -> None:
        scope, state = exchange.scope, exchange.state
        status, code = exchange.status, state.get("code")
        if status in (0, NOT_ANSWERED):
            status, code = NOT_ANSWERED, NO_ANSWER
        request = exchange.route, scope["method"], scope["path"], exchange.headers, exchange.request_id, exchange.began
        record = RequestRecord(*request, status, code, state.get("queue_entry"), state.get("publish"))
        self._observer.finish_request(record)


class _Exchange:
    """One request and its answer: counts the bytes of the body and notes the answer's status."""

    __slots__ = (
        *("scope", "state", "headers", "request_id", "began", "endpoint", "status"),
        *("_receive", "_send", "_body_limit", "_memory", "_renew", "_read_bytes", "_held_bytes", "_has_ended"),
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        body_limit: int,
        memory: BodyMemory,
        renew: Callable[[Grant], Awaitable[Grant]],
    ) -> None:
        self.scope = scope
        self.state = scope.setdefault("state", {})
        # The fast path may have read the head already, and then left the request to ASGI.
        self.began: float = self.state.get("began") or time.perf_counter()
        self.headers = dict(scope["headers"])
        self.request_id = request_id_of(self.headers)
        self.state["request_id"] = self.request_id.decode()
        # Set when the head of the request is accepted.
        self.endpoint: Endpoint | None = None
        # Status of the answer; 0 until it has begun.
        self.status = 0
        self._receive = receive
        self._send = send
        self._body_limit = body_limit
        self._memory = memory
        self._renew = renew
        self._read_bytes = 0
        self._held_bytes = 0
        self._has_ended = False

    @property
    def route(self) -> str:
        """Template of the route. Paths are not recorded, because clients could make any number of them."""
        if self.endpoint is not None:
            return self.endpoint.path
        template: str | None = getattr(self.scope.get("route"), "path", None)
        if template is not None:
            return template
        mount: str = self.scope.get("root_path", "")
        return f"{mount}/{{path}}" if mount else OTHER

    @property
    def actor(self) -> Actor:
        """Who makes the changes of this request: the caller, if its key was checked, and its address."""
        grant, client = self.state.get("grant"), self.scope.get("client")
        return Actor(
            key_id=None if grant is None else grant.caller.key_id,
            request_id=self.request_id.decode(),
            client_address=None if client is None else client[0],
        )

    @property
    def _tenant(self) -> str | None:
        grant = self.state.get("grant")
        return None if grant is None else grant.caller.tenant

    def check_length(self) -> None:
        """Raise `BodyTooLarge` or `TooManyBytes` if the body's declared length is too large."""
        length = int(self.headers.get(b"content-length", b"0"))
        if length > self._body_limit:
            raise too_large(self._body_limit)
        if not self._memory.has_room(length, self._tenant):
            raise self._memory.full()

    async def receive(self) -> Message:
        """Receive a message; raise `BodyTooLarge` or `TooManyBytes` when the body passes a limit.

        Raises `Unauthenticated` if the key was revoked, or expired, before a slow body had ended.
        """
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        size = len(message.get("body", b""))
        self._read_bytes += size
        self._has_ended = not message.get("more_body", False)
        if "refusal" in self.state:  # the rest of the body is malformed
            raise self.state["refusal"]
        if self._read_bytes > self._body_limit:
            raise too_large(self._body_limit)
        try:
            self._memory.take(size, self._tenant)
        except TooManyBytes:
            # Released before the answer is sent, because other bodies that arrive now need the room.
            self.release_memory()
            raise
        self._held_bytes += size
        grant = self.state.get("grant")
        if self._has_ended and grant is not None and time.perf_counter() - self.began > _LONGEST_BODY_SECONDS:
            await self._renew(grant)
        return message

    async def send(self, message: Message) -> None:
        """Send a message; the head of the answer gets the request id and the security headers that it lacks."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            is_unread = self.status == _TOO_LARGE or self.state.get("code") == TooManyBytes.code
            if is_unread and not self._has_ended and (self._read_bytes or b"expect" not in self.headers):
                await _discard(self._receive, self._body_limit)
            headers = [*message["headers"], (_REQUEST_ID, self.request_id)]
            if self.endpoint is None or self.endpoint.asgi is None:  # a prediction has the bytes of the fast path
                headers += _missing_headers(headers, scheme=self.scope.get("scheme", "http"))
            message["headers"] = headers
        await self._send(message)

    async def answer_error(self, error: Exception, answer: AnswerError) -> None:
        """Answer with `error`, or with a 500 if it is a defect; only log it if the answer has begun."""
        known = known_failure(error)
        if known is None or self.status:
            request_id = self.request_id.decode()
            log.exception("%s %s failed", self.scope["method"], self.route, extra={"request_id": request_id})
            known = InternalError(f"the service failed on request {request_id}; its log says why")
        self.state["code"] = known.code
        if not self.status:
            await answer(self.scope, known)(self.scope, self._receive, self.send)

    def release_memory(self) -> None:
        """Give back the memory that the body was counted with."""
        if self._held_bytes:
            self._memory.release(self._held_bytes, self._tenant)
            self._held_bytes = 0


def request_id_of(headers: Mapping[bytes, bytes]) -> bytes:
    """Return the client's request id if it is valid, otherwise a new one."""
    client_id = headers.get(_REQUEST_ID)
    if client_id and _CLIENT_REQUEST_ID.fullmatch(client_id):
        return client_id
    return b"%b%012x" % (_PROCESS_PREFIX, next(_REQUEST_COUNT))


async def _discard(receive: Receive, limit: int) -> None:
    """Read the rest of a body for a short time.

    If the connection is closed while the client sends, the client never reads the answer.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while limit > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                limit -= len(message.get("body", b""))


def _missing_headers(headers: Iterable[_Header], *, scheme: str) -> Iterator[_Header]:
    """Yield the security headers that an answer with these headers lacks."""
    names = {name.lower() for name, _ in headers}
    yield from (header for header in _SECURITY_HEADERS if header[0] not in names)
    if scheme == "https":
        yield _STRICT_TRANSPORT
