"""Trainer: claims jobs, watches their fits, and publishes the results."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapters.catalog.catalog import Catalog
from adapters.errors import (
    CatalogBusy,
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
from adapters.training.execution.fit_client import Fitter, FitterDied, Frame
from adapters.training.execution.publisher import Publisher
from adapters.training.execution.telemetry import Ending, Listener, Recorder
from adapters.training.gradient.checkpoint import CheckpointFolder
from adapters.training.gradient.training_loop import SECONDS_BETWEEN_CHECKPOINTS

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0
# Interval of the checks for a cancelled job, and for a new job in the queue.
SECONDS_BETWEEN_LOOKS = 0.2

# Errors that are no fault of a job: its lease runs out, and another attempt may succeed.
_TRANSIENT = (CatalogBusy, StorageFailed, TooManyOpenFiles)

log = logging.getLogger(__name__)


class Trainer:
    """Worker that takes jobs from the queue, one at a time, until `stop` is set."""

    def __init__(
        self,
        catalog: Catalog,
        queue: JobQueue,
        base: BaseLayer,
        fitter: Fitter,
        *,
        stop: threading.Event,
        lease_seconds: float,
        checkpoints: Path,
        monotonic: Callable[[], float] = time.monotonic,
        listener: Listener = Listener(),  # noqa: B008 - immutable
    ) -> None:
        self._catalog = catalog
        self._queue = queue
        self._base = base
        self._fitter = fitter
        self._stop = stop
        self._checkpoints = CheckpointFolder(checkpoints)
        self._lease_seconds = lease_seconds
        # Progress is written once a second, or more often for a lease shorter than three seconds.
        self._heartbeat_seconds = min(1.0, lease_seconds / 3)
        # A crash costs the work since the last checkpoint and the rest of the lease, so both are kept similar.
        self._checkpoint_seconds = min(SECONDS_BETWEEN_CHECKPOINTS, lease_seconds / 3)
        self._monotonic = monotonic
        self._listener = listener
        self._sweep_at = monotonic()

    def run(self) -> None:
        """Work until `stop` is set, and then hand a running job back to the queue."""
        pause = _SHORTEST_PAUSE_SECONDS
        try:
            while not self._stop.is_set():
                try:
                    ready = self._fitter.is_ready(SECONDS_BETWEEN_LOOKS)
                except FitterDied:
                    log.error("the fit process cannot start; the next attempt is in %g s", pause)
                    self._fitter.kill()
                    self._stop.wait(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                    continue
                if ready:
                    pause = _SHORTEST_PAUSE_SECONDS
                    if not self._work_once():
                        self._stop.wait(SECONDS_BETWEEN_LOOKS)
        finally:
            self._fitter.kill()

    def _work_once(self) -> bool:
        try:
            claim = self._queue.claim(base=self._base.fingerprint)
            if claim is not None:
                log.info("job %s for %s: attempt %d", claim.id, claim.adapter, claim.attempt)
                self._train(claim)
            if claim is not None or self._monotonic() >= self._sweep_at:
                self._sweep()
        except (*_TRANSIENT, StorageFull) as error:
            # The job is claimed again after its lease has run out.
            log.warning("%s", error.detail)
            self._stop.wait(_SHORTEST_PAUSE_SECONDS)
            return False
        return claim is not None

    def _sweep(self) -> None:
        """Remove the checkpoints of jobs that have ended, by a cancellation or with another trainer."""
        self._sweep_at = self._monotonic() + self._lease_seconds
        if present := self._checkpoints.jobs():
            states = self._queue.states(sorted(present))
            for job_id in present:
                if job_id not in states or states[job_id].ended:
                    self._checkpoints.drop(job_id)

    def _train(self, claim: Job) -> None:
        recorder, ending = Recorder(claim, self._listener), Ending.LOST
        try:
            ending = self._end_of(claim, recorder)
        finally:
            recorder.end(ending)

    def _end_of(self, claim: Job, recorder: Recorder) -> Ending:
        """Run a claimed job to its end, and return how it ended."""
        try:
            try:
                return self._watch_fit(claim, recorder)
            except BaseException:
                # The fit may still run, and its frames must not be taken for those of the next job.
                self._fitter.kill()
                raise
        except ClaimLost as error:
            log.info("%s", error)
            return Ending.LOST
        except FitterDied as death:
            log.warning("job %s: the fit process died", claim.id)
            if death.out_of_memory:
                # Another attempt would run out of memory too.
                out_of_memory = OutOfMemory("the fit ran out of memory, and its process ended")
                _unless_lost(self._queue.fail, claim, out_of_memory.members())
            else:
                _unless_lost(self._queue.expire_lease, claim)
            return Ending.DIED
        except _TRANSIENT:
            raise
        except LoraplexError as error:
            if error.outcome_unknown:
                # The job may have succeeded.
                raise
            log.info("job %s failed: %s", claim.id, error.detail)
            _unless_lost(self._queue.fail, claim, error.members())
            return Ending.FAILED

    def _watch_fit(self, claim: Job, recorder: Recorder) -> Ending:
        """Process the frames of a fit until the job has ended or is handed back; raise `ClaimLost` and `FitterDied`."""
        publisher = Publisher(self._catalog, self._queue, self._base, claim)
        checkpoint = self._checkpoints.take_over(claim.id, claim.fence)
        request = publisher.request(
            checkpoint_seconds=self._checkpoint_seconds, times_epochs=self._listener.wants_epochs
        )
        self._fitter.begin(request, checkpoint=checkpoint)
        progress, history = claim.progress, claim.history
        pace = _Pace(claim.training.steps, self._monotonic)
        heartbeat_at = self._monotonic() + self._heartbeat_seconds
        while True:
            frame = self._fitter.next_frame(SECONDS_BETWEEN_LOOKS)
            if self._stop.is_set():
                self._fitter.kill()
                self._queue.release(claim)
                return Ending.HANDED_BACK
            if frame is not None:
                recorder.saw(frame)
                if frame["frame"] == "done":
                    with recorder.publishing() as publish:
                        succeeded = publisher.finish(frame)
                        publish.adapters = 0 if claim.training.is_fleet else 1
                    return Ending.SUCCEEDED if succeeded else Ending.FAILED
                if frame["frame"] == "outcomes":
                    with recorder.publishing() as publish:
                        publish.adapters = publisher.publish_some(frame)
                    progress = pace.progress(publisher.finished, None, publisher.tally())
                elif frame["frame"] == "note":
                    self._queue.append_log(claim, frame["text"])
                else:
                    progress = pace.progress(frame["step"], frame["loss"], publisher.tally())
                    history = frame["history"]
                if frame["frame"] == "error":
                    self._fail(claim, frame, progress, history)
                    return Ending.FAILED
            try:
                self._queue.check_claim(claim)
                if self._monotonic() >= heartbeat_at:
                    heartbeat_at = self._monotonic() + self._heartbeat_seconds
                    self._queue.heartbeat(claim, progress=progress, history=history)
            except (*_TRANSIENT, StorageFull) as error:
                # The fit continues; if the lease runs out meanwhile, the fencing token prevents its publish.
                log.warning("job %s: %s", claim.id, error.detail)

    def _fail(self, claim: Job, frame: Frame, progress: Any, history: Any) -> None:
        self._queue.fail(claim, frame["error"], progress=progress, history=history)
        if frame["error"]["code"] == "out_of_memory":
            # Its heap has reached its limit and is fragmented.
            self._fitter.kill()


class _Pace:
    """Progress of a fit, with the remaining time estimated from its pace so far."""

    def __init__(self, steps: int, monotonic: Callable[[], float]) -> None:
        self._steps = steps
        self._monotonic = monotonic
        self._began: tuple[int, float] | None = None

    def progress(self, step: int, loss: float | None, tally: Mapping[str, int] | None) -> dict[str, object]:
        """Return the progress as a job shows it."""
        now = self._monotonic()
        began_at, began = self._began = self._began or (step, now)
        left = (self._steps - step) * (now - began) / (step - began_at) if step > began_at else None
        shown: dict[str, object] = {"step": step, "steps": self._steps, "loss": loss}
        shown["seconds_left"] = None if left is None else round(left, 1)
        return shown if tally is None else shown | {"adapters": tally}


def _unless_lost(action: Callable[..., None], *arguments: Any) -> None:
    try:
        action(*arguments)
    except ClaimLost as error:
        log.info("%s", error)
