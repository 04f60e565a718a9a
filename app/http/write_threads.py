"""Threads of their own for calls that change the catalogue: while it is locked, only such calls wait.

Calls that read go on in the web server's threads, because SQLite serves them while another process holds the write
lock.
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
_MOST_WAITING = 200
_PATIENCE_SECONDS = 15.0
"""Longest wait of a call for a thread, the same as that of a thread for the lock."""


class WriteThreads:
    """Runs a bounded number of writing calls at once; the others wait, up to a number and a time."""

    def __init__(
        self,
        *,
        threads: int = _THREADS,
        most_waiting: int = _MOST_WAITING,
        patience_seconds: float = _PATIENCE_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._free = asyncio.Semaphore(threads)
        self._limiter = anyio.CapacityLimiter(threads)
        self._most_waiting = most_waiting
        self._patience_seconds = patience_seconds
        self._monotonic = monotonic
        self._waiting = 0
        self._locked_at = -float("inf")
        """When a call last found the catalogue locked."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in a thread; raises `CatalogBusy` if too many calls wait, or this one has for too long."""
        with self._waits():
            try:
                async with asyncio.timeout(self._patience_seconds):
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
        """Hold `semaphore`, which bounds what precedes a write.

        Its holders may compute for long, and are waited for. If they wait for the catalogue instead, raises
        `CatalogBusy` after that time.
        """
        began = self._monotonic()
        with self._waits():
            await semaphore.acquire()
        try:
            waited = self._monotonic() - began
            if waited >= self._patience_seconds and self._locked_at >= began:
                raise CatalogBusy("the catalogue is locked by another process; try again")
            yield
        finally:
            semaphore.release()

    @contextmanager
    def _waits(self) -> Iterator[None]:
        if self._waiting >= self._most_waiting:
            raise CatalogBusy(f"{self._waiting} calls wait to change the catalogue already; try again")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
