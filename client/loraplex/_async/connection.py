"""Connection of the asynchronous client: calls with retries, lists page by page, and streams."""

import asyncio
import random
import time
from asyncio import timeout as limit
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from loraplex.calls import Call, Query, encoded, given
from loraplex.decode import Answer
from loraplex.errors import InvalidInput, LoraplexError
from loraplex.frames import AsyncListing
from loraplex.transport import (
    Settings,
    answer_of,
    as_bytes,
    check_timeout,
    errors_of_httpx,
    may_repeat,
    retry_after,
    seconds_to_wait,
)

T = TypeVar("T")
# The longest silence of a stream; the service sends something every 10 s.
SILENCE_SECONDS = 25.0
_STREAM_TIMEOUT = httpx.Timeout(SILENCE_SECONDS, connect=10.0, pool=None)
_CHUNK_BYTES = 2**18
# The largest page of the service.
_PAGE = 1000
# Longer than the timeouts of httpx, so that httpx raises first and its error names the cause.
_MOMENT_SECONDS = 0.1


class AsyncConnection:
    """Sends calls through one httpx client, which it shares with nothing else."""

    def __init__(self, settings: Settings, transport: httpx.AsyncBaseTransport | None) -> None:
        self.settings = settings
        self._http = httpx.AsyncClient(base_url=settings.url, headers=settings.headers, transport=transport)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, call: Call) -> Answer:
        """Return the answer to a call if it succeeds; raise its error otherwise."""
        return await self._with_retries(self._attempt, call)

    async def fetch(self, call: Call, read: Callable[[Any], T]) -> T:
        """Return what `read` makes of the JSON that answers a call."""
        answer = await self.send(call)
        return answer.decode(read)

    async def get(
        self, path: str, read: Callable[[Any], T], query: Query | None = None, *, timeout: float | None = None
    ) -> T:
        """Return what `read` makes of the JSON at this path."""
        return await self.fetch(Call("GET", path, safe=True, query=query or {}, timeout=timeout), read)

    def pages(
        self, path: str, read: Callable[[Any], T], query: Query | None = None, *, limit: int | None
    ) -> AsyncListing[T]:
        """Return at most `limit` items of a list; each page is requested when it is needed."""
        return AsyncListing(self._pages(path, read, query, limit=limit))

    async def _pages(
        self, path: str, read: Callable[[Any], T], query: Query | None, *, limit: int | None
    ) -> AsyncIterator[T]:
        if limit is not None and limit < 0:
            raise InvalidInput(f"limit is {limit}", field="limit", given=limit, expected="0 or more, or None")
        left, cursor = limit, None
        while left is None or left > 0:
            size = _PAGE if left is None else min(left, _PAGE)
            page = {**(query or {}), "limit": size, "cursor": cursor}
            items, cursor = await self.get(
                path, lambda value: ([read(item) for item in value["data"]], value["next_cursor"]), page
            )
            for item in items:
                yield item
            left = None if left is None else left - len(items)
            if cursor is None:
                return

    @asynccontextmanager
    async def stream(self, call: Call) -> AsyncIterator[httpx.Response]:
        """Yield the response to a call as soon as its head has come, if it succeeds; raise its error otherwise."""
        with errors_of_httpx(self.settings.url):
            async with aclosing(await self._with_retries(self._open, call)) as response:
                yield response

    async def _with_retries(self, attempt: Callable[[Call, float], Awaitable[T]], call: Call) -> T:
        """Call `attempt` with the seconds that are left until it succeeds."""
        timeout = self.settings.timeout + call.allowance if call.timeout is None else call.timeout
        check_timeout(timeout)
        end = time.monotonic() + timeout
        retries = self.settings.retries if call.retries is None else call.retries
        failures = 0
        while True:
            try:
                return await attempt(call, max(end - time.monotonic(), 0.001))
            except LoraplexError as error:
                wait = seconds_to_wait(failures, retry_after(error.headers), chance=random.random())
                too_late = time.monotonic() + wait >= end
                if failures == retries or too_late or not may_repeat(error, safe=call.safe):
                    raise
            await asyncio.sleep(wait)
            failures += 1

    async def _attempt(self, call: Call, seconds: float) -> Answer:
        end = time.monotonic() + seconds
        content = bytearray()
        with errors_of_httpx(self.settings.url):
            # A thread cannot be interrupted, so the blocking client has no `limit`. The timeout of httpx limits each of
            # its reads: an attempt takes longer if the head comes slowly, and up to twice its time if the body does.
            async with limit(seconds + _MOMENT_SECONDS):
                request = self._request(call, httpx.Timeout(seconds, pool=None))
                async with aclosing(await self._http.send(request, stream=True)) as response:
                    # The body has the time that the head left.
                    request.extensions["timeout"]["read"] = max(end - time.monotonic(), 0.001)
                    async for chunk in response.aiter_bytes():
                        if time.monotonic() > end:
                            raise TimeoutError
                        content += chunk
        return answer_of(response, bytes(content))

    async def _open(self, call: Call, _seconds: float) -> httpx.Response:
        with errors_of_httpx(self.settings.url):
            response = await self._http.send(self._request(call, _STREAM_TIMEOUT), stream=True)
            if not response.is_success:
                async with aclosing(response):
                    answer_of(response, await response.aread())
            return response

    def _request(self, call: Call, timeout: httpx.Timeout) -> httpx.Request:
        headers, content = dict(call.headers), call.content
        if call.json is not None:
            headers["Content-Type"], content = "application/json", encoded(call.json)
        if isinstance(content, Path):
            headers["Content-Length"] = str(content.stat().st_size)
        return self._http.build_request(
            call.method,
            call.path,
            params=given(call.query) or None,
            headers=as_bytes(headers),
            content=_chunks(content) if isinstance(content, Path) else content or None,
            timeout=timeout,
        )


async def _chunks(file: Path) -> AsyncIterator[bytes]:
    with await asyncio.to_thread(file.open, "rb") as opened:
        while chunk := await asyncio.to_thread(opened.read, _CHUNK_BYTES):
            yield chunk
