"""Root of the command line: `status`, and the commands of the other modules and of other distributions."""

import sys
from collections.abc import Iterable
from contextlib import suppress
from getpass import getpass
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from loraplex.calls import address
from loraplex.cli import adapters, base, datasets, jobs, tenants
from loraplex.cli import evaluate as evaluating
from loraplex.cli import predict as predicting
from loraplex.cli import train as training
from loraplex.cli.errors import REFUSED, WrongUsage
from loraplex.cli.output import pairs
from loraplex.cli.profiles import DEFAULT_PROFILE, Profile, read_profiles, store_profile
from loraplex.cli.session import RETRIES, AsJson, ProfileName, Session, TenantName, Url, command
from loraplex.errors import Forbidden
from loraplex.results import JobStatus

_PANEL = "The service"
# Entry points of this group are functions for Typer, or groups of them. They are imported when they run, because their
# imports are slow, and because the working directory may have a package of the same name.
_GROUP = "loraplex.commands"
_HELP = {
    "backup": "Write the data folder to one file while the service runs.",
    "doctor": "Check the data folder, and repair it.",
    "gc": "Remove what is due from the trash, the quarantine and the usage.",
    "migrate": "Copy a data folder to PostgreSQL and a bucket, or back.",
    "restore": "Create a data folder from a backup.",
    "serve": "Answer requests and train, until SIGTERM.",
    "keys": "Create, list and revoke keys, in the data folder itself.",
    "trainer": "Only train, until SIGTERM: for a service that runs apart on the same data folder.",
}


class _RootGroup(TyperGroup):
    """Group of the client's commands and of the installed ones."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        return [*super().list_commands(ctx), *sorted(entry.name for entry in entry_points(group=_GROUP))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by its name; None if there is none."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for entry in entry_points(group=_GROUP, name=cmd_name):
            return _InstalledCommand(entry)
        if cmd_name in _HELP:
            ctx.fail(f"'{cmd_name}' comes with the service, which is not installed: pip install 'loraplex[server]'.")
        return None


class _InstalledCommand(TyperCommand):
    """Placeholder for a command of another distribution until it runs."""

    def __init__(self, entry: EntryPoint) -> None:
        help_text = _HELP.get(entry.name, f"From {entry.module}.")
        super().__init__(entry.name, help=help_text, rich_help_panel=_PANEL)
        self._entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the command itself."""
        entry = self._entry
        try:
            target = entry.load()
        except Exception as error:
            package = entry.module.partition(".")[0]
            advice = f"Where PYTHONPATH leads to another package called {package}, unset it."
            print(f"loraplex: cannot load {entry.value}: {error}. {advice}", file=sys.stderr)
            raise SystemExit(REFUSED) from error
        if not isinstance(target, typer.Typer):
            app = typer.Typer(add_completion=False)
            app.command(entry.name)(target)
            target = app
        return get_command(target).make_context(info_name, args, parent=parent, **extra)


cli = typer.Typer(
    help="Train, use and manage named LoRA adapters of one frozen linear layer.",
    cls=_RootGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_service = typer.Typer()


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"loraplex {version('loraplex')}")
        raise typer.Exit


@cli.callback()
def root(
    url: Url = None,
    profile: ProfileName = None,
    tenant: TenantName = None,
    as_json: AsJson = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Read the options before the command; `command` looks them up."""


@command(_service, "status", panel=_PANEL)
def status(session: Session) -> None:
    """Show whether the service answers, with the number of its adapters and jobs."""
    client = session.client
    layer = client.base()
    is_ready = client.ready()
    lists: dict[str, Iterable[object]] = {
        "adapters": client.adapters(),
        "jobs_running": client.jobs(status=JobStatus.RUNNING),
        "jobs_queued": client.jobs(status=JobStatus.QUEUED),
    }
    counts = {name: sum(1 for _ in items) for name, items in lists.items()}
    about = {
        "service": session.url,
        "ready": "yes" if is_ready else "no: it is starting or stopping",
        "base layer": f"{layer.source}, {layer.in_features} numbers in, {layer.out_features} out",
        **{name.replace("_", " "): f"{count:,}" for name, count in counts.items()},
    }
    session.give({"url": session.url, "ready": is_ready, "base": layer, **counts}, pairs(about))
    if not is_ready:
        raise typer.Exit(REFUSED)


@command(_service, "login", panel=_PANEL)
def login(session: Session) -> None:
    """Ask for a key of the service at `--url`, check it, and keep both as a profile (`--profile`, else `default`).

    An operator's profile can have a tenant too (`--tenant`). The key is not shown. Without a terminal, it is read from
    standard input.
    """
    from loraplex import Client

    name = session.profile or DEFAULT_PROFILE
    known = read_profiles().get(name)
    url = known.url if session.given_url is None and known is not None else address(session.given_url)
    key = _ask_for_key(url)
    # A key that may not read is a key all the same.
    tenant = session.given_tenant
    with Client(url, key=key, tenant=tenant, retries=RETRIES) as client, suppress(Forbidden):
        client.base()
    file = store_profile(name, Profile(url, key, tenant))
    said = f"The key for {url} is in {file}. Use it: loraplex --profile {name} status"
    session.give({"profile": name, "url": url, "file": str(file)}, said)


def _ask_for_key(url: str) -> str:
    asked = getpass(f"Key for {url}: ", sys.stderr) if sys.stdin.isatty() else sys.stdin.readline()
    key = asked.strip()
    if not key:
        raise WrongUsage("No key was given.")
    return key


for commands in (training.app, predicting.app, evaluating.app, adapters.app, jobs.app, tenants.reports_app, _service):
    cli.add_typer(commands)
cli.add_typer(base.app, name="base", rich_help_panel=_PANEL)
cli.add_typer(datasets.app, name="dataset", rich_help_panel=jobs.PANEL)
cli.add_typer(tenants.app, name="tenants", rich_help_panel=_PANEL)
