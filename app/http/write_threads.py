"""Threads for calls that write to the catalogue, so that only such calls wait while it is locked.

Calls that read use the web server's threads, because SQLite serves them while another process holds the write lock.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import ParamSpec, TypeVar

import anyio
import anyio.to_thread

from adapters.errors import CatalogBusy

P = ParamSpec("P")
T = TypeVar("T")
_THREADS = 16
_MAX_WAITING = 200
# Longest wait of a call for a thread, equal to that of a thread for the lock.
_TIMEOUT_SECONDS = 15.0


class WriteThreads:
    """Bounded pool for calls that write: a bounded number of other calls wait for a bounded time."""

    def __init__(
        self,
        *,
        threads: int = _THREADS,
        max_waiting: int = _MAX_WAITING,
        timeout_seconds: float = _TIMEOUT_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._free = asyncio.Semaphore(threads)
        self._limiter = anyio.CapacityLimiter(threads)
        self._max_waiting = max_waiting
        self._timeout_seconds = timeout_seconds
        self._monotonic = monotonic
        self._waiting = 0
        # Monotonic time at which a call last found the catalogue locked.
        self._locked_at = -float("inf")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in a thread; raise `CatalogBusy` if too many calls wait, or if this one waits too long."""
        with self._waiting_call():
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    await self._free.acquire()
            except TimeoutError:
                raise CatalogBusy("the catalogue is written to by many at once; try again") from None
        try:
            return await anyio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=self._limiter)
        except CatalogBusy:
            self._locked_at = self._monotonic()
            raise
        finally:
            self._free.release()

    @asynccontextmanager
    async def turn(self, semaphore: asyncio.Semaphore) -> AsyncIterator[None]:
        """Hold a semaphore that bounds the work before a write.

        Its holders may compute for long, so the wait has no time limit. If the catalogue was locked meanwhile, raise
        `CatalogBusy` after the time limit of a write.
        """
        started_at = self._monotonic()
        with self._waiting_call():
            await semaphore.acquire()
        try:
            waited = self._monotonic() - started_at
            if waited >= self._timeout_seconds and self._locked_at >= started_at:
                raise CatalogBusy("the catalogue is locked by another process; try again")
            yield
        finally:
            semaphore.release()

    @contextmanager
    def _waiting_call(self) -> Iterator[None]:
        if self._waiting >= self._max_waiting:
            raise CatalogBusy(f"{self._waiting} calls wait to change the catalogue already; try again")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
