"""The head and the body of an answer leave in one write, after those of its batch are made.

uvicorn makes two writes at once. Each is a packet that wakes the reader, and takes about 50 µs between two answers
that are being made.
"""

import asyncio
from typing import Any

_MOST_HELD_BYTES = 2**16
_LINGER_SECONDS = 2.0


class JoinedWrites:
    """A transport that holds what is written in one turn of the loop until the next turn."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: list[bytes] = []
        self._held_bytes = 0
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

    def _flush(self) -> None:
        if self._held:
            held, self._held, self._held_bytes = self._held, [], 0
            if not self.is_closing():
                self._transport.writelines(held)
