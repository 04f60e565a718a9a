"""A job as it goes on: a live bar on a terminal, lines where nobody watches, JSON lines for machines."""

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraplex.cli.failures import Interrupted
from loraplex.cli.session import Session
from loraplex.cli.visible import visible
from loraplex.results import JobFields

if TYPE_CHECKING:
    from loraplex.results import Event

Show = Callable[["Event"], None]


def follow(session: Session, job_id: str, *, tell: Show | None = None) -> JobFields:
    """The job once it has ended, however it did; what it tells meanwhile goes to `tell`, else to people.

    Raises `Interrupted` on Ctrl-C; the job goes on.
    """
    try:
        with _showing(session, tell) as show:
            for event in session.client.events(job_id):
                show(event)
        ended: JobFields = session.client.job(job_id)
    except KeyboardInterrupt:
        raise Interrupted(
            f"The job goes on. To follow it: loraplex jobs --follow {job_id}\nTo end it: loraplex cancel {job_id}"
        ) from None
    return ended


@contextmanager
def _showing(session: Session, tell: Show | None) -> Iterator[Show]:
    if tell is not None:
        yield tell
    elif session.as_json:
        yield _nothing
    elif session.err.is_terminal:
        with _bar(session) as show:
            yield show
    else:
        yield _Lines(session).show


def _nothing(_event: "Event") -> None:
    return None


class _Lines:
    """One line for each state and each line of the job's log."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def show(self, event: "Event") -> None:
        if event.name == "status":
            self._session.say(str(event.data["status"]))
        elif event.name == "log":
            self._session.say(f"  {event.data['text']}")


@contextmanager
def _bar(session: Session) -> Iterator[Show]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text

    columns = (
        TextColumn("{task.description:<9}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
    )
    with _unwinding_on_sigterm(), Progress(*columns, console=session.err, transient=True) as progress:
        task = progress.add_task("queued", total=None, loss="", left="")

        def show(event: "Event") -> None:
            if event.name == "status":
                progress.update(task, description=str(event.data["status"]))
            elif event.name == "progress":
                progress.update(task, **_shown(event.data))
            elif event.name == "log":
                progress.console.print(Text(visible(f"  {event.data['text']}"), style="dim"))

        yield show


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """The bar hides the cursor, which comes back only where what it wraps comes to an end."""
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _shown(data: Mapping[str, Any]) -> dict[str, Any]:
    loss, left, fleet = data.get("loss"), data.get("seconds_left"), data.get("adapters")
    text = "" if loss is None else f"loss {loss:.4g}"
    if fleet:
        text = f"{fleet['published']} published, {fleet['failed']} failed"
    return {
        "completed": data["step"],
        "total": data["steps"],
        "loss": text,
        "left": "" if left is None else f"{left:.0f} s left",
    }
