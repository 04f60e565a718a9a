"""Traces, where they are wanted. Nothing of OpenTelemetry's SDK is imported before that is known.

A process opens one `Tracing` (or None) at its start, and closes it at its end:

    tracing = open_tracing(settings, process="trainer-1")
    if tracing is not None:
        job = tracing.span("job", began, ended, attributes={"loraplex.job": id})   # seconds since the epoch
        tracing.span("epoch", began, ended, within=job)
        tracing.close(1.0)                                                          # takes so many seconds at most

Spans are made when what they are about has ended, from times that were taken anyway.
"""

from typing import TYPE_CHECKING

from app.settings import Settings

if TYPE_CHECKING:
    from app.observability.spans import Tracing


def open_tracing(settings: Settings, *, process: str) -> "Tracing | None":
    """Where the setting TRACES asks for it; `process` tells this one from others of the service."""
    if not settings.traces:
        return None
    from app.observability.spans import Tracing

    return Tracing(process)
