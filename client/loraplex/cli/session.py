"""Commands with a session: the client and the printer of results; and the options that several commands share.

Results go to standard output, as tables or, with `--json`, as JSON. Everything else goes to standard error.
"""

import inspect
import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields, is_dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, TypeVar
from urllib.parse import quote

import typer

from loraplex.calls import DEFAULT_URL, URL_VARIABLE, address
from loraplex.cli.errors import REFUSED, WrongUsage, reported
from loraplex.cli.output import console, plain
from loraplex.cli.profiles import Profile, find_profile
from loraplex.errors import InvalidInput, LoraplexError
from loraplex.progress import escape

if TYPE_CHECKING:
    from rich.console import RenderableType

    from loraplex import Client

# Few retries, because a user waits: an unreachable service is reported within two seconds.
RETRIES = 2
_COMPLETION_SECONDS = 0.5
_MAX_COMPLETIONS = 50


class Session:
    """One run of one command."""

    def __init__(
        self, *, url: str | None, as_json: bool, profile: str | None = None, tenant: str | None = None
    ) -> None:
        self.given_url = url
        self.given_tenant = tenant
        self.profile = profile
        self.as_json = as_json

    @cached_property
    def service(self) -> Profile:
        """Return the address of the service and the key for it; raise `WrongUsage` and `BadFile`."""
        return find_profile(self.profile, url=self.given_url)

    @property
    def url(self) -> str:
        """Return the address of the service."""
        return self.service.url

    @property
    def url_for_hints(self) -> str:
        """Return the address of the service, also if its profile cannot be read."""
        try:
            return self.url
        except LoraplexError:
            return address(self.given_url)

    @cached_property
    def client(self) -> "Client":
        """Return the client, which is created on first use."""
        from loraplex import Client  # imports httpx and numpy

        try:
            tenant = self.given_tenant or self.service.tenant
            return Client(self.url, key=self.service.key, tenant=tenant, retries=RETRIES)
        except InvalidInput as error:
            raise WrongUsage(f"{error.detail}: say it by --url or {URL_VARIABLE}, such as {DEFAULT_URL}") from None

    def note(self, text: str) -> None:
        """Print a note that is not part of the result; with `--json`, print nothing."""
        if not self.as_json:
            print(escape(text), file=sys.stderr, flush=True)

    def give(self, value: object, *shown: "RenderableType") -> None:
        """Print the result: `value` as one JSON document (ASCII, for any locale), or its display for people."""
        if self.as_json:
            self.give_json(value, indent=2)
            return
        printer = console(stderr=False)
        for part in shown:
            printer.print(escape(part) if isinstance(part, str) else part, crop=False)

    def give_json(self, value: object, *, indent: int | None = None) -> None:
        """Print JSON, in one line without `indent`."""
        print(json.dumps(plain(value), indent=indent), flush=True)

    def close(self) -> None:
        """Close the connections of the client."""
        if "client" in self.__dict__:
            self.client.close()


# Command function whose first parameter is its session.
Function = TypeVar("Function", bound=Callable[Concatenate[Session, ...], None])


def option(text: str, *names: str, panel: str | None = None, **settings: Any) -> Any:
    """Return the declaration of an option with its help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


def argument(metavar: str, text: str, *, show_default: bool | str = False, **settings: Any) -> Any:
    """Return the declaration of an argument with its help."""
    return typer.Argument(metavar=metavar, help=text, show_default=show_default, **settings)


_URL_HELP = f"Where the service answers, instead of {URL_VARIABLE} or {DEFAULT_URL}."
Url = Annotated[str | None, option(_URL_HELP, "--url", metavar="URL")]
_PROFILE_HELP = "Profile with the address and the key, which `loraplex login` makes."
ProfileName = Annotated[str | None, option(_PROFILE_HELP, "--profile", metavar="NAME")]
_TENANT_HELP = "Tenant that an operator acts for, instead of that of the profile or `default`."
TenantName = Annotated[str | None, option(_TENANT_HELP, "--tenant", metavar="NAME")]
AsJson = Annotated[bool, option("Print JSON instead of tables.", "--json")]
Yes = Annotated[bool, option("Do not ask for confirmation.", "--yes", "-y")]


def command(
    app: typer.Typer, name: str, *, panel: str | None = None, example: str | None = None
) -> Callable[[Function], Function]:
    """Register a function as a command with a session and the options that all commands share.

    The fields of a parameter that is a dataclass are options too.
    """

    def register(function: Function) -> Function:
        _, *own = inspect.signature(function).parameters.values()
        groups: dict[str, Any] = {one.name: one.annotation for one in own if is_dataclass(one.annotation)}

        def run(
            ctx: typer.Context,
            *,
            url: Url = None,
            profile: ProfileName = None,
            tenant: TenantName = None,
            as_json: AsJson = False,
            **arguments: Any,
        ) -> None:
            before = ctx.find_root().params
            session = Session(
                url=url or before["url"],
                profile=profile or before["profile"],
                tenant=tenant or before["tenant"],
                as_json=as_json or before["as_json"],
            )
            with closing(session), reported(session.url_for_hints, as_json=session.as_json):
                for group, kind in groups.items():
                    arguments[group] = kind(**{field.name: arguments.pop(field.name) for field in fields(kind)})
                function(session, **arguments)

        context, *shared, _ = inspect.signature(run).parameters.values()
        options = chain.from_iterable(
            inspect.signature(one.annotation).parameters.values() if one.name in groups else [one] for one in own
        )
        run.__signature__ = inspect.Signature([context, *options, *shared])  # type: ignore[attr-defined]  # for typer
        app.command(name, help=inspect.getdoc(function), epilog=example, rich_help_panel=panel)(run)
        return function

    return register


def confirm(question: str, *, yes: bool) -> None:
    """Ask for confirmation on a terminal; exit if the answer is no, or if there is no terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise WrongUsage(f"{question} There is no terminal to ask on: add --yes.")
    if not typer.confirm(question, err=True):
        raise typer.Exit(REFUSED)


def complete_adapter(incomplete: str) -> list[str]:
    """Return adapters whose names begin with the text."""
    return _first("name", f"adapters?prefix={quote(incomplete)}")


def complete_dataset(incomplete: str) -> list[str]:
    """Return data sets whose names begin with the text."""
    return _first("name", f"datasets?prefix={quote(incomplete)}")


def complete_job(incomplete: str) -> list[str]:
    """Return ids of the newest jobs that begin with the text."""
    return [job_id for job_id in _first("id", "jobs?") if job_id.startswith(incomplete)]


def _first(member: str, path: str) -> list[str]:
    """Return a member of each of the first items of a list of the service; nothing if it does not answer."""
    # The client is not used, because its import would delay each completion.
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    try:
        service = find_profile(None, url=None)
        request = Request(f"{service.url.rstrip('/')}/{path}&limit={_MAX_COMPLETIONS}")
        if service.key is not None:
            request.add_header("Authorization", f"Bearer {service.key}")
        if service.tenant is not None:
            request.add_header("X-Tenant", service.tenant)
        with urlopen(request, timeout=_COMPLETION_SECONDS) as answer:
            return [str(item[member]) for item in json.load(answer)["data"]]
    except (LoraplexError, OSError, HTTPException, ValueError, KeyError, TypeError):
        return []
