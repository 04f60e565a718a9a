"""Telemetry of trainers: counts and traces what `adapters.training.execution.telemetry` reports."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from adapters.training.execution.telemetry import Ending, Listener, Publish, Run
from app.observability.metrics import definitions as d
from app.observability.metrics.recorder import Metrics

if TYPE_CHECKING:
    from app.observability.tracing import Tracing

log = logging.getLogger(__name__)
_Report = TypeVar("_Report")


def listener(metrics: Metrics, tracing: "Tracing | None" = None) -> Listener:
    """Return a listener for a trainer's runs and publishes. Epochs are timed only if they are traced."""

    def on_publish(publish: Publish) -> None:
        metrics.record_publish(publish.ended - publish.began, publish.adapters, source="job")

    def on_run(run: Run) -> None:
        metrics.observe(d.TRAINING_SECONDS, [run.ended - run.began], run.method, run.ending)
        metrics.add(d.FITS_DIED, run.ending is Ending.DIED)
        metrics.add(d.RESUMED, run.resumed)
        if tracing is not None:
            _trace(tracing, run)

    return Listener(published=_log_errors(on_publish), ran=_log_errors(on_run), wants_epochs=tracing is not None)


def _trace(tracing: "Tracing", run: Run) -> None:
    """Add a span `job` with spans `epoch` and `publish` below it.

    A long run reports only some of its epochs, and each says how many it stands for.
    """
    job = run.job
    attributes: dict[str, str | int | bool] = {
        "loraplex.job": job.id,
        "loraplex.adapter": job.adapter,
        "loraplex.adapters": job.training.adapters,
        "loraplex.method": run.method,
        "loraplex.attempt": job.attempt,
        "loraplex.resumed": run.resumed,
        "loraplex.ending": run.ending.value,
    }
    error = run.ending.value if run.ending in (Ending.FAILED, Ending.DIED) else None
    within = tracing.add_span("job", run.began, run.ended, attributes=attributes, error=error)
    for epoch in run.epochs:
        epoch_attributes = {"loraplex.epoch": epoch.number, "loraplex.epochs": epoch.every, "loraplex.loss": epoch.loss}
        tracing.add_span("epoch", epoch.began, epoch.ended, within=within, attributes=epoch_attributes)
    for publish in run.publishes:
        publish_attributes = {"loraplex.adapters": publish.adapters}
        tracing.add_span("publish", publish.began, publish.ended, within=within, attributes=publish_attributes)


def _log_errors(report: Callable[[_Report], None]) -> Callable[[_Report], None]:
    """Return `report` with its errors logged: a training goes on whatever happens to its telemetry."""

    def report_safely(value: _Report) -> None:
        try:
            report(value)
        except Exception:
            log.exception("the telemetry of a run could not be recorded")

    return report_safely
