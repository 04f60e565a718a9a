"""What API workers and trainers both open, from the settings."""

import time
from collections.abc import Callable

from adapters.catalog.catalog import Catalog
from adapters.jobs.queue import JobQueue
from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.training.execution.fit_client import Fitter
from app.settings import Settings

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
    return JobQueue(catalog.database, catalog.writer, now=now, lease_seconds=settings.lease_seconds)
