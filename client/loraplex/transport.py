"""Settings of a client, the errors of httpx as errors of loraplex, and the rules of retries.

Calls with an idempotency key are repeated as those that change nothing: the service makes one change of them.

| what happened | calls that change nothing | calls that change something |
|---|---|---|
| no connection was made | retry | retry: nothing was sent |
| 429 or 503 from the service itself | retry | retry: it did nothing |
| 429 or 503 from a proxy | retry | no |
| `idempotency_in_progress`: an earlier attempt still runs | retry | retry |
| the connection broke, or the answer is late | retry, while there is time | no |
| anything else | no | no |
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version

import httpx

from loraplex.calls import DEFAULT_URL, KEY_VARIABLE, URL_VARIABLE, address
from loraplex.decode import Answer, error_of, is_problem
from loraplex.errors import (
    BadAnswer,
    CatalogBusy,
    IdempotencyInProgress,
    InvalidInput,
    LoraplexError,
    NotReady,
    QueueFull,
    RateLimited,
    TimedOut,
    TooManyBytes,
    Unreachable,
)

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"|[^\x00-\x20\x7f]([^\x00-\x08\x0a-\x1f\x7f]*[^\x00-\x20\x7f])?")
_FIRST_SECONDS = 0.25
_LONGEST_SECONDS = 8.0
_BUSY = (429, 503)
_NOTHING_DONE = (QueueFull, RateLimited, NotReady, CatalogBusy, TooManyBytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a client."""

    url: str
    timeout: float
    """Seconds that a call may take, including retries."""
    retries: int
    headers: Mapping[bytes, bytes] = field(repr=False)
    """One of them may be a key."""


def settings(
    url: str | None,
    *,
    key: str | None,
    feature_space: str | None,
    timeout: float,
    retries: int,
    headers: Mapping[str, str] | None,
) -> Settings:
    """Return checked settings; raise `InvalidInput`.

    Without a key, and without a header `Authorization`, the key is that of the environment.
    """
    url = address(url)
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        expected = f"such as {DEFAULT_URL}"
        raise InvalidInput(f"{url!r} is no address of a service", field="url", given=url, expected=expected)
    check_timeout(timeout)
    if retries < 0:
        raise InvalidInput(f"retries is {retries}", field="retries", given=retries, expected="a whole number from 0 on")
    sent = {"User-Agent": f"loraplex-python/{_version()}", **(headers or {})}
    if key is None and not any(name.lower() == "authorization" for name in sent):
        key = os.environ.get(KEY_VARIABLE) or None
    if key is not None:
        sent["Authorization"] = f"Bearer {key.strip()}"
    if feature_space is not None:
        sent["X-Feature-Space"] = feature_space
    for name, value in sent.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            # The value may be a key, so it is not shown.
            expected = "a name of letters, digits and -, and text on one line that has no spaces around it"
            raise InvalidInput(f"the header {name!r} cannot be sent", field="headers", expected=expected)
    return Settings(url=url.rstrip("/"), timeout=timeout, retries=retries, headers=as_bytes(sent))


def check_timeout(seconds: float) -> None:
    """Raise `InvalidInput` if the timeout is not a positive finite number."""
    if not 0 < seconds < math.inf:
        raise InvalidInput(f"timeout is {seconds}", field="timeout", given=seconds, expected="seconds, more than 0")


def as_bytes(headers: Mapping[str, str]) -> dict[bytes, bytes]:
    """Return headers as bytes, because httpx refuses text that is not ASCII."""
    return {name.encode(): value.encode() for name, value in headers.items()}


def _version() -> str:
    try:
        return version("loraplex")
    except PackageNotFoundError:
        return "unknown"


class NotSent(Unreachable):
    """The service could not be reached, so nothing was sent."""

    code = Unreachable.code


@contextmanager
def errors_of_httpx(url: str) -> Iterator[None]:
    """Raise the loraplex error for an error of httpx in the block, and `TimedOut` for `TimeoutError`."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise NotSent(
            f"{url} cannot be reached: {str(error) or type(error).__name__}",
            given=url,
            expected=f"a running service: start one with `loraplex serve`, or say where it is by url or {URL_VARIABLE}",
        ) from error
    except (httpx.TimeoutException, TimeoutError) as error:
        expected = "a longer timeout, or less to do in one request"
        raise TimedOut(f"{url} did not answer in time", given=url, expected=expected) from error
    except httpx.TransportError as error:
        raise Unreachable(
            f"the connection to {url} broke: {str(error) or type(error).__name__}",
            given=url,
            expected="a service that is not stopping; check whether it made the change",
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BadAnswer(f"{url} answered with something that cannot be read: {error}", given=url) from error


def answer_of(response: httpx.Response, content: bytes) -> Answer:
    """Return an answer with this body; raise the error that its status means, unless it is a success."""
    url = str(response.request.url.copy_with(query=None))
    answer = Answer(url=url, status=response.status_code, headers=dict(response.headers), content=content)
    if not response.is_success:
        raise error_of(answer)
    return answer


def may_repeat(error: LoraplexError, *, safe: bool) -> bool:
    """Return whether the table above allows a retry after an error of a call that is `safe` to repeat, or is not."""
    if isinstance(error, NotSent | IdempotencyInProgress):
        return True
    if safe:
        return isinstance(error, Unreachable | TimedOut) or error.status in _BUSY
    # A code that this client has no class for gets the class of its status, which may not mean that nothing was done.
    did_nothing = isinstance(error, _NOTHING_DONE) and error.code == type(error).code
    return did_nothing and error.status in _BUSY and is_problem(error.headers)


def seconds_to_wait(attempt: int, at_least: float, *, chance: float) -> float:
    """Return the seconds before the next attempt: exponential backoff with jitter, and no less than `at_least`."""
    most = min(_LONGEST_SECONDS, _FIRST_SECONDS * 2.0**attempt)
    return at_least + most * (0.5 + 0.5 * chance)


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds of `Retry-After`; 0 if there is none."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0
