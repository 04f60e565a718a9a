"""uvicorn's HTTP/1.1 protocol with limits on the size of a head, on a client's silence and on how a body is framed.

A response has no deadline while the service works on it, but its client must read it. A request is refused, and its
connection closed, if it is ambiguous where the request ends: the bytes after it could be read as a request that the
client did not send (request smuggling).
"""

import asyncio
import logging
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from adapters.errors import LoraplexError
from app.http.errors import HeadTooLarge, InternalError, NotHttp
from app.observability.records import LONGEST_PATH, OTHER
from app.serving.buffered_transport import BufferedTransport
from app.serving.connections import OpenConnections, Phase

# Longest time from the first bytes of a head to its end. After it, the connection is closed.
HEAD_SECONDS = 30.0
# Longest time in which no content of a body arrives, or the client reads nothing of the data that waits for it. After
# it, the connection is closed.
MESSAGE_SECONDS = 75.0
# Stage of the parser: between two requests, before the headers are complete, or before the body is complete.
BETWEEN_REQUESTS, HEAD, BODY = Phase
# Value of a byte counter that restarts inside the current piece (the bytes of one `_feed` call).
RESTARTED_IN_PIECE = -1
# Bytes of chunk framing that each byte of content pays for. The smallest chunks have 6: `1\r\n` and `\r\n` with a byte
# between them, and a few for longer sizes.
_FRAMING_PER_CONTENT = 16
_REQUEST_LINE_REST = len(" " + " HTTP/1.1\r\n" + "\r\n")
_HEADER_REST = len(":" + "\r\n")
# Digits of a Content-Length, leading zeros included: Python refuses to read a number of thousands.
_MOST_LENGTH_DIGITS = 20

log = logging.getLogger(__name__)


class GuardedHttpProtocol(HttpToolsProtocol):
    """One connection with limits on the requests that it reads.

    The subclass in `app.serving.uvicorn_protocol` implements the callbacks for the head, calls `check_head_bytes` and
    `begin_body`, and sets `stage` if it reads a request itself.
    """

    def __init__(self, *args: Any, open_connections: OpenConnections, max_head_bytes: int, **named: Any) -> None:
        super().__init__(*args, **named)
        self._open_connections = open_connections
        self._max_head_bytes = max_head_bytes
        self.stage = BETWEEN_REQUESTS
        # Bytes of the current head in earlier pieces. `RESTARTED_IN_PIECE` if another request ended in the current one.
        self.head_bytes = 0
        # Bytes of content since `_count_bytes` last ran in the body.
        self._content_bytes = 0
        # Bytes of chunk framing and trailers that may follow. Content adds to it, up to `max_head_bytes`.
        self._framing_bytes_left = 0
        self._is_chunked = False
        # Time at which the current head began, or at which the last content of the current body arrived.
        self._silent_since = 0.0
        # Time of the last complete response, or of the connection's start if there is none.
        self.idle_since = 0.0
        # Header line that frames the body of a request with an `Upgrade` header; empty for other requests.
        self._upgrade_framing = b""
        # Whether the parser is reading the head that `_resume_body` made.
        self._is_resuming = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and close it if there are too many."""
        super().connection_made(BufferedTransport(transport, self._open_connections.flushes))  # type: ignore[arg-type]
        self.idle_since = self.loop.time()
        if not self._open_connections.add(self):
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._open_connections.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data in pieces of at most `max_head_bytes`, because the parser keeps a whole head in memory."""
        most = self._max_head_bytes
        if len(data) > most:
            view = memoryview(data)
            for begin in range(0, len(data), most):
                self._feed(view[begin : begin + most])
        else:
            self._feed(data)

    def on_response_complete(self) -> None:
        """Start the next pipelined request, as uvicorn does, but set no keep-alive timer for each request.

        `OpenConnections` closes idle connections with one timer for all of them.
        """
        self.server_state.total_requests += 1
        self.idle_since = self.loop.time()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Pass part of a body to the ASGI call, and count it."""
        self._content_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Complete the request of an ASGI call."""
        if self._upgrade_framing:
            return  # The parser ends an upgrade request after its head: `_resume_body` reads the body.
        if self._is_chunked:
            self._is_chunked = False
            self._check_trailers()
        self.stage, self.head_bytes = BETWEEN_REQUESTS, RESTARTED_IN_PIECE
        super().on_message_complete()

    def check_head_bytes(self) -> None:
        """Raise `HeadTooLarge` if a head is too large. Only a head that arrived in several pieces can be.

        The size is computed from the parsed headers, without the spaces around a value, which the parser drops. So a
        head within the limit is never refused, however it was cut. A larger one passes only if the excess is such
        spaces, and never with more than three times the limit: the first piece, the pieces that `_count_bytes` adds
        up and the last piece have at most `max_head_bytes` each.
        """
        size = len(self.parser.get_method()) + len(self.url) + _REQUEST_LINE_REST
        if size + _header_bytes(self.headers) > self._max_head_bytes:
            raise self._head_too_large()

    def begin_body(self) -> bool:
        """Check how the body is framed; return False if `_resume_body` made the head and the request is known already.

        Raises `NotHttp` if the framing is ambiguous: a proxy in front of the service may have read it differently.
        """
        if self._is_resuming:
            self._is_resuming = False
            return False
        parser = self.parser
        version = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise NotHttp(f"this is a request of HTTP/{version}; HTTP/1.1 is required")
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (len(codings) > 1 or codings[0].strip().lower() != b"chunked"):
            raise NotHttp("only Transfer-Encoding: chunked is supported")
        if codings and version != "1.1":
            raise NotHttp("the body has a Transfer-Encoding, which HTTP/1.0 does not have")
        lengths = [value for name, value in self.headers if name == b"content-length"]
        if any(len(length) > _MOST_LENGTH_DIGITS for length in lengths):
            raise NotHttp(f"the Content-Length has more than {_MOST_LENGTH_DIGITS} digits")
        if parser.should_upgrade():
            if parser.get_method() == b"CONNECT":
                raise NotHttp("CONNECT is not supported")
            if codings:
                self._upgrade_framing = b"transfer-encoding: chunked\r\n"
            elif lengths:
                self._upgrade_framing = b"content-length: %b\r\n" % lengths[0]
        self._is_chunked = bool(codings)
        self._content_bytes = 0
        # The share of the piece in which the body begins is unknown: that piece, of up to `max_head_bytes`, is free.
        self._framing_bytes_left = 2 * self._max_head_bytes
        return True

    def is_overdue(self, now: float) -> bool:
        """Return whether the client has neither sent nor read anything for too long."""
        stalled_since = self.transport.stalled_since(now)  # type: ignore[attr-defined]
        if stalled_since is not None and now - stalled_since > MESSAGE_SECONDS:
            return True
        if self.parser is None:
            return False  # A request was refused or the connection is lost: it closes once everything is sent.
        # A client may read an answer before it sends more of a head, but not before it sends more of a body.
        if not self._must_send() or (stalled_since is not None and self.stage is not BODY):
            self._silent_since = self.idle_since = now
        return now - self._waiting_since() > (self.timeout_keep_alive, HEAD_SECONDS, MESSAGE_SECONDS)[self.stage]

    def silence(self, now: float) -> tuple[Phase, float] | None:
        """Return what the client has stopped in, and since when it has neither sent nor read anything.

        Return None if the connection is closing or the client waits for the service.
        """
        stalled_since = self.transport.stalled_since(now)  # type: ignore[attr-defined]
        if stalled_since is not None:
            return Phase.MESSAGE, stalled_since
        if self.parser is None:
            return None
        return (self.stage, self._waiting_since()) if self._must_send() else None

    def _must_send(self) -> bool:
        """Return whether the service waits for the client: for more of a body that it reads, or for a request."""
        if self.stage is BODY:
            return not (self.flow.read_paused or getattr(self.cycle, "waiting_for_100_continue", False))
        return getattr(self.cycle, "response_complete", True)

    def _waiting_since(self) -> float:
        """Return since when the service waits for the client."""
        return self.idle_since if self.stage is BETWEEN_REQUESTS else self._silent_since

    def close_now(self) -> None:
        """Close the connection, without the data that the client has not read."""
        self.transport.close_now()  # type: ignore[attr-defined]

    def _feed(self, data: bytes | memoryview) -> None:
        try:
            while self.parser is not None:  # None after a refusal: the rest of the data is dropped.
                try:
                    self.parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as stopped:
                    data = memoryview(data)[stopped.args[0] :]
                self._resume_body()
                if not data:
                    break
        except httptools.HttpParserError as error:
            self._refuse(_error_of(error))
            return
        if self.stage is BETWEEN_REQUESTS:
            self.head_bytes = 0
        elif self.parser is not None:
            self._count_bytes(data)

    def _count_bytes(self, data: bytes | memoryview) -> None:
        """Add a piece to the byte counters if it ends inside a head or a body."""
        if self.stage is HEAD:
            if self.head_bytes <= 0:
                self._silent_since = self.loop.time()
            # If the head began inside the piece, its share of the piece is unknown: count 1, so that the counter is
            # positive and `check_head_bytes` runs at the end of the head.
            if self.head_bytes < 0:
                self.head_bytes = 1
            elif self.head_bytes == 0:
                # Empty lines before a request are not in its head.
                self.head_bytes = len(bytes(data).lstrip(b"\r\n"))
            else:
                self.head_bytes += len(data)
            if self.head_bytes > self._max_head_bytes:
                self._refuse(self._head_too_large())
            return
        content, self._content_bytes = self._content_bytes, 0
        if not self._is_chunked:
            self._silent_since = self.loop.time()
            return
        most = self._max_head_bytes
        if content or self._framing_bytes_left > most:
            self._silent_since = self.loop.time()
        left = self._framing_bytes_left + _FRAMING_PER_CONTENT * content - (len(data) - content)
        self._framing_bytes_left = min(left, most)
        if left < 0:
            self._refuse(self._head_too_large())

    def _resume_body(self) -> None:
        """Read the body of a request with an `Upgrade` header, which the service ignores.

        The parser stops after such a head, because another protocol could follow it. If the request has a body, a new
        parser reads it. That parser first gets a made-up head with the same framing, which is not passed on.
        """
        framing, self._upgrade_framing = self._upgrade_framing, b""
        if not framing:
            return
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._is_resuming = True
        kept = b"" if self.cycle.keep_alive else b"connection: close\r\n"
        # PUT, because `app.serving.uvicorn_protocol` could pass a POST to `FastPath`.
        self.parser.feed_data(b"PUT / HTTP/1.1\r\n%b%b\r\n" % (kept, framing))

    def _check_trailers(self) -> None:
        """Check the size of the trailers, which are not passed on, and whether the connection stays open."""
        if _header_bytes(self.headers) > self._max_head_bytes:
            raise self._head_too_large()
        if not self.parser.should_keep_alive():
            # The parser ignores all data after this request.
            self.cycle.keep_alive = False
            if self.cycle.response_complete:
                self.transport.close()

    def _head_too_large(self) -> HeadTooLarge:
        most = self._max_head_bytes
        detail = f"the request's line and headers, or the trailers of its body, have more than {most} bytes"
        return HeadTooLarge(detail, field="head", expected=f"at most {most} bytes")

    def _refuse(self, error: LoraplexError) -> None:
        """Answer the current request with `error` after all earlier requests, and close the connection.

        In the stage `BODY`, the request has an ASGI call already, which reads `error` from its state. In the other
        stages, a new ASGI call is made that has the error from the start and no body.
        """
        if self._is_resuming:
            self.stage = BODY  # The head that `_resume_body` made belongs to a request that has an ASGI call.
        url = self.url if self.stage is HEAD else b""
        method = self.parser.get_method().decode() if url else OTHER
        self.parser = None  # type: ignore[assignment]
        self.transport.lingers = True  # type: ignore[attr-defined]
        before: RequestResponseCycle | None = self.cycle
        if self.stage is BODY:
            assert before is not None
            self.stage = BETWEEN_REQUESTS
            if before.response_complete:
                self.transport.close()
                return
            before.scope["state"]["refusal"] = error
            before.more_body = before.keep_alive = False
            before.message_event.set()
            return
        self.stage = BETWEEN_REQUESTS
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


def _header_bytes(headers: list[tuple[bytes, bytes]]) -> int:
    """Return the size of header lines in bytes, written as `name: value` and a line end."""
    return sum(len(name) + len(value) + _HEADER_REST for name, value in headers)


def _error_of(error: httptools.HttpParserError) -> LoraplexError:
    """Return the error that a callback raised, `NotHttp` for the parser's own, or `InternalError` for a defect."""
    raised = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
    if raised is None:
        return NotHttp(f"this is not an HTTP/1.1 request: {error}")
    if isinstance(raised, LoraplexError):
        return raised
    log.error("a request could not be read", exc_info=raised)
    return InternalError("the service failed while it read this request; its log says why")
