"""Commands `dataset put`, `list`, `show`, `preview` and `delete`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from loraplex.cli.errors import WrongUsage, list_bad_rows
from loraplex.cli.output import Table, pairs, plural, size, when
from loraplex.cli.session import Session, Yes, argument, command, complete_dataset, confirm, option
from loraplex.results import DatasetVersion

FORMATS = "CSV, Parquet, Arrow stream, JSON lines or NPZ"
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_MAX_COLUMNS = 12
_MAX_CELL = 24

app = typer.Typer(no_args_is_help=True, help="Data sets: upload, list, show, preview, delete.")
_NAME_HELP = "Name of the data set; `show` also accepts a version: name@3."
Name = Annotated[str, argument("NAME", _NAME_HELP, autocompletion=complete_dataset)]


def put_dataset(session: Session, name: str, file: Path) -> DatasetVersion:
    """Upload a file, and print a summary of it."""
    version = session.client.put_dataset(name, file)
    rows, columns = plural(version.rows, "row"), plural(len(version.columns), "column")
    session.note(f"data set: {version.dataset}@{version.version}, {rows}, {columns}, {size(version.bytes)}")
    if version.bad_rows:
        session.note(f"rows that cannot be trained on (`loraplex dataset show {name}` lists them):")
    for line in list_bad_rows(version.bad_rows):
        session.note(line)
    return version


def find_dataset(session: Session, reference: str) -> DatasetVersion:
    """Return the version that `tickets` or `tickets@3` names, with its columns."""
    name, _, number = reference.partition("@")
    if number.isdecimal():
        return session.client.dataset_version(name, int(number))
    if number in ("", "live"):
        return session.client.dataset(name).newest
    raise WrongUsage(f"Not a data set: '{reference}'. Write name or name@3.")


def name_of(file: Path) -> str:
    """Return a name for a data set from the name of a file, with `-` for characters that names must not have."""
    return _NOT_IN_NAMES.sub("-", file.name.partition(".")[0]).strip("-._")[:128] or "data"


@command(app, "put")
def put(
    session: Session,
    file: Annotated[Path, argument("FILE", f"{FORMATS}.")],
    *,
    name: Annotated[str | None, option("Name of the data set.", show_default="the file's name")] = None,
) -> None:
    """Upload a file as a data set, or as a new version of one."""
    session.give(put_dataset(session, name or name_of(file), file))


@command(app, "list")
def list_datasets(session: Session) -> None:
    """List the data sets."""
    datasets = list(session.client.datasets())
    rows = []
    for dataset in datasets:
        newest = dataset.newest
        about = (
            f"@{newest.version}",
            f"{newest.rows:,}",
            size(newest.bytes),
            dataset.versions,
            when(newest.created_at),
        )
        rows.append((dataset.name, *about))
    right = ("newest", "rows", "size", "versions")
    table = Table(("name", *right, "made"), rows, right=right)
    session.give(datasets, table if datasets else "There are none. To upload one: loraplex dataset put FILE")


@command(app, "show")
def show(session: Session, name: Name) -> None:
    """Show the columns of a data set, and its rows that cannot be used for training."""
    version = find_dataset(session, name)
    session.give(version, *_describe(version))


@command(app, "preview")
def preview(
    session: Session,
    name: Name,
    *,
    offset: Annotated[int, option("First row, from 0.", min=0)] = 0,
    limit: Annotated[int, option("Number of rows.", min=1, max=100)] = 10,
) -> None:
    """Show some rows of a data set."""
    part = session.client.preview(name, offset=offset, limit=limit)
    names = list(part.rows[0]) if part.rows else []
    left_out = len(names) - _MAX_COLUMNS
    # Of many columns, show the last one, because the target is often the last.
    shown = names if left_out <= 0 else [*names[: _MAX_COLUMNS - 1], names[-1]]
    rows = [(number, *(_cell(row[name]) for name in shown)) for number, row in enumerate(part.rows, part.offset)]
    session.give(part, Table(("row", *shown), rows, right=("row",)))
    if left_out > 0:
        columns = plural(left_out, "column")
        session.note(f"{columns} between {shown[-2]} and {shown[-1]} left out (all: --json)")


@command(app, "delete")
def delete(session: Session, name: Name, *, yes: Yes = False) -> None:
    """Delete a data set with all its versions."""
    confirm(f"Delete the data set {name} with all its versions?", yes=yes)
    session.client.delete_dataset(name)
    session.give({"deleted": name}, f"deleted {name}")


def _cell(value: object) -> str | None:
    return None if value is None else str(value)[:_MAX_CELL]


def _describe(version: DatasetVersion) -> Iterator[Any]:
    """Yield the table of a version, of its columns and of its bad rows."""
    about = {
        "data set": f"{version.dataset}@{version.version}",
        "rows": f"{version.rows:,}",
        "size": size(version.bytes),
        "made": when(version.created_at),
        "digest": version.digest,
    }
    yield pairs(about)
    yield ""
    right = ("width", "nulls", "not finite")
    yield Table(("column", "type", *right), version.columns, right=right)
    if version.bad_rows:
        yield ""
        title = "Rows that cannot be trained on"
        yield Table(("row", "column", "reason"), version.bad_rows, title=title, right=("row",), folds="reason")
