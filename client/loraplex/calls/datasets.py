"""Data sets: upload, list, show, preview, delete."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loraplex import reading
from loraplex.calls.adapters import remove
from loraplex.calls.making import conditions, get, pages, path
from loraplex.reading import reading as reading_json
from loraplex.results import Dataset, DatasetVersion, Preview
from loraplex.steps import Call, Repeat, Steps, ask, work
from loraplex.tables import NPZ, media_type, write_table

_READING_SECONDS = 120.0
_READING_SECONDS_A_BYTE = 2.0**-20
"""So long the service allows itself for reading a file: two minutes, and a second more for each MiB."""


def put_dataset(
    name: str,
    source: Any,
    *,
    content_type: str | None,
    if_match: str | None,
    if_none_match: str | None,
    timeout: float,
) -> Steps[DatasetVersion]:
    """Upload a file, arrays or an Arrow table as a data set."""
    headers = conditions(if_match, if_none_match)
    if isinstance(source, str | Path):
        file = Path(source)
        return (yield from ask(upload_file(name, file, content_type or media_type(file), headers, timeout)))
    with TemporaryDirectory(prefix="loraplex-") as folder:
        file = Path(folder) / "table"
        kind = yield from work(lambda: write_table(source, file))
        return (yield from ask(upload_file(name, file, content_type or kind, headers, timeout)))


def put_arrays(name: str, columns: dict[str, Any], *, timeout: float) -> Steps[DatasetVersion]:
    """Upload arrays, each a column."""
    return put_dataset(name, columns, content_type=NPZ, if_match=None, if_none_match=None, timeout=timeout)


def upload_file(
    name: str, file: Path, content_type: str, headers: dict[str, str], timeout: float
) -> Call[DatasetVersion]:
    """The call that uploads a file, which has as long as the service may take to read it."""
    return Call(
        method="PUT",
        path=path("datasets", name),
        read=reading_json(reading.dataset_version),
        repeats=Repeat.IF_REFUSED,
        headers={"Content-Type": content_type, **headers},
        content=file,
        timeout=timeout + _READING_SECONDS + file.stat().st_size * _READING_SECONDS_A_BYTE,
    )


def list_datasets(*, prefix: str | None, limit: int | None) -> Steps[None]:
    """Tell data sets in byte order of name."""
    return pages("/datasets", reading.dataset, query={"prefix": prefix}, limit=limit)


def show_dataset(name: str) -> Steps[Dataset]:
    """One data set with its newest version's report."""
    return ask(get(path("datasets", name), reading.dataset))


def list_dataset_versions(name: str, *, limit: int | None) -> Steps[None]:
    """Tell a data set's versions, newest first."""
    return pages(path("datasets", name, "versions"), reading.dataset_version, limit=limit)


def show_dataset_version(name: str, number: int) -> Steps[DatasetVersion]:
    """One version with its report."""
    return ask(get(path("datasets", name, "versions", number), reading.dataset_version))


def preview(name: str, *, version: int | None, offset: int | None, limit: int | None) -> Steps[Preview]:
    """Some rows."""
    query = {"version": version, "offset": offset, "limit": limit}
    return ask(get(path("datasets", name, "preview"), reading.preview, query))


def delete_dataset(name: str, *, if_match: str | None = None) -> Steps[None]:
    """Delete a data set with all its versions."""
    return ask(remove(path("datasets", name), if_match))
