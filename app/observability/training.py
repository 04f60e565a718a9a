"""What trainers do, counted and traced: what `adapters.training.execution.telemetry` tells, for metrics and spans."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from adapters.training.execution.telemetry import Ending, Listener, Publish, Run
from app.observability.metrics.recorder import Metrics

if TYPE_CHECKING:
    from app.observability.tracing import Tracing

log = logging.getLogger(__name__)
_Told = TypeVar("_Told")


def listener(metrics: Metrics, tracing: "Tracing | None" = None) -> Listener:
    """Who is told of a trainer's runs and publishes; epochs are timed where they are traced."""

    def published(publish: Publish) -> None:
        metrics.published(publish.ended - publish.began, publish.adapters, source="job")

    def ran(run: Run) -> None:
        metrics.trained(run.method, run.ending, run.ended - run.began)
        if run.ending is Ending.DIED:
            metrics.fit_died()
        if run.resumed:
            metrics.resumed()
        if tracing is not None:
            _trace(tracing, run)

    return Listener(published=_unharmed(published), ran=_unharmed(ran), wants_epochs=tracing is not None)


def _trace(tracing: "Tracing", run: Run) -> None:
    """A span `job`, and below it `epoch` and `publish`; of very many only some, which say for how many they stand."""
    job = run.job
    about: dict[str, str | int | bool] = {
        "loraplex.job": job.id,
        "loraplex.adapter": job.adapter,
        "loraplex.adapters": job.training.adapters,
        "loraplex.method": run.method,
        "loraplex.attempt": job.attempt,
        "loraplex.resumed": run.resumed,
        "loraplex.ending": run.ending.value,
    }
    failed = run.ending.value if run.ending in (Ending.FAILED, Ending.DIED) else None
    within = tracing.span("job", run.began, run.ended, attributes=about, failed=failed)
    for epoch in run.epochs:
        seen = {"loraplex.epoch": epoch.number, "loraplex.epochs": epoch.every, "loraplex.loss": epoch.loss}
        tracing.span("epoch", epoch.began, epoch.ended, within=within, attributes=seen)
    for publish in run.publishes:
        made = {"loraplex.adapters": publish.adapters}
        tracing.span("publish", publish.began, publish.ended, within=within, attributes=made)


def _unharmed(tell: Callable[[_Told], None]) -> Callable[[_Told], None]:
    """The same, but that a training goes on whatever goes wrong in telling of it."""

    def told(what: _Told) -> None:
        try:
            tell(what)
        except Exception:
            log.exception("a run cannot be counted or traced")

    return told
