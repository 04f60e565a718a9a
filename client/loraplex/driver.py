"""Blocking driver."""

import time
from collections.abc import Iterator
from contextlib import closing
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


class Driver:
    """Executes effects on one httpx client, which threads may share.

    The timeout of httpx limits each read. An attempt may therefore take longer than its time if the head of the answer
    arrives slowly, and up to twice as long if the body does.
    """

    def __init__(self, settings: Settings, transport: httpx.BaseTransport | None) -> None:
        self.settings = settings
        self._http = httpx.Client(base_url=settings.url, headers=settings.headers, transport=transport)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def run(self, steps: Operation[T]) -> T:
        """Execute an operation, and return its result."""
        talk = Execution(steps)
        with _Stream() as stream:
            while not talk.ended:
                self._advance(talk, stream)
        return talk.result

    def iterate(self, steps: Operation[None]) -> Iterator[Any]:
        """Yield the items that an operation emits."""
        talk = Execution(steps)
        with _Stream() as stream:
            while not talk.ended:
                if isinstance(talk.step, Emit):
                    yield talk.step.item
                    talk.go_on(None)
                else:
                    self._advance(talk, stream)

    def _advance(self, talk: Execution[Any], stream: "_Stream") -> None:
        try:
            came = self._take(talk.step, stream)
        except BaseException as error:
            talk.fail(error)
        else:
            talk.go_on(came)

    def _take(self, step: Effect, stream: "_Stream") -> Any:
        match step:
            case Call():
                return self.run(send_with_retries(step, self.settings.retry_policy))
            case Attempt():
                return self._attempt(step)
            case OpenStream():
                return self._open(step, stream)
            case ReadStream():
                return self._read(stream)
            case Sleep(seconds):
                time.sleep(seconds)
            case CallFunction(function):
                return function()
        return None

    def _attempt(self, step: Attempt) -> Answer:
        end = time.monotonic() + step.seconds
        content = bytearray()
        try:
            sent = request(self._http, step)
            response = self._http.send(sent, stream=True)
            with closing(response):
                # The body has the time that the head left; it is checked after each chunk.
                sent.extensions["timeout"]["read"] = max(end - time.monotonic(), 0.001)
                for chunk in response.iter_bytes():
                    if time.monotonic() > end:
                        raise late(self.settings.url)
                    content += chunk
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise from_httpx(error, self.settings.url) from error
        return answer(response, bytes(content))

    def _open(self, step: OpenStream, stream: "_Stream") -> Answer:
        stream.close()
        try:
            response = self._http.send(request(self._http, step), stream=True)
            stream.open(response)
            return answer(response, b"" if response.status_code == 200 else response.read())
        except httpx.HTTPError as error:
            raise from_httpx(error, self.settings.url) from error

    def _read(self, stream: "_Stream") -> bytes:
        try:
            return next(stream.chunks, b"")
        except httpx.HTTPError as error:
            raise from_httpx(error, self.settings.url) from error


class _Stream:
    """The open stream, if any."""

    chunks: Iterator[bytes] = iter(())

    def __init__(self) -> None:
        self._response: httpx.Response | None = None

    def open(self, response: httpx.Response) -> None:
        self._response = response
        self.chunks = response.iter_bytes()

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response = None

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
