"""Publisher of a claimed job: the request for its fit, and versions from its frames, under the fencing token."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sqlalchemy.engine import Connection

from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Publication, Published, Source, Version
from adapters.clock import seconds_since
from adapters.errors import Conflict, FitFailed, FleetFailed, NotFound
from adapters.jobs.job import Job
from adapters.jobs.queue import JobQueue
from adapters.jobs.training_job import TrainingJob
from adapters.lora.adapter import Adapter, digest_of, from_canonical_bytes
from adapters.lora.base_layer import BaseLayer
from adapters.names import Reference, parse_reference
from adapters.training.evaluation.evaluate import Evaluation, why_unmatched
from adapters.training.evaluation.gate import GateDecision, When
from adapters.training.execution.fit_client import Done, FitRequest, Outcomes, StoredAdapter, StoredVersion
from adapters.training.settings import TrainingSpec

log = logging.getLogger(__name__)


class Publisher:
    """Publisher of the adapters of one claim."""

    def __init__(self, catalog: Catalog, queue: JobQueue, base: BaseLayer, claim: Job) -> None:
        self._catalog, self._queue, self._base, self._claim = catalog, queue, base, claim
        self._gate = claim.training.gate
        self._is_fleet = claim.training.is_fleet
        self._waiting = {adapter.position: adapter for adapter in queue.waiting(claim)}
        self._total: int = claim.training.adapters
        self._live: Version | None = None
        self._unmatched: str | None = None

    @property
    def finished(self) -> int:
        """Return the number of adapters that have a version or an error."""
        return self._total - len(self._waiting)

    def tally(self) -> dict[str, int] | None:
        """Return how many adapters of a fleet are published and failed; None for a job of one adapter."""
        return self._queue.tally(self._claim) if self._is_fleet else None

    def request(self, *, checkpoint_seconds: float, times_epochs: bool) -> FitRequest:
        """Return the request for the fit: blobs are given by name, so that it may run on another machine.

        Raises `Conflict` if an update no longer fits the live version.
        """
        claim, training = self._claim, self._claim.training
        assert claim.data_file is not None
        stored = None
        if self._gate.compares:
            with suppress(NotFound):
                self._live = self._catalog.find(Reference(claim.adapter))
        live = self._live
        if live is not None and live.base == self._base.fingerprint:
            self._unmatched = why_unmatched(
                live.labels, live.loss, training.labels, training.spec.loss, self._base.labels
            )
            if self._unmatched is None:
                stored = StoredAdapter(blob=live.file, offset=live.offset, length=live.bytes)
        return FitRequest(
            job=training,
            base=claim.base,
            feature_space=claim.feature_space,
            data=claim.data_file,
            done=tuple(position for position in range(training.positions) if position not in self._waiting),
            live={} if stored is None else {0: stored},
            statistics=self._find_statistics() if training.is_update else None,
            compared=tuple(map(self._find_compared, training.compared)),
            checkpoint_seconds=checkpoint_seconds,
            times_epochs=times_epochs,
        )

    def publish_outcomes(self, frame: Outcomes) -> int:
        """Publish the adapters of one stack of a fleet, and store the errors of the others; return how many."""
        if frame.failed:
            self._queue.fail_adapters(self._claim, frame.failed)
        waiting = self._waiting
        publications = [
            self._publication(waiting[position].name, content, metrics, position=position, rows=waiting[position].rows)
            for (position, metrics, *_), content in zip(frame.trained, frame.contents, strict=False)
        ]
        published = self._catalog.publish(publications, admit=self._admit, record=self._record)
        for position in (*(trained.position for trained in frame.trained), *(position for position, _ in frame.failed)):
            waiting.pop(position, None)
        return len(published)

    def finish(self, frame: Done) -> bool:
        """End the job with the version of its adapter, or with the tally of its fleet; return whether it succeeded."""
        if self._is_fleet:
            return self._finish_fleet()
        if frame.result is not None:
            return self._finish_evaluation(frame.result)
        claim, training = self._claim, self._claim.training
        verdict = self._gate.decide(Evaluation.from_json(frame.metrics).held_out, self._live, unmatched=self._unmatched)
        assert frame.spec is not None
        spec, content = TrainingSpec.from_json(frame.spec), frame.contents[0]
        publication = self._publication(
            claim.adapter, content, frame.metrics, spec=spec, verdict=verdict, statistics=frame.attachment("statistics")
        )
        step, loss = frame.history[-1] if frame.history else (training.steps, None)

        def record(connection: Connection, published: Sequence[Published]) -> None:
            (made,) = published
            if training.is_update and self._gate.moves and not made.moved_live:
                detail = f"another version of {claim.adapter} has become live while this update was computed"
                raise Conflict(f"{detail}: send it again")
            self._record(connection, published)
            decisions: dict[str, Any] = {}
            if self._gate.when is When.IF_BETTER:
                decisions["gate"] = verdict.to_json(moved=made.moved_live)
            if chosen := _chosen(training.spec, spec):
                decisions["chosen"] = chosen
            version = made.version
            self._queue.succeed(
                claim,
                result={"name": version.adapter, "version": version.version, "digest": version.digest},
                progress={"step": step, "steps": training.steps, "loss": loss},
                metrics={**frame.metrics, **decisions},
                history=frame.history,
                connection=connection,
            )

        (made,) = self._catalog.publish([publication], admit=self._admit, record=record)
        self._queue.remove_data(claim)
        log.info("job %s published %s", claim.id, made.version)
        return True

    def _finish_fleet(self) -> bool:
        claim, tally = self._claim, self._queue.tally(self._claim)
        progress = {"step": self._total, "steps": self._total, "loss": None, "adapters": tally}
        if tally["published"] == 0:
            detail = f"none of the {self._total} groups could be trained"
            error = FleetFailed(f"{detail}; GET /jobs/{claim.id}/adapters says why each failed")
            self._queue.fail(claim, error.members(), progress=progress)
            return False
        self._queue.succeed(claim, result=None, progress=progress, metrics=tally, history=[])
        log.info("job %s published %d of %d adapters", claim.id, tally["published"], self._total)
        return True

    def _finish_evaluation(self, result: Mapping[str, Any]) -> bool:
        steps = self._claim.training.steps
        progress = {"step": steps, "steps": steps, "loss": None}
        self._queue.succeed(self._claim, result=result, progress=progress, metrics=None, history=[])
        return True

    def _admit(self, connection: Connection, publications: Sequence[Publication]) -> Sequence[bool]:
        return self._queue.admit(connection, self._claim, publications)

    def _record(self, connection: Connection, published: Sequence[Published]) -> None:
        self._queue.record(connection, self._claim, published)

    def _publication(
        self,
        name: str,
        content: bytes,
        metrics: Mapping[str, Any],
        *,
        position: int = 0,
        rows: int | None = None,
        spec: TrainingSpec | None = None,
        verdict: GateDecision | None = None,
        statistics: bytes | None = None,
    ) -> Publication:
        claim, live = self._claim, self._live
        return Publication(
            name=name,
            adapter=_read_fitted(content),
            base=self._base,
            source=Source.JOB,
            job=claim.id,
            position=position,
            metrics=metrics,
            moves_live=self._gate.moves if verdict is None else verdict.moves,
            checks_live=(self._gate.compares and not self._is_fleet) or claim.training.is_update,
            expected_live=None if live is None else live.version,
            lineage=self._lineage(rows, spec),
            statistics=statistics,
        )

    def _lineage(self, rows: int | None, spec: TrainingSpec | None) -> dict[str, object]:
        """Return what the version was trained from and how: enough to train it again."""
        claim = self._claim
        assert claim.started_at is not None
        lineage = claim.training.lineage(spec)
        if rows is not None:
            lineage["rows"] = rows
        if claim.training.is_update and self._live is not None:
            lineage["parent"] = str(self._live)
        return lineage | {"code": _code_version(), "seconds": seconds_since(claim.started_at, self._queue.now())}

    def _find_compared(self, reference: str | None) -> StoredVersion:
        """Return where the version of an evaluation is stored; one that is gone has a problem."""
        if reference is None:
            return StoredVersion(reference=None)
        try:
            version = self._catalog.find(parse_reference(reference))
        except NotFound:
            return StoredVersion(reference=reference, problem="it was deleted after this evaluation was queued")
        return StoredVersion(
            reference=reference,
            digest=version.digest,
            blob=version.file,
            offset=version.offset,
            length=version.bytes,
            loss=version.loss,
        )

    def _find_statistics(self) -> str:
        """Return the blob of the live version's statistics, which earlier updates in the queue have changed.

        Raises `Conflict` if that version was trained in another way than the one that was live when the update was
        sent.
        """
        self._live = live = self._catalog.find(Reference(self._claim.adapter))
        # Its sums are of residuals of the base layer that it was made for.
        live.check_servable(self._base, self._claim.feature_space)
        if live.statistics is None or live.lineage is None or not _is_trained_alike(live.lineage, self._claim.training):
            detail = f"{live} has become live since this update was sent, and was trained in another way"
            raise Conflict(f"{detail}: send it again", given=str(live))
        return live.statistics


def _chosen(requested: TrainingSpec, spec: TrainingSpec) -> dict[str, Any]:
    """Return the settings that the held-out rows have chosen, by name."""
    if requested.candidates:
        return {}
    were_open = {"rank": requested.try_ranks, "learning_rate": requested.try_rates, "ridge": requested.try_ridges}
    return {name: getattr(spec, name) for name, is_open in were_open.items() if is_open}


def _is_trained_alike(lineage: Mapping[str, Any], training: TrainingJob) -> bool:
    """Return whether the statistics of a version are those of the same settings and the same prior."""
    spec = replace(TrainingSpec.from_json(lineage["spec"]), split=None)
    return spec == replace(training.spec, split=None) and lineage["prior"] == training.provenance.prior


def _read_fitted(content: bytes) -> Adapter:
    adapter = from_canonical_bytes(content)
    if digest_of(content) != adapter.digest:
        raise FitFailed("a fitted adapter is incomplete")
    return adapter


@cache
def _code_version() -> str:
    # Cached: reading it takes longer than training some adapters of a fleet.
    try:
        return version("loraplex-server")
    except PackageNotFoundError:
        return "unknown"
