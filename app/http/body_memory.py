"""Counts the bytes of request bodies that one worker holds, and gives freed memory back to the system."""

import asyncio
import ctypes

from app.http.errors import TooManyBytes

LARGE_BYTES = 2**20
"""After bodies from this size on, what they took is given back."""
_PAUSE_SECONDS = 1.0
"""Between two walks over the heap: requests that end together have one."""


class BodyMemory:
    """Count of the body bytes in memory, from their arrival to the end of their request."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._trims = False

    def has_room(self, size: int) -> bool:
        """Return whether this number of further bytes is within the limit."""
        return self.held + size <= self.limit

    def take(self, size: int) -> None:
        """Count bytes that have arrived; raise `TooManyBytes`, and count nothing, past the limit."""
        if self.held + size > self.limit:
            raise self.full()
        self.held += size

    def release(self, size: int) -> None:
        """Count bytes down again, at the end of their request."""
        self.held -= size
        if size >= LARGE_BYTES and not self._trims:
            self._trims = True
            asyncio.get_running_loop().call_later(_PAUSE_SECONDS, self._trim)

    def full(self) -> TooManyBytes:
        """Return the error for a body that has no room."""
        return TooManyBytes(
            f"at most {self.limit} bytes of request bodies may be in memory (LORAPLEX_MAX_INFLIGHT_BODY_BYTES): try"
            " again in a moment",
            expected=f"at most {self.limit} bytes in flight",
        )

    def _trim(self) -> None:
        self._trims = False
        # On a thread: it takes milliseconds, and the interpreter lock is free meanwhile.
        asyncio.get_running_loop().run_in_executor(None, trim_heap)


def trim_heap() -> None:
    """Give free pages of the C heap back to the system, where the C library can: glibc keeps them otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
