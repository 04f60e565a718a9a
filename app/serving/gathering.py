"""Fetching by threads: once however many ask, and what is asked for together by one hop to a thread."""

import asyncio
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
_TOGETHER_SECONDS = 0.002


class Gathering(Generic[K, V]):
    """What is on its way, by key. Nothing is remembered once it has come.

    `fetch`, which a thread runs, yields for each of its keys the value or the error, one by one as they come.
    """

    def __init__(self, fetch: Callable[[Sequence[K]], Iterator[tuple[K, V | Exception]]], threads: Executor) -> None:
        self._fetch = fetch
        self._threads = threads
        self._coming: dict[K, asyncio.Future[V]] = {}
        self._asked: list[K] = []

    def get(self, key: K) -> "asyncio.Future[V]":
        """The value of a key, when it comes; whoever waits for it must not cancel it."""
        future = self._coming.get(key)
        if future is None:
            loop = asyncio.get_running_loop()
            future = self._coming[key] = loop.create_future()
            if not self._asked:
                loop.call_soon(self._send, loop)
            self._asked.append(key)
        return future

    def _send(self, loop: asyncio.AbstractEventLoop) -> None:
        keys, self._asked = self._asked, []
        self._threads.submit(self._work, loop, keys)

    def _work(self, loop: asyncio.AbstractEventLoop, keys: Sequence[K]) -> None:
        missing = dict.fromkeys(keys)
        failure: Exception = AssertionError("a key was neither fetched nor refused")
        come: list[tuple[K, V | Exception]] = []
        told = time.monotonic()
        try:
            for key, result in self._fetch(keys):
                del missing[key]
                come.append((key, result))
                # Each telling may start a batch: what comes quickly comes together.
                if time.monotonic() - told > _TOGETHER_SECONDS:
                    loop.call_soon_threadsafe(self._come, come)
                    come, told = [], time.monotonic()
        except Exception as error:
            failure = error
        loop.call_soon_threadsafe(self._come, come + [(key, failure) for key in missing])

    def _come(self, results: Sequence[tuple[K, V | Exception]]) -> None:
        for key, result in results:
            future = self._coming.pop(key)
            if isinstance(result, Exception):
                future.set_exception(result)
                future.exception()  # seen, even where everybody who asked has gone
            else:
                future.set_result(result)
