"""Commands `loraplex serve` and `loraplex trainer`, which the client's command line loads as plugins."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.child_process import stop_on_signals
from app.observability import logs
from app.processes.store_guard import guarded_store
from app.settings import description_of, exit_if_unusable, load_settings


def _option(name: str) -> Any:
    return typer.Option(help=description_of(name))


Base = Annotated[str | None, _option("base")]
DataDir = Annotated[Path | None, _option("data_dir")]
AcceptCatalog = Annotated[
    bool,
    typer.Option(
        "--accept-catalog",
        help="Start although the catalogue and the blobs do not belong together: take the catalogue as it is, make it "
        "if it is missing, and move the blobs that it does not refer to into quarantine.",
    ),
]


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
    with exit_if_unusable():
        settings = load_settings(options)
        logs.configure(settings.log_format, process="supervisor")
        with guarded_store(settings, accept_catalog=accept_catalog):
            status = run(settings)
    sys.exit(status)


def trainer(base: Base = None, data_dir: DataDir = None, accept_catalog: AcceptCatalog = False) -> None:
    """Only train, until SIGTERM: for a service that runs `serve --trainers 0` on the same data folder."""
    with exit_if_unusable():
        settings = load_settings({"base": base, "data_dir": data_dir})
        logs.configure(settings.log_format, process="trainer")
        with guarded_store(settings, accept_catalog=accept_catalog):
            # Imported late, because it loads torch, and a start that is refused need not wait for it.
            from app.processes.trainer import run_trainer

            run_trainer(settings, stop_on_signals())
