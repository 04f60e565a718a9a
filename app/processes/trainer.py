"""Trainer: a process that runs the jobs in the queue."""

import threading
from functools import partial

import torch

from adapters.child_process import on_parent_exit, stop_on_signals
from adapters.training.execution.trainer import Trainer
from app import bootstrap
from app.observability import logs
from app.observability.metrics.process_slot import METRICS
from app.observability.metrics.recorder import Metrics
from app.observability.training import listener
from app.settings import Settings, exit_if_unusable, load_settings

_SECONDS_TO_CLOSE = 1.0


def run_trainer(settings: Settings, stop: threading.Event, *, supervised: bool = False) -> None:
    """Run jobs until `stop` is set. The trainer of a supervised service leaves the warnings to the first worker."""
    logs.configure(settings.log_format, process="trainer")
    torch.set_num_threads(1)
    with exit_if_unusable():
        base = bootstrap.load_base(settings)
        catalog = bootstrap.open_catalog(settings)
    metrics = Metrics(settings.data_dir / METRICS, "trainer")
    logs.configure(settings.log_format, process=metrics.process)
    bootstrap.sweep_in_background(catalog)
    if not supervised:
        bootstrap.warn_in_background(partial(bootstrap.warn_about_jobs, catalog.database, base))
    tracing = bootstrap.open_tracing(settings, process=metrics.process)
    try:
        Trainer(
            catalog,
            bootstrap.open_queue(catalog, settings),
            base,
            bootstrap.open_fitter(settings),
            stop=stop,
            lease_seconds=settings.lease_seconds,
            checkpoints=bootstrap.open_checkpoints(catalog, settings),
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
