"""Both clients behind one face, so that a test says what it means once."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

from loraplex import AsyncClient, AsyncJob


class Blocking:
    """An `AsyncClient` or `AsyncJob`, each of whose calls is waited for on a loop of its own."""

    def __init__(self, held: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._held = held
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._held, name)
        return self._called(value) if callable(value) else value

    def _called(self, method: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            result = method(*arguments, **named)
            if isinstance(result, AsyncIterator):
                return self._items(result)
            return self._wrapped(self._loop.run_until_complete(result) if inspect.isawaitable(result) else result)

        return call

    def _items(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        while True:
            try:
                yield self._wrapped(self._loop.run_until_complete(anext(items)))
            except StopAsyncIteration:
                return

    def _wrapped(self, value: Any) -> Any:
        return Blocking(value, self._loop) if isinstance(value, AsyncClient | AsyncJob) else value
