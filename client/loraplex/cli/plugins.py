"""Commands of other distributions (`serve` and `trainer` of the service), and shell completion of names."""

import json
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any
from urllib.parse import quote

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from loraplex.address import address
from loraplex.cli.errors import REFUSED

# Entry points of this group are Typer functions. They are imported when they run, because their imports are slow, and
# because the working directory may have a package of the same name.
GROUP = "loraplex.commands"
PANEL = "The service"
_HELP = {
    "serve": "Answer requests and train, until SIGTERM.",
    "trainer": "Only train, until SIGTERM: for a service that runs apart on the same data folder.",
}


class RootGroup(TyperGroup):
    """Group of the client's commands and of the installed ones."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        return [*super().list_commands(ctx), *_installed()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by its name; None if there is none."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        entry = _installed().get(cmd_name)
        if entry is None and cmd_name in _HELP:
            ctx.fail(f"'{cmd_name}' comes with the service, which is not installed: pip install 'loraplex[server]'.")
        return None if entry is None else _Installed(entry)


class _Installed(TyperCommand):
    """Placeholder for a command until it runs."""

    def __init__(self, entry: EntryPoint) -> None:
        help_text = _HELP.get(entry.name, f"From {entry.value.partition(':')[0]}.")
        super().__init__(entry.name, help=help_text, rich_help_panel=PANEL)
        self._entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the command itself."""
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


_SECONDS = 0.5
_MOST = 50


def complete_adapter(incomplete: str) -> list[str]:
    """Return adapters whose names begin with the text."""
    return _names("adapters", incomplete)


def complete_dataset(incomplete: str) -> list[str]:
    """Return data sets whose names begin with the text."""
    return _names("datasets", incomplete)


def complete_job(incomplete: str) -> list[str]:
    """Return ids of the newest jobs that begin with the text."""
    return [found for found in _ask("jobs?limit=50", "id") if found.startswith(incomplete)]


def _names(kind: str, incomplete: str) -> list[str]:
    return _ask(f"{kind}?limit={_MOST}&prefix={quote(incomplete)}", "name")


def _ask(path: str, member: str) -> list[str]:
    # The client is not used, because its import would delay each completion.
    from http.client import HTTPException
    from urllib.request import urlopen

    try:
        with urlopen(f"{address().rstrip('/')}/{path}", timeout=_SECONDS) as answer:
            return [str(found[member]) for found in json.load(answer)["data"]]
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return []
