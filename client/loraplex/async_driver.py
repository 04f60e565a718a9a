"""Driver for an asyncio event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

import httpx

from loraplex.effects import (
    Answer,
    Attempt,
    Call,
    CallFunction,
    Effect,
    Emit,
    Execution,
    OpenStream,
    Operation,
    ReadStream,
    Sleep,
)
from loraplex.retry import send_with_retries
from loraplex.transport import Settings, answer, from_httpx, late, request

T = TypeVar("T")
# Longer than the timeouts of httpx, so that httpx raises first and its error names the cause.
_MOMENT_SECONDS = 0.1


class AsyncDriver:
    """Executes effects on one httpx client, which tasks may share."""

    def __init__(self, settings: Settings, transport: httpx.AsyncBaseTransport | None) -> None:
        self.settings = settings
        self._http = httpx.AsyncClient(base_url=settings.url, headers=settings.headers, transport=transport)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def run(self, steps: Operation[T]) -> T:
        """Execute an operation, and return its result."""
        talk = Execution(steps)
        async with _Stream() as stream:
            while not talk.ended:
                await self._advance(talk, stream)
        return talk.result

    async def iterate(self, steps: Operation[None]) -> AsyncIterator[Any]:
        """Yield the items that an operation emits."""
        talk = Execution(steps)
        async with _Stream() as stream:
            while not talk.ended:
                if isinstance(talk.step, Emit):
                    yield talk.step.item
                    talk.go_on(None)
                else:
                    await self._advance(talk, stream)

    async def _advance(self, talk: Execution[Any], stream: "_Stream") -> None:
        try:
            came = await self._take(talk.step, stream)
        except BaseException as error:
            talk.fail(error)
        else:
            talk.go_on(came)

    async def _take(self, step: Effect, stream: "_Stream") -> Any:
        match step:
            case Call():
                return await self.run(send_with_retries(step, self.settings.retry_policy))
            case Attempt():
                return await self._attempt(step)
            case OpenStream():
                return await self._open(step, stream)
            case ReadStream():
                return await self._read(stream)
            case Sleep(seconds):
                await asyncio.sleep(seconds)
            case CallFunction(function):
                return await asyncio.to_thread(function)
        return None

    async def _attempt(self, step: Attempt) -> Answer:
        try:
            async with asyncio.timeout(step.seconds + _MOMENT_SECONDS):
                response = await self._http.send(request(self._http, step), stream=True)
                async with aclosing(response):
                    content = await response.aread()
        except TimeoutError:
            raise late(self.settings.url) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise from_httpx(error, self.settings.url) from error
        return answer(response, content)

    async def _open(self, step: OpenStream, stream: "_Stream") -> Answer:
        await stream.close()
        try:
            response = await self._http.send(request(self._http, step), stream=True)
            stream.open(response)
            return answer(response, b"" if response.status_code == 200 else await response.aread())
        except httpx.HTTPError as error:
            raise from_httpx(error, self.settings.url) from error

    async def _read(self, stream: "_Stream") -> bytes:
        try:
            return await anext(stream.chunks, b"")
        except httpx.HTTPError as error:
            raise from_httpx(error, self.settings.url) from error


class _Stream:
    """The open stream, if any."""

    chunks: AsyncIterator[bytes]

    def __init__(self) -> None:
        self._response: httpx.Response | None = None

    def open(self, response: httpx.Response) -> None:
        self._response = response
        self.chunks = response.aiter_bytes()

    async def close(self) -> None:
        if self._response is not None:
            await self._response.aclose()
        self._response = None

    async def __aenter__(self) -> "_Stream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
