"""uvicorn's HTTP/1.1, where the head and the body of an answer leave in one write, after those of its batch are made.

uvicorn makes two writes at once. Each is a packet that wakes the reader, and takes about 50 µs between two answers
that are being made.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

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


class Protocol(HttpToolsProtocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The loop has a client."""
        super().connection_made(JoinedWrites(transport))  # type: ignore[arg-type]
