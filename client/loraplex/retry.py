"""Retries: when a call is sent again, and after how long.

| what happened | calls that change nothing | calls that change something |
|---|---|---|
| no connection was made | retry | retry: nothing was sent |
| 429 or 503 from the service itself | retry | retry: it did nothing |
| 429 or 503 from a proxy | retry | no |
| the connection broke, or the answer is late | retry, while there is time | no |
| anything else | no | no |

Each call gives its column (`Repeat`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from loraplex.decode import error_of, is_problem
from loraplex.effects import Answer, Attempt, Call, OpenStream, Operation, Repeat, Sleep
from loraplex.errors import (
    CatalogBusy,
    InvalidInput,
    LoraplexError,
    NotReady,
    QueueFull,
    TimedOut,
    TooManyBytes,
    Unreachable,
)

T = TypeVar("T")
_FIRST_SECONDS = 0.25
_LONGEST_SECONDS = 8.0
_BUSY = (429, 503)
_NOTHING_DONE = (QueueFull, NotReady, CatalogBusy, TooManyBytes)


class NotSent(Unreachable):
    """The service could not be reached, so nothing was sent."""

    code = Unreachable.code


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Settings of the retries: `clock` returns seconds, and `chance` a random number from 0 to 1."""

    timeout: float
    retries: int
    clock: Callable[[], float]
    chance: Callable[[], float]


def send_with_retries(call: Call[T], retry_policy: RetryPolicy) -> Operation[T]:
    """Send a call, with retries that `may_repeat` allows, and return its decoded answer or raise its error."""
    answer: Answer = yield from send_until_success(call, retry_policy, Attempt)
    return call.read(answer)


def send_until_success(
    call: Call[Any], retry_policy: RetryPolicy, send: Callable[[Call[Any], float], Attempt | OpenStream]
) -> Operation[Answer]:
    """Call `send` with the seconds that are left until it returns a successful answer."""
    timeout = retry_policy.timeout + call.allowance if call.timeout is None else call.timeout
    check_timeout(timeout)
    end = retry_policy.clock() + timeout
    for attempt in range(retry_policy.retries + 1):
        answer: Answer | None = None
        try:
            answer = yield send(call, max(end - retry_policy.clock(), 0.001))
            if 200 <= answer.status < 300:
                return answer
            error = error_of(answer)
        except (Unreachable, TimedOut) as lost:
            error = lost
        wait = seconds_to_wait(attempt, retry_after(answer), chance=retry_policy.chance())
        late = retry_policy.clock() + wait >= end
        if attempt == retry_policy.retries or late or not may_repeat(call.repeats, error, answer):
            raise error
        yield Sleep(wait)
    raise AssertionError("the last attempt raises or returns")


def check_timeout(seconds: float) -> None:
    """Raise `InvalidInput` if the timeout is not a positive finite number."""
    if not 0 < seconds < math.inf:
        raise InvalidInput(f"timeout is {seconds}", field="timeout", given=seconds, expected="seconds, more than 0")


def may_repeat(repeats: Repeat, error: LoraplexError, answer: Answer | None) -> bool:
    """Return whether the table above allows a retry."""
    if isinstance(error, NotSent):
        return True
    if answer is None:
        return repeats is Repeat.ALWAYS
    if answer.status not in _BUSY:
        return False
    if repeats is Repeat.ALWAYS:
        return True
    # A code that this client has no class for gets the class of its status, which may not mean that nothing was done.
    return is_problem(answer) and isinstance(error, _NOTHING_DONE) and error.code == type(error).code


def seconds_to_wait(attempt: int, at_least: float, *, chance: float) -> float:
    """Return the seconds before the next attempt: exponential backoff with jitter, and no less than `at_least`."""
    most = min(_LONGEST_SECONDS, _FIRST_SECONDS * 2.0**attempt)
    return at_least + most * (0.5 + 0.5 * chance)


def retry_after(answer: Answer | None) -> float:
    """Return the seconds of an answer's `Retry-After`; 0 if it has none."""
    given = "" if answer is None else answer.headers.get("retry-after", "").strip()
    if given.isascii() and given.isdigit():
        return float(given)
    try:
        return max(0.0, (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0
