"""Tables that never break ids, names and numbers: a table that is too wide drops columns, or exceeds the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loraplex.sanitize import escape

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

_NO_END = 1_000_000


class Fitting:
    """Rows under headings.

    `right` lists columns of numbers, `folds` is a column of sentences, which alone may take several lines, and `least`
    lists columns to drop, in this order, if there is no space for all.
    """

    def __init__(
        self,
        *headings: str,
        title: str | None = None,
        right: Sequence[str] = (),
        folds: str | None = None,
        least: Sequence[str] = (),
    ) -> None:
        self._headings = headings
        self._title = title
        self._right = right
        self._folds = folds
        self._least = least
        self._rows: list[Sequence[str]] = []

    def add_row(self, *cells: str) -> None:
        """Add a row with a cell for each heading."""
        self._rows.append(cells)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        left_out: list[str] = []
        made = self._made(left_out)
        while self._narrowest(made, console, options) > options.max_width and len(left_out) < len(self._least):
            left_out.append(self._least[len(left_out)])
            made = self._made(left_out)
        yield whole(made, self._narrowest(made, console, options), options)
        if left_out:
            names = ", ".join(escape(name) for name in self._headings if name in left_out)
            yield f"no room for {names}: --json has all"

    def _made(self, left_out: Sequence[str]) -> "Table":
        from rich import box
        from rich.table import Table

        made = Table(title=self._title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        kept = [place for place, heading in enumerate(self._headings) if heading not in left_out]
        for heading in (self._headings[place] for place in kept):
            made.add_column(
                heading,
                justify="right" if heading in self._right else "left",
                overflow="fold",
                no_wrap=heading != self._folds,
            )
        for cells in self._rows:
            made.add_row(*(cells[place] for place in kept))
        return made

    def _narrowest(self, made: "Table", console: "Console", options: "ConsoleOptions") -> int:
        sentences = [cells[self._headings.index(self._folds)] for cells in self._rows] if self._folds else []
        return narrowest(made, sentences, console, options)


class Pairs:
    """Names and values; only values of several words may take several lines."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.table import Table

        made = Table(box=None, show_header=False, pad_edge=False)
        made.add_column(style="dim", no_wrap=True)
        made.add_column(overflow="fold")
        for name, value in self._values.items():
            made.add_row(name, value)
        yield whole(made, narrowest(made, list(self._values.values()), console, options), options)


def narrowest(made: "Table", sentences: Sequence[str], console: "Console", options: "ConsoleOptions") -> int:
    """Return the least width of a table that breaks no word; `sentences` are the cells of the column that may fold."""
    from rich.cells import cell_len
    from rich.measure import Measurement

    widest = max((cell_len(escape(text)) for text in sentences), default=0)
    longest_word = max((cell_len(escape(word)) for text in sentences for word in text.split()), default=0)
    return Measurement.get(console, options.update(max_width=_NO_END), made).maximum - widest + longest_word


def whole(made: "Table", width: int, options: "ConsoleOptions") -> "Table":
    """Print the table, beyond the edge if it is wider than the terminal."""
    if width > options.max_width:
        made.width = width
    return made
