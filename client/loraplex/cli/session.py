"""What every command has: the service, and where results, notes and errors go.

Results go to standard output, as a table for people or, with `--json`, as JSON for machines. Everything else goes to
standard error.
"""

import inspect
import json
import sys
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec

import typer

from loraplex.address import DEFAULT_URL, URL_VARIABLE, address
from loraplex.cli import errors as failures
from loraplex.cli.exit_codes import REFUSED
from loraplex.cli.json_output import plain
from loraplex.errors import InvalidInput
from loraplex.sanitize import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from loraplex.client import Client

_RETRIES = 2
"""Somebody waits: a service that is not there is said to be so within a second or two."""
_NARROWEST = 80
"""A narrower terminal breaks the lines of a table itself: columns of no width would lose what they hold."""
P = ParamSpec("P")

Url = Annotated[
    str | None,
    typer.Option(
        "--url", help=f"Where the service answers, instead of {URL_VARIABLE} or {DEFAULT_URL}.", metavar="URL"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for machines instead of tables for people.")]


class Session:
    """One run of one command."""

    def __init__(self, *, url: str | None, as_json: bool) -> None:
        self.url = address(url)
        self.as_json = as_json

    @cached_property
    def client(self) -> "Client":
        """The client, made when it is first needed."""
        from loraplex.client import Client  # imports httpx and numpy

        try:
            return Client(self.url, retries=_RETRIES)
        except InvalidInput as error:
            raise failures.WrongUsage(
                f"{error.detail}: say it by --url or {URL_VARIABLE}, such as {DEFAULT_URL}"
            ) from None

    @cached_property
    def out(self) -> "Console":
        """Standard output."""
        return console(stderr=False)

    @cached_property
    def err(self) -> "Console":
        """Standard error."""
        return console(stderr=True)

    def say(self, text: str) -> None:
        """A note for people that is no part of the result; machines get none, so that what they read is JSON."""
        if not self.as_json:
            print(visible(text), file=sys.stderr, flush=True)

    def give(self, value: object, *shown: "RenderableType") -> None:
        """The result: `value` as one JSON document, in ASCII so that any locale has it, or what people are shown."""
        if self.as_json:
            print(json.dumps(plain(value), indent=2), flush=True)
        else:
            for each in shown:
                self.out.print(each, crop=False)

    def give_line(self, value: object) -> None:
        """One JSON line of many."""
        print(json.dumps(plain(value)), flush=True)

    def close(self) -> None:
        """Close the client's connections, where there is one."""
        if "client" in self.__dict__:
            self.client.close()


class Given:
    """The options that stood before the command, where they may stand too."""

    def __init__(self, *, url: str | None = None, as_json: bool = False) -> None:
        self.url = url
        self.as_json = as_json


def console(*, stderr: bool) -> "Console":
    """A console that styles and wraps on a terminal only: what is piped keeps each row on its line."""
    from rich.console import Console

    class Visible(Console):
        def render_str(self, text: str, **how: Any) -> "Text":
            return super().render_str(visible(text), **how)

    stream = sys.stderr if stderr else sys.stdout
    made = Visible(stderr=stderr, width=None if stream.isatty() else 10_000, highlight=False, markup=False, emoji=False)
    if not stderr and made.width < _NARROWEST:
        made.width = _NARROWEST
    return made


def command(
    app: typer.Typer, name: str, *, panel: str | None = None, example: str | None = None
) -> Callable[[Callable[Concatenate[Session, P], None]], Callable[..., None]]:
    """Register a function as a command: it gets a session, and the command gets `--url` and `--json`."""

    def register(function: Callable[Concatenate[Session, P], None]) -> Callable[..., None]:
        def run(ctx: typer.Context, *args: P.args, **kwargs: P.kwargs) -> None:
            url, as_json = kwargs.pop("url"), kwargs.pop("as_json")
            before = ctx.find_object(Given) or Given()
            session = Session(url=str(url) if url else before.url, as_json=bool(as_json) or before.as_json)
            try:
                with failures.told(session.url, as_json=session.as_json):
                    function(session, *args, **kwargs)
            finally:
                session.close()

        given, *own = inspect.signature(function, eval_str=True).parameters.values()
        del given
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        shared = [
            inspect.Parameter("url", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Url),
            inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson),
        ]
        keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        signature = inspect.Signature([context, *keywords, *shared])
        run.__signature__ = signature  # type: ignore[attr-defined]  # what Typer reads
        run.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
        app.command(name, help=inspect.getdoc(function), epilog=example, rich_help_panel=panel)(run)
        return run

    return register


def confirm(question: str, *, yes: bool) -> None:
    """Ask on a terminal; ends the command where the answer is no, or nobody can be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise failures.WrongUsage(f"{question} Nobody can be asked here: say --yes.")
    if not typer.confirm(question, err=True):
        raise typer.Exit(REFUSED)


def plural(count: int, one: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {one}{'' if count == 1 else 's'}"
