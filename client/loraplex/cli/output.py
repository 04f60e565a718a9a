"""Output of predictions: as a table, as JSON, or in a file."""

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.cli.errors import BadFile, WrongUsage
from loraplex.cli.session import plural
from loraplex.results import Label
from loraplex.sanitize import escape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Name and cells of the column with the correct labels.
Truth = tuple[str, list[Any]] | None
_MOST_OUTPUTS = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """One answer per row: its most probable classes, or the outputs of the layer."""

    labels: Sequence[Sequence[Label]] | None = None
    outputs_NO: "NDArray[np.float32] | None" = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Return each row as a JSON object."""
        if self.labels is not None:
            for row, found in enumerate(self.labels):
                yield {"row": row, "labels": [label._asdict() for label in found]}
        elif self.outputs_NO is not None:
            for row, numbers in enumerate(self.outputs_NO.tolist()):
                yield {"row": row, "outputs": numbers}

    def as_json(self, reference: str | None) -> dict[str, Any]:
        """Return all rows as one JSON document; the adapter of the base layer is null."""
        return {"adapter": reference, "predictions": list(self.rows())}

    def shown(self, truth: Truth) -> list[Any]:
        """Return a table, and the accuracy if the labels are known."""
        headings, rows = self.cells(truth, digits=4)
        left_out = 0 if self.outputs_NO is None else self.outputs_NO.shape[1] - _MOST_OUTPUTS
        if left_out > 0:
            keep = len(headings) - left_out
            headings, rows = headings[:keep], (cells[:keep] for cells in rows)
        always = 2 if truth is None else 3
        made = Fitting(
            *headings, right=[heading for heading in headings if heading != "label"], least=headings[: always - 1 : -1]
        )
        for cells in rows:
            made.add_row(*map(str, cells))
        more = [f"{left_out} more outputs a row: --json or --out has all"] if left_out > 0 else []
        return [made, *more, *self._right(truth)]

    def cells(self, truth: Truth, *, digits: int | None) -> tuple[list[str], Iterator[list[Any]]]:
        """Return headings and rows, with the correct labels first; numbers have `digits` digits, or all."""
        own, rows = self._own()
        headings = ["row", *([truth[0]] if truth else []), *own]

        def shown(cell: Any) -> Any:
            return f"{cell:.{digits}g}" if digits is not None and isinstance(cell, float) else cell

        def all_rows() -> Iterator[list[Any]]:
            for row, cells in enumerate(rows):
                yield [row, *([truth[1][row]] if truth else []), *map(shown, cells)]

        return headings, all_rows()

    def _own(self) -> tuple[list[str], Iterator[list[Any]]]:
        if self.labels is not None:
            most = max(map(len, self.labels))
            pairs = [["label", "probability"], *([f"label_{n}", f"probability_{n}"] for n in range(2, most + 1))]
            flat = ([cell for pair in found for cell in pair] for found in self.labels)
            return [heading for pair in pairs for heading in pair], flat
        assert self.outputs_NO is not None
        return [f"output_{n}" for n in range(self.outputs_NO.shape[1])], iter(self.outputs_NO.tolist())

    def _right(self, truth: Truth) -> list[str]:
        if truth is None or self.labels is None or any(isinstance(cell, list) for cell in truth[1]):
            return []
        name, cells = truth
        hits = sum(_same(found[0].label, cell) for found, cell in zip(self.labels, cells, strict=True))
        return [f"{name} is right in {plural(hits, 'row')} of {len(cells)}"]


def check_out(file: Path, rows: str | None, *, classes: bool) -> None:
    """Raise `WrongUsage` if answers (classes or not) cannot be written to `file`, or would overwrite the rows."""
    if file.suffix.lower() not in (".csv", ".jsonl", ".ndjson", ".npy"):
        raise WrongUsage(f"{file}: answers go to .csv, .jsonl or .npy.")
    if classes and takes_numbers(file):
        raise WrongUsage(f"{file} takes numbers only: leave --labels and --top-k out, or write a .csv or .jsonl.")
    if rows is not None and file.exists() and Path(rows).exists() and file.samefile(rows):
        raise WrongUsage(f"--out would overwrite {rows}, which the rows come from: name another file.")


def takes_numbers(file: Path) -> bool:
    """Return whether the format of the file holds only numbers."""
    return file.suffix.lower() == ".npy"


def write_answers(answers: Answers, truth: Truth, file: Path) -> None:
    """Write a whole .csv, .jsonl or .npy file; raise `BadFile`, and write nothing, if that fails."""
    try:
        with _whole(file) as part:
            if takes_numbers(file):
                _write_npy(answers, part)
            elif file.suffix.lower() == ".csv":
                _write_csv(answers, truth, part)
            else:
                with part.open("w", encoding="utf-8") as opened:
                    opened.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in answers.rows())
    except OSError as error:
        raise BadFile(f"Cannot write {file}: {error.strerror}") from None


def _write_npy(answers: Answers, file: Path) -> None:
    import numpy as np

    assert answers.outputs_NO is not None  # `check_out` has seen to it
    with file.open("wb") as opened:
        np.save(opened, answers.outputs_NO)


def _write_csv(answers: Answers, truth: Truth, file: Path) -> None:
    headings, rows = answers.cells(truth, digits=None)
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(headings)
        writer.writerows(rows)


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """Open a temporary file that replaces `file` when it is complete, and leave `file` unchanged after an error."""
    file = file.resolve()
    if file.exists() and not (file.is_file() and os.access(file, os.W_OK)):
        yield file  # a pipe or a device, which take things as they come; else opening it says what is wrong
        return
    part = file.with_name(f".loraplex-{os.getpid()}")
    try:
        yield part
        if file.exists():
            shutil.copymode(file, part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _same(label: str | int, cell: Any) -> bool:
    """Return whether a cell is this label; cells of CSV files are text."""
    if isinstance(label, int) and isinstance(cell, str):
        try:
            return float(cell) == label
        except ValueError:
            return False
    return bool(label == cell)


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
