"""Trainer: a process that runs the jobs in the queue."""

import logging
import threading
import time

import torch

from adapters.catalog.catalog import Catalog
from adapters.child_process import on_parent_exit, stop_on_signals
from adapters.errors import CatalogBusy
from adapters.lora.base_layer import BaseLayer
from adapters.training.execution.trainer import Trainer
from app.bootstrap import CHECKPOINTS, load_base, open_fitter, open_queue, open_tracing, warn_about_jobs
from app.observability import logs
from app.observability.metrics.process_slot import METRICS
from app.observability.metrics.recorder import Metrics
from app.observability.training import listener
from app.settings import Settings, exit_if_unusable, load_settings

_SECONDS_TO_CLOSE = 1.0

log = logging.getLogger(__name__)


def run_trainer(settings: Settings, stop: threading.Event, *, supervised: bool = False) -> None:
    """Run jobs until `stop` is set. The trainer of a supervised service leaves the warnings to the first worker."""
    logs.configure(settings.log_format, process="trainer")
    torch.set_num_threads(1)
    with exit_if_unusable():
        base = load_base(settings)
        catalog = Catalog(settings.data_dir, now=time.time, quarantine_days=settings.quarantine_days)
        catalog.sweep()
    metrics = Metrics(settings.data_dir / METRICS, "trainer")
    logs.configure(settings.log_format, process=metrics.process)
    if not supervised:
        _warn_about_jobs(catalog, base)
    tracing = open_tracing(settings, process=metrics.process)
    try:
        Trainer(
            catalog,
            open_queue(catalog, settings),
            base,
            open_fitter(settings),
            stop=stop,
            lease_seconds=settings.lease_seconds,
            checkpoints=settings.data_dir / CHECKPOINTS,
            listener=listener(metrics, tracing),
        ).run()
    finally:
        catalog.close()
        metrics.close()
        if tracing is not None:
            tracing.close(_SECONDS_TO_CLOSE)


def main() -> None:
    """Run jobs until SIGTERM, or until the supervisor has ended."""
    stop = stop_on_signals()
    on_parent_exit(stop.set)
    run_trainer(load_settings(), stop, supervised=True)


def _warn_about_jobs(catalog: Catalog, base: BaseLayer) -> None:
    try:
        warn_about_jobs(catalog.database, base)
    except CatalogBusy as error:
        log.warning("%s", error.detail)
