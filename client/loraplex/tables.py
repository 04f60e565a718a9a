"""Tables to upload: files by their ending, arrays as NPZ, DataFrames and Arrow tables as a stream."""

import sys
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraplex.arrays import array
from loraplex.errors import InvalidDataset, WrongType

NPZ = "application/x-npz"
LINES = "application/x-ndjson"
ARROW = "application/vnd.apache.arrow.stream"
# First bytes of an Arrow file, the other format of Arrow, which often has the ending .arrow too.
_ARROW_FILE = b"ARROW1"
_BY_ENDING: Mapping[str, str] = {
    ".csv": "text/csv",
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".parquet": "application/vnd.apache.parquet",
    ".arrow": ARROW,
    ".arrows": ARROW,
    ".npz": NPZ,
}


def media_type(file: Path, content_type: str | None = None) -> str:
    """Return a file's media type, from `content_type` or its ending; raise `InvalidDataset` if neither gives one."""
    kind = content_type or _BY_ENDING.get(file.suffix.lower())
    if kind is None or not file.is_file():
        problem = "is no file" if not file.is_file() else "does not say by its ending what it is"
        expected = f"a file that ends in {', '.join(_BY_ENDING)}"
        raise InvalidDataset(f"{file} {problem}", field="source", given=str(file), expected=expected)
    if kind == ARROW:
        with file.open("rb") as opened:
            is_arrow_file = opened.read(len(_ARROW_FILE)) == _ARROW_FILE
        if is_arrow_file:
            problem = "is an Arrow file, and the service reads Arrow streams"
            expected = "what pyarrow.ipc.new_stream writes, or Parquet"
            raise InvalidDataset(f"{file} {problem}", field="source", given=str(file), expected=expected)
    return kind


def write_table(source: Any, file: Path) -> str:
    """Write named arrays, one per column, or a table to a file, and return its media type.

    A table is a pandas or polars DataFrame, or any object with an Arrow stream (`__arrow_c_stream__`), such as a
    `pyarrow.Table`. Raises `WrongType`, which names the column if one is at fault.
    """
    if isinstance(source, Mapping):
        return _write_npz(source, file)
    if _is_a("polars", "DataFrame", source):
        # This needs no pyarrow. The oldest layout avoids newer types that not every reader supports.
        source.write_ipc_stream(file, compat_level=import_module("polars").CompatLevel.oldest())
        return ARROW
    if _is_a("pandas", "DataFrame", source):
        source = _of_pandas(source)
    if not hasattr(source, "__arrow_c_stream__"):
        raise _no_table(
            source, "cannot be read", "a path, named arrays, a pandas or polars DataFrame, or a pyarrow.Table"
        )
    return _write_arrow(source, file)


def _write_npz(source: Mapping[Any, Any], file: Path) -> str:
    columns = {str(name): _column(value, str(name)) for name, value in source.items()}
    # The format of numpy.savez, which does not allow a column named `file`.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, column, version=(2, 0), allow_pickle=False)
    return NPZ


def _write_arrow(source: Any, file: Path) -> str:
    pyarrow = _pyarrow(source)
    try:
        reader = pyarrow.RecordBatchReader.from_stream(source)
    except pyarrow.ArrowInvalid as error:
        raise _no_table(source, f"is no table: {error}", "a table") from None
    ipc = import_module("pyarrow.ipc")
    with pyarrow.OSFile(str(file), "wb") as sink, ipc.new_stream(sink, reader.schema) as writer:
        for batch in reader:
            # pyarrow cannot read every empty batch that it writes.
            if batch.num_rows:
                writer.write_batch(batch)
    return ARROW


def _of_pandas(frame: Any) -> Any:
    """Return the columns of a DataFrame, without its index, as a `pyarrow.Table`. NaN and NA become null."""
    pyarrow = _pyarrow(frame)
    columns: dict[str, Any] = {}
    for index, name in enumerate(map(str, frame.columns)):
        try:
            if name in columns:
                raise ValueError("another column has its name")
            columns[name] = pyarrow.Array.from_pandas(frame.iloc[:, index])
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            detail, kind = f"the column {name!r} cannot be a column of Arrow: {error}", str(frame.dtypes.iloc[index])
            expected = "values of one type: numbers, booleans, text, dates, or lists of numbers or of text"
            raise WrongType(detail, field=name, given=kind, expected=expected) from None
    return pyarrow.table(columns)


def _pyarrow(source: Any) -> Any:
    try:
        return import_module("pyarrow")
    except ImportError:
        problem = "is sent by way of pyarrow, which is not installed"
        raise _no_table(source, problem, "pip install 'loraplex[arrow]'; or a mapping of names to arrays") from None


def _no_table(source: object, problem: str, expected: str) -> WrongType:
    kind = type(source).__name__
    return WrongType(f"a {kind} {problem}", field="source", given=kind, expected=expected)


def _is_a(library: str, name: str, value: object) -> bool:
    # An instance of the class exists only if its library is imported.
    module = sys.modules.get(library)
    return module is not None and isinstance(value, getattr(module, name))


def _column(value: Any, name: str) -> NDArray[Any]:
    column = array(value, field=name)
    if column.dtype == object and all(isinstance(text, str) for text in column.flat):
        column = column.astype(str)
    if column.dtype.hasobject:
        detail, kind = f"{name} is no array of numbers, booleans or text", str(column.dtype)
        raise WrongType(detail, field=name, given=kind, expected="values of one type in each column")
    return np.ascontiguousarray(column)
