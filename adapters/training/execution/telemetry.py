"""Records of a trainer's runs and publishes, for listeners that count or trace them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from adapters.jobs.job import Job
from adapters.jobs.training_job import JobKind
from adapters.training.execution.fit_client import Frame, Note
from adapters.training.gradient.training_loop import Epoch


class Ending(StrEnum):
    """End of a run."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LOST = "lost"
    """The job was cancelled or claimed by another trainer, or the catalogue could not be written."""
    DIED = "died"
    """The fit process died."""
    HANDED_BACK = "handed_back"
    """The trainer stopped, and the job is queued again."""


@dataclass(slots=True)
class Publish:
    """One publish, whose adapters are durable from `ended` on; times are seconds since the epoch."""

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
    """Whether it resumed from the checkpoint of an earlier attempt."""
    publishes: list[Publish] = field(default_factory=list)
    """The newest publishes, up to a limit."""
    epochs: list[Epoch] = field(default_factory=list)
    """Epochs, if a listener wants them; a sample of very many."""

    @property
    def method(self) -> str:
        """Return the method of the training, or `evaluation`."""
        training = self.job.training
        return str(training.kind if training.kind is JobKind.EVALUATION else training.spec.method)


@dataclass(frozen=True, slots=True)
class Listener:
    """Callbacks for publishes and runs; an exception in one ends the trainer."""

    published: Callable[[Publish], None] = lambda _publish: None
    ran: Callable[[Run], None] = lambda _run: None
    wants_epochs: bool = False
    """Whether the fit records the times of epochs."""


_MOST_PUBLISHES = 200


class Recorder:
    """Recorder of one run, which passes it to a listener."""

    def __init__(self, job: Job, listener: Listener) -> None:
        self._listener, self._run = listener, Run(job, time.time())

    def saw(self, frame: Frame) -> None:
        """Record the epochs of a frame, and whether the fit was resumed."""
        self._run.resumed |= isinstance(frame, Note) and frame.resumed
        self._run.epochs += frame.epochs

    @contextmanager
    def publishing(self) -> Iterator[Publish]:
        """Record a publish, unless it fails or makes no adapter."""
        publish = Publish(time.time())
        yield publish
        publish.ended = time.time()
        if publish.adapters:
            self._run.publishes = [*self._run.publishes[1 - _MOST_PUBLISHES :], publish]
            self._listener.published(publish)

    def end(self, ending: Ending) -> None:
        """Pass the whole run to the listener."""
        self._run.ending, self._run.ended = ending, time.time()
        self._listener.ran(self._run)
