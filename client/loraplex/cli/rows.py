"""Rows to predict: from a file, from standard input, or from the command line."""

import csv
import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from zipfile import BadZipFile

from loraplex.cli.errors import BadFile, WrongUsage
from loraplex.cli.request import Selection, has_columns
from loraplex.results import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

STDIN = "-"
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_TABLES = (".parquet", ".arrow", ".arrows", ".npz")
_KINDS = (".csv", *_JSON_LINES, ".npy", *_TABLES)
_SHOWN = 40
_WRONG = {UnicodeDecodeError: "it is not UTF-8", RecursionError: "it is nested too deep"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows with their columns."""

    source: str
    names: list[str] | None
    """Names of the columns; None if rows consist only of numbers."""
    cells: Any
    """Lists of text, numbers or lists in the order of `names`, or an array (N, I)."""

    def used(self, selection: Selection) -> list[str]:
        """Return the selected columns; raise `BadFile` for one that does not exist."""
        names = self.names or []
        if "prefix" in selection:
            wanted = [name for name in names if name.startswith(selection["prefix"])]
        else:
            wanted = list(selection.get("columns") or [selection["column"]])
        missing = [name for name in wanted if name not in names]
        if missing or not wanted:
            what = f"no column {', '.join(missing)}" if missing else f"no column that begins with {selection['prefix']}"
            raise BadFile(f"{self.source} has {what}")
        return wanted

    def column(self, name: str) -> list[Any]:
        """Return the cells of one column."""
        place = (self.names or []).index(name)
        return [row[place] for row in self.cells]

    def described(self) -> list[Column]:
        """Return the columns with the types of their first cells."""
        return [self._described(name, cell) for name, cell in zip(self.names or (), self.cells[0], strict=True)]

    @staticmethod
    def _described(name: str, cell: object) -> Column:
        if isinstance(cell, list):
            return Column(name, "list<float64>", len(cell), 0, 0)
        is_number = not isinstance(cell, bool) and _is_number(cell)
        return Column(name, "float64" if is_number else "string", None, 0, 0)

    def numbers(self, selection: Selection | None) -> "NDArray[Any]":
        """Return (N, I): the selected columns, or all if rows consist only of numbers; raise `BadFile`."""
        import numpy as np

        if isinstance(self.cells, np.ndarray):
            return self.cells
        names = self.names or []
        places = None if selection is None else [names.index(name) for name in self.used(selection)]
        found = [
            [number for place in (range(len(cells)) if places is None else places) for number in self._cell(row, place)]
            for row, cells in enumerate(self.cells)
        ]
        width = len(found[0])
        for row, numbers in enumerate(found):
            if len(numbers) != width:
                raise BadFile(f"{self.source}, row {row}: {len(numbers)} numbers, where row 0 has {width}", row=row)
        return np.array(found)

    def _cell(self, row: int, place: int) -> list[float]:
        cell = self.cells[row][place]
        try:
            return [_number(each) for each in (cell if isinstance(cell, list) else [cell])]
        except ValueError:
            column = self.names[place] if self.names else place
            raise BadFile(
                f"{self.source}, row {row}, column {column}: not a number: {str(cell)[:_SHOWN]!r}", row=row
            ) from None


def read_rows(source: str, *, limit: int | None, expected: Selection | None) -> Rows:
    """Return the rows of a file by its ending, or of standard input (`-`), as JSON or CSV by its first byte.

    A first line that consists only of numbers is a row, unless it has the `expected` columns. Raises `BadFile` and
    `WrongUsage`.
    """
    path = Path(source)
    kind = path.suffix.lower()
    try:
        if source == STDIN:
            # The encoding of files, whatever the locale is.
            file = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
            return _read_text(file, "standard input", limit, expected, as_json=None)
        if kind == ".npy":
            return _read_npy(path, limit)
        if kind in _TABLES:
            names, cells = read_table_file(path, limit)
            return _checked(Rows(source=path.name, names=names, cells=cells))
        if kind in _JSON_LINES or kind == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as opened:
                return _read_text(opened, path.name, limit, expected, as_json=kind != ".csv")
    except (OSError, UnicodeDecodeError, csv.Error, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else _WRONG.get(type(error), str(error))
        raise BadFile(f"Cannot read {'standard input' if source == STDIN else source}: {reason}") from None
    raise WrongUsage(f"{source}: rows come from {', '.join(_KINDS)}, or from standard input (-).")


def can_read(file: Path) -> bool:
    """Return whether rows can be read from a file with this name."""
    return file.suffix.lower() in _KINDS


def rows_of_options(texts: Sequence[str]) -> Rows:
    """Return the rows of `--row "1,2,3"`; spaces may separate the numbers too."""
    cells = [text.replace(",", " ").split() for text in texts]
    return _checked(Rows(source="--row", names=None, cells=cells))


def _read_npy(path: Path, limit: int | None) -> Rows:
    import numpy as np

    try:
        with path.open("rb") as file:  # given a path, `np.load` leaves a broken archive open
            array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, BadZipFile) as error:
        raise BadFile(f"Cannot read {path.name}: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim not in (1, 2) or array.dtype.kind not in "fiu":
        raise BadFile(f"{path.name}: expected an array of numbers, one row of inputs a row")
    return _checked(Rows(source=path.name, names=None, cells=np.atleast_2d(array)[:limit]))


def _read_text(
    file: TextIO, source: str, limit: int | None, expected: Selection | None, *, as_json: bool | None
) -> Rows:
    text = itertools.dropwhile(lambda line: not line.strip(), file)
    first = next(text, "")
    lines = itertools.chain([first], text)
    if as_json is None:
        as_json = first.lstrip()[:1] in ("{", "[")
    return _checked(_read_json(lines, source, limit) if as_json else _read_csv(lines, source, limit, expected))


def _read_csv(lines: Iterator[str], source: str, limit: int | None, expected: Selection | None) -> Rows:
    reader = (cells for cells in csv.reader(lines) if cells)
    first = next(reader, [])
    has_names = not all(map(_is_number, first)) or (expected is not None and has_columns(first, expected))
    twice = [name for name, count in Counter(first).items() if count > 1] if has_names else []
    if twice:
        raise BadFile(f"{source}: two columns are called {twice[0]!r}")
    cells = list(itertools.islice(reader if has_names else itertools.chain([first], reader), limit))
    for row, each in enumerate(cells):
        if len(each) != len(first):
            raise BadFile(f"{source}, row {row}: {len(each)} cells, expected {len(first)}", row=row)
    return Rows(source=source, names=first if has_names else None, cells=cells)


def _read_json(lines: Iterator[str], source: str, limit: int | None) -> Rows:
    found = _json_values("".join(lines), source)
    found = found[:limit]
    if all(isinstance(each, dict) for each in found):
        names = list(found[0]) if found else []
        cells = [[each.get(name) for name in names] for each in found]
        return Rows(source=source, names=names, cells=cells)
    for row, each in enumerate(found):
        if not isinstance(each, list):
            raise BadFile(f"{source}, row {row}: expected an object or a list of numbers", row=row)
    return Rows(source=source, names=None, cells=found)


def _json_values(text: str, source: str) -> list[Any]:
    """Return one value per row: those of the lines, or the items of a document that is one list."""
    try:
        whole = json.loads(text)
    except ValueError:
        found = []
        for number, line in enumerate(text.splitlines()):
            try:
                found += [json.loads(line)] if line.strip() else []
            except ValueError:
                raise BadFile(f"{source}, line {number + 1}: it is not JSON: {line.strip()[:_SHOWN]}") from None
        return found
    return whole if isinstance(whole, list) and whole and isinstance(whole[0], list | dict) else [whole]


def _checked(rows: Rows) -> Rows:
    if not len(rows.cells) or not len(rows.cells[0]):
        raise BadFile(f"{rows.source} has no rows")
    return rows


def _is_number(cell: object) -> bool:
    try:
        _number(cell)
    except ValueError:
        return False
    return True


def _number(cell: object) -> float:
    """Return the number; raise `ValueError` for anything else. Text is read as a decimal number."""
    if isinstance(cell, bool) or not isinstance(cell, int | float | str) or (isinstance(cell, str) and "_" in cell):
        raise ValueError(cell)
    try:
        return float(cell)
    except OverflowError:  # an integer above what a float holds
        raise ValueError(cell) from None


# First bytes of an Arrow file; Arrow streams may have the ending .arrow too.
_ARROW_FILE = b"ARROW1"
_BATCH_ROWS = 4096
Cells = list[list[Any]]


def read_table_file(path: Path, limit: int | None) -> tuple[list[str], Cells]:
    """Return the names of the columns, and the cells of each row. true and false are 1 and 0, as in a data set.

    Raises `BadFile` and `OSError`.
    """
    if path.suffix.lower() == ".npz":
        return _read_npz(path, limit)
    return _read_arrow(path, limit)


def _read_npz(path: Path, limit: int | None) -> tuple[list[str], Cells]:
    import numpy as np

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            columns = {name: np.atleast_1d(array)[:limit] for name, array in archive.items()}
    except (ValueError, EOFError, BadZipFile, AttributeError, TypeError) as error:
        raise BadFile(f"Cannot read {path.name}: {error}") from None
    lengths = {name: len(array) for name, array in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {rows}" for name, rows in lengths.items())
        raise BadFile(f"{path.name}: the arrays differ in length: {listed}")
    lists = [(array.astype(int) if array.dtype.kind == "b" else array).tolist() for array in columns.values()]
    return list(columns), [list(row) for row in zip(*lists, strict=True)]


def _read_arrow(path: Path, limit: int | None) -> tuple[list[str], Cells]:
    try:
        pyarrow = import_module("pyarrow")
    except ImportError:
        raise BadFile(
            f"Cannot read {path.name} without pyarrow: pip install 'loraplex[arrow]', or give the rows as CSV or NPZ."
        ) from None
    cells: Cells = []
    try:
        with path.open("rb") as file:
            names, batches = _batches(file, is_parquet=path.suffix.lower() == ".parquet")
            for batch in batches:
                columns = [_plain(pyarrow, column).to_pylist() for column in batch.columns]
                cells += map(list, zip(*columns, strict=True))
                if limit is not None and len(cells) >= limit:
                    break
    except (pyarrow.ArrowException, ValueError) as error:
        raise BadFile(f"Cannot read {path.name}: {error}") from None
    return names, cells[:limit]


def _batches(file: Any, *, is_parquet: bool) -> tuple[list[str], Any]:
    if is_parquet:
        parquet = import_module("pyarrow.parquet").ParquetFile(file)
        return parquet.schema_arrow.names, parquet.iter_batches(batch_size=_BATCH_ROWS)
    ipc = import_module("pyarrow.ipc")
    is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    file.seek(0)
    if not is_file:
        stream = ipc.open_stream(file)
        return stream.schema.names, stream
    opened = ipc.open_file(file)
    return opened.schema.names, (opened.get_batch(number) for number in range(opened.num_record_batches))


def _plain(pyarrow: Any, column: Any) -> Any:
    """Return a column in the types in which a data set would store it."""
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_boolean(column.type):
        return column.cast(pyarrow.int64())
    if types.is_temporal(column.type):
        return column.cast(pyarrow.string())
    return column.cast(pyarrow.float64()) if types.is_decimal(column.type) else column
