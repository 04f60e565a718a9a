"""Settings of a client, calls as httpx requests, and the errors of httpx as errors of loraplex."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import httpx

from loraplex.address import DEFAULT_URL, URL_VARIABLE, address
from loraplex.arrays import Encode
from loraplex.effects import Answer, Attempt, OpenStream
from loraplex.errors import BadAnswer, InvalidInput, LoraplexError, TimedOut, Unreachable
from loraplex.retry import NotSent, RetryPolicy, check_timeout

_CHUNK_BYTES = 2**18
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"|[^\x00-\x20\x7f]([^\x00-\x08\x0a-\x1f\x7f]*[^\x00-\x20\x7f])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a client."""

    url: str
    encode: Encode | None
    retry_policy: RetryPolicy
    headers: Mapping[bytes, bytes]

    @property
    def timeout(self) -> float:
        """Return the seconds that a call may take, including retries."""
        return self.retry_policy.timeout


def settings(
    url: str | None,
    *,
    encode: Encode | None,
    feature_space: str | None,
    timeout: float,
    retries: int,
    headers: Mapping[str, str] | None,
) -> Settings:
    """Return checked settings; raise `InvalidInput`."""
    where = address(url)
    try:
        parsed = httpx.URL(where)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidInput(
            f"{where!r} is no address of a service", field="url", given=where, expected=f"such as {DEFAULT_URL}"
        )
    check_timeout(timeout)
    if retries < 0:
        raise InvalidInput(f"retries is {retries}", field="retries", given=retries, expected="a whole number from 0 on")
    own = {"User-Agent": f"loraplex-python/{_version()}", **(headers or {})}
    if feature_space is not None:
        own["X-Feature-Space"] = feature_space
    for name, value in own.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            # The value may be a key, so it is not shown.
            raise InvalidInput(
                f"the header {name!r} cannot be sent",
                field="headers",
                expected="a name of letters, digits and -, and text on one line that has no spaces around it",
            )
    retry_policy = RetryPolicy(timeout=timeout, retries=retries, clock=time.monotonic, chance=random.random)
    return Settings(
        url=where.rstrip("/"),
        encode=encode,
        retry_policy=retry_policy,
        headers={name.encode(): value.encode() for name, value in own.items()},
    )


def request(client: httpx.Client | httpx.AsyncClient, step: Attempt | OpenStream) -> httpx.Request:
    """Return the httpx request of a call; a file is read from its beginning."""
    call = step.call
    # As bytes, because httpx refuses text that is not ASCII, which the id of an event may contain.
    headers = {name.encode(): value.encode() for name, value in call.headers.items()}
    content: Any = call.content
    if isinstance(content, Path):
        headers[b"Content-Length"] = str(content.stat().st_size).encode()
        content = _chunks(content) if isinstance(client, httpx.Client) else _chunks_async(content)
    return client.build_request(
        call.method,
        call.path,
        params=dict(call.query) or None,
        headers=headers,
        content=content or None,
        timeout=httpx.Timeout(step.seconds, pool=None) if isinstance(step, Attempt) else _quiet(step.seconds),
    )


def answer(response: httpx.Response, content: bytes) -> Answer:
    """Return an answer with this body."""
    url = str(response.request.url.copy_with(query=None))
    return Answer(url=url, status=response.status_code, headers=dict(response.headers), content=content)


def from_httpx(error: Exception, url: str) -> LoraplexError:
    """Return the loraplex error for an error of httpx."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return NotSent(
            f"{url} cannot be reached: {_said(error)}",
            given=url,
            expected=f"a running service: start one with `loraplex serve`, or say where it is by url or {URL_VARIABLE}",
        )
    if isinstance(error, httpx.TimeoutException):
        return late(url)
    if isinstance(error, httpx.TransportError):
        return Unreachable(
            f"the connection to {url} broke: {_said(error)}",
            given=url,
            expected="a service that is not stopping; look whether what was asked for has been done",
        )
    return BadAnswer(f"{url} answered with something that cannot be read: {error}", given=url)


def late(url: str) -> TimedOut:
    """Return the error for an answer that is missing or incomplete when its time is up."""
    return TimedOut(
        f"{url} did not answer in time", given=url, expected="a longer timeout, or less to do in one request"
    )


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _quiet(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=10.0, pool=None)


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            yield chunk


async def _chunks_async(file: Path) -> AsyncIterator[bytes]:
    opened: IO[bytes] = await asyncio.to_thread(file.open, "rb")
    try:
        while chunk := await asyncio.to_thread(opened.read, _CHUNK_BYTES):
            yield chunk
    finally:
        opened.close()


def _version() -> str:
    try:
        return version("loraplex")
    except PackageNotFoundError:
        return "unknown"
