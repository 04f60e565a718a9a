"""Buffered transports: what is written to a connection in one turn of the event loop is sent in one piece."""

import asyncio
import fcntl
import logging
import sys
import termios
from contextlib import suppress
from typing import Any

# More than this is sent without waiting for the end of the turn.
_MOST_HELD_BYTES = 2**16
# Time for a client that still sends to read an answer, before its connection is closed.
_LINGER_SECONDS = 2.0

log = logging.getLogger(__name__)


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
        """Return how many bytes the kernel holds that the client's kernel has not acknowledged; 0 if unknown."""
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
