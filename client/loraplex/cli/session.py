"""Session of a command: the client, and the streams for results, notes and errors.

Results go to standard output, as a table or, with `--json`, as JSON. Everything else goes to standard error.
"""

import inspect
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec

import typer

from loraplex.address import DEFAULT_URL, URL_VARIABLE, address
from loraplex.cli import errors as failures
from loraplex.cli.errors import REFUSED, Interrupted
from loraplex.cli.json_output import plain
from loraplex.errors import BadAnswer, InvalidInput, JobCancelled, JobFailed, QueueFull, TimedOut, Unreachable
from loraplex.progress import Display, display
from loraplex.results import JobFields
from loraplex.sanitize import escape

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from loraplex import Client

# Few retries, because a user waits: an unreachable service is reported within two seconds.
_RETRIES = 2
# A narrower terminal breaks the lines of a table itself, because columns without width would lose their content.
_NARROWEST = 80
P = ParamSpec("P")

Url = Annotated[
    str | None,
    typer.Option(
        "--url", help=f"Where the service answers, instead of {URL_VARIABLE} or {DEFAULT_URL}.", metavar="URL"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


class Session:
    """One run of one command."""

    def __init__(self, *, url: str | None, as_json: bool) -> None:
        self.url = address(url)
        self.as_json = as_json

    @cached_property
    def client(self) -> "Client":
        """Return the client, which is created on first use."""
        from loraplex import Client  # imports httpx and numpy

        try:
            return Client(self.url, retries=_RETRIES)
        except InvalidInput as error:
            raise failures.WrongUsage(
                f"{error.detail}: say it by --url or {URL_VARIABLE}, such as {DEFAULT_URL}"
            ) from None

    @cached_property
    def out(self) -> "Console":
        """Return the console of standard output."""
        return console(stderr=False)

    @cached_property
    def err(self) -> "Console":
        """Return the console of standard error."""
        return console(stderr=True)

    def say(self, text: str) -> None:
        """Print a note that is not part of the result; with `--json`, print nothing."""
        if not self.as_json:
            print(escape(text), file=sys.stderr, flush=True)

    def give(self, value: object, *shown: "RenderableType") -> None:
        """Print the result: `value` as one JSON document (ASCII, for any locale), or its display for people."""
        if self.as_json:
            print(json.dumps(plain(value), indent=2), flush=True)
        else:
            for each in shown:
                self.out.print(each, crop=False)

    def give_line(self, value: object) -> None:
        """Print one line of JSON."""
        print(json.dumps(plain(value)), flush=True)

    def close(self) -> None:
        """Close the connections of the client."""
        if "client" in self.__dict__:
            self.client.close()


class Given:
    """Options before the command, which may also follow it."""

    def __init__(self, *, url: str | None = None, as_json: bool = False) -> None:
        self.url = url
        self.as_json = as_json


def console(*, stderr: bool) -> "Console":
    """Return a console that styles and wraps only on a terminal, so that piped rows keep their lines."""
    from rich.console import Console

    class Visible(Console):
        def render_str(self, text: str, **how: Any) -> "Text":
            return super().render_str(escape(text), **how)

    stream = sys.stderr if stderr else sys.stdout
    made = Visible(stderr=stderr, width=None if stream.isatty() else 10_000, highlight=False, markup=False, emoji=False)
    if not stderr and made.width < _NARROWEST:
        made.width = _NARROWEST
    return made


def command(
    app: typer.Typer, name: str, *, panel: str | None = None, example: str | None = None
) -> Callable[[Callable[Concatenate[Session, P], None]], Callable[..., None]]:
    """Register a function as a command with a session and the options `--url` and `--json`."""

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
    """Ask for confirmation on a terminal; exit if the answer is no, or if there is no terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise failures.WrongUsage(f"{question} Nobody can be asked here: say --yes.")
    if not typer.confirm(question, err=True):
        raise typer.Exit(REFUSED)


def plural(count: int, one: str) -> str:
    """Return `1 row`, `2 rows`."""
    return f"{count:,} {one}{'' if count == 1 else 's'}"


# Errors after which `wait` polls the job, because it has no event stream.
_NO_EVENTS = (QueueFull, TimedOut, Unreachable, BadAnswer)


def follow(session: Session, job_id: str) -> JobFields:
    """Follow a job until it ends, and return it; its progress is displayed.

    Raises `Interrupted` on Ctrl-C; the job continues.
    """
    with _going_on(job_id), _unwinding_on_sigterm():
        return _ended(session, job_id, Display() if session.as_json else display(session.err))


def follow_in_lines(session: Session, job_id: str) -> JobFields:
    """Follow a job until it ends, and print each event as a line of JSON, or only the end if there are no events."""
    with _going_on(job_id):
        try:
            for event in session.client.events(job_id):
                session.give_line({"event": event.name, "data": event.data, "id": event.id})
        except _NO_EVENTS:
            job = _ended(session, job_id, Display())
            end = {"status": job.status, "attempt": job.attempt, "result": job.result, "error": job.error}
            session.give_line({"event": "status", "data": end, "id": None})
            return job
        ended: JobFields = session.client.job(job_id)
        return ended


def _ended(session: Session, job_id: str, shown: Display) -> JobFields:
    try:
        return session.client.wait(job_id, progress=shown)
    except (JobFailed, JobCancelled) as error:
        ended: JobFields = error.job
        return ended


@contextmanager
def _going_on(job_id: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"The job goes on. To follow it: loraplex jobs --follow {job_id}\nTo end it: loraplex cancel {job_id}"
        ) from None


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """Raise an exception on SIGTERM, so that a progress bar shows the cursor again."""
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
