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


def media_type(file: Path, said: str | None = None) -> str:
    """Return the media type of a file, from `said` or from its ending; raise `InvalidDataset` if neither gives one."""
    kind = said or _BY_ENDING.get(file.suffix.lower())
    if kind is None or not file.is_file():
        problem = "is no file" if not file.is_file() else "does not say by its ending what it is"
        raise InvalidDataset(
            f"{file} {problem}",
            field="source",
            given=str(file),
            expected=f"a file that ends in {', '.join(_BY_ENDING)}",
        )
    if kind == ARROW:
        with file.open("rb") as opened:
            if opened.read(len(_ARROW_FILE)) == _ARROW_FILE:
                raise InvalidDataset(
                    f"{file} is an Arrow file, and the service reads Arrow streams",
                    field="source",
                    given=str(file),
                    expected="what pyarrow.ipc.new_stream writes, or Parquet",
                )
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
        raise WrongType(
            f"a data set cannot be read from a {type(source).__name__}",
            field="source",
            given=type(source).__name__,
            expected="a file's path, a mapping of names to arrays, a pandas or polars DataFrame, or a pyarrow.Table",
        )
    return _write_arrow(source, file)


def _write_npz(source: Mapping[Any, Any], file: Path) -> str:
    columns = {str(name): _column(value, str(name)) for name, value in source.items()}
    # The format of numpy.savez, which does not allow a column named `file`.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, held in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, held, version=(2, 0), allow_pickle=False)
    return NPZ


def _write_arrow(source: Any, file: Path) -> str:
    pyarrow = _pyarrow(source)
    try:
        reader = pyarrow.RecordBatchReader.from_stream(source)
    except pyarrow.ArrowInvalid as error:
        kind = type(source).__name__
        raise WrongType(f"a {kind} is no table: {error}", field="source", given=kind, expected="a table") from None
    ipc = import_module("pyarrow.ipc")
    with pyarrow.OSFile(str(file), "wb") as sink, ipc.new_stream(sink, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
    return ARROW


def _of_pandas(frame: Any) -> Any:
    """Return the columns of a DataFrame, without its index, as a `pyarrow.Table`. NaN and NA become null."""
    pyarrow = _pyarrow(frame)
    columns: dict[str, Any] = {}
    for place, label in enumerate(frame.columns):
        name = str(label)
        if name in columns:
            raise WrongType(
                f"two columns are called {name!r}", field=name, given=name, expected="a name of its own for each column"
            )
        try:
            columns[name] = pyarrow.Array.from_pandas(frame.iloc[:, place])
        except (pyarrow.ArrowException, TypeError, ValueError) as error:
            raise WrongType(
                f"the column {name!r} has no form in Arrow: {error}",
                field=name,
                given=str(frame.dtypes.iloc[place]),
                expected="values of one type: numbers, booleans, text, dates, or lists of numbers or of text",
            ) from None
    return pyarrow.table(columns)


def _pyarrow(source: Any) -> Any:
    try:
        return import_module("pyarrow")
    except ImportError:
        kind = type(source).__name__
        raise WrongType(
            f"a {kind} is sent by way of pyarrow, which is not installed",
            field="source",
            given=kind,
            expected="pip install 'loraplex[arrow]'; or a mapping of names to arrays",
        ) from None


def _is_a(library: str, name: str, value: object) -> bool:
    # An instance of the class exists only if its library is imported.
    module = sys.modules.get(library)
    return module is not None and isinstance(value, getattr(module, name))


def _column(value: Any, name: str) -> NDArray[Any]:
    found = array(value, field=name)
    if found.dtype == object and all(isinstance(text, str) for text in found.flat):
        found = found.astype(str)
    if found.dtype.hasobject:
        raise WrongType(
            f"{name} is no array of numbers, booleans or text",
            field=name,
            given=str(found.dtype),
            expected="values of one type in each column",
        )
    return np.ascontiguousarray(found)
