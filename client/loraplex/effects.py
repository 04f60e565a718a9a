"""What a client does, without doing it: an operation is a generator of steps, and a driver takes them one by one.

The drivers, `loraplex.driver` and `loraplex.async_driver`, differ in how they wait and in nothing else: what is sent,
what is sent again, what is read and what is raised is decided here and in `loraplex.calls`, once for both.
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
    """When a call may be sent again. Each call says which of the two it is."""

    ALWAYS = "always"
    """It changes nothing: after a lost connection too, and whoever answered 429 or 503."""
    IF_REFUSED = "if_refused"
    """It changes something: only where it never left, or the service itself said that it did nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer as it came."""

    url: str
    status: int
    headers: Mapping[str, str]
    """By names in small letters."""
    content: bytes

    @property
    def request_id(self) -> str | None:
        """By which the service's log knows the request."""
        return self.headers.get("x-request-id")

    def members(self) -> Mapping[str, Any]:
        """The JSON object in it; empty where there is none."""
        try:
            found = json.loads(self.content)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def json(self) -> Any:
        """The JSON value in it; raises `BadAnswer`."""
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
    """One request and how its answer is read."""

    method: str
    path: str
    read: Callable[[Answer], T]
    repeats: Repeat
    query: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | Path = b""
    """The body; a file is read while it is sent, from its beginning each time that it is."""
    timeout: float | None = None
    """Seconds in all, in place of the client's own."""
    allowance: float = 0.0
    """Seconds more than the client's own, where no others are given: what the service may take for it."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Send a call once and wait for its answer, whatever its status → `Answer`."""

    call: Call[Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class Open:
    """Send a call and wait for the beginning of its answer, which is a stream where it is a 200 → `Answer`."""

    call: Call[Any]
    seconds: float
    """Without any byte, between two of them too."""


@dataclass(frozen=True, slots=True)
class Read:
    """Wait for the next bytes of the stream that is open → bytes, none at its end."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """Call a function that takes a while, such as an encoder or one that reads files → what it returns."""

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Tell:
    """Hand one item to whoever iterates."""

    item: Any


Step = Call[Any] | Attempt | Open | Read | Pause | Work | Tell
Steps = Generator[Step, Any, T]
"""An operation: it yields steps, is sent what came of each or has its error thrown in, and returns its result."""


def ask(call: Call[T]) -> Steps[T]:
    """One call, sent again where that is allowed, → its result."""
    answer: T = yield call
    return answer


def work(function: Callable[[], T]) -> Steps[T]:
    """What a function returns."""
    done: T = yield Work(function)
    return done


def each(steps: Steps[T], take: Callable[[Any], object]) -> Steps[T]:
    """`steps` with their items given to `take` instead of to whoever iterates."""
    talk = Talk(steps)
    while not talk.ended:
        step = talk.step
        try:
            answer = take(step.item) if isinstance(step, Tell) else (yield step)
        except BaseException as error:
            talk.fail(error)
        else:
            talk.go_on(answer)
    return talk.result


class Talk(Generic[T]):
    """Steps under way, as a driver holds them."""

    result: T
    """Once it has ended."""

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self.step: Step
        self.ended = False
        self.go_on(None)

    def go_on(self, answer: object) -> None:
        """To the next step, with what came of this one."""
        self._advance(self._steps.send, answer)

    def fail(self, error: BaseException) -> None:
        """To the next step, if there is one, after this one ended in `error`; raises it where nothing handles it."""
        self._advance(self._steps.throw, error)

    def _advance(self, move: Callable[[Any], Step], value: object) -> None:
        try:
            self.step = move(value)
        except StopIteration as done:
            self.ended = True
            self.result = done.value
