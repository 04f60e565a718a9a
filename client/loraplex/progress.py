"""A job's progress as it is shown: a bar in a terminal or a notebook, lines elsewhere."""

import time
from types import TracebackType
from typing import Any

from loraplex import reading
from loraplex.results import Event, JobFields, Progress

_SECONDS_BETWEEN_LINES = 2.0


class Display:
    """Shows nothing: what a job does is told to it, and it is used in a `with`."""

    def event(self, event: Event) -> None:
        """Something that the job tells."""
        if event.name == "progress":
            self.progress(reading.progress(event.data))
        elif event.name == "status":
            self.status(event.data["status"])

    def job(self, job: JobFields) -> None:
        """The job as it is now."""
        self.status(str(job.status))
        if job.progress is not None:
            self.progress(job.progress)

    def progress(self, progress: Progress) -> None:
        """How far it is."""

    def status(self, status: str) -> None:
        """Where it stands."""

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        return None


class Bar(Display):
    """One line that is drawn again and again."""

    def __init__(self, name: str, console: Any) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Line

        self._line = Line(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            console=console,
        )
        self._task = self._line.add_task(name, total=None, said="queued")

    def progress(self, progress: Progress) -> None:
        """Move the bar."""
        self._line.update(self._task, total=progress.steps, completed=progress.step, said=_said(progress))

    def status(self, status: str) -> None:
        """Say so where there is no progress to show."""
        if self._line.tasks[0].total is None or status not in ("queued", "running"):
            last = self._line.tasks[0].fields["said"].partition(" · ")[0]
            shown = status if self._line.tasks[0].total is None else f"{last} · {status}"
            self._line.update(self._task, said=shown)

    def __enter__(self) -> "Bar":
        self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.stop()


class Lines(Display):
    """A line where something has changed, and now and then how far it is."""

    def __init__(self, name: str, console: Any) -> None:
        self._name = name
        self._console = console
        self._status = ""
        self._shown_at = 0.0
        self._step = 0

    def progress(self, progress: Progress) -> None:
        """A line, unless there was one just now."""
        now = time.monotonic()
        late = now - self._shown_at >= _SECONDS_BETWEEN_LINES or progress.step == progress.steps
        if progress.step != self._step and late:
            self._shown_at, self._step = now, progress.step
            self._say(f"step {progress.step}/{progress.steps} · {_said(progress)}")

    def status(self, status: str) -> None:
        """A line where it is another one."""
        if status != self._status:
            self._status = status
            self._say(status)

    def _say(self, text: str) -> None:
        self._console.print(f"{self._name}: {text}", markup=False, highlight=False, soft_wrap=True)


def display(name: str, *, shown: bool) -> Display:
    """What shows the progress of the job that trains `name`, on standard error."""
    if not shown:
        return Display()
    from rich.console import Console

    console = Console(stderr=True)
    return Bar(name, console) if console.is_terminal or console.is_jupyter else Lines(name, console)


def _said(progress: Progress) -> str:
    fleet = progress.adapters
    parts = [
        None if fleet is None else f"{fleet['published']} of {fleet['total']} published, {fleet['failed']} failed",
        None if progress.loss is None else f"loss {progress.loss:.4g}",
        None if not progress.seconds_left else f"{progress.seconds_left:.0f} s left",
    ]
    return " · ".join(part for part in parts if part is not None)
