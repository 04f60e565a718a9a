"""Commands that other distributions bring: `serve` and `trainer`, where the service is installed."""

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from loraplex.cli.exit_codes import REFUSED

GROUP = "loraplex.commands"
"""Entry points of this group are functions as Typer takes them. They are imported when they are run, not before: what
they need takes long to import, and the folder that one works in may have a package of the same name."""
PANEL = "The service"
_HELP = {
    "serve": "Answer requests and train, until SIGTERM.",
    "trainer": "Only train, until SIGTERM: for a service that runs apart on the same data folder.",
}


class RootGroup(TyperGroup):
    """Our own commands, and those that are installed beside us."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all."""
        return [*super().list_commands(ctx), *_installed()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by its name, None where there is none."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        entry = _installed().get(cmd_name)
        if entry is None and cmd_name in _HELP:
            ctx.fail(f"'{cmd_name}' comes with the service, which is not installed: pip install 'loraplex[server]'.")
        return None if entry is None else _Installed(entry)


class _Installed(TyperCommand):
    """Stands in for a command until it is run."""

    def __init__(self, entry: EntryPoint) -> None:
        help_text = _HELP.get(entry.name, f"From {entry.value.partition(':')[0]}.")
        super().__init__(entry.name, help=help_text, rich_help_panel=PANEL)
        self._entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command itself."""
        return _load(self._entry).make_context(info_name, args, parent=parent, **extra)


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def _load(entry: EntryPoint) -> Any:
    try:
        function = entry.load()
    except Exception as error:
        package = entry.module.partition(".")[0]
        print(
            f"loraplex: cannot load {entry.value}: {error}. Where PYTHONPATH leads to another package called "
            f"{package}, unset it.",
            file=sys.stderr,
        )
        raise SystemExit(REFUSED) from error
    app = typer.Typer(add_completion=False)
    app.command(entry.name)(function)
    return get_command(app)
