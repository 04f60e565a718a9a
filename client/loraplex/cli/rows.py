"""Rows to predict: from a file, from standard input, or from the command line."""

import csv
import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from zipfile import BadZipFile

from loraplex.cli.columns import Selection, columns_of, has_columns
from loraplex.cli.errors import BadFile, WrongUsage
from loraplex.results import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

# N rows · I in_features

_STDIN = "-"
_JSON = (".jsonl", ".ndjson", ".json")
_ARROW = (".parquet", ".arrow", ".arrows")
_ARRAYS = (".npy", ".npz")
_KINDS = (".csv", *_JSON, *_ARROW, *_ARRAYS)
# First bytes of an Arrow file; Arrow streams may have the ending .arrow too.
_ARROW_FILE = b"ARROW1"
_BATCH_ROWS = 4096
_MAX_SHOWN = 40
_UNREADABLE = (OSError, ValueError, EOFError, BadZipFile, csv.Error, RecursionError)
_REASONS = {UnicodeDecodeError: "it is not UTF-8", RecursionError: "it is nested too deep"}
# Names of the columns, or None if rows consist only of numbers; and the cells of each row, or an array (N, I).
Cells = tuple[list[str] | None, Any]


@dataclass(frozen=True, slots=True)
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
        columns = columns_of(selection, names)
        missing = [name for name in columns if name not in names]
        if missing or not columns:
            what = ", ".join(missing) or f"that begins with {selection['prefix']}"
            raise BadFile(f"{self.source} has no column {what}")
        return columns

    def described(self) -> list[Column]:
        """Return the columns with the types of their first cells."""
        described = []
        for name, cell in zip(self.names or (), self.cells[0], strict=True):
            kind = "list<float64>" if isinstance(cell, list) else "float64" if _is_number(cell) else "string"
            described.append(Column(name, kind, len(cell) if isinstance(cell, list) else None, 0, 0))
        return described

    def numbers(self, selection: Selection | None) -> "NDArray[Any]":
        """Return (N, I): the selected columns, or all if rows consist only of numbers; raise `BadFile`."""
        import numpy as np

        if isinstance(self.cells, np.ndarray):
            return self.cells
        names = self.names or []
        indexes = None if selection is None else [names.index(name) for name in self.used(selection)]
        rows = [
            [number for index in indexes or range(len(cells)) for number in self._numbers_in(row, index)]
            for row, cells in enumerate(self.cells)
        ]
        for row, numbers in enumerate(rows):
            if len(numbers) != len(rows[0]):
                problem = f"{len(numbers)} numbers, where row 0 has {len(rows[0])}"
                raise BadFile(f"{self.source}, row {row}: {problem}", row=row)
        return np.array(rows)

    def _numbers_in(self, row: int, index: int) -> list[float]:
        cell = self.cells[row][index]
        try:
            return [_number(item) for item in (cell if isinstance(cell, list) else [cell])]
        except ValueError:
            column = self.names[index] if self.names else index
            problem = f"not a number: {str(cell)[:_MAX_SHOWN]!r}"
            raise BadFile(f"{self.source}, row {row}, column {column}: {problem}", row=row) from None


def rows_of_options(texts: Sequence[str]) -> Rows:
    """Return the rows of `--row "1,2,3"`; spaces may separate the numbers too."""
    return _checked(Rows("--row", None, [text.replace(",", " ").split() for text in texts]))


def read_rows(source: str, *, limit: int | None, expected: Selection | None) -> Rows:
    """Return the rows of a file by its ending, or of standard input (`-`), as JSON or CSV by its first byte.

    A first line that consists only of numbers is a row, unless it has the `expected` columns. Raises `BadFile` and
    `WrongUsage`.
    """
    if source != _STDIN and Path(source).suffix.lower() not in _KINDS:
        raise WrongUsage(f"{source}: rows come from {', '.join(_KINDS)}, or from standard input (-).")
    name = "standard input" if source == _STDIN else Path(source).name
    try:
        names, cells = _read(source, limit, expected)
    except _UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) else _REASONS.get(type(error), error)
        raise BadFile(f"Cannot read {name}: {reason}") from None
    return _checked(Rows(name, names, cells))


def _checked(rows: Rows) -> Rows:
    """Return the rows; raise `BadFile` if there are none, or if names and cells do not form a table."""
    names = rows.names
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise BadFile(f"{rows.source}: two columns are called {repeated[0]!r}")
    for row, cells in enumerate(rows.cells if isinstance(rows.cells, list) else ()):
        if not isinstance(cells, list):
            raise BadFile(f"{rows.source}, row {row}: expected an object or a list of numbers", row=row)
        if names is not None and len(cells) != len(names):
            raise BadFile(f"{rows.source}, row {row}: {len(cells)} cells, expected {len(names)}", row=row)
    if not len(rows.cells) or not len(rows.cells[0]):
        raise BadFile(f"{rows.source} has no rows")
    return rows


def _read(source: str, limit: int | None, expected: Selection | None) -> Cells:
    path = Path(source)
    kind = path.suffix.lower()
    if source == _STDIN:
        # The encoding of files, whatever the locale is.
        text = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
        return _read_text(text, limit, expected, is_json=None)
    if kind in _ARRAYS:
        return _read_arrays(path, limit)
    if kind in _ARROW:
        return _read_arrow(path, limit)
    with path.open(encoding="utf-8-sig", newline="") as opened:
        return _read_text(opened, limit, expected, is_json=kind in _JSON)


def _read_text(file: TextIO, limit: int | None, expected: Selection | None, *, is_json: bool | None) -> Cells:
    text = itertools.dropwhile(lambda line: not line.strip(), file)
    first = next(text, "")
    lines = itertools.chain([first], text)
    if is_json or (is_json is None and first.lstrip()[:1] in ("{", "[")):
        return _read_json("".join(lines), limit)
    return _read_csv(lines, limit, expected)


def _read_csv(lines: Iterable[str], limit: int | None, expected: Selection | None) -> Cells:
    reader = (cells for cells in csv.reader(lines) if cells)
    first = next(reader, [])
    if not all(map(_is_number, first)) or (expected is not None and has_columns(first, expected)):
        return first, list(itertools.islice(reader, limit))
    return None, list(itertools.islice(itertools.chain([first], reader), limit))


def _read_json(text: str, limit: int | None) -> Cells:
    rows = _json_values(text)[:limit]
    if rows and all(isinstance(row, dict) for row in rows):
        return list(rows[0]), [[row.get(name) for name in rows[0]] for row in rows]
    return None, rows


def _json_values(text: str) -> list[Any]:
    """Return one value per row: those of the lines, or the items of a document that is one list."""
    try:
        document = json.loads(text)
    except ValueError:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError:
                raise ValueError(f"line {number}: it is not JSON: {line.strip()[:_MAX_SHOWN]}") from None
        return rows
    return document if isinstance(document, list) and document and isinstance(document[0], list | dict) else [document]


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


def _read_arrays(path: Path, limit: int | None) -> Cells:
    """Return the rows of one array, or the named arrays of an archive as columns, where true and false are 1 and 0."""
    import numpy as np

    with path.open("rb") as file:  # given a path, `np.load` leaves a broken archive open
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if loaded.ndim not in (1, 2) or loaded.dtype.kind not in "fiu":
                raise ValueError("expected an array of numbers, one row of inputs a row")
            return None, np.atleast_2d(loaded)[:limit]
        columns = {name: np.atleast_1d(array)[:limit] for name, array in loaded.items()}
    lengths = {name: len(array) for name, array in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {rows}" for name, rows in lengths.items())
        raise ValueError(f"the arrays differ in length: {listed}")
    lists = [(array.astype(int) if array.dtype.kind == "b" else array).tolist() for array in columns.values()]
    return list(columns), [list(cells) for cells in zip(*lists, strict=True)]


def _read_arrow(path: Path, limit: int | None) -> Cells:
    try:
        pyarrow = import_module("pyarrow")
    except ImportError:
        raise BadFile(
            f"Cannot read {path.name} without pyarrow: pip install 'loraplex[arrow]', or give the rows as CSV or NPZ."
        ) from None
    with path.open("rb") as file:
        try:
            names, batches = _batches(file, is_parquet=path.suffix.lower() == ".parquet")
            columns = ([_plain(pyarrow, column).to_pylist() for column in batch.columns] for batch in batches)
            rows = itertools.chain.from_iterable(zip(*lists, strict=True) for lists in columns)
            return names, [list(cells) for cells in itertools.islice(rows, limit)]
        except pyarrow.ArrowException as error:
            raise ValueError(str(error)) from None


def _batches(file: Any, *, is_parquet: bool) -> tuple[list[str], Iterable[Any]]:
    """Return the names of the columns, and the batches of rows, which are read one by one."""
    if is_parquet:
        parquet = import_module("pyarrow.parquet").ParquetFile(file)
        return parquet.schema_arrow.names, parquet.iter_batches(_BATCH_ROWS)
    ipc = import_module("pyarrow.ipc")
    is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    file.seek(0)
    reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
    return reader.schema.names, map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader


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
