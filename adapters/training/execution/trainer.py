"""Trainer: claims jobs, writes the progress of their fits once a second, and publishes the results."""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from adapters.access.audit import acting_as
from adapters.catalog.catalog import Catalog
from adapters.errors import (
    CatalogBusy,
    CatalogUnavailable,
    ClaimLost,
    LoraplexError,
    OutOfMemory,
    StorageFailed,
    StorageFull,
    TooManyOpenFiles,
)
from adapters.jobs.job import Job
from adapters.jobs.queue import JobQueue
from adapters.lora.base_layer import BaseLayer
from adapters.training.execution.fit_client import Done, Failed, Fitter, FitterDied, Note, Outcomes, Progress
from adapters.training.execution.publisher import Publisher
from adapters.training.execution.telemetry import Ending, Listener, Recorder
from adapters.training.gradient.checkpoint import CheckpointFolder
from adapters.training.gradient.training_loop import SECONDS_BETWEEN_CHECKPOINTS

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0
# Interval of the checks for a cancelled job, and for a new job in the queue.
POLL_SECONDS = 0.2

# Time for which a publish is repeated while a bucket does not answer.
SECONDS_TO_PUBLISH = 600.0
# Errors that are no fault of a job: its lease runs out, and another attempt may succeed.
_TRANSIENT = (CatalogBusy, CatalogUnavailable, StorageFailed, TooManyOpenFiles)

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Trainer:
    """Worker that takes jobs from the queue, one at a time, until `stop` is set."""

    catalog: Catalog
    queue: JobQueue
    base: BaseLayer
    fitter: Fitter
    _: KW_ONLY
    stop: threading.Event
    lease_seconds: float
    checkpoints: CheckpointFolder
    listener: Listener = field(default_factory=Listener)
    monotonic: Callable[[], float] = time.monotonic
    _sweep_at: float = field(default=-math.inf, init=False)

    def run(self) -> None:
        """Work until `stop` is set, and then hand a running job back to the queue."""
        pause = _SHORTEST_PAUSE_SECONDS
        try:
            while not self.stop.is_set():
                try:
                    ready = self.fitter.is_ready(POLL_SECONDS)
                except FitterDied:
                    log.error("the fit process cannot start; the next attempt is in %g s", pause)
                    self.fitter.kill()
                    self.stop.wait(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                    continue
                if ready:
                    pause = _SHORTEST_PAUSE_SECONDS
                    if not self._work_once():
                        self.stop.wait(POLL_SECONDS)
        finally:
            self.fitter.kill()

    def _work_once(self) -> bool:
        try:
            claim = self.queue.claim(base=self.base.fingerprint)
            if claim is not None:
                log.info("job %s for %s: attempt %d", claim.id, claim.adapter, claim.attempt)
                self._train(claim)
            if claim is not None or self.monotonic() >= self._sweep_at:
                self._sweep()
        except (*_TRANSIENT, StorageFull) as error:
            # The job is claimed again after its lease has run out.
            log.warning("%s", error.detail)
            self.stop.wait(_SHORTEST_PAUSE_SECONDS)
            return False
        return claim is not None

    def _sweep(self) -> None:
        """Remove the checkpoints of jobs that have ended, by a cancellation or with another trainer."""
        self._sweep_at = self.monotonic() + self.lease_seconds
        if present := self.checkpoints.jobs():
            states = self.queue.states(sorted(present))
            for job_id in present:
                if job_id not in states or states[job_id].ended:
                    self.checkpoints.drop(job_id)

    def _train(self, claim: Job) -> None:
        """Run a claimed job to its end."""
        recorder, ending = Recorder(claim, self.listener), Ending.LOST
        try:
            with acting_as(claim.submitted_by):
                ending = self._watch_fit(claim, recorder)
        except BaseException as error:
            # The fit may still run, and its frames must not be taken for those of the next job.
            self.fitter.kill()
            ending = self._end_after(error, claim)
        finally:
            recorder.end(ending)

    def _end_after(self, error: BaseException, claim: Job) -> Ending:
        """End a job after an error of its fit or its publish; raise the error again if it does not end the job."""
        if isinstance(error, ClaimLost):
            log.info("%s", error)
            return Ending.LOST
        if isinstance(error, FitterDied):
            log.warning("job %s: the fit process died", claim.id)
            if error.out_of_memory:
                # Another attempt would run out of memory too.
                out_of_memory = OutOfMemory("the fit ran out of memory, and its process ended")
                _unless_lost(self.queue.fail, claim, out_of_memory.members())
            else:
                _unless_lost(self.queue.expire_lease, claim)
            return Ending.DIED
        # After an unknown outcome, the job may have succeeded.
        if not isinstance(error, LoraplexError) or isinstance(error, _TRANSIENT) or error.outcome_unknown:
            raise error
        log.info("job %s failed: %s", claim.id, error.detail)
        _unless_lost(self.queue.fail, claim, error.members())
        return Ending.FAILED

    def _watch_fit(self, claim: Job, recorder: Recorder) -> Ending:
        """Process the frames of a fit until the job has ended or is handed back; raise `ClaimLost` and `FitterDied`."""
        progress, history = claim.progress, claim.history
        wait = _StorageWait(self, claim)
        publisher = Publisher(
            *(self.catalog, self.queue, self.base, claim), on_storage_failure=lambda error: wait.pause(error, progress)
        )
        checkpoint = self.checkpoints.take_over(claim.id, claim.fence)
        # A crash costs the work since the last checkpoint and the rest of the lease, so both are kept similar.
        checkpoint_seconds = min(SECONDS_BETWEEN_CHECKPOINTS, self.lease_seconds / 3)
        # Progress is written once a second, or more often for a lease shorter than three seconds.
        heartbeat_seconds = min(1.0, self.lease_seconds / 3)
        request = publisher.request(checkpoint_seconds=checkpoint_seconds, times_epochs=self.listener.wants_epochs)
        self.fitter.begin(request, checkpoint=checkpoint)
        pace = _Pace(claim.training.steps, self.monotonic)
        heartbeat_at = self.monotonic() + heartbeat_seconds
        while True:
            frame = self.fitter.next_frame(POLL_SECONDS)
            if self.stop.is_set():
                self.fitter.kill()
                self.checkpoints.save(claim.id, claim.fence, waits=True)
                self.queue.release(claim)
                return Ending.HANDED_BACK
            if frame is not None:
                recorder.saw(frame)
            if isinstance(frame, Done):
                with recorder.publishing() as publish:
                    succeeded = publisher.finish(frame)
                    publish.adapters = 0 if claim.training.is_fleet else claim.training.adapters
                return Ending.SUCCEEDED if succeeded else Ending.FAILED
            if isinstance(frame, Outcomes):
                with recorder.publishing() as publish:
                    publish.adapters = publisher.publish_outcomes(frame)
                progress = pace.progress(publisher.finished, None, publisher.tally())
            elif isinstance(frame, Note):
                self.queue.append_log(claim, frame.text)
            elif isinstance(frame, Progress):
                progress, history = pace.progress(frame.step, frame.loss, publisher.tally()), frame.history
            if isinstance(frame, Failed):
                self.queue.fail(claim, frame.error, progress=progress, history=history)
                if frame.error["code"] == OutOfMemory.code:
                    # Its heap has reached its limit and is fragmented.
                    self.fitter.kill()
                return Ending.FAILED
            try:
                self.queue.check_claim(claim)
                if self.monotonic() >= heartbeat_at:
                    heartbeat_at = self.monotonic() + heartbeat_seconds
                    self.queue.heartbeat(claim, progress=progress, history=history)
                    self.checkpoints.save(claim.id, claim.fence)
            except (*_TRANSIENT, StorageFull) as error:
                # The fit continues; if the lease runs out meanwhile, the fencing token prevents its publish.
                log.warning("job %s: %s", claim.id, error.detail)


@dataclass(slots=True)
class _StorageWait:
    """Pauses between the attempts of one claim to publish, for some minutes in all."""

    trainer: Trainer
    claim: Job
    _ends_at: float | None = None

    def pause(self, error: StorageFailed, progress: Mapping[str, Any] | None) -> None:
        """Wait and renew the lease; raise `error` if the time is up or the trainer stops, and `ClaimLost`."""
        trainer, now = self.trainer, self.trainer.monotonic()
        if self._ends_at is None:
            self._ends_at = now + SECONDS_TO_PUBLISH
        if now >= self._ends_at or trainer.stop.wait(_SHORTEST_PAUSE_SECONDS):
            raise error
        log.warning("job %s: the publish is repeated: %s", self.claim.id, error.detail)
        trainer.queue.heartbeat(self.claim, progress=progress)


@dataclass(slots=True)
class _Pace:
    """Progress of a fit, with the remaining time estimated from its pace so far."""

    steps: int
    monotonic: Callable[[], float]
    _began: tuple[int, float] | None = None

    def progress(self, step: int, loss: float | None, tally: Mapping[str, int] | None) -> dict[str, object]:
        """Return the progress as a job shows it."""
        now = self.monotonic()
        began_at, began = self._began = self._began or (step, now)
        left = round((self.steps - step) * (now - began) / (step - began_at), 1) if step > began_at else None
        progress: dict[str, object] = {"step": step, "steps": self.steps, "loss": loss, "seconds_left": left}
        return progress if tally is None else progress | {"adapters": tally}


def _unless_lost(action: Callable[..., None], *arguments: Any) -> None:
    try:
        action(*arguments)
    except ClaimLost as error:
        log.info("%s", error)
