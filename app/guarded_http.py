"""uvicorn's HTTP/1.1 with limits: on the bytes of a head, on a client's silence, and on what counts as one request.

Everything here is for the connection before a request is answered. A request whose end is in doubt is refused, and its
connection is closed: what follows it could be taken for a request that the client has not sent.
"""

import asyncio
import logging
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from adapters.errors import LoraplexError
from app.answered import LONGEST_PATH, OTHER
from app.joined_writes import JoinedWrites
from app.open_connections import OpenConnections
from app.problems import HeadTooLarge, NotHttp

HEAD_SECONDS = 30.0
"""A head that has begun is complete within this, or its connection is closed."""
BODY_SECONDS = 75.0
"""A body that has begun brings a byte within this, or its connection is closed."""
BETWEEN, HEAD, BODY = range(3)
"""Which part of a request the parser is in: in none, before its headers are complete, after that."""
BEGAN_INSIDE = -1
"""Instead of a count of bytes: it begins anew inside the piece that is being parsed."""
_LINE_AND_END = len(" " + " HTTP/1.1\r\n" + "\r\n")
_HEADER_REST = len(": " + "\r\n")

log = logging.getLogger(__name__)


class GuardedHttp(HttpToolsProtocol):
    """One connection. `stage` and the callbacks of the parser are the subclass's to keep, see `app.wire`."""

    def __init__(self, *args: Any, open_connections: OpenConnections, max_head_bytes: int, **named: Any) -> None:
        super().__init__(*args, **named)
        self._open_connections = open_connections
        self._max_head_bytes = max_head_bytes
        self.stage = BETWEEN
        self.head_bytes = 0
        """Bytes of the head that has begun, without those of the piece that is being parsed. Negative: the piece has
        other requests before it."""
        self._framing_bytes = 0
        """Bytes of a chunked body that are not its content, since the last that were. Negative: some were in this
        piece."""
        self._is_chunked = False
        self._silent_since = 0.0
        """When the last piece of a head's beginning, or of a body, came."""
        self.rests_since = 0.0
        self._body_framing = b""
        """Header lines that say how long the body is, of a request that asks for an upgrade."""
        self._is_resuming = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and close it if there are too many."""
        super().connection_made(JoinedWrites(transport))  # type: ignore[arg-type]
        self.rests_since = self.loop.time()
        if not self._open_connections.add(self):
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._open_connections.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came: never more at once than a head may have, because the parser keeps all of a head."""
        most = self._max_head_bytes
        if len(data) > most:
            view = memoryview(data)
            for begin in range(0, len(data), most):
                self._feed(view[begin : begin + most])
        else:
            self._feed(data)

    def on_response_complete(self) -> None:
        """Go on with the next request, as uvicorn does, without a timer for each."""
        self.server_state.total_requests += 1
        self.rests_since = self.loop.time()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Pass a part of a body on."""
        self._framing_bytes = BEGAN_INSIDE
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request that is an ASGI call."""
        if self._body_framing:
            return  # This is only the end of its head: `_resume_body` reads the body.
        if self._is_chunked:
            self._is_chunked = False
            self._end_trailers()
        self.stage, self.head_bytes = BETWEEN, BEGAN_INSIDE
        super().on_message_complete()

    def check_head_bytes(self) -> None:
        """Raise `HeadTooLarge` if a head that came in several pieces has too many bytes."""
        size = len(self.parser.get_method()) + len(self.url) + _LINE_AND_END
        if size + _bytes_of(self.headers) > self._max_head_bytes:
            raise self._head_too_large()

    def begin_body(self) -> bool:
        """Check how the body is framed; return False if the head is one of `_resume_body`.

        Raises `NotHttp` if there is more than one way to read it: a proxy in front may have read it the other way.
        """
        if self._is_resuming:
            self._is_resuming = False
            self.stage = BODY
            return False
        parser = self.parser
        version = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise NotHttp(f"this is a request of HTTP/{version}; HTTP/1.1 is spoken here")
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (len(codings) > 1 or codings[0].strip().lower() != b"chunked"):
            raise NotHttp("the body's Transfer-Encoding is not chunked alone, which is all that is read here")
        if codings and version != "1.1":
            raise NotHttp("the body has a Transfer-Encoding, which HTTP/1.0 does not have")
        if parser.should_upgrade():
            if parser.get_method() == b"CONNECT":
                raise NotHttp("CONNECT is for proxies, and this is not one")
            lengths = [value for name, value in self.headers if name == b"content-length"]
            if codings:
                self._body_framing = b"transfer-encoding: chunked\r\n"
            elif lengths:
                self._body_framing = b"content-length: %b\r\n" % lengths[0]
        self._is_chunked = bool(codings)
        self._framing_bytes = BEGAN_INSIDE
        self.stage = BODY
        return True

    def is_overdue(self, now: float) -> bool:
        """Return whether the client has been silent for too long."""
        if self.parser is None:
            return False  # It is refused, or gone: its end is near.
        cycle = self.cycle
        is_answering = not getattr(cycle, "response_complete", True)
        if self.stage == BODY:
            if self.flow.read_paused or getattr(cycle, "waiting_for_100_continue", False):
                self._silent_since = now  # The client waits for us.
            return now - self._silent_since > BODY_SECONDS
        if is_answering:
            self._silent_since = now
            return False
        if self.stage == HEAD:
            return now - self._silent_since > HEAD_SECONDS
        return now - self.rests_since > self.timeout_keep_alive

    def waits_since(self) -> tuple[bool, float] | None:
        """Return whether a head has begun, and since when nothing is going on; None if a request is."""
        if self.parser is None:
            return None
        if self.stage == BODY or not getattr(self.cycle, "response_complete", True):
            return None
        has_begun = self.stage == HEAD
        return has_begun, self._silent_since if has_begun else self.rests_since

    def hang_up(self) -> None:
        """Close the connection."""
        self.transport.close()

    def _feed(self, data: bytes | memoryview) -> None:
        size = len(data)
        while self.parser is not None:  # else it is refused: what the client still sends is read and left
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as stopped:
                data = memoryview(data)[stopped.args[0] :]
                self._resume_body()
                if data:
                    continue
            except httptools.HttpParserError as error:
                self._refuse(_error_of(error))
                return
            break
        if self.stage == BETWEEN:
            self.head_bytes = 0
        elif self.parser is not None:
            self._count(size)

    def _count(self, size: int) -> None:
        """Count a piece at whose end a request was not complete."""
        if self.stage == HEAD:
            if self.head_bytes <= 0:
                self._silent_since = self.loop.time()
            # If it began inside, how much of the piece is its own cannot be told. Its end is checked exactly.
            self.head_bytes = 1 if self.head_bytes < 0 else self.head_bytes + size
            if self.head_bytes > self._max_head_bytes:
                self._refuse(self._head_too_large())
        elif not self._is_chunked or self._framing_bytes < 0:
            self._silent_since = self.loop.time()
            self._framing_bytes = 0
        else:
            self._framing_bytes += size
            if self._framing_bytes > self._max_head_bytes:
                self._refuse(self._head_too_large())

    def _resume_body(self) -> None:
        """Go on after a request that asks for an upgrade, which it does not get.

        The parser takes what follows such a head for another protocol. A new one reads the body, if there is one: it
        is given a head that says as much about the body, and of which nobody hears.
        """
        framing, self._body_framing = self._body_framing, b""
        if not framing:
            return
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._is_resuming = True
        kept = b"" if self.cycle.keep_alive else b"connection: close\r\n"
        # Not a POST: `Direct` takes nothing else.
        self.parser.feed_data(b"PUT / HTTP/1.1\r\n%b%b\r\n" % (kept, framing))

    def _end_trailers(self) -> None:
        """Check the trailers, which are left out: no call here has any."""
        if _bytes_of(self.headers) > self._max_head_bytes:
            raise self._head_too_large()
        if not self.parser.should_keep_alive():
            # Then the parser reads nothing after it.
            self.cycle.keep_alive = False
            if self.cycle.response_complete:
                self.transport.close()

    def _head_too_large(self) -> HeadTooLarge:
        most = self._max_head_bytes
        return HeadTooLarge(
            f"the request's line and headers, or the trailers of its body, have more than {most} bytes",
            field="head",
            expected=f"at most {most} bytes",
        )

    def _refuse(self, error: LoraplexError) -> None:
        """Answer with `error` once everything before it is answered, and close; the request is not passed on."""
        url = self.url if self.stage == HEAD else b""
        method = self.parser.get_method().decode() if url else OTHER
        self.parser = None  # type: ignore[assignment]
        self.transport.lingers = True  # type: ignore[attr-defined]
        before: RequestResponseCycle | None = self.cycle
        if self.stage == BODY:
            assert before is not None
            self.stage = BETWEEN
            if before.response_complete:
                self.transport.close()
                return
            before.scope["state"]["refusal"] = error
            before.more_body = before.keep_alive = False
            before.message_event.set()
            return
        self.stage = BETWEEN
        path = url.partition(b"?")[0][:LONGEST_PATH]
        super().on_message_begin()
        self.scope["state"]["refusal"] = error
        self.scope |= {"method": method, "path": path.decode("latin-1"), "raw_path": path, "query_string": b""}
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.pipeline.appendleft((self.cycle, self.app))


def _bytes_of(headers: list[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) + _HEADER_REST for name, value in headers)


def _error_of(error: httptools.HttpParserError) -> LoraplexError:
    """Return what a callback has raised, or else what the parser has found."""
    raised = error.__context__
    if isinstance(raised, LoraplexError):
        return raised
    if raised is not None and not isinstance(raised, httptools.HttpParserError | UnicodeDecodeError):
        log.error("a request's head could not be read", exc_info=raised)
    why = error if raised is None else "its address cannot be read"
    return NotHttp(f"this is not an HTTP/1.1 request: {why}")
