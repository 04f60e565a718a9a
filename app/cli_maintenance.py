"""Commands `loraplex doctor`, `backup`, `restore` and `gc`, which the client's command line loads as plugins.

They work on the data folder, beside a running service or without one.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.errors import LoraplexError
from app.cli import DataDir
from app.settings import Settings, SettingsError, exit_if_unusable, load_settings, make_data_dir

if TYPE_CHECKING:
    from adapters.maintenance.doctor import Finding
    from adapters.storage.postgres_database import PostgresDatabase

# Exit status if something is wrong with the data folder, or the command could not do what it is for.
_FAILED = 1


@contextmanager
def reported() -> Iterator[None]:
    """Name the command line as the actor of all changes; print an error of the domain, and end the process."""
    from adapters.access.audit import COMMAND_LINE, acting_as

    try:
        with exit_if_unusable(), acting_as(COMMAND_LINE):
            yield
    except LoraplexError as error:
        print(f"loraplex: {error.detail}", file=sys.stderr)
        sys.exit(_FAILED)


def _settings(data_dir: Path | None) -> Settings:
    settings = load_settings({"data_dir": data_dir})
    if settings.database_url is not None and settings.blob_url is not None:
        # There is nothing in it that cannot be made again.
        make_data_dir(settings)
    elif not settings.data_dir.is_dir():
        raise SettingsError(f"there is no data folder {settings.data_dir}")
    return settings


@contextmanager
def _opened_database(settings: Settings, *, migrates: bool = False) -> "Iterator[PostgresDatabase | None]":
    """Open the database of `DATABASE_URL`; None if the catalogue is in the data folder.

    Only a restore migrates its tables, which are empty: those of a store may be used by services of an older release.
    """
    if settings.database_url is None:
        yield None
        return
    # The driver is an optional dependency.
    from adapters.storage.postgres_database import PostgresDatabase

    with closing(PostgresDatabase(settings.database_url, migrates=migrates)) as database:
        yield database


def doctor(
    data_dir: DataDir = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Repair what can be repaired: restore lost bytes from another copy, move orphans to quarantine, and "
            "build damaged indexes again.",
        ),
    ] = False,
    remove_lost: Annotated[
        bool,
        typer.Option("--remove-lost", help="With --repair, also remove the versions whose bytes have no other copy."),
    ] = False,
) -> None:
    """Check the catalogue, every reference and every digest; exit with status 1 if anything is wrong."""
    from adapters.maintenance.doctor import diagnose
    from adapters.maintenance.scrub import read_state

    if remove_lost and not repair:
        raise typer.BadParameter("it needs --repair", param_hint="--remove-lost")
    with reported(), _opened_database(settings := _settings(data_dir)) as database:
        folder, blobs = settings.data_dir, settings.blob_location.open()
        diagnosis = diagnose(folder, blobs, database)
        _print_findings(diagnosis.findings)
        state = read_state(folder)
        last = "none was completed yet"
        if state.finished_at is not None:
            last = f"the last one ended at {datetime.fromtimestamp(state.finished_at, UTC):%Y-%m-%dT%H:%M:%SZ}"
        print(f"checked {diagnosis.blobs} blobs: {len(diagnosis.findings)} findings")
        print(f"scrub: {last}; {len(state.damaged)} damaged blobs")
        left = len(diagnosis.findings)
        if repair and diagnosis.findings:
            from adapters.maintenance.repair import repair as repair_findings

            repairs = repair_findings(folder, diagnosis, blobs, database, remove_lost=remove_lost)
            for finding, is_repaired, action in repairs:
                print(f"{'repaired' if is_repaired else 'left':10} {finding.subject}: {action}")
            left = sum(not one.is_repaired for one in repairs)
    if left:
        sys.exit(_FAILED)


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The tar file to write; it is replaced at the end.")],
    data_dir: DataDir = None,
) -> None:
    """Write the catalogue and all blobs to one file, consistently, while the service runs."""
    from adapters.maintenance.backup import back_up

    with reported(), _opened_database(settings := _settings(data_dir)) as database:
        made = back_up(settings.data_dir, file, settings.blob_location.open(), database)
    print(f"{file}: revision {made.revision}, {made.blobs} blobs, {made.bytes:,} bytes")
    for damage in made.damages:
        print(f"{damage.problem:20} {damage.part}: {damage.detail}")
    if made.damages:
        sys.exit(_FAILED)


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `loraplex backup` wrote.")],
    data_dir: DataDir = None,
) -> None:
    """Create a store from a backup. The data folder, and the database and the prefix of the settings, must be empty."""
    from adapters.maintenance.restore import restore as restore_backup

    with reported(), _opened_database(settings := load_settings({"data_dir": data_dir}), migrates=True) as database:
        folder = settings.data_dir
        restored = restore_backup(file, folder, settings.blob_location if settings.blob_url else None, database)
    print(f"{folder}: revision {restored.revision}, {restored.blobs} blobs, every digest checked")
    _print_findings(restored.findings)
    if restored.findings:
        sys.exit(_FAILED)


def gc(
    data_dir: DataDir = None,
    vacuum: Annotated[
        bool,
        typer.Option(
            "--vacuum",
            help="Also shrink the catalogue's file: changes wait meanwhile, about a second for 100 MB. On PostgreSQL, "
            "run VACUUM (ANALYZE), beside which changes go on.",
        ),
    ] = False,
    audit_days: Annotated[
        float | None,
        typer.Option(
            "--audit-days",
            min=0,
            help="Also remove the entries of the audit log that are older than this number of days.",
        ),
    ] = None,
) -> None:
    """Remove what has expired, such as deleted adapters, and move files without a row to quarantine."""
    from adapters.access.audit import AuditLog
    from adapters.access.idempotency import remove_expired
    from adapters.access.tenants import DEFAULT_TENANT
    from adapters.access.usage import Usage
    from adapters.clock import rfc3339
    from adapters.maintenance.backup import remove_abandoned_links
    from adapters.storage.quarantine import SECONDS_A_DAY
    from adapters.storage.store_identity import CATALOG, check_schema, connected
    from app.bootstrap import open_catalog

    with reported():
        settings = _settings(data_dir)
        folder = settings.data_dir
        if settings.database_url is None:
            check_schema(folder)
        catalog = open_catalog(settings, migrates=False)
        try:
            trash, purged, swept = catalog.purge_trash(), catalog.blobs.purge(), catalog.sweep()
            keys = remove_expired(catalog.database, now=time.time())
            hours = Usage(catalog.database, now=time.time).remove_expired()
            removed = None
            if audit_days is not None:
                until = rfc3339(max(0.0, time.time() - audit_days * SECONDS_A_DAY))
                removed = AuditLog(catalog.database).remove_before(until, tenant=DEFAULT_TENANT)
        finally:
            catalog.close()
        remove_abandoned_links(folder, catalog.blobs)
        print(f"trash: {trash:,} bytes freed")
        print(f"usage: {hours:,} entries removed")
        print(f"quarantine: {purged:,} bytes freed, {swept} files moved into it or removed")
        print(f"idempotency keys: {keys} expired ones removed")
        if removed is not None:
            print(f"audit log: {removed:,} entries removed")
        if vacuum and settings.database_url is not None:
            with _opened_database(settings) as database:
                assert database is not None
                print(f"catalogue: {database.vacuum():,} bytes freed")
        elif vacuum:
            before = (folder / CATALOG).stat().st_size
            with connected(folder / CATALOG) as connection:
                connection.execute("PRAGMA journal_mode=TRUNCATE")
                connection.execute("VACUUM")
            print(f"catalogue: {before - (folder / CATALOG).stat().st_size:,} bytes freed")


def _print_findings(findings: "list[Finding] | tuple[Finding, ...]") -> None:
    for finding in findings:
        print(f"{finding.problem:20} {finding.subject}: {finding.detail}")
