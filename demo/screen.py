"""Output of the demo: live on a terminal, plain lines in a file or a pipe."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_PLAIN_WIDTH = 100


class Screen:
    """Console of the demo; nothing else writes to it."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        if not self._console.is_terminal:
            self._console.width = _PLAIN_WIDTH

    def chapter(self, title: str) -> None:
        """Print a heading."""
        self._console.print(f"\n[bold cyan]{title}[/]")

    def say(self, sentence: str) -> None:
        """Print one sentence."""
        self._console.print(f"  {sentence}")

    def fail(self, message: str, log: str) -> None:
        """Print the end of the service's log, and the reason for which the demo ends."""
        self._console.print("\nThe last lines of the service's log:")
        self._console.print(log, markup=False, style="dim", soft_wrap=True)
        self._console.print(f"\n{message}", markup=False, style="bold red")

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show a spinner while the block runs, or print one line."""
        if not self._console.is_terminal:
            self.say(f"{what} …")
            yield
            return
        with self._console.status(f"{what} …"):
            yield

    @contextmanager
    def training_progress(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Yield a function that displays a job: as a progress bar, or as a line for each new step."""
        if not self._console.is_terminal:
            yield self._print_step_once()
            return
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("loss {task.fields[loss]}"), console=self._console) as bar:
            task = bar.add_task("queued", total=None, loss="-")

            def show(job: dict[str, Any]) -> None:
                step, steps, loss = _progress_of(job)
                bar.update(task, description=job["status"], completed=step, total=steps, loss=loss)

            yield show

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a small table."""
        table = Table(*headings, show_lines=True)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def _print_step_once(self) -> Callable[[dict[str, Any]], None]:
        printed: list[tuple[str, int]] = []

        def show(job: dict[str, Any]) -> None:
            step, steps, loss = _progress_of(job)
            if (job["status"], step) not in printed:
                printed.append((job["status"], step))
                self.say(f"{job['status']}: step {step} of {steps or '?'}, loss {loss}")

        return show


def _progress_of(job: dict[str, Any]) -> tuple[int, int | None, str]:
    """Return step, steps and loss of a job, which may not have begun."""
    progress = job["progress"] or {}
    loss = progress.get("loss")
    return progress.get("step") or 0, progress.get("steps"), "-" if loss is None else f"{loss:.4f}"
