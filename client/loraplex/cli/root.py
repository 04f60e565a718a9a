"""Root of the command line, with the commands `base` and `status`."""

from collections.abc import Iterable
from importlib.metadata import version
from typing import Annotated

import typer

from loraplex.cli import adapters, datasets, jobs
from loraplex.cli import predict as predicting
from loraplex.cli import train as training
from loraplex.cli.errors import REFUSED
from loraplex.cli.plugins import PANEL, RootGroup
from loraplex.cli.session import AsJson, Given, Session, Url, command
from loraplex.cli.summary import pairs
from loraplex.results import Base, JobStatus


def _register_status(cli: typer.Typer, *, panel: str) -> None:

    @command(cli, "base", panel=panel)
    def base(session: Session) -> None:
        """Show the base layer."""
        found: Base = session.client.base()
        about = {
            "source": found.source,
            "numbers in": found.in_features,
            "numbers out": found.out_features,
            "bias": "yes" if found.bias else "no",
            "held in": f"{found.dtype} on {found.device}",
            "encoder": found.feature_space,
            "fingerprint": found.fingerprint,
        }
        session.give(found, pairs(about))

    @command(cli, "status", panel=panel)
    def status(session: Session) -> None:
        """Show whether the service answers, with the number of its adapters and jobs."""
        client = session.client
        found = client.base()
        ready = client.ready()
        counts = {
            "adapters": _count(client.adapters()),
            "jobs_running": _count(client.jobs(status=JobStatus.RUNNING)),
            "jobs_queued": _count(client.jobs(status=JobStatus.QUEUED)),
        }
        about = {
            "service": session.url,
            "ready": "yes" if ready else "no: it is starting or stopping",
            "base layer": f"{found.source}, {found.in_features} numbers in, {found.out_features} out",
            **{name.replace("_", " "): f"{count:,}" for name, count in counts.items()},
        }
        session.give({"url": session.url, "ready": ready, "base": found, **counts}, pairs(about))
        if not ready:
            raise typer.Exit(REFUSED)


def _count(found: Iterable[object]) -> int:
    return sum(1 for _ in found)


cli = typer.Typer(
    help="Train, use and manage named LoRA adapters of one frozen linear layer.",
    cls=RootGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"loraplex {version('loraplex')}")
        raise typer.Exit


@cli.callback()
def root(
    ctx: typer.Context,
    url: Url = None,
    as_json: AsJson = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Read the options before the command."""
    ctx.obj = Given(url=url, as_json=as_json)


training.register(cli, panel="Train and ask")
predicting.register(cli, panel="Train and ask")
adapters.register(cli, panel="Adapters")
jobs.register(cli, panel="Jobs and data sets")
datasets.register(cli, panel="Jobs and data sets")
_register_status(cli, panel=PANEL)


def run() -> None:
    """Run the command line."""
    cli(prog_name="loraplex")
