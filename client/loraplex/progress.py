"""Display of a job's progress: a bar in a terminal or a notebook, lines elsewhere."""

import time
from typing import TYPE_CHECKING, Self

from loraplex import decode as reading
from loraplex.results import Event, JobFields, LogLine, Progress

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 2.0
_BETWEEN = " · "
# Scripts and emoji need them.
_JOINERS = "\u200c\u200d"


class Display:
    """Receives the progress of a job, and shows nothing. It is a context manager.

    Subclasses override its methods, and `wait(progress=...)` accepts them. It receives the job first and then its
    events, or the job repeatedly if there is no event stream. Each line of the log is received once.
    """

    def __init__(self) -> None:
        self._adapter = ""
        self._logged: set[LogLine] = set()

    def job(self, job: JobFields) -> None:
        """Handle the current state of the job."""
        self._adapter = job.adapter
        self.status(str(job.status))
        for line in job.log:
            self._log(line)
        if job.progress is not None:
            self.progress(job.progress)

    def event(self, event: Event) -> None:
        """Handle an event."""
        if event.name == "progress":
            self.progress(reading.progress(event.data))
        elif event.name == "status":
            self.status(event.data["status"])
        elif event.name == "log":
            self._log(reading.log_line(event.data))

    def progress(self, progress: Progress) -> None:
        """Handle the progress."""

    def status(self, status: str) -> None:
        """Handle a new status."""

    def log(self, text: str) -> None:
        """Handle a line of the log."""

    def _log(self, line: LogLine) -> None:
        if line not in self._logged:
            self._logged.add(line)
            self.log(line.text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class Bar(Display):
    """A line that is redrawn below the log of the job."""

    def __init__(self, console: "Console") -> None:
        from rich import progress as rich

        super().__init__()
        name, note = (rich.TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[note]"))
        self._bar = rich.Progress(name, rich.BarColumn(), rich.TaskProgressColumn(), note, console=console)
        self._task = self._bar.add_task("", total=None, note="")
        self._status = self._figures = ""

    def progress(self, progress: Progress) -> None:
        """Move the bar."""
        self._figures = _figures(progress)
        self._bar.update(self._task, total=progress.steps, completed=progress.step)
        self._update_note()

    def status(self, status: str) -> None:
        """Show the status, unless the job is running."""
        self._status = status
        self._update_note()
        self._bar.refresh()

    def log(self, text: str) -> None:
        """Print a line above the bar."""
        _print(self._bar.console, f"  {text}")

    def _update_note(self) -> None:
        note = self._figures or self._status
        if self._status not in ("queued", "running"):
            note = _joined(self._figures.partition(_BETWEEN)[0], self._status)
        self._bar.update(self._task, description=escape(self._adapter), note=note)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class Lines(Display):
    """A line for each change, and now and then one for the progress."""

    def __init__(self, console: "Console") -> None:
        super().__init__()
        self._console = console
        self._status = ""
        self._printed_at = 0.0
        self._step = 0

    def progress(self, progress: Progress) -> None:
        """Print a line, unless the last one is recent."""
        now = time.monotonic()
        is_due = now - self._printed_at >= _SECONDS_BETWEEN_LINES or progress.step == progress.steps
        if progress.step != self._step and is_due:
            self._printed_at, self._step = now, progress.step
            self._print(_joined(f"step {progress.step}/{progress.steps}", _figures(progress)))

    def status(self, status: str) -> None:
        """Print a line if the status has changed."""
        if status != self._status:
            self._status = status
            self._print(status)

    def log(self, text: str) -> None:
        """Print the line."""
        self._print(f"  {text}")

    def _print(self, text: str) -> None:
        _print(self._console, f"{self._adapter}: {text}")


def display(console: "Console | None" = None) -> Display:
    """Return the display for a console: a bar in a terminal or a notebook, lines elsewhere.

    The default console is that of standard error.
    """
    from rich.console import Console

    console = console or Console(stderr=True)
    return Bar(console) if console.is_terminal or console.is_jupyter else Lines(console)


def _print(console: "Console", text: str) -> None:
    console.print(escape(text), markup=False, highlight=False, soft_wrap=True)


def _figures(progress: Progress) -> str:
    fleet = progress.adapters
    return _joined(
        fleet and f"{fleet['published']} of {fleet['total']} published, {fleet['failed']} failed",
        None if progress.loss is None else f"loss {progress.loss:.4g}",
        f"{progress.seconds_left:.0f} s left" if progress.seconds_left else None,
    )


def _joined(*parts: object) -> str:
    return _BETWEEN.join(str(part) for part in parts if part)


def escape(text: str) -> str:
    """Return text of others (names, labels, messages) as one line that cannot steer a terminal.

    Control characters, line ends, changes of direction and lone surrogates become escapes.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in _JOINERS else character.encode("unicode_escape").decode()
        for character in text
    )
