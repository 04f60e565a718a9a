"""Effects: the requests, waits and reads of a client as values, without performing them.

An operation is a generator that yields effects. A driver executes them one by one and sends back their results. The
drivers in `loraplex.driver` and `loraplex.async_driver` differ only in how they wait; what is sent, retried, decoded
and raised is decided here and in `loraplex.calls`, once for both.
"""

import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, TypeVar

from loraplex.errors import BadAnswer

T = TypeVar("T")
JSON = "application/json"


class Repeat(StrEnum):
    """Condition under which a call may be sent again."""

    ALWAYS = "always"
    """The call changes nothing: also after a lost connection, and for any 429 or 503."""
    IF_REFUSED = "if_refused"
    """The call changes something: only if it was not sent, or if the service itself refused it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A complete answer."""

    url: str
    status: int
    headers: Mapping[str, str]
    """Names are in lower case."""
    content: bytes

    @property
    def request_id(self) -> str | None:
        """Return the id of the request in the log of the service."""
        return self.headers.get("x-request-id")

    def members(self) -> Mapping[str, Any]:
        """Return the JSON object of the body; empty if there is none."""
        try:
            found = json.loads(self.content)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def json(self) -> Any:
        """Return the JSON value of the body; raise `BadAnswer` if there is none."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError):
            raise BadAnswer(
                f"{self.url} answered {self.status} with something else than JSON",
                status=self.status,
                request_id=self.request_id,
                expected="the address of a loraplex service",
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One request, and the decoder of its answer."""

    method: str
    path: str
    read: Callable[[Answer], T]
    repeats: Repeat
    query: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | Path = b""
    """The body. A file is read from its beginning each time the request is sent."""
    timeout: float | None = None
    """Seconds in total; None for the timeout of the client."""
    allowance: float = 0.0
    """Seconds in addition to the timeout of the client, for work of the service."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Send a call once, and wait for its answer of any status; the result is an `Answer`."""

    call: Call[Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class OpenStream:
    """Send a call, and wait for the head of its answer; a 200 leaves a stream open. The result is an `Answer`."""

    call: Call[Any]
    seconds: float
    """Longest time without a byte."""


@dataclass(frozen=True, slots=True)
class ReadStream:
    """Wait for the next bytes of the open stream; the result is bytes, empty at its end."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class CallFunction:
    """Call a function that takes a while, such as an encoder; the result is what it returns."""

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Emit:
    """Give one item to the caller that iterates."""

    item: Any


Effect = Call[Any] | Attempt | OpenStream | ReadStream | Sleep | CallFunction | Emit
# A generator that yields effects, receives their results or errors, and returns the result of the operation.
Operation = Generator[Effect, Any, T]


def ask(call: Call[T]) -> Operation[T]:
    """Send a call, with retries, and return its result."""
    answer: T = yield call
    return answer


def work(function: Callable[[], T]) -> Operation[T]:
    """Return the result of a function that takes a while."""
    done: T = yield CallFunction(function)
    return done


def each(steps: Operation[T], take: Callable[[Any], object]) -> Operation[T]:
    """Execute an operation, and pass the items that it emits to `take`."""
    talk = Execution(steps)
    while not talk.ended:
        step = talk.step
        try:
            answer = take(step.item) if isinstance(step, Emit) else (yield step)
        except BaseException as error:
            talk.fail(error)
        else:
            talk.go_on(answer)
    return talk.result


class Execution(Generic[T]):
    """An operation in execution, as a driver holds it."""

    result: T
    """Set when `ended` is true."""

    def __init__(self, steps: Operation[T]) -> None:
        self._steps = steps
        self.step: Effect
        self.ended = False
        self.go_on(None)

    def go_on(self, answer: object) -> None:
        """Continue with the result of the effect."""
        self._advance(self._steps.send, answer)

    def fail(self, error: BaseException) -> None:
        """Continue after the effect raised an error; raise the error if the operation does not handle it."""
        self._advance(self._steps.throw, error)

    def _advance(self, move: Callable[[Any], Effect], value: object) -> None:
        try:
            self.step = move(value)
        except StopIteration as done:
            self.ended = True
            self.result = done.value
