"""Commands `loraplex serve` and `loraplex trainer`, which the client's command line loads as plugins."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import CatalogNotLoadable
from app.observability import logs
from app.processes.signals import EXIT_CONFIG, stop_on_signals
from app.processes.store_guard import guarded_store
from app.settings import Settings, SettingsError, load_settings

Base = Annotated[str | None, typer.Option(help=str(Settings.model_fields["base"].description))]
AcceptCatalog = Annotated[
    bool,
    typer.Option(
        "--accept-catalog",
        help="Start although the catalogue and the blobs do not belong together: take the catalogue as it is, make it "
        "if it is missing, and move the blobs that it does not refer to into quarantine.",
    ),
]
DataDir = Annotated[Path | None, typer.Option(help=str(Settings.model_fields["data_dir"].description))]


def _option(name: str) -> Any:
    return typer.Option(help=Settings.model_fields[name].description)


def serve(
    base: Base = None,
    data_dir: DataDir = None,
    host: Annotated[str | None, _option("host")] = None,
    port: Annotated[int | None, _option("port")] = None,
    workers: Annotated[int | None, _option("workers")] = None,
    trainers: Annotated[int | None, _option("trainers")] = None,
    accept_catalog: AcceptCatalog = False,
) -> None:
    """Answer requests and train, until SIGTERM. Every other setting is an environment variable."""
    from app.processes.supervisor import serve as run  # imported late, because `loraplex --help` loads this module

    options = {"base": base, "data_dir": data_dir, "host": host, "port": port, "workers": workers, "trainers": trainers}
    try:
        settings = load_settings(options)
        logs.configure(settings.log_format, process="supervisor")
        with guarded_store(settings, accept_catalog=accept_catalog):
            status = run(settings)
        sys.exit(status)
    except (SettingsError, CatalogNotLoadable) as error:
        _refuse(error)


def trainer(base: Base = None, data_dir: DataDir = None, accept_catalog: AcceptCatalog = False) -> None:
    """Only train, until SIGTERM: for a service that runs `serve --trainers 0` on the same data folder."""
    try:
        settings = load_settings({"base": base, "data_dir": data_dir})
        logs.configure(settings.log_format, process="trainer")
        with guarded_store(settings, accept_catalog=accept_catalog):
            from app.processes.trainer import (
                run_trainer,  # imported late, because it loads torch: a start that is refused need not wait for it
            )

            run_trainer(settings, stop_on_signals())
    except (SettingsError, CatalogNotLoadable) as error:
        _refuse(error)


def _refuse(error: SettingsError | CatalogNotLoadable) -> None:
    print(f"loraplex: {error}", file=sys.stderr)
    sys.exit(EXIT_CONFIG)
