"""The open connections of one worker: how many there may be, and which are closed if their clients are silent."""

import asyncio
import fcntl
import logging
import resource
import sys
import termios
from contextlib import suppress
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.serving.connection_guard import GuardedHttpProtocol

_MOST_FILES = 2**16
_LEAST_RESERVED_FILES = 64
_SECONDS_BETWEEN_SWEEPS = 1.0
# When the limit is reached, 1/64 of it is closed at once: each look at all connections pays for many new ones.
_CLOSED_TOGETHER = 64
# Shortest silence after which a connection with a request under way is closed to make room for a new one.
_LEAST_SILENT_SECONDS = 5.0

log = logging.getLogger(__name__)


class Phase(IntEnum):
    """Phase that a connection is in. To make room, silent connections of the lower phases are closed first."""

    IDLE = 0
    """No request is under way."""
    HEAD = 1
    """The client has not completed a head."""
    MESSAGE = 2
    """The client has not completed a body, or not read a response."""


class OpenConnections:
    """Connections of one event loop, `limit` at most; none stays open past its deadline.

    One timer serves all of them, so that a request costs none.
    """

    def __init__(self, limit: int) -> None:
        # Shared by the transports of all connections.
        self.flushes = FlushQueue()
        self._limit = limit
        self._connections: set[GuardedHttpProtocol] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed_for_others = 0

    def add(self, connection: "GuardedHttpProtocol") -> bool:
        """Take a new connection; return False if there are too many and none of them may be closed for it."""
        if len(self._connections) >= self._limit and not self._make_room():
            return False
        self._connections.add(connection)
        if self._timer is None:
            self._schedule()
        return True

    def discard(self, connection: "GuardedHttpProtocol") -> None:
        """Forget a connection that is closed."""
        self._connections.discard(connection)

    def _make_room(self) -> bool:
        """Close the connections that have been silent longest; return whether there was one.

        Those with a head under way come after the idle ones, because it may be about to end. Those with a body or a
        response under way are closed only if there is no other, and not before `_LEAST_SILENT_SECONDS`.
        """
        now = asyncio.get_running_loop().time()
        silent = [(silence, connection) for connection in self._connections if (silence := connection.silence(now))]
        closable = [pair for pair in silent if pair[0][0] < Phase.MESSAGE]
        if not closable:
            closable = [pair for pair in silent if now - pair[0][1] >= _LEAST_SILENT_SECONDS]
        closable.sort(key=lambda pair: pair[0])
        for _, connection in closable[: max(1, self._limit // _CLOSED_TOGETHER)]:
            # Forget it now, and not when the loop reports that it is lost: more may be added before that.
            self._connections.discard(connection)
            connection.close_now()
            self._closed_for_others += 1
        return bool(closable)

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_SECONDS_BETWEEN_SWEEPS, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for connection in [connection for connection in self._connections if connection.is_overdue(now)]:
            connection.close_now()
        if self._closed_for_others:
            log.warning(
                "%d silent connections were closed: %d are open", self._closed_for_others, len(self._connections)
            )
            self._closed_for_others = 0
        if self._connections:
            self._schedule()


def raise_file_limit() -> None:
    """Let this process open as many files as its hard limit allows, 65,536 at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def limit_connections(max_connections: int) -> int:
    """Return how many connections the limit of open files allows, `max_connections` at most.

    A quarter of the files is kept for the database, stored files and uploads.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return max_connections
    return max(1, min(max_connections, soft - max(_LEAST_RESERVED_FILES, soft // 4)))


_MOST_HELD_BYTES = 2**16
_LINGER_SECONDS = 2.0


class BufferedTransport:
    """A transport that holds what is written in one turn of the loop until the next turn."""

    def __init__(self, transport: asyncio.Transport, flushes: "FlushQueue") -> None:
        self._transport = transport
        self._flushes = flushes
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._flushed_bytes = 0
        self._sent_bytes = -1
        self._sent_at = 0.0
        self.is_closing = transport.is_closing
        # Whether `close` leaves a client that still sends some time to read the answer: bytes that come to a closed
        # connection make its kernel drop what it has received.
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send `data` after all that was given before."""
        if not self._held:
            self._flushes.add(self)
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > _MOST_HELD_BYTES:
            self.flush()

    def close(self) -> None:
        """Close once everything is sent."""
        self.flush()
        if self.lingers and not self.is_closing():
            self.lingers = False
            if self._transport.can_write_eof():  # TLS cannot close one direction
                self._transport.write_eof()
            asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._transport.close)
        else:
            self._transport.close()

    def close_now(self) -> None:
        """Close without waiting for the client to read."""
        # Over TLS, `close` would wait for the client's own end of the session.
        if self._transport.get_write_buffer_size() or not self._transport.can_write_eof():
            self._transport.abort()
        else:
            self.flush()
            self._transport.close()

    def stalled_since(self, now: float) -> float | None:
        """Return the time of the last call that found progress in sending; None if nothing waits to be sent."""
        unsent = self._transport.get_write_buffer_size()
        if not unsent and not self._held:
            return None
        # The size of the buffer alone does not show progress. As much may have been added to it as was sent, and the
        # kernel takes more only once a third of its own buffer, of some MiB, is free.
        sent = self._flushed_bytes - unsent - self._kernel_bytes()
        if sent != self._sent_bytes:
            self._sent_bytes, self._sent_at = sent, now
        return self._sent_at

    def _kernel_bytes(self) -> int:
        """Return how many bytes the kernel holds that the client's has not acknowledged; 0 if it does not say."""
        descriptor = self._transport.get_extra_info("socket").fileno()
        with suppress(OSError, ValueError):
            return int.from_bytes(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return 0

    def flush(self) -> None:
        """Pass on what is held."""
        if self._held:
            self._flushed_bytes += self._held_bytes
            held, self._held, self._held_bytes = self._held, [], 0
            if not self.is_closing():
                self._transport.writelines(held)


class FlushQueue:
    """Transports of one event loop that hold data. One callback flushes all of them in the next turn."""

    def __init__(self) -> None:
        self._transports: list[BufferedTransport] = []

    def add(self, transport: BufferedTransport) -> None:
        """Flush a transport in the next turn of the loop."""
        if not self._transports:
            asyncio.get_running_loop().call_soon(self._flush)
        self._transports.append(transport)

    def _flush(self) -> None:
        transports, self._transports = self._transports, []
        for transport in transports:
            try:
                transport.flush()
            except Exception:  # the other clients get their answers
                log.exception("an answer could not be sent")
