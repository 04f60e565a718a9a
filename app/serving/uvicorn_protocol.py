"""Connections on which small requests are answered without ASGI, and all others by the application."""

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import httptools

from adapters.errors import LoraplexError
from app.http.errors import NotHttp
from app.http.host_policy import authority_of
from app.service import Service
from app.serving.connection_guard import BETWEEN_REQUESTS, BODY, HEAD, RESTARTED_IN_PIECE, GuardedHttpProtocol
from app.serving.connections import OpenConnections, most_connections
from app.serving.fast_path import FastPath, FastPathRequest


def protocol_factory(service: Service) -> type[asyncio.Protocol]:
    """What uvicorn makes a connection with, as `http`."""
    settings = service.settings
    made = partial(
        Protocol,
        direct=FastPath(service),
        open_connections=OpenConnections(most_connections(settings.max_connections)),
        max_head_bytes=settings.max_head_bytes,
    )
    return cast("type[asyncio.Protocol]", made)


class _Exchange:
    """A request that `FastPath` answers, as far as uvicorn's protocol has to see one."""

    message_event = asyncio.Event()  # nobody waits for it

    def __init__(self) -> None:
        self.keep_alive = True
        self.response_complete = True
        self.disconnected = False


class Protocol(GuardedHttpProtocol):
    """One connection; what `direct` takes never becomes an ASGI call."""

    def __init__(self, *given: Any, direct: FastPath, **named: Any) -> None:
        super().__init__(*given, **named)
        self._direct = direct
        self._bodies = direct.bodies
        self._body: bytes | None = None
        """What has come of a request that is read for `direct`."""
        self._named: Mapping[bytes, bytes] | None = None
        """Its headers by their names."""
        self._began = 0.0
        """When its head was there."""
        self._asked: FastPathRequest | None = None
        self._exchange = _Exchange()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        if self._asked is not None:
            self._asked.ticket.future.cancel()
        self._drop_body()

    def on_message_begin(self) -> None:
        """A request begins. What ASGI has to know of it is gathered where it becomes an ASGI call."""
        self.stage = HEAD
        self.url, self.headers, self.expect_100_continue = b"", [], False

    def on_headers_complete(self) -> None:
        """Its head is here."""
        if self.head_bytes > 0:
            self.check_head_bytes()
        parser = self.parser
        if (
            parser.get_method() == b"POST"
            and getattr(self.cycle, "response_complete", True)  # there is none at first
            and (named := self._direct.may_take(self.url, self.headers)) is not None
            and parser.should_keep_alive()
            and parser.get_http_version() == "1.1"
            and not self.flow.write_paused
        ):
            self._body, self._named = b"", named
            self._began = time.perf_counter()
        elif self.begin_body():
            self._become_asgi()
        # Not before: a request whose head is refused has no ASGI call yet.
        self.stage = BODY

    def on_body(self, body: bytes) -> None:
        """A part of its body is."""
        if self._body is None:
            super().on_body(body)
        else:
            self._body += body
            bodies = self._bodies
            bodies.held += len(body)
            if bodies.held > bodies.limit:
                # It is refused there.
                self._become_asgi()

    def on_message_complete(self) -> None:
        """All of it is."""
        if self._body is not None:
            assert self._named is not None
            asked = self._direct.ask(self.url, self._named, self._body, self._began)
            if asked is not None:
                self.stage, self.head_bytes = BETWEEN_REQUESTS, RESTARTED_IN_PIECE
                self._wait_for(asked)
                return
            self._become_asgi()
        super().on_message_complete()

    def shutdown(self) -> None:
        """The service stops: whoever has begun a request gets its answer."""
        if self._body is not None:
            self._become_asgi()
        super().shutdown()

    def _become_asgi(self) -> None:
        """Go on with what has come of a request as uvicorn does."""
        url, headers, expected = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expected
        self.headers.extend(headers)
        if self._body is not None:
            self.scope["state"]["began"] = self._began
        try:
            if not url.startswith(b"/"):
                if httptools.parse_url(url).path is None:  # as in `http://host`
                    raise httptools.HttpParserInvalidURLError
                self.scope["state"]["target_authority"] = authority_of(url)
            super().on_headers_complete()
        except httptools.HttpParserInvalidURLError as error:
            raise NotHttp("this is not an HTTP/1.1 request: its address cannot be read") from error
        body, self._body = self._body, None
        if body:
            # From here on, it is counted as it is received.
            self._bodies.held -= len(body)
            super().on_body(body)
        # Its trailers come here, and not into the headers that the application has.
        self.headers = []

    def _drop_body(self) -> None:
        if self._body is not None:
            self._bodies.held -= len(self._body)
            self._body = None

    def _refuse(self, error: LoraplexError) -> None:
        """Refuse a request that is read for `direct` as if its head were not complete: it has no ASGI call."""
        if self._body is not None:
            self._drop_body()
            self.stage = HEAD
        super()._refuse(error)

    def _wait_for(self, asked: FastPathRequest) -> None:
        assert self._body is not None
        self._bodies.held -= len(self._body)
        self._body, self._asked = None, asked
        # As a request that is being answered: those that follow on this connection wait for it.
        self._exchange.response_complete = False
        self.cycle = self._exchange  # type: ignore[assignment]
        asked.ticket.future.add_done_callback(self._answer)

    def _answer(self, _future: object) -> None:
        asked, self._asked = self._asked, None
        assert asked is not None
        exchange = self._exchange
        content = self._direct.answer(asked, self.server_state.default_headers, keep_alive=exchange.keep_alive)
        if content is None or self.transport.is_closing():
            return
        self.transport.write(content)
        exchange.response_complete = True
        if not exchange.keep_alive:
            self.transport.close()
        if self.pipeline:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1
            self.idle_since = self.loop.time()
