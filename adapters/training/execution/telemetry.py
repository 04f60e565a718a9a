"""What a trainer did with a job, told to whoever counts or traces it. The domain knows no metrics and no spans."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from adapters.jobs.job import Job
from adapters.training.execution.fit_client import Frame
from adapters.training.gradient.epochs import Epoch


class Ending(StrEnum):
    """How a job left a trainer."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LOST = "lost"
    """It was cancelled, or another trainer took it over, or the catalogue could not be written to."""
    DIED = "died"
    """The process that fitted it died."""
    HANDED_BACK = "handed_back"
    """The trainer was told to stop, and the job waits again."""


@dataclass(slots=True)
class Publish:
    """One publish: its adapters are durable from `ended` on. Times are seconds since the epoch of clocks."""

    began: float
    ended: float = 0.0
    adapters: int = 0


@dataclass(slots=True)
class Run:
    """One claim of a job, from `began` to `ended`."""

    job: Job
    began: float
    ended: float = 0.0
    ending: Ending = Ending.LOST
    resumed: bool = False
    """Whether it went on from an earlier attempt's checkpoint."""
    publishes: list[Publish] = field(default_factory=list)
    """The newest, of very many."""
    epochs: list[Epoch] = field(default_factory=list)
    """As far as they are wanted, and of very many only some."""

    @property
    def method(self) -> str:
        """How it was trained."""
        return self.job.training.spec.method.value


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told. What these raise ends the trainer: they take care of themselves."""

    published: Callable[[Publish], None] = lambda _publish: None
    ran: Callable[[Run], None] = lambda _run: None
    wants_epochs: bool = False
    """Whether the process that fits is to take the times of epochs."""


_MOST_PUBLISHES = 200


class Recorder:
    """Notes one run, and tells of it."""

    def __init__(self, job: Job, listener: Listener, now: Callable[[], float] = time.time) -> None:
        self._listener, self._now = listener, now
        self._run = Run(job, now())

    def saw(self, frame: Frame) -> None:
        """Note what a frame says of epochs and of an earlier attempt."""
        self._run.resumed |= frame.get("resumed", False)
        self._run.epochs += [Epoch(*epoch) for epoch in frame.get("epochs", ())]

    @contextmanager
    def publishing(self) -> Iterator[Publish]:
        """Around a publish, which says how many adapters it made; one that made none, or failed, is not told of."""
        publish = Publish(self._now())
        yield publish
        publish.ended = self._now()
        if publish.adapters:
            self._run.publishes = [*self._run.publishes[1 - _MOST_PUBLISHES :], publish]
            self._listener.published(publish)

    def end(self, ending: Ending) -> None:
        """Tell of the whole run."""
        self._run.ending, self._run.ended = ending, self._now()
        self._listener.ran(self._run)
