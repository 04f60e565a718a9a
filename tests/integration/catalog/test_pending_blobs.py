"""Blobs that are being written: no sweep takes them, and their rows cost no commit of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
import sqlalchemy as sa

from adapters.catalog.adapter_cache import read_adapter
from adapters.catalog.catalog import Catalog
from adapters.errors import CatalogBusy, PreconditionFailed, StorageFailed
from adapters.jobs.queue import JobQueue
from adapters.storage.blobs import blob_key
from tests.support.catalog_factories import publication, put, quarantined_files, stored_files, submit, write_orphan
from tests.support.databases import open_catalog, rows_of
from tests.support.storage_kinds import on_both_storages

pytestmark = on_both_storages


@pytest.fixture
def other(catalog: Catalog, folder: Path) -> Iterator[Catalog]:
    """The same storage, opened as a second service does."""
    opened = open_catalog(folder, now=lambda: 0.0)
    yield opened
    opened.close()


def _pending(folder: Path) -> set[str]:
    return {key for (key,) in rows_of(folder, "SELECT key FROM pending_blobs")}


def _write_and_raise(catalog: Catalog, error: BaseException) -> None:
    with catalog.writer.upload() as upload:
        upload.write(b"not published")
        raise error


def test_a_blob_is_pending_before_its_file_exists_and_until_it_is_published(catalog: Catalog, folder: Path) -> None:
    pending = []

    def write(file: BinaryIO) -> None:
        pending.append((Path(file.name).name, _pending(folder)))

    with catalog.writer.upload() as upload:
        name = upload.write(write)
        assert blob_key(name) in _pending(folder)
        with catalog.database.write() as connection:
            upload.publish(connection)
        assert blob_key(name) not in _pending(folder)
    ((file, keys),) = pending
    assert file == f"{name}.tmp"
    assert blob_key(name) in keys


def test_another_service_sweeps_neither_a_blob_nor_its_temporary_file(
    catalog: Catalog, other: Catalog, folder: Path
) -> None:
    swept = []
    with catalog.writer.upload() as upload:
        name = upload.write(lambda _: swept.append(other.sweep()))
        swept.append(other.sweep())
        with catalog.database.write() as connection:
            upload.publish(connection)
    assert swept == [0, 0]
    assert stored_files(folder) == {name}
    # No row refers to it after all.
    assert other.sweep() == 1


def test_a_sweep_takes_the_blobs_of_a_writer_that_has_ended(catalog: Catalog, other: Catalog, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _write_and_raise(catalog, KeyboardInterrupt())
    (name,) = stored_files(folder)
    assert other.sweep() == 0
    catalog.writer.close()
    assert other.sweep() == 1
    assert quarantined_files(folder) == {name}
    assert _pending(folder) == set()


def test_of_processes_that_start_together_one_sweeps(folder: Path) -> None:
    now = [100.0]
    started = [open_catalog(folder, now=lambda: now[0]) for _ in range(3)]
    write_orphan(started[0], b"left by a crash")
    now[0] = 101.0
    assert [catalog.sweep_once() for catalog in started] == [1, 0, 0]
    # A process that was started again, after a crash that left another blob.
    write_orphan(started[0], b"left by another crash")
    restarted = open_catalog(folder, now=lambda: now[0])
    now[0] = 102.0
    assert [catalog.sweep_once() for catalog in (started[1], restarted)] == [0, 1]
    # A clock that was set back says nothing about the order.
    now[0] = 50.0
    write_orphan(started[0], b"left by a third")
    late = open_catalog(folder, now=lambda: now[0])
    assert late.sweep_once() == 1
    for catalog in (*started, restarted, late):
        catalog.close()


def test_a_writer_sweeps_what_it_gave_up_itself(catalog: Catalog, folder: Path) -> None:
    with pytest.raises(StorageFailed):
        _write_and_raise(catalog, StorageFailed("was it stored?", outcome_unknown=True))
    assert len(stored_files(folder)) == 1
    assert catalog.sweep() == 1
    assert stored_files(folder) == set()
    assert put(catalog, "acme").version == 1


def test_a_refused_change_removes_its_blobs_and_uses_their_keys_again(catalog: Catalog, folder: Path) -> None:
    put(catalog, "first")
    before = _pending(folder)
    with pytest.raises(PreconditionFailed):
        _write_and_raise(catalog, PreconditionFailed("no"))
    assert len(stored_files(folder)) == 1
    assert _pending(folder) == before
    names = {put(catalog, "acme", seed).file for seed in range(len(before))}
    assert {blob_key(name) for name in names} == before


def test_a_publish_whose_pending_row_was_deleted_stores_nothing(catalog: Catalog, folder: Path) -> None:
    kept = put(catalog, "acme", 1)

    def delete_rows(connection: sa.Connection, *_: object) -> list[bool]:
        connection.exec_driver_sql("DELETE FROM pending_blobs")
        return [True]

    with pytest.raises(CatalogBusy, match="deleted while it was written"):
        catalog.publish([publication("acme", 2)], admit=delete_rows, tenant="default")
    assert stored_files(folder) == {kept.file}
    (published,) = catalog.publish([publication("acme", 2)], tenant="default")
    assert published.version.version == 2
    assert read_adapter(published.version, catalog.blobs).digest == published.version.digest


def test_a_change_that_writes_a_blob_commits_once(
    catalog: Catalog, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(catalog, "acme", 0)
    commits, write = [], catalog.database.write

    @contextmanager
    def counted() -> Iterator[sa.Connection]:
        with write() as connection:
            yield connection
        commits.append(1)

    monkeypatch.setattr(catalog.database, "write", counted)
    put(catalog, "acme", 1)
    assert len(commits) == 1
    catalog.publish(
        [publication(f"device-{number}", number, statistics=b"sums") for number in range(3)], tenant="default"
    )
    assert len(commits) == 2
    submit(queue)
    assert len(commits) == 3
