"""Rows of the files that hold typed columns: NPZ, and, with pyarrow, Parquet and Arrow streams and files."""

from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from loraplex.cli.errors import BadFile

_ARROW_FILE = b"ARROW1"
"""The first bytes of an Arrow file, which is not an Arrow stream, although both may be called .arrow."""
_BATCH_ROWS = 4096
Cells = list[list[Any]]


def read_table_file(path: Path, limit: int | None) -> tuple[list[str], Cells]:
    """Return the names of the columns, and a list of cells a row. true and false are 1 and 0, as in a data set.

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
    """Return a column in the types that a data set would store it in."""
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_boolean(column.type):
        return column.cast(pyarrow.int64())
    if types.is_temporal(column.type):
        return column.cast(pyarrow.string())
    return column.cast(pyarrow.float64()) if types.is_decimal(column.type) else column
