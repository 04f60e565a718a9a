"""The driver that blocks."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, TypeVar

import httpx

from loraplex.effects import Answer, Attempt, Call, Open, Pause, Read, Step, Steps, Talk, Tell, Work
from loraplex.retry import attempts
from loraplex.transport import Settings, answer, from_httpx, late, request

T = TypeVar("T")


class Driver:
    """Takes steps on one httpx client, which threads may share.

    httpx's time-out is for each read, so that an attempt may take longer than it is given where an answer's head drips
    in; and up to twice as long where its body does, and then stops.
    """

    def __init__(self, settings: Settings, transport: httpx.BaseTransport | None) -> None:
        self.settings = settings
        self._http = httpx.Client(base_url=settings.url, headers=settings.headers, transport=transport)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def run(self, steps: Steps[T]) -> T:
        """All steps, to their result."""
        talk = Talk(steps)
        with _Stream() as stream:
            while not talk.ended:
                self._advance(talk, stream)
        return talk.result

    def iterate(self, steps: Steps[None]) -> Iterator[Any]:
        """What the steps tell, as it comes."""
        talk = Talk(steps)
        with _Stream() as stream:
            while not talk.ended:
                if isinstance(talk.step, Tell):
                    yield talk.step.item
                    talk.go_on(None)
                else:
                    self._advance(talk, stream)

    def _advance(self, talk: Talk[Any], stream: "_Stream") -> None:
        try:
            came = self._take(talk.step, stream)
        except BaseException as error:
            talk.fail(error)
        else:
            talk.go_on(came)

    def _take(self, step: Step, stream: "_Stream") -> Any:
        match step:
            case Call():
                return self.run(attempts(step, self.settings.patience))
            case Attempt():
                return self._attempt(step)
            case Open():
                return self._open(step, stream)
            case Read():
                return self._read(stream)
            case Pause(seconds):
                time.sleep(seconds)
            case Work(function):
                return function()
        return None

    def _attempt(self, step: Attempt) -> Answer:
        end = time.monotonic() + step.seconds
        content = bytearray()
        try:
            sent = request(self._http, step)
            response = self._http.send(sent, stream=True)
            with closing(response):
                # The body has the time that its head left, and is looked at again each time that it drips.
                sent.extensions["timeout"]["read"] = max(end - time.monotonic(), 0.001)
                for chunk in response.iter_bytes():
                    if time.monotonic() > end:
                        raise late(self.settings.url)
                    content += chunk
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise from_httpx(error, self.settings.url) from error
        return answer(response, bytes(content))

    def _open(self, step: Open, stream: "_Stream") -> Answer:
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
    """The stream that is open, if there is one."""

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
