"""uvicorn's HTTP/1.1, where the head and the body of an answer leave in one write, after those of its batch are made.

uvicorn makes two writes at once. Each is a packet that wakes the reader, and takes about 50 µs between two answers
that are being made.
"""

import asyncio
import time
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.direct import Asked, Direct
from app.service import Service

_MOST_HELD_BYTES = 2**16


class JoinedWrites:
    """A transport that holds what is written in one turn of the loop until the next turn."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._call_soon = asyncio.get_running_loop().call_soon
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send `data` after all that was given before."""
        if not self._held:
            self._call_soon(self._flush)
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > _MOST_HELD_BYTES:
            self._flush()

    def close(self) -> None:
        """Close once everything is sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            held, self._held, self._held_bytes = self._held, [], 0
            if not self.is_closing():
                self._transport.writelines(held)


def connections(service: Service) -> type[asyncio.Protocol]:
    """What uvicorn makes a connection with, as `http`."""
    return cast("type[asyncio.Protocol]", partial(Protocol, direct=Direct(service)))


class _Exchange:
    """A request that `Direct` answers, as far as uvicorn's protocol has to see one."""

    message_event = asyncio.Event()  # nobody waits for it

    def __init__(self) -> None:
        self.keep_alive = True
        self.response_complete = True
        self.disconnected = False


class Protocol(HttpToolsProtocol):
    """One connection; what `direct` takes never becomes an ASGI call."""

    def __init__(self, *given: Any, direct: Direct, **named: Any) -> None:
        super().__init__(*given, **named)
        self._direct = direct
        self._bodies = direct.bodies
        self._body: bytes | None = None
        """What has come of a request that is read for `direct`."""
        self._began = 0.0
        """When its head was there."""
        self._asked: Asked | None = None
        self._exchange = _Exchange()
        self._rests_since: float | None = None
        self._rest_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The loop has a client."""
        super().connection_made(JoinedWrites(transport))  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        if self._asked is not None:
            self._asked.ticket.future.cancel()
        if self._body is not None:
            self._bodies.held -= len(self._body)
            self._body = None

    def on_message_begin(self) -> None:
        """A request begins. What ASGI has to know of it is gathered where it becomes an ASGI call."""
        self._rests_since = None
        self.url, self.headers, self.expect_100_continue = b"", [], False

    def on_headers_complete(self) -> None:
        """Its head is here."""
        # Again: it may have begun before the answer to the one before it.
        self._rests_since = None
        parser = self.parser
        if (
            parser.get_method() == b"POST"
            and getattr(self.cycle, "response_complete", True)  # there is none at first
            and self._direct.may_take(self.url, self.headers)
            and parser.should_keep_alive()
            and parser.get_http_version() == "1.1"
            and not self.flow.write_paused
        ):
            self._body = b""
            self._began = time.perf_counter()
        else:
            self._become_asgi()

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
            asked = self._direct.ask(self.url, self.headers, self._body, self._began)
            if asked is not None:
                self._wait_for(asked)
                return
            self._become_asgi()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP as uvicorn does, with an id."""
        self.transport.write(self._direct.refuse(msg, self.server_state.default_headers))
        self.transport.close()

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
        super().on_headers_complete()
        body, self._body = self._body, None
        if body:
            # From here on, it is counted as it is received.
            self._bodies.held -= len(body)
            super().on_body(body)

    def _wait_for(self, asked: Asked) -> None:
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
            self._rest()

    def _rest(self) -> None:
        """Close the connection where nothing comes for long. One timer, and not one a request, as uvicorn has it."""
        self._rests_since = self.loop.time()
        if self._rest_timer is None:
            self._rest_timer = self.loop.call_later(self.timeout_keep_alive, self._see_whether_it_rests)

    def _see_whether_it_rests(self) -> None:
        self._rest_timer = None
        if self._rests_since is None:
            return
        left = self._rests_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._rest_timer = self.loop.call_later(left, self._see_whether_it_rests)
        else:
            self.timeout_keep_alive_handler()
