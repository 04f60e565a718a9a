"""uvicorn's connection protocol with the fast path: small plain requests never become an ASGI call."""

import asyncio
from functools import partial
from typing import Any, cast

import httptools

from adapters.errors import LoraplexError
from app.http.endpoints import SERVED_BY
from app.http.errors import NotHttp
from app.http.host_policy import authority_of
from app.service import Service
from app.serving.connection_guard import BETWEEN_REQUESTS, BODY, HEAD, RESTARTED_IN_PIECE, GuardedHttpProtocol
from app.serving.connections import OpenConnections, limit_connections
from app.serving.fast_path import Fallback, FastPath, FastPathRequest
from app.settings import Settings


def protocol_factory(service: Service) -> type[asyncio.Protocol]:
    """Return what uvicorn makes each connection with (its setting `http`)."""
    settings = service.settings
    factory = partial(
        FastPathProtocol,
        service=service,
        fast_path=FastPath(service),
        open_connections=OpenConnections(limit_connections(settings.max_connections)),
        max_head_bytes=settings.max_head_bytes,
    )
    return cast("type[asyncio.Protocol]", factory)


def answer_headers(settings: Settings) -> list[tuple[str, str]]:
    """Return the constant headers of every answer (uvicorn's setting `headers`)."""
    return [] if settings.served_by is None else [(SERVED_BY, settings.served_by)]


class _FastPathCycle:
    """Stand-in for uvicorn's `RequestResponseCycle` while the fast path answers a request."""

    message_event = asyncio.Event()  # uvicorn sets it; nothing waits for it

    def __init__(self) -> None:
        self.keep_alive = True
        self.response_complete = True
        self.disconnected = False


class FastPathProtocol(GuardedHttpProtocol):
    """One connection. Requests that the fast path does not accept go to the ASGI application.

    While the service drains, that is each of them, and the connection is closed after its answer.
    """

    def __init__(self, *args: Any, service: Service, fast_path: FastPath, **named: Any) -> None:
        super().__init__(*args, **named)
        self._service = service
        self._fast_path = fast_path
        self._bodies = fast_path.bodies
        # Body so far of a request that the fast path has accepted and that is not complete.
        self._body: bytes | None = None
        # Bytes of it that are counted in `_bodies`.
        self._held_bytes = 0
        # Request that the fast path has accepted and not answered.
        self._request: FastPathRequest | None = None
        self._fast_cycle = _FastPathCycle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up the current request."""
        super().connection_lost(exc)
        if self._request is not None and self._request.entry is not None:
            self._request.entry.cancel()
        self._drop_body()

    def on_message_begin(self) -> None:
        """Begin a request, without what uvicorn prepares for its ASGI call: `_become_asgi` does that."""
        self.stage = HEAD
        self.url, self.headers, self.expect_100_continue = b"", [], False

    def on_headers_complete(self) -> None:
        """Choose between the fast path and ASGI."""
        if self.head_bytes > 0:
            self.check_head_bytes()
        parser = self.parser
        request = None
        if parser.get_method() == b"POST":
            is_idle = (
                getattr(self.cycle, "response_complete", True)  # there is no cycle before the first request
                and parser.should_keep_alive()
                and not self.flow.write_paused
                and not self._service.draining
            )
            request = self._fast_path.accept(
                self.url, self.headers, is_idle=is_idle, http_version=parser.get_http_version
            )
        if request is not None:
            self._body, self._request = b"", request
        elif self.begin_body():
            self._become_asgi()
        # Set last, because a request whose head is refused has no ASGI call yet.
        self.stage = BODY

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body, or pass it on to the ASGI call."""
        if self._body is None:
            super().on_body(body)
            return
        self._body += body

    def on_message_complete(self) -> None:
        """Put the complete request into the queue, or leave it to ASGI."""
        if self._body is not None and self._has_room():
            request = self._request
            assert request is not None
            if self._fast_path.enqueue(request, self._body, self._respond):
                self.stage, self.head_bytes = BETWEEN_REQUESTS, RESTARTED_IN_PIECE
                self._body = None
                if self._held_bytes:
                    self._drop_body()
                # uvicorn queues the requests that follow on this connection until the cycle is complete.
                self._fast_cycle.response_complete = False
                self.cycle = self._fast_cycle  # type: ignore[assignment]
                if request.entry is None:
                    self._respond()
                return
            self._become_asgi()
        super().on_message_complete()

    def shutdown(self) -> None:
        """Stop the connection after the current request, which may not be complete yet."""
        if self._body is not None:
            self._fast_path.count_fallback(Fallback.CONNECTION)
            self._become_asgi()
        super().shutdown()

    def _count_bytes(self, data: bytes | memoryview) -> None:
        """Count the kept part of a body too. One that arrives in a piece with its head is gone at the end of it."""
        super()._count_bytes(data)
        if self._body is not None and self._has_room():
            self._bodies.held += len(self._body) - self._held_bytes
            self._held_bytes = len(self._body)

    def _has_room(self) -> bool:
        """Return whether there is memory for the body so far. If not, the ASGI application refuses it."""
        assert self._body is not None
        if self._bodies.held + len(self._body) - self._held_bytes <= self._bodies.limit:
            return True
        self._fast_path.count_fallback(Fallback.MEMORY)
        self._become_asgi()
        return False

    def _become_asgi(self) -> None:
        """Make an ASGI call of the request as far as it has been read."""
        url, headers, expect_100_continue = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect_100_continue
        self.headers.extend(headers)
        if self._body is not None:
            assert self._request is not None
            self.scope["state"]["began"] = self._request.began
            self._request = None
        try:
            if not url.startswith(b"/"):
                if httptools.parse_url(url).path is None:  # as in `http://host`
                    raise httptools.HttpParserInvalidURLError
                self.scope["state"]["target_authority"] = authority_of(url)
            super().on_headers_complete()
            if self._service.draining:
                self.cycle.keep_alive = False
        except httptools.HttpParserInvalidURLError as error:
            raise NotHttp("this is not an HTTP/1.1 request: its address cannot be read") from error
        body = self._body
        # The middleware counts the body again when it receives it.
        self._drop_body()
        if body:
            super().on_body(body)
        # Trailers are added here, so that they do not become headers of the ASGI call.
        self.headers = []

    def _drop_body(self) -> None:
        self._body = None
        if self._held_bytes:
            self._bodies.held -= self._held_bytes
            self._held_bytes = 0

    def _refuse(self, error: LoraplexError) -> None:
        """Refuse the current request. One of the fast path has no ASGI call, as if its head were not complete."""
        if self._body is not None:
            self._drop_body()
            self._request = None
            self.stage = HEAD
        super()._refuse(error)

    def _respond(self) -> None:
        request, self._request = self._request, None
        assert request is not None
        cycle = self._fast_cycle
        try:
            content = self._fast_path.respond(request, self.server_state.default_headers, keep_alive=cycle.keep_alive)
        except BaseException:
            # A defect: if the connection stayed open, the client would wait for an answer until its own timeout.
            self.transport.close()
            raise
        if content is None or self.transport.is_closing():
            return
        self.transport.write(content)
        cycle.response_complete = True
        if not cycle.keep_alive:
            self.transport.close()
        if self.pipeline:
            self.on_response_complete()
        else:  # the common case, without a call
            self.server_state.total_requests += 1
            self.idle_since = self.loop.time()
