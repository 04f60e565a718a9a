"""When a call is sent again, and after how long.

| what happened | calls that change nothing | calls that change something |
|---|---|---|
| no connection came about | again | again: nothing was sent |
| 429 or 503, from the service in its own shape | again | again: it did nothing |
| 429 or 503, from whatever is in between | again | no |
| the connection broke, or the answer is late | again, while there is time | no |
| anything else | no | no |

`loraplex.calls` says of each call which of the two columns it is in (`Repeat`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from loraplex.effects import Answer, Attempt, Call, Open, Pause, Repeat, Steps
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
from loraplex.problems import error_of, is_problem

T = TypeVar("T")
_FIRST_SECONDS = 0.25
_LONGEST_SECONDS = 8.0
_BUSY = (429, 503)
_NOTHING_DONE = (QueueFull, NotReady, CatalogBusy, TooManyBytes)


class NotSent(Unreachable):
    """The service could not be reached: nothing was sent"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How a client waits: `clock` tells seconds, `chance` a number from 0 to 1."""

    timeout: float
    retries: int
    clock: Callable[[], float]
    chance: Callable[[], float]


def attempts(call: Call[T], patience: Patience) -> Steps[T]:
    """Send a call, again where `may_repeat` allows it and while its time lasts; read the answer or raise its error."""
    answer: Answer = yield from insist(call, patience, Attempt)
    return call.read(answer)


def insist(call: Call[Any], patience: Patience, send: Callable[[Call[Any], float], Attempt | Open]) -> Steps[Answer]:
    """The success that `send`, given how many seconds are left, comes to in the end."""
    timeout = patience.timeout + call.allowance if call.timeout is None else call.timeout
    check_timeout(timeout)
    end = patience.clock() + timeout
    for attempt in range(patience.retries + 1):
        answer: Answer | None = None
        try:
            answer = yield send(call, max(end - patience.clock(), 0.001))
            if 200 <= answer.status < 300:
                return answer
            error = error_of(answer)
        except (Unreachable, TimedOut) as lost:
            error = lost
        wait = seconds_to_wait(attempt, retry_after(answer), chance=patience.chance())
        late = patience.clock() + wait >= end
        if attempt == patience.retries or late or not may_repeat(call.repeats, error, answer):
            raise error
        yield Pause(wait)
    raise AssertionError("the last attempt raises or returns")


def check_timeout(seconds: float) -> None:
    """Raises `InvalidInput` for what is no time that can be waited."""
    if not 0 < seconds < math.inf:
        raise InvalidInput(f"timeout is {seconds}", field="timeout", given=seconds, expected="seconds, more than 0")


def may_repeat(repeats: Repeat, error: LoraplexError, answer: Answer | None) -> bool:
    """The table above."""
    if isinstance(error, NotSent):
        return True
    if answer is None:
        return repeats is Repeat.ALWAYS
    if answer.status not in _BUSY:
        return False
    if repeats is Repeat.ALWAYS:
        return True
    # A code that this client does not know has the class of its status: that it did nothing is not certain.
    return is_problem(answer) and isinstance(error, _NOTHING_DONE) and error.code == type(error).code


def seconds_to_wait(attempt: int, at_least: float, *, chance: float) -> float:
    """Twice as long each time, and not all clients at once; never less than the service asks for."""
    most = min(_LONGEST_SECONDS, _FIRST_SECONDS * 2.0**attempt)
    return at_least + most * (0.5 + 0.5 * chance)


def retry_after(answer: Answer | None) -> float:
    """What an answer's `Retry-After` asks for, in seconds; 0 where it asks for nothing."""
    given = "" if answer is None else answer.headers.get("retry-after", "").strip()
    if given.isascii() and given.isdigit():
        return float(given)
    try:
        return max(0.0, (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0
