"""One process that trains."""

import logging
import sys
import threading
import time

import torch

from adapters.catalog.catalog import Catalog
from adapters.errors import BaseNotLoadable, CatalogBusy, CatalogNotLoadable
from adapters.lora.base_layer import BaseLayer
from adapters.training.execution.trainer import Trainer
from app.bootstrap import CHECKPOINTS, load_base, open_fitter, open_queue, open_tracing, warn_about_jobs
from app.observability import logs
from app.observability.metrics.process_slot import METRICS
from app.observability.metrics.recorder import Metrics
from app.observability.training import listener
from app.processes.signals import EXIT_CONFIG, stop_on_signals, when_parent_ends
from app.settings import Settings, load_settings

_SECONDS_TO_CLOSE = 1.0

log = logging.getLogger(__name__)


def run_trainer(settings: Settings, stop: threading.Event, *, supervised: bool = False) -> None:
    """Train what is in the queue until `stop` is set; `supervised`: for a service, whose first worker logs warnings."""
    logs.configure(settings.log_format, process="trainer")
    torch.set_num_threads(1)
    try:
        base = load_base(settings)
        catalog = Catalog(settings.data_dir, now=time.time, quarantine_days=settings.quarantine_days)
        catalog.sweep()
    except (BaseNotLoadable, CatalogNotLoadable) as error:
        print(f"loraplex: {error.detail}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    except (IsADirectoryError, NotADirectoryError) as error:
        print(f"loraplex: the data folder {settings.data_dir} cannot be used: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    metrics = Metrics.open(settings.data_dir / METRICS, "trainer")
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
        metrics.close()
        if tracing is not None:
            tracing.close(_SECONDS_TO_CLOSE)


def main() -> None:
    """Train until SIGTERM or until the supervisor is gone; settings in the environment."""
    stop = stop_on_signals()
    when_parent_ends(stop.set)
    run_trainer(load_settings(), stop, supervised=True)


def _warn_about_jobs(catalog: Catalog, base: BaseLayer) -> None:
    try:
        warn_about_jobs(catalog.database, base)
    except CatalogBusy as error:
        log.warning("%s", error.detail)
