"""Tables on their way to the service: files by their ending, arrays as NPZ, Arrow tables as a stream."""

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
_ARROW_FILE = b"ARROW1"
"""What the other of Arrow's two formats begins with, which files called .arrow have as often as not."""
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
    """What a file is, as is `said` or by the ending of its name; raises `InvalidDataset`."""
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
    """Write arrays by name, each a column, or an Arrow table, to a file; returns what kind of file it is."""
    # Whoever has an Arrow table has imported pyarrow.
    arrow = sys.modules.get("pyarrow")
    if arrow is not None and isinstance(source, arrow.Table):
        ipc = import_module("pyarrow.ipc")
        with arrow.OSFile(str(file), "wb") as sink, ipc.new_stream(sink, source.schema) as writer:
            writer.write_table(source)
        return ARROW
    if not isinstance(source, Mapping):
        raise WrongType(
            f"a data set cannot be read from a {type(source).__name__}",
            field="source",
            given=type(source).__name__,
            expected="a file's path, a mapping of names to arrays, or a pyarrow.Table",
        )
    columns = {str(name): _column(value, str(name)) for name, value in source.items()}
    # As numpy.savez does, which has no room for a column called `file`.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, held in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, held, version=(2, 0), allow_pickle=False)
    return NPZ


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
