"""The loop that claims jobs, watches over their fits and publishes what comes out."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from adapters.adapter import Adapter, digest_of, from_canonical_bytes
from adapters.base_layer import BaseLayer
from adapters.catalog import Catalog
from adapters.errors import BaseChanged, CatalogBusy, ClaimLost, FitFailed, LoraplexError, StorageFull
from adapters.job_queue import JobQueue
from adapters.jobs import Job
from adapters.training.fitter import Fitter, FitterDied, Frame
from adapters.versions import Publication, Source

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0
SECONDS_BETWEEN_LOOKS = 0.2
"""How often a running job is looked at for a cancel, and the queue for a new job."""

log = logging.getLogger(__name__)


class Trainer:
    """Takes jobs from the queue, one at a time, until it is told to stop."""

    def __init__(
        self,
        catalog: Catalog,
        queue: JobQueue,
        base: BaseLayer,
        fitter: Fitter,
        *,
        stop: threading.Event,
        lease_seconds: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._queue = queue
        self._base = base
        self._fitter = fitter
        self._stop = stop
        # Progress is written at most once a second; a lease shorter than three seconds wants more.
        self._heartbeat_seconds = min(1.0, lease_seconds / 3)
        self._monotonic = monotonic

    def run(self) -> None:
        """Work until `stop` is set; then a running job is handed back to the queue."""
        pause = _SHORTEST_PAUSE_SECONDS
        try:
            while not self._stop.is_set():
                try:
                    ready = self._fitter.is_ready(SECONDS_BETWEEN_LOOKS)
                except FitterDied:
                    log.error("the process that fits cannot start; it is tried again in %g s", pause)
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
            claim = self._queue.claim()
            if claim is None:
                return False
            log.info("job %s for %s: attempt %d", claim.id, claim.adapter, claim.attempt)
            self._train(claim)
        except (CatalogBusy, StorageFull) as error:
            # What could not be written now is found again: the job's lease runs out.
            log.warning("%s", error.detail)
            return False
        return True

    def _train(self, claim: Job) -> None:
        try:
            if claim.base != self._base.fingerprint:
                raise BaseChanged(
                    "the base layer has changed since the job was queued",
                    given=claim.base,
                    expected=self._base.fingerprint,
                )
            try:
                done = self._watch_fit(claim)
            except BaseException:
                # Whatever it was: the fit may still run, and its frames must not be taken for the next job's.
                self._fitter.kill()
                raise
            if done is not None:
                self._publish(claim, done)
        except ClaimLost as error:
            log.info("%s", error)
        except FitterDied:
            log.warning("job %s: the process that fits died", claim.id)
            _unless_lost(self._queue.abandon, claim)
        except CatalogBusy:
            raise
        except LoraplexError as error:
            log.info("job %s failed: %s", claim.id, error.detail)
            _unless_lost(self._queue.fail, claim, error.members())

    def _watch_fit(self, claim: Job) -> Frame | None:
        """The frame that ends the fit; None where the job ended or was handed back. Raises `ClaimLost` too."""
        assert claim.data_file is not None
        self._fitter.begin(
            {
                "data_path": str(self._catalog.blobs.path(claim.data_file)),
                "spec": claim.spec["resolved"],
                "feature_space": claim.feature_space,
                "base": claim.base,
            }
        )
        progress, history = claim.progress, claim.history
        heartbeat_at = self._monotonic() + self._heartbeat_seconds
        while True:
            frame = self._fitter.next_frame(SECONDS_BETWEEN_LOOKS)
            if self._stop.is_set():
                self._fitter.kill()
                self._queue.hand_back(claim)
                return None
            if frame is not None and frame["frame"] == "done":
                return frame
            if frame is not None:
                progress, history = _progress(claim, frame["step"], frame["loss"]), frame["history"]
                if frame["frame"] == "error":
                    self._queue.fail(claim, frame["error"], progress=progress, history=history)
                    return None
            try:
                self._queue.check_ours(claim)
                if self._monotonic() >= heartbeat_at:
                    heartbeat_at = self._monotonic() + self._heartbeat_seconds
                    self._queue.heartbeat(claim, progress=progress, history=history)
            except (CatalogBusy, StorageFull) as error:
                # The fit goes on: where the lease runs out meanwhile, the fence keeps it from publishing.
                log.warning("job %s: %s", claim.id, error.detail)

    def _publish(self, claim: Job, done: Frame) -> None:
        adapter = from_canonical_bytes(done["content"])
        if digest_of(done["content"]) != adapter.digest:
            raise FitFailed("the fitted adapter did not arrive whole")
        publication = self._publication(claim, adapter, done["metrics"])
        steps = claim.spec["steps"]
        progress = _progress(claim, steps, done["history"][-1][1])
        versions = self._catalog.publish(
            [publication],
            also=lambda connection, versions: self._queue.succeed(
                connection,
                claim,
                versions[0],
                progress=progress,
                metrics=done["metrics"],
                history=done["history"],
            ),
        )
        self._queue.remove_data(claim)
        log.info("job %s published %s@%d", claim.id, claim.adapter, versions[0].version)

    def _publication(self, claim: Job, adapter: Adapter, metrics: dict[str, Any]) -> Publication:
        return Publication(
            name=claim.adapter,
            adapter=adapter,
            base=self._base,
            source=Source.JOB,
            job=claim.id,
            metrics=metrics,
            moves_live=claim.spec["publish"] == "always",
        )


def _progress(claim: Job, step: int, loss: float | None) -> dict[str, object]:
    return {"step": step, "steps": claim.spec["steps"], "loss": loss}


def _unless_lost(action: Callable[..., None], *arguments: Any) -> None:
    try:
        action(*arguments)
    except ClaimLost as error:
        log.info("%s", error)
