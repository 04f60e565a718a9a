"""Output of commands: tables, numbers and times for people, and JSON for programs."""

import json
import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from loraplex.errors import LoraplexError
from loraplex.progress import escape
from loraplex.results import Back, Estimate, JobFields, LossPoint

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table as RichTable
    from rich.text import Text

# A narrower terminal breaks the lines of a table itself, because columns without width would lose their content.
_NARROWEST = 80
# Fields that a list leaves out. The client sets them to empty values.
_NOT_IN_LISTS = ("history", "log", "columns", "bad_rows", "lineage")
_PROBLEM_FIELDS = ("title", "status", "detail", "code", "field", "row", "given", "expected", "request_id", "served_by")


def console(*, stderr: bool) -> "Console":
    """Return a console that styles and wraps only on a terminal, so that piped rows keep their lines."""
    from rich.console import Console

    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 10_000
    made = Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)
    if not stderr:
        made.width = max(made.width, _NARROWEST)
    return made


@dataclass(frozen=True)
class Table:
    """Rows under headings."""

    headings: Sequence[str]
    rows: Collection[Iterable[object]]
    title: str | None = None
    right: Collection[str] = ()
    """Columns of numbers."""
    folds: str | None = None
    """The column of sentences, which alone may take several lines."""
    least: Sequence[str] = ()
    """Columns to drop, in this order, if there is no space for all."""
    has_header: bool = True

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        rows = [[escape(cell_text(cell)) for cell in row] for row in self.rows]
        widths = self._least_widths(rows)
        gap = 3 if self.has_header else 2
        for count in range(len(self.least) + 1):
            left_out = self.least[:count]
            kept = [index for index, heading in enumerate(self.headings) if heading not in left_out]
            width = sum(widths[index] for index in kept) + gap * (len(kept) - 1)
            if width <= options.max_width:
                break
        table = self._with_columns(kept, rows)
        table.width = width if width > options.max_width else None  # it is printed beyond the edge
        yield table
        if left_out:
            names = ", ".join(escape(name) for name in self.headings if name in left_out)
            yield f"no room for {names}: --json has all"

    def _with_columns(self, kept: Sequence[int], rows: Iterable[Sequence[str]]) -> "RichTable":
        from rich import box
        from rich.table import Column
        from rich.table import Table as RichTable

        columns = [
            Column(
                escape(self.headings[index]),
                justify="right" if self.headings[index] in self.right else "left",
                overflow="fold",
                no_wrap=self.headings[index] != self.folds,
                style="" if self.has_header or index else "dim",
            )
            for index in kept
        ]
        frame = box.SIMPLE_HEAD if self.has_header else None
        table = RichTable(*columns, title=self.title, title_justify="left", box=frame, pad_edge=False, show_edge=False)
        table.show_header = self.has_header
        for row in rows:
            table.add_row(*(row[index] for index in kept))
        return table

    def _least_widths(self, rows: Iterable[Sequence[str]]) -> list[int]:
        """Return the least width of each column that breaks no word."""
        from rich.cells import cell_len

        widths = []
        for heading, *cells in zip(self.headings, *rows, strict=True):
            words = [word for sentence in cells for word in sentence.split()]
            widths.append(max(map(cell_len, words if heading == self.folds else [escape(heading), *cells]), default=0))
        return widths


def pairs(values: Mapping[str, object]) -> Table:
    """Return a table of names and values; only values of several words may take several lines."""
    # Numbers in full, because they are settings that may be copied.
    rows = [(name, None if value is None else str(value)) for name, value in values.items()]
    return Table(("", "value"), rows, folds="value", has_header=False)


def alert(text: str) -> "Text":
    """Return a line that a terminal shows in bold red."""
    from rich.text import Text

    return Text(escape(text), style="bold red")


def cell_text(value: object) -> str:
    """Return a value as text: – for None, and four digits of a number with a fraction."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def when(time: str | None) -> str | None:
    """Return a time in UTC, to the second."""
    return None if time is None else time[:19].replace("T", " ")


def size(count: float) -> str:
    """Return a number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.{0 if unit == 'B' else 1}f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def plural(count: int, one: str) -> str:
    """Return `1 row`, `2 rows`."""
    return f"{count:,} {one}{'' if count == 1 else 's'}"


def plain(value: Any, *, listed: bool = False) -> Any:
    """Return a result of the client, or a container of results, as a JSON value in the shape of the HTTP API.

    `listed` omits the fields that a list leaves out.
    """
    if isinstance(value, LoraplexError):
        return problem(value)
    if isinstance(value, LossPoint):
        return [value.step, value.loss]
    if isinstance(value, Back):
        return {"name": value.name, "from": value.version, "to": value.to}
    if isinstance(value, Estimate):
        takes = {name: getattr(value, name) for name in ("memory_bytes", "seconds", "scratch_bytes")}
        return {"spec": plain(value.spec), "estimate": takes, "adapters": value.adapters}
    if is_dataclass(value):
        # A job with methods also has a client, which is not part of the value.
        names = [field.name for field in fields(JobFields if isinstance(value, JobFields) else value)]
        shown = [name for name in names if not (listed and name in _NOT_IN_LISTS)]
        return {name: plain(getattr(value, name), listed=listed) for name in shown}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(name): plain(member) for name, member in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item, listed=True) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # as text, which is what the service's problems give too
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def problem(error: LoraplexError) -> dict[str, Any]:
    """Return an error in the form of a problem (RFC 9457), also if the client raised it."""
    known = {"type": f"urn:loraplex:{error.code}"} | {name: getattr(error, name) for name in _PROBLEM_FIELDS}
    # The client may have more precise values, such as the row among all rows that were sent in parts.
    members = {**error.members, **{name: value for name, value in known.items() if value is not None}}
    return {name: plain(value) for name, value in members.items() if value is not None}
