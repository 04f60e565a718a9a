"""Root of the command line."""

from importlib.metadata import version
from typing import Annotated

import typer

from loraplex.cli import adapters, datasets, jobs, service
from loraplex.cli import predict as predicting
from loraplex.cli import train as training
from loraplex.cli.plugins import PANEL, RootGroup
from loraplex.cli.session import AsJson, Given, Url

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
service.register(cli, panel=PANEL)


def run() -> None:
    """Run the command line."""
    cli(prog_name="loraplex")
