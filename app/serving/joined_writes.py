"""The head and the body of an answer leave in one write, after those of its batch are made.

uvicorn makes two writes at once. Each is a packet that wakes the reader, and takes about 50 µs between two answers
that are being made.
"""

import asyncio
import fcntl
import sys
import termios
from contextlib import suppress
from typing import Any

_MOST_HELD_BYTES = 2**16
_LINGER_SECONDS = 2.0


class JoinedWrites:
    """A transport that holds what is written in one turn of the loop until the next turn."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._flushed_bytes = 0
        self._sent_bytes = -1
        self._sent_at = 0.0
        self._call_soon = asyncio.get_running_loop().call_soon
        self.is_closing = transport.is_closing
        self.lingers = False
        """Whether `close` leaves a client that still sends some time to read the answer: bytes that come to a closed
        connection make its kernel drop what it has received."""

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
        if self.lingers and not self.is_closing():
            self.lingers = False
            self._transport.write_eof()
            asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._transport.close)
        else:
            self._transport.close()

    def close_now(self) -> None:
        """Close without waiting for the client to read."""
        if self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._flush()
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

    def _flush(self) -> None:
        if self._held:
            self._flushed_bytes += self._held_bytes
            held, self._held, self._held_bytes = self._held, [], 0
            if not self.is_closing():
                self._transport.writelines(held)
