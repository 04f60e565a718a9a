"""Commands `dataset put`, `list`, `show`, `preview` and `delete`."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from loraplex.cli.errors import BadFile, WrongUsage
from loraplex.cli.output import Fitting
from loraplex.cli.plugins import complete_dataset
from loraplex.cli.session import Session, command, confirm, plural
from loraplex.cli.summary import dash, pairs, size, when
from loraplex.results import Dataset, DatasetVersion, Preview

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_MOST_BAD_ROWS = 5
_MOST_COLUMNS = 12
_LONGEST_CELL = 24

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of the data set; `show` also accepts a version: name@3.",
        autocompletion=complete_dataset,
    ),
]


def put_dataset(session: Session, name: str, file: Path) -> DatasetVersion:
    """Upload a file, and print a summary of it."""
    if not file.is_file():
        raise BadFile(f"{file} is no file" if file.exists() else f"There is no file {file}")
    stored: DatasetVersion = session.client.put_dataset(name, file)
    session.say(
        f"data set: {stored.dataset}@{stored.version}, {plural(stored.rows, 'row')}, "
        f"{plural(len(stored.columns), 'column')}, {size(stored.bytes)}"
    )
    if stored.bad_rows:
        session.say("rows that cannot be trained on:")
    for bad in stored.bad_rows[:_MOST_BAD_ROWS]:
        session.say(f"  row {bad.row}, column {bad.column}: {bad.reason}")
    if len(stored.bad_rows) > _MOST_BAD_ROWS:
        session.say(f"  … more: loraplex dataset show {name}")
    return stored


def find_dataset(session: Session, reference: str) -> DatasetVersion:
    """Return the version that `tickets` or `tickets@3` names, with its columns."""
    name, _, number = reference.partition("@")
    if number and number != "live" and not number.isdecimal():
        raise WrongUsage(f"Not a data set: '{reference}'. Write name or name@3.")
    if number.isdecimal():
        found: DatasetVersion = session.client.dataset_version(name, int(number))
        return found
    newest: DatasetVersion = session.client.dataset(name).newest
    return newest


def name_of(file: Path) -> str:
    """Return a name for a data set from the name of a file, with `-` for characters that names must not have."""
    return _NOT_IN_NAMES.sub("-", file.name.partition(".")[0]).strip("-._")[:128] or "data"


def register(cli: typer.Typer, *, panel: str) -> None:
    """Register the commands."""
    group = typer.Typer(no_args_is_help=True, help="Data sets: upload, list, show, preview, delete.")
    cli.add_typer(group, name="dataset", rich_help_panel=panel)

    @command(group, "put")
    def put(
        session: Session,
        file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV, Parquet, Arrow stream, JSON lines or NPZ.")],
        *,
        name: Annotated[str | None, typer.Option(help="Name of the data set.", show_default="the file's name")] = None,
    ) -> None:
        """Upload a file as a data set, or as a new version of one."""
        session.give(put_dataset(session, name or name_of(file), file))

    @command(group, "list")
    def list_datasets(session: Session) -> None:
        """List the data sets."""
        datasets = list(session.client.datasets())
        none = "There are none. To upload one: loraplex dataset put FILE"
        session.give(datasets, _dataset_table(datasets) if datasets else none)

    @command(group, "show")
    def show(session: Session, name: Name) -> None:
        """Show the columns of a data set, and its rows that cannot be used for training."""
        version = find_dataset(session, name)
        session.give(version, *_describe(version))

    @command(group, "preview")
    def preview(
        session: Session,
        name: Name,
        *,
        offset: Annotated[int, typer.Option(help="First row, from 0.", min=0)] = 0,
        limit: Annotated[int, typer.Option(help="Number of rows.", min=1, max=100)] = 10,
    ) -> None:
        """Show some rows of a data set."""
        rows = session.client.preview(name, offset=offset, limit=limit)
        table, left_out = _preview_table(rows)
        session.give(rows, table)
        if left_out:
            session.say(left_out)

    @command(group, "delete")
    def delete(
        session: Session,
        name: Name,
        *,
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    ) -> None:
        """Delete a data set with all its versions."""
        confirm(f"Delete the data set {name} with all its versions?", yes=yes)
        session.client.delete_dataset(name)
        session.give({"deleted": name}, f"deleted {name}")


def _dataset_table(datasets: Sequence[Dataset]) -> Fitting:
    right = ("newest", "rows", "size", "versions")
    table = Fitting("name", "newest", "rows", "size", "versions", "made", right=right)
    for dataset in datasets:
        newest, versions = dataset.newest, str(dataset.versions)
        about = (f"@{newest.version}", f"{newest.rows:,}", size(newest.bytes), versions, when(newest.created_at))
        table.add_row(dataset.name, *about)
    return table


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
    columns = Fitting("column", "type", "width", "nulls", "not finite", right=("width", "nulls", "not finite"))
    for column in version.columns:
        columns.add_row(column.name, column.type, dash(column.width), str(column.nulls), str(column.not_finite))
    yield from ("", columns)
    if version.bad_rows:
        bad = Fitting("row", "column", "reason", title="Rows that cannot be trained on", right=("row",), folds="reason")
        for row in version.bad_rows:
            bad.add_row(str(row.row), dash(row.column), row.reason)
        yield from ("", bad)


def _preview_table(preview: Preview) -> tuple[Fitting, str]:
    """Return the rows as a table, and a note about columns that are left out."""
    names = list(preview.rows[0]) if preview.rows else []
    left_out = len(names) - _MOST_COLUMNS
    # Of many columns, show the last one, because the target is often the last.
    shown = names if left_out <= 0 else [*names[: _MOST_COLUMNS - 1], names[-1]]
    table = Fitting("row", *shown, right=("row",))
    for number, row in enumerate(preview.rows, preview.offset):
        table.add_row(str(number), *(dash(row[name])[:_LONGEST_CELL] for name in shown))
    if left_out <= 0:
        return table, ""
    return table, f"{plural(left_out, 'column')} between {shown[-2]} and {shown[-1]} left out (all: --json)"
