"""What API workers and trainers both open, from the settings."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from adapters.catalog.catalog import Catalog
from adapters.jobs.queue import JobQueue
from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.training.execution.fit_client import Fitter
from app.settings import Settings

if TYPE_CHECKING:
    from app.observability.tracing import Tracing

CHECKPOINTS = "checkpoints"
"""Folder, in the data folder, of what fits have reached."""


def load_base(settings: Settings) -> BaseLayer:
    """The base layer that the settings name; raises `BaseNotLoadable`."""
    return load_base_layer(**base_arguments(settings))


def base_arguments(settings: Settings) -> dict[str, str]:
    """What `load_base_layer` is called with, here and in the process that fits."""
    return {
        "source": settings.base,
        "weight_key": settings.base_weight_key,
        "bias_key": settings.base_bias_key,
        "device": settings.device,
        "dtype": settings.dtype,
    }


def open_fitter(settings: Settings) -> Fitter:
    """A trainer's hold on the process that fits, which is not started yet."""
    return Fitter(
        base_arguments(settings),
        threads=settings.trainer_threads,
        memory_bytes=settings.trainer_memory_bytes,
        stopped_seconds=settings.lease_seconds,
    )


def open_queue(catalog: Catalog, settings: Settings, *, now: Callable[[], float] = time.time) -> JobQueue:
    """The queue in the catalogue's database."""
    return JobQueue(catalog.database, catalog.blobs, now=now, lease_seconds=settings.lease_seconds)


def open_tracing(settings: Settings, *, process: str) -> "Tracing | None":
    """Return what records this process's spans if the setting TRACES is on, otherwise None.

    `process` names the process among those of the service.
    """
    if not settings.traces:
        return None
    # OpenTelemetry's SDK takes long to import, and most services do not use it.
    from app.observability.tracing import Tracing

    return Tracing(process)
