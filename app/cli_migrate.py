"""Command `loraplex migrate`, which the client's command line loads as a plugin."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import DataDir
from app.cli_maintenance import reported
from app.settings import Settings, SettingsError, load_settings, make_data_dir

if TYPE_CHECKING:
    from adapters.maintenance.move import Move


def migrate(
    to_database: Annotated[
        str | None, typer.Option(metavar="URL", help="PostgreSQL database to copy to: postgresql+psycopg://…")
    ] = None,
    to_blobs: Annotated[
        str | None, typer.Option(metavar="URL", help="Bucket to copy to, with a prefix: s3://bucket/prefix")
    ] = None,
    from_database: Annotated[
        str | None, typer.Option(metavar="URL", help="PostgreSQL database to copy to the data folder.")
    ] = None,
    from_blobs: Annotated[
        str | None, typer.Option(metavar="URL", help="Bucket to copy to the data folder, with its prefix.")
    ] = None,
    data_dir: DataDir = None,
    blobs_only: Annotated[
        bool,
        typer.Option(
            "--blobs-only",
            help="Copy the blobs alone, while the service runs. Stop it afterwards, and repeat the command for the "
            "rest.",
        ),
    ] = False,
    trust_copies: Annotated[
        bool,
        typer.Option("--trust-copies", help="Do not read the blobs again that an earlier run has copied and checked."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Copy a data folder to PostgreSQL and a bucket, or back, and compare every digest. The source stays as it is."""
    pairs = {"to": (to_database, to_blobs), "from": (from_database, from_blobs)}
    given = [direction for direction, urls in pairs.items() if any(urls)]
    if len(given) != 1 or not all(pairs[given[0]]):
        raise typer.BadParameter("give both --to-database and --to-blobs, or both --from-database and --from-blobs")
    database_url, blob_url = pairs[given[0]]
    with reported(), _scratch() as scratch:
        settings = load_settings({"data_dir": data_dir, "database_url": database_url, "blob_url": blob_url})
        if given == ["from"]:
            make_data_dir(settings)
        elif not settings.data_dir.is_dir():
            raise SettingsError(f"there is no data folder {settings.data_dir}")
        move = _move(settings, scratch, to_folder=given == ["from"], blobs_only=blobs_only, trusts_copies=trust_copies)
    if as_json:
        tables = {name: table._asdict() for name, table in move.tables.items()}
        print(json.dumps(asdict(move) | {"tables": tables}, indent=2))
    else:
        _print(move)


def _move(settings: Settings, scratch: Path, *, to_folder: bool, blobs_only: bool, trusts_copies: bool) -> "Move":
    # Imported late, because the drivers are optional, and `loraplex --help` loads this module.
    from adapters.maintenance.move import MoveOptions, move_to_folder, move_to_servers, open_postgres
    from adapters.storage.object_blobs import ObjectBlobs

    catalog = scratch / "catalog"
    catalog.mkdir()
    options = MoveOptions(scratch=catalog, blobs_only=blobs_only, trusts_copies=trusts_copies, report=_report)
    # Not in the data folder, which stays as it is.
    blobs = replace(settings.blob_location, folder=scratch).open()
    assert settings.database_url is not None
    assert isinstance(blobs, ObjectBlobs)
    move = move_to_folder if to_folder else move_to_servers
    # The source may be used by services of an older release.
    with closing(open_postgres(settings.database_url, migrates=not to_folder)) as database:
        return move(settings.data_dir, database, blobs, options)


@contextmanager
def _scratch() -> Iterator[Path]:
    """Yield a folder for a copy of the catalogue, and remove it at the end."""
    with tempfile.TemporaryDirectory(prefix="loraplex-migrate-") as folder:
        yield Path(folder)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print(move: "Move") -> None:
    counts = move.blobs
    print(f"store {move.store_id}, revision {move.revision}")
    print(f"blobs: {counts.copied:,} copied ({counts.bytes:,} bytes), {counts.present:,} there already")
    if counts.trusted:
        print(f"blobs: {counts.trusted:,} of those there already were trusted, and not compared")
    if counts.missing:
        print(f"blobs: {counts.missing:,} were removed meanwhile")
    if move.tables:
        rows = sum(table.rows for table in move.tables.values())
        print(f"rows: {rows:,} in {len(move.tables)} tables, with the same digests; {move.checkpoints} checkpoints")
    elif move.is_complete:
        print("the target was complete already: only its blobs were compared")
    else:
        print("no rows were copied: stop the service, and repeat the command without --blobs-only")
