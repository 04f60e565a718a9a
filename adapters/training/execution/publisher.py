"""Publisher of a claimed job: the request for its fit, and versions from its frames, under the fencing token."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sqlalchemy.engine import Connection

from adapters.catalog.catalog import PACK_ADAPTERS, Catalog, Record
from adapters.catalog.versions import Publication, Published, Source, Version
from adapters.clock import seconds_since
from adapters.errors import Conflict, FitFailed, FleetFailed, NotFound, StorageFailed
from adapters.jobs.job import Job
from adapters.jobs.job_adapters import ALL, AdapterStatus, JobAdapter, Selection
from adapters.jobs.queue import JobQueue
from adapters.jobs.training_job import TrainingJob
from adapters.lora.adapter import Adapter, digest_of, from_canonical_bytes
from adapters.lora.base_layer import BaseLayer
from adapters.names import Reference, parse_reference
from adapters.training.evaluation.evaluate import Evaluation, why_unmatched
from adapters.training.evaluation.gate import NOT_EVALUATED, GateDecision, When
from adapters.training.evaluation.judgement import AdapterReport
from adapters.training.execution.fit_client import Done, FitRequest, Outcomes, StoredAdapter, StoredVersion
from adapters.training.planning.split import FEW_ROWS, SplitBy
from adapters.training.settings import TrainingSpec

log = logging.getLogger(__name__)


# Adapters of a fleet whose reports are read together.
_REPORTS_AT_ONCE = 1000


class Publisher:
    """Publisher of the adapters of one claim."""

    def __init__(
        self,
        catalog: Catalog,
        queue: JobQueue,
        base: BaseLayer,
        claim: Job,
        *,
        on_storage_failure: Callable[[StorageFailed], None],
    ) -> None:
        """Prepare to publish. `on_storage_failure` raises the error, or returns to have the publish repeated."""
        self._on_storage_failure = on_storage_failure
        self._catalog, self._queue, self._base, self._claim = catalog, queue, base, claim
        self._tenant = claim.tenant
        self._gate = claim.training.gate
        self._is_fleet = claim.training.is_fleet
        self._waiting = {adapter.position: adapter for adapter in queue.waiting(claim)}
        self._total: int = claim.training.adapters
        self._live: dict[int, Version] = {}
        self._stored: dict[int, StoredAdapter] = {}

    @property
    def finished(self) -> int:
        """Return the number of adapters that have a version or an error."""
        return self._total - len(self._waiting)

    @property
    def _prior_position(self) -> int | None:
        """Position of a fleet's mean, which is behind the groups."""
        training = self._claim.training
        return None if training.fleet_prior is None else training.positions - 1

    def tally(self) -> dict[str, int] | None:
        """Return how many adapters of a fleet are published and failed; None for a job of one adapter."""
        return self._queue.tally(self._claim) if self._is_fleet else None

    def request(self, *, checkpoint_seconds: float, times_epochs: bool) -> FitRequest:
        """Return the request for the fit: blobs are given by name, so that it may run on another machine.

        Raises `Conflict` if an update no longer fits the live version.
        """
        claim, training = self._claim, self._claim.training
        assert claim.data_file is not None
        if self._gate.compares:
            self._find_live()
        return FitRequest(
            job=training,
            base=claim.base,
            feature_space=claim.feature_space,
            data=claim.data_file,
            done=tuple(position for position in range(training.positions) if position not in self._waiting),
            live=self._stored,
            wants_prior=self._prior_position in self._waiting,
            statistics=self._find_statistics() if training.is_update else None,
            compared=tuple(map(self._find_compared, training.compared)),
            checkpoint_seconds=checkpoint_seconds,
            times_epochs=times_epochs,
        )

    def _adapters(self, selection: Selection) -> Sequence[JobAdapter]:
        return self._queue.adapters(self._claim.id, selection, tenant=self._tenant)

    def _find_live(self) -> None:
        """Find what the names of the adapters answer with now.

        Of adapters that an earlier attempt has published, it is what they answered with before: the fit needs the same
        versions again to come to the same decisions.
        """
        listed = self._adapters(ALL)
        adapters = [adapter for adapter in listed if adapter.position != self._prior_position]
        before = {adapter.name: adapter.replaced for adapter in adapters if adapter.moved_live}
        names = [adapter.name for adapter in adapters]
        found = self._catalog.live_versions(names, tenant=self._tenant, instead=before)
        for adapter in adapters:
            if adapter.name in found:
                version, evidence = found[adapter.name]
                self._live[adapter.position] = version
                self._stored[adapter.position] = self._describe_live(version, evidence)

    def _describe_live(self, live: Version, evidence: bytes | None) -> StoredAdapter:
        training = self._claim.training
        unmatched: str | None = "it was made for another base layer"
        if live.base == self._base.fingerprint:
            labels, of_base = training.labels, self._base.labels
            unmatched = why_unmatched(live.labels, live.loss, labels, training.spec.loss, of_base)
        unjudged = unmatched or why_unjudged(live, training, has_evidence=evidence is not None)
        return StoredAdapter(
            blob=live.file if unmatched is None else None,
            offset=live.offset,
            length=live.bytes,
            evidence=evidence,
            is_of_job=live.source is Source.JOB,
            unjudged=unjudged,
        )

    def publish_outcomes(self, frame: Outcomes) -> int:
        """Publish the adapters of one stack of a fleet, and store the errors of the others; return how many."""
        if frame.failed:
            self._queue.fail_adapters(self._claim, frame.failed)
        evidence = dict(zip(frame.evidence, frame.contents[len(frame.trained) :], strict=True))
        publications, reports = [], {}
        for trained, content in zip(frame.trained, frame.contents, strict=False):
            position, adapter = trained.position, self._waiting[trained.position]
            report = reports[position] = self._report(position, trained.metrics, trained.report)
            publications.append(
                self._publication(
                    adapter.name,
                    content,
                    trained.metrics,
                    report.decision,
                    position=position,
                    rows=adapter.rows,
                    spec=None if trained.spec is None else TrainingSpec.from_json(trained.spec),
                    evidence=evidence.get(position),
                )
            )

        def record(connection: Connection, published: Sequence[Published]) -> None:
            self._record(connection, published, reports)

        published = 0
        # In parts, because each holds the write lock.
        for first in range(0, len(publications), PACK_ADAPTERS):
            part = publications[first : first + PACK_ADAPTERS]
            published += len(self._publish(part, record))
        for position in (*reports, *(position for position, _ in frame.failed)):
            self._waiting.pop(position, None)
        return published

    def finish(self, frame: Done) -> bool:
        """End the job with the version of its adapter, or with the tally of its fleet; return whether it succeeded."""
        if self._is_fleet:
            return self._finish_fleet()
        if frame.result is not None:
            return self._finish_evaluation(frame.result)
        claim, training = self._claim, self._claim.training
        report = self._report(0, frame.metrics, frame.report)
        assert frame.spec is not None
        spec, content = TrainingSpec.from_json(frame.spec), frame.contents[0]
        publication = self._publication(
            claim.adapter,
            content,
            frame.metrics,
            report.decision,
            spec=spec,
            statistics=frame.attachment("statistics"),
            evidence=frame.attachment("evidence"),
        )
        step, loss = frame.history[-1] if frame.history else (training.steps, None)
        for text in report.fit.warnings:
            self._queue.append_log(claim, text)

        def record(connection: Connection, published: Sequence[Published]) -> None:
            (made,) = published
            if training.is_update and self._gate.moves and not made.moved_live:
                detail = f"another version of {claim.adapter} has become live while this update was computed"
                raise Conflict(f"{detail}: send it again")
            self._record(connection, published, {0: report})
            decisions: dict[str, Any] = {}
            if self._gate.when is When.IF_BETTER:
                decisions["gate"] = report.decision.to_json(moved=made.moved_live)
            if chosen := _chosen(training.spec, spec):
                decisions["chosen"] = chosen
            version = made.version
            self._queue.succeed(
                claim,
                result={"name": version.adapter, "version": version.version, "digest": version.digest},
                progress={"step": step, "steps": training.steps, "loss": loss},
                metrics={**frame.metrics, **decisions},
                history=frame.history,
                report=report.to_json(moved=made.moved_live),
                suspects=frame.suspects,
                connection=connection,
            )

        (made,) = self._publish([publication], record)
        self._queue.remove_data(claim)
        log.info("job %s published %s", claim.id, made.version)
        return True

    def _publish(self, publications: Sequence[Publication], record: Record) -> list[Published]:
        """Publish in one transaction, and again if the blobs could not be stored: a fit may have taken hours."""
        while True:
            try:
                return self._catalog.publish(publications, tenant=self._tenant, admit=self._admit, record=record)
            except StorageFailed as error:
                if error.outcome_unknown:
                    raise
                self._on_storage_failure(error)

    def _finish_fleet(self) -> bool:
        claim = self._claim
        if self._waiting:
            # The mean of a fleet of one group, say: the fit has ended without it.
            missing = FitFailed("the fit ended without an adapter for it").members()
            self._queue.fail_adapters(claim, [(position, missing) for position in self._waiting])
        tally = self._queue.tally(claim)
        progress = {"step": self._total, "steps": self._total, "loss": None, "adapters": tally}
        if tally["published"] == 0:
            detail = f"none of the {self._total} groups could be trained"
            error = FleetFailed(f"{detail}; GET /jobs/{claim.id}/adapters says why each failed")
            self._queue.fail(claim, error.members(), progress=progress)
            return False
        warnings = self._fleet_warnings()
        for text in warnings:
            self._queue.append_log(claim, text)
        self._queue.succeed(
            claim, result=None, progress=progress, metrics=tally, history=[], report={"warnings": warnings}
        )
        log.info("job %s published %d of %d adapters", claim.id, tally["published"], self._total)
        return True

    def _fleet_warnings(self) -> list[str]:
        """Return the warnings about the adapters of the fleet, each with the number of adapters."""
        counts: Counter[str] = Counter()
        after: int | None = None
        selection = Selection(status=AdapterStatus.PUBLISHED, limit=_REPORTS_AT_ONCE)
        while adapters := self._adapters(replace(selection, after=after)):
            after = adapters[-1].position
            for adapter in adapters:
                # Without the figures of the adapter, which come after a colon.
                counts.update({text.partition(":")[0] for text in (adapter.report or {}).get("warnings", ())})
        return [f"{text}: {count} adapters" for text, count in counts.most_common()]

    def _report(self, position: int, metrics: Mapping[str, Any], reported: Mapping[str, Any] | None) -> "PublishReport":
        """Return the report on an adapter, with the decision of the gate."""
        report = AdapterReport() if reported is None else AdapterReport.from_json(reported)
        if position == self._prior_position:
            reason = "it is what the groups have in common, and there is nothing to compare it with"
            return PublishReport(report, GateDecision(self._gate.when is not When.NEVER, reason, self._gate, {}))
        stored = self._stored.get(position)
        decision = self._gate.decide(
            Evaluation.from_json(metrics).held_out,
            self._live.get(position),
            unmatched=stored.unjudged if stored is not None and stored.blob is None else None,
            judgement=report.judgement,
        )
        warnings = list(report.warnings)
        is_unevaluated = report.evaluation is None and self._gate.when is When.IF_NOT_WORSE
        if is_unevaluated and self._claim.training.provenance.split is not None:
            # Without a split, the warnings of the plan say so.
            warnings.append(NOT_EVALUATED)
        return PublishReport(replace(report, warnings=tuple(warnings)), decision)

    def _finish_evaluation(self, result: Mapping[str, Any]) -> bool:
        steps = self._claim.training.steps
        progress = {"step": steps, "steps": steps, "loss": None}
        adapters = [self._explain_problem(entry) for entry in result["adapters"]]
        result = {**result, "adapters": adapters}
        self._queue.succeed(self._claim, result=result, progress=progress, metrics=None, history=[])
        return True

    def _admit(self, connection: Connection, publications: Sequence[Publication]) -> Sequence[bool]:
        return self._queue.admit(connection, self._claim, publications)

    def _record(
        self, connection: Connection, published: Sequence[Published], reports: Mapping[int, "PublishReport"]
    ) -> None:
        members = {
            item.position: reports[item.position].to_json(moved=item.moved_live)
            for item in published
            if item.position is not None
        }
        self._queue.record(connection, self._claim, published, members)

    def _publication(
        self,
        name: str,
        content: bytes,
        metrics: Mapping[str, Any],
        decision: GateDecision,
        *,
        position: int = 0,
        rows: int | None = None,
        spec: TrainingSpec | None = None,
        statistics: bytes | None = None,
        evidence: bytes | None = None,
    ) -> Publication:
        claim, live = self._claim, self._live.get(position)
        is_compared = self._gate.compares and position != self._prior_position
        return Publication(
            name=name,
            adapter=_read_fitted(content),
            base=self._base,
            source=Source.JOB,
            job=claim.id,
            position=position,
            metrics=metrics,
            moves_live=decision.moves,
            checks_live=is_compared or claim.training.is_update,
            expected_live=None if live is None else live.version,
            lineage=self._lineage(rows, spec),
            statistics=statistics,
            evidence=evidence,
        )

    def _lineage(self, rows: int | None, spec: TrainingSpec | None) -> dict[str, object]:
        """Return what the version was trained from and how: enough to train it again."""
        claim = self._claim
        assert claim.started_at is not None
        lineage = claim.training.lineage(spec)
        if rows is not None:
            lineage["rows"] = rows
        if claim.training.is_update and self._live:
            lineage["parent"] = str(self._live[0])
        return lineage | {"code": _code_version(), "seconds": seconds_since(claim.started_at, self._queue.now())}

    def _explain_problem(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return an entry of an evaluation; a version whose file is missing may have been deleted meanwhile."""
        if entry["problem"] is None:
            return entry
        return {**entry, "problem": self._find_compared(entry["adapter"]).problem or entry["problem"]}

    def _find_compared(self, reference: str | None) -> StoredVersion:
        """Return where the version of an evaluation is stored; one that is gone has a problem."""
        if reference is None:
            return StoredVersion(reference=None)
        try:
            version = self._catalog.find(parse_reference(reference), tenant=self._tenant)
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
        self._live[0] = live = self._catalog.find(Reference(self._claim.adapter), tenant=self._tenant)
        # Its sums are of residuals of the base layer that it was made for.
        live.check_servable(self._base, self._claim.feature_space)
        if live.statistics is None or live.lineage is None or not _is_trained_alike(live.lineage, self._claim.training):
            detail = f"{live} has become live since this update was sent, and was trained in another way"
            raise Conflict(f"{detail}: send it again", given=str(live))
        return live.statistics


@dataclass(frozen=True, slots=True)
class PublishReport:
    """Report on an adapter, and the decision whether live moves to it."""

    fit: AdapterReport
    decision: GateDecision

    def to_json(self, *, moved: bool) -> dict[str, Any]:
        """Return the report as a job stores it, with whether live has actually moved."""
        return {
            "evaluation": self.fit.evaluation,
            "decision": self.decision.summarize(moved=moved),
            "auto": self.fit.auto,
            "warnings": list(self.fit.warnings),
        }


def why_unjudged(live: Version, training: TrainingJob, *, has_evidence: bool) -> str | None:
    """Say why a version may have been trained on every row that a training evaluates; None if it was not.

    has_evidence: whether it has out-of-sample errors of the rows that it was trained on.
    """
    if live.source is Source.UPLOAD:
        return None
    lineage = live.lineage or {}
    if has_evidence:
        return None if live.loss == training.spec.loss else "its errors on its own rows are of another loss"
    rule, data = lineage.get("split"), lineage.get("data")
    if not isinstance(rule, Mapping) or not isinstance(data, Mapping):
        return "no rows were held out when it was trained"
    if rule != training.provenance.split:
        return "other rows were held out when it was trained"
    if rule.get("by") == SplitBy.HASH:
        rows = lineage.get("rows", data.get("rows"))
        is_held_out = isinstance(rows, int) and rows >= FEW_ROWS
        return None if is_held_out else "no rows were held out when it was trained"
    if rule.get("by") in (SplitBy.ROWS, SplitBy.GROUP):
        is_same = (
            data.get("digest") == training.provenance.data.get("digest") and lineage.get("seed") == training.spec.seed
        )
        return None if is_same else "other rows were held out when it was trained"
    return None


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
