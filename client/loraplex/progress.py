"""Display of a job's progress: a bar in a terminal or a notebook, lines elsewhere."""

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from loraplex import decode as reading
from loraplex.results import Event, JobFields, LogLine, Progress
from loraplex.sanitize import escape

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 2.0
_BETWEEN = " · "


class Display:
    """Receives the progress of a job, and shows nothing. It is a context manager.

    Subclasses override its methods, and `wait(progress=...)` accepts them. It receives the job first and then its
    events, or the job repeatedly if there is no event stream. Each line of the log is received once.
    """

    def __init__(self) -> None:
        self._logged: set[LogLine] = set()

    def job(self, job: JobFields) -> None:
        """Handle the current state of the job."""
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

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        return None


class Bar(Display):
    """A line that is redrawn below the log of the job."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Line

        super().__init__()
        self._line = Line(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            console=console,
        )
        self._task = self._line.add_task("", total=None, said="")
        self._status = self._said = ""

    def job(self, job: JobFields) -> None:
        """Show the name of the adapter."""
        self._line.update(self._task, description=escape(job.adapter))
        super().job(job)

    def progress(self, progress: Progress) -> None:
        """Move the bar."""
        self._said = _said(progress)
        self._line.update(self._task, total=progress.steps, completed=progress.step)
        self._say()

    def status(self, status: str) -> None:
        """Show the status, unless the job is running."""
        self._status = status
        self._say()
        self._line.refresh()

    def log(self, text: str) -> None:
        """Print a line above the bar."""
        _print(self._line.console, f"  {text}")

    def _say(self) -> None:
        goes_on = self._status in ("queued", "running")
        said = self._said or self._status if goes_on else _joined(self._said.partition(_BETWEEN)[0], self._status)
        self._line.update(self._task, said=said)

    def __enter__(self) -> Self:
        self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.stop()


class Lines(Display):
    """A line for each change, and now and then one for the progress."""

    def __init__(self, console: "Console") -> None:
        super().__init__()
        self._console = console
        self._name = ""
        self._status = ""
        self._shown_at = 0.0
        self._step = 0

    def job(self, job: JobFields) -> None:
        """Print the name of the adapter."""
        self._name = job.adapter
        super().job(job)

    def progress(self, progress: Progress) -> None:
        """Print a line, unless the last one is recent."""
        now = time.monotonic()
        late = now - self._shown_at >= _SECONDS_BETWEEN_LINES or progress.step == progress.steps
        if progress.step != self._step and late:
            self._shown_at, self._step = now, progress.step
            self._say(_joined(f"step {progress.step}/{progress.steps}", _said(progress)))

    def status(self, status: str) -> None:
        """Print a line if the status has changed."""
        if status != self._status:
            self._status = status
            self._say(status)

    def log(self, text: str) -> None:
        """Print the line."""
        self._say(f"  {text}")

    def _say(self, text: str) -> None:
        _print(self._console, f"{self._name}: {text}")


def display(console: "Console | None" = None) -> Display:
    """Return the display for a console: a bar in a terminal or a notebook, lines elsewhere.

    The default console is that of standard error.
    """
    from rich.console import Console

    drawn_on = console or Console(stderr=True)
    return Bar(drawn_on) if drawn_on.is_terminal or drawn_on.is_jupyter else Lines(drawn_on)


def _print(console: "Console", text: str) -> None:
    console.print(escape(text), markup=False, highlight=False, soft_wrap=True)


def _said(progress: Progress) -> str:
    fleet = progress.adapters
    parts = [
        None if fleet is None else f"{fleet['published']} of {fleet['total']} published, {fleet['failed']} failed",
        None if progress.loss is None else f"loss {progress.loss:.4g}",
        None if not progress.seconds_left else f"{progress.seconds_left:.0f} s left",
    ]
    return _joined(*parts)


def _joined(*parts: str | None) -> str:
    return _BETWEEN.join(part for part in parts if part)
