"""Checks and maintenance of the data folder before, during and after a run of `serve` or `trainer`."""

import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import CatalogBusy, CatalogNotLoadable, StorageFailed
from adapters.storage.blobs import Blobs
from adapters.storage.quarantine import Quarantine
from adapters.storage.store_identity import (
    CATALOG,
    RUNNING,
    WRITERS,
    catalog_bytes,
    check_integrity,
    check_store,
    complete_store,
    newest_revision,
    refuse_unfinished,
    unreferenced,
)
from app.settings import Settings, make_data_dir

if TYPE_CHECKING:
    from adapters.storage.database import Database

# A larger catalogue is checked in the background, and only after an unclean end.
MAX_BYTES_AT_START = 256 * 2**20
_SECONDS_BETWEEN_PURGES = 3600.0

log = logging.getLogger(__name__)


@contextmanager
def guarded_store(settings: Settings, *, accept_catalog: bool) -> Iterator[None]:
    """Check the data folder, and hold a mark in it that a process is running.

    With `accept_catalog`, the catalogue is used as it is, and created if it is missing. Raises `SettingsError` if the
    folder cannot be used, and `CatalogNotLoadable` if its catalogue is damaged or does not belong to the blobs.
    """
    make_data_dir(settings)
    folder = settings.data_dir
    blobs = settings.blob_location.open()
    abandoned = _lock_abandoned(folder / RUNNING)
    try:
        if accept_catalog:
            _accept(settings, blobs)
        # Each worker checks a catalogue of `DATABASE_URL` when it opens it.
        is_large = settings.database_url is None and _check(folder, blobs)
    except BaseException:
        # The marks stay, so that the next start checks again.
        _unlock(abandoned)
        raise
    marks = _mark(folder / RUNNING)
    stop = threading.Event()
    if is_large and abandoned:
        threading.Thread(target=_check_in_background, args=(folder, abandoned), daemon=True).start()
    else:
        _remove(abandoned)
    if settings.database_url is None:
        # On several machines, workers take turns.
        threading.Thread(target=_purge_hourly, args=(blobs, stop), daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        _remove(marks)


@contextmanager
def opened_database(settings: Settings) -> Iterator["Database"]:
    """Open the database for one command, whether or not the service runs; create it if it is missing.

    Raises `SettingsError`, `CatalogNotLoadable` and `CatalogUnavailable` as `guarded_store` does.
    """
    make_data_dir(settings)
    folder = settings.data_dir
    quarantine = Quarantine(folder, now=time.time, days=settings.quarantine_days)
    blobs = settings.blob_location.open()
    if settings.database_url is None:
        check_store(folder, blobs=blobs)
    database = _open(settings, quarantine)
    try:
        if settings.database_url is not None:
            check_store(folder, database, blobs=blobs)
        blobs.create_folder()
        complete_store(folder, database, blobs=blobs)
        yield database
    finally:
        database.close()


def _open(settings: Settings, quarantine: Quarantine) -> "Database":
    # Imported here, because the supervisor does without SQLAlchemy, and most services without the driver.
    if settings.database_url is not None:
        from adapters.storage.postgres_database import PostgresDatabase

        return PostgresDatabase(settings.database_url)
    from adapters.storage.sqlite_database import SqliteDatabase

    return SqliteDatabase(settings.data_dir, make_room=quarantine.empty)


def _check(folder: Path, blobs: Blobs) -> bool:
    """Check the store; return whether the catalogue is too large for an integrity check before the start."""
    catalog = folder / CATALOG
    is_large = catalog_bytes(folder) > MAX_BYTES_AT_START
    try:
        check_store(folder, blobs=blobs)
        if not is_large:
            check_integrity(catalog)
    except CatalogBusy as error:
        log.warning("the catalogue is not checked: %s", error.detail)
    except StorageFailed as error:
        raise CatalogNotLoadable(error.detail) from error
    return is_large


def _accept(settings: Settings, blobs: Blobs) -> None:
    # Imported here, because this process does without SQLAlchemy otherwise.
    from adapters.storage.pending_blobs import BlobWriter, live_owners

    folder = settings.data_dir
    database = _open(settings, Quarantine(folder, now=time.time, days=settings.quarantine_days))
    refuse_unfinished(database.name, database.identity(with_references=False))
    blobs.create_folder()
    writer = BlobWriter(database, blobs, folder)
    if live_owners(folder / WRITERS):
        raise CatalogNotLoadable(
            f"the catalogue {database.name} cannot be accepted while another process publishes: stop it first"
        )
    writer.delete_stale_rows()
    writer.close()
    newest = newest_revision(folder, blobs=blobs)
    # Before the ids are written: while they differ, every start is refused, and sweeps nothing.
    if orphans := unreferenced(folder, database, blobs=blobs):
        kept = blobs.keep_aside(orphans)
        log.warning("moved %d blobs that the catalogue does not refer to into %s; they stay there", len(orphans), kept)
    complete_store(folder, database, blobs=blobs, accept=True, revision_at_least=newest)
    log.warning("the catalogue %s is accepted as it is", database.name)
    database.close()


def _check_in_background(folder: Path, abandoned: list[tuple[Path, int]]) -> None:
    try:
        check_integrity(folder / CATALOG, by_table=True)
    except (CatalogBusy, CatalogNotLoadable) as error:
        log.error("%s", error.detail)
        _unlock(abandoned)
    else:
        _remove(abandoned)


def _purge_hourly(blobs: Blobs, stop: threading.Event) -> None:
    while not stop.wait(_SECONDS_BETWEEN_PURGES):
        try:
            blobs.purge()
        except OSError as error:
            log.warning("the quarantine cannot be purged: %s", error)


def _mark(running: Path) -> list[tuple[Path, int]]:
    """Create the mark of this process; return it with its lock, which no child process inherits."""
    path = running / f"{uuid.uuid4().hex}.lock"
    # Locked before it gets the name that others search for. Otherwise they could take it for abandoned.
    fresh = path.with_suffix(".new")
    try:
        running.mkdir(exist_ok=True)
        lock = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fresh.rename(path)
    except OSError as error:
        # For example on a full disk, from which the service can still serve.
        log.warning("an unclean end of this process will not be noticed: %s", error)
        return []
    return [(path, lock)]


def _lock_abandoned(running: Path) -> list[tuple[Path, int]]:
    """Return the marks of dead processes, locked, so that only one of several simultaneous starts does the check."""
    abandoned = []
    for path in running.glob("*.lock"):
        # A folder of that name is not a mark.
        with suppress(FileNotFoundError, IsADirectoryError):
            lock = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
            else:
                abandoned.append((path, lock))
    return abandoned


def _remove(marks: list[tuple[Path, int]]) -> None:
    for path, _ in marks:
        path.unlink(missing_ok=True)
    _unlock(marks)


def _unlock(marks: list[tuple[Path, int]]) -> None:
    for _, lock in marks:
        os.close(lock)
