"""One process that trains."""

import sys
import threading
import time

import torch

from adapters.catalog import Catalog
from adapters.errors import BaseNotLoadable, CatalogNotLoadable
from adapters.training.trainer import Trainer
from app import logs
from app.lifecycle import EXIT_CONFIG, stop_on_signals, when_parent_ends
from app.opening import CHECKPOINTS, load_base, open_fitter, open_queue
from app.settings import Settings, load_settings


def run_trainer(settings: Settings, stop: threading.Event) -> None:
    """Train what is in the queue until `stop` is set."""
    logs.configure()
    torch.set_num_threads(1)
    try:
        base = load_base(settings)
        catalog = Catalog(settings.data_dir, now=time.time)
    except (BaseNotLoadable, CatalogNotLoadable) as error:
        print(f"loraplex: {error.detail}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    catalog.sweep()
    Trainer(
        catalog,
        open_queue(catalog, settings),
        base,
        open_fitter(settings),
        stop=stop,
        lease_seconds=settings.lease_seconds,
        checkpoints=settings.data_dir / CHECKPOINTS,
    ).run()


def main() -> None:
    """Train until SIGTERM or until the supervisor is gone: `python -m app.trainer`, settings in the environment."""
    stop = stop_on_signals()
    when_parent_ends(stop.set)
    run_trainer(load_settings(), stop)


if __name__ == "__main__":
    main()
