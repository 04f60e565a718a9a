"""Reads JSON bodies exactly, without holding up the event loop."""

import asyncio
from functools import partial

from adapters.errors import RequestTimeout
from adapters.large_json.reader import read_in_process
from adapters.lora.base_layer import BaseLayer
from adapters.strict_json import parse

_AT_ANY_TIME_BYTES = 2**14
_THREAD_BYTES = 2**19
"""A thread parses that in some 50 ms, and holds the interpreter lock for as long."""
_LONGEST_LIST = 10_000
_LONGEST_WAIT_SECONDS = 30.0
"""Longest wait of a large body for the process, because reading another one may take minutes."""


class JsonBodies:
    """Bounds how much JSON is read at once: small bodies by threads, large ones by another process."""

    def __init__(self, base: BaseLayer) -> None:
        # Of trainings and updates. `inputs` alone is a field of other calls, which look at its length first.
        self._columns = {f"{data}.inputs": base.in_features for data in ("data", "add", "forget")}
        self._columns |= {f"{data}.corpus": base.out_features for data in ("data", "add", "forget")}
        self._longest = max(_LONGEST_LIST, base.in_features, base.out_features)
        self._threads = asyncio.Semaphore(1)
        self._processes = asyncio.Semaphore(1)
        """One process may take `json_reading.MEMORY_BYTES`."""

    async def parse(self, body: bytes | bytearray, *, longest: int = 0, what: str = "the body") -> object:
        """Return what a body says; tables of a large one come as `LongList`.

        `longest`: entries of the longest list that a valid body of this call may have, apart from tables of numbers
        and lists of the same length. Raises `NotJson`, `DuplicateKey`, what `read_in_process` raises, and
        `RequestTimeout` if other large bodies are read for too long.
        """
        if len(body) <= _AT_ANY_TIME_BYTES:
            return await asyncio.to_thread(parse, body, what=what)
        if len(body) <= _THREAD_BYTES:
            async with self._threads:
                return await asyncio.to_thread(parse, body, what=what)
        longest = max(longest, self._longest)
        try:
            async with asyncio.timeout(_LONGEST_WAIT_SECONDS):
                await self._processes.acquire()
        except TimeoutError:
            raise RequestTimeout(
                f"{what} waited {_LONGEST_WAIT_SECONDS:g} s for other large bodies to be read; try again"
            ) from None
        try:
            read = partial(read_in_process, body, longest=longest, columns=self._columns, what=what)
            return await asyncio.to_thread(read)
        finally:
            self._processes.release()
