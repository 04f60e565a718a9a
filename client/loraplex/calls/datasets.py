"""Calls for data sets: upload, list, show, preview, delete."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from loraplex import decode as reading
from loraplex.calls.adapters import remove
from loraplex.calls.builders import conditions, encoded, get, pages, path
from loraplex.decode import reading as reading_json
from loraplex.effects import Call, Operation, Repeat, ask, work
from loraplex.errors import WrongShape
from loraplex.results import Dataset, DatasetVersion, Preview
from loraplex.tables import LINES, media_type, write_table

_READING_SECONDS = 120.0
# Time that the service allows itself for reading a file: two minutes, and a second for each MiB.
_READING_SECONDS_A_BYTE = 2.0**-20


def put_dataset(
    name: str,
    source: Any,
    *,
    content_type: str | None,
    if_match: str | None,
    if_none_match: str | None,
    timeout: float | None,
) -> Operation[DatasetVersion]:
    """Upload a file, arrays or an Arrow table as a data set."""
    headers = conditions(if_match, if_none_match)
    if isinstance(source, str | Path):
        file = Path(source)
        kind = media_type(file, content_type)
        return (yield from ask(_upload(name, file, content_type=kind, headers=headers, timeout=timeout)))
    write = partial(write_table, source)
    return (yield from _write_and_upload(name, write, content_type=content_type, headers=headers, timeout=timeout))


def put_columns(name: str, columns: Mapping[str, Any], *, timeout: float | None) -> Operation[DatasetVersion]:
    """Upload columns of arrays and of lists of labels."""
    # Lists of labels differ in length, which NPZ cannot represent.
    arrays = all(isinstance(column, np.ndarray) for column in columns.values())
    write = partial(write_table if arrays else _write_lines, columns)
    return _write_and_upload(name, write, content_type=None, headers={}, timeout=timeout)


def _write_lines(columns: Mapping[str, Any], file: Path) -> str:
    lengths = {
        name: len(column) if isinstance(column, list) or column.ndim else None for name, column in columns.items()
    }
    if len(set(lengths.values())) > 1:
        raise WrongShape(
            "columns differ in length: " + ", ".join(f"{name} has {rows}" for name, rows in lengths.items()),
            given=lengths,
            expected="a value for each row",
        )
    with file.open("wb") as opened:
        for row in zip(*columns.values(), strict=True):
            opened.write(encoded(dict(zip(columns, row, strict=True))) + b"\n")
    return LINES


def _write_and_upload(
    name: str,
    write: Callable[[Path], str],
    *,
    content_type: str | None,
    headers: Mapping[str, str],
    timeout: float | None,
) -> Operation[DatasetVersion]:
    with TemporaryDirectory(prefix="loraplex-") as folder:
        file = Path(folder) / "table"
        kind = yield from work(lambda: write(file))
        call = _upload(name, file, content_type=content_type or kind, headers=headers, timeout=timeout)
        return (yield from ask(call))


def _upload(
    name: str, file: Path, *, content_type: str, headers: Mapping[str, str], timeout: float | None
) -> Call[DatasetVersion]:
    return Call(
        method="PUT",
        path=path("datasets", name),
        read=reading_json(reading.dataset_version),
        repeats=Repeat.IF_REFUSED,
        headers={"Content-Type": content_type, **headers},
        content=file,
        timeout=timeout,
        allowance=_READING_SECONDS + file.stat().st_size * _READING_SECONDS_A_BYTE,
    )


def list_datasets(*, prefix: str | None, limit: int | None) -> Operation[None]:
    """Emit data sets in byte order of their names."""
    return pages("/datasets", reading.dataset, query={"prefix": prefix}, limit=limit)


def show_dataset(name: str) -> Operation[Dataset]:
    """Return the call that reads a data set with the report of its newest version."""
    return ask(get(path("datasets", name), reading.dataset))


def list_dataset_versions(name: str, *, limit: int | None) -> Operation[None]:
    """Emit the versions of a data set, newest first."""
    return pages(path("datasets", name, "versions"), reading.dataset_version, limit=limit)


def show_dataset_version(name: str, number: int) -> Operation[DatasetVersion]:
    """Return the call that reads a version with its report."""
    return ask(get(path("datasets", name, "versions", number), reading.dataset_version))


def preview(name: str, *, version: int | None, offset: int | None, limit: int | None) -> Operation[Preview]:
    """Return the call that reads some rows."""
    query = {"version": version, "offset": offset, "limit": limit}
    return ask(get(path("datasets", name, "preview"), reading.preview, query))


def delete_dataset(name: str, *, if_match: str | None = None) -> Operation[None]:
    """Return the call that deletes a data set with all its versions."""
    return ask(remove(path("datasets", name), if_match))
