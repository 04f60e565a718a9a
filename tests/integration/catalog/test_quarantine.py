"""Orphan blobs are kept for some days, within a part of the disk, and make room for what is written."""

import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import adapters.storage.blobs
from adapters.catalog.catalog import Catalog
from adapters.datasets.ingest import Format, Ingestion, upload_file
from adapters.datasets.store import Datasets
from adapters.errors import StorageFull
from adapters.storage.blob_location import BlobLocation
from adapters.storage.store_identity import check_store
from app.service import Service
from tests.conftest import Serve
from tests.support.catalog_factories import put, quarantined_files, stored_files, write_orphan
from tests.support.external_programs import skip_or_fail

DAY = 86_400


class _Clock:
    """Seconds since the epoch, which a test moves."""

    def __init__(self) -> None:
        self.seconds = 1e9

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def open_catalog(folder: Path, clock: _Clock) -> Iterator[Callable[[float], Catalog]]:
    """Open the catalogue with these days of quarantine."""
    opened: list[Catalog] = []

    def make(days: float) -> Catalog:
        opened.append(Catalog(folder, now=clock, blobs=BlobLocation(folder=folder, quarantine_days=days)))
        return opened[-1]

    yield make
    for catalog in opened:
        catalog.database.close()


def test_orphans_are_moved_and_removed_when_their_days_are_over(
    open_catalog: Callable[[float], Catalog], folder: Path, clock: _Clock
) -> None:
    catalog = open_catalog(7)
    kept = put(catalog, "acme", 1)
    orphan = write_orphan(catalog, b"no row ever came")
    (folder / "blobs" / "0123.tmp").write_bytes(b"half")
    (folder / "blobs" / "lost+found").mkdir()
    assert catalog.sweep() == 2
    assert stored_files(folder) == {kept.file, "lost+found"}
    (moved,) = (folder / "quarantine").iterdir()
    assert moved.name == f"20010909T014640Z-{orphan}"
    assert moved.read_bytes() == b"no row ever came"
    (folder / "quarantine" / "notes.txt").write_text("somebody else's")

    clock.seconds += 6.9 * DAY
    later = write_orphan(catalog, b"another")
    assert catalog.sweep() == 1
    assert quarantined_files(folder) >= {orphan, later}
    clock.seconds += 0.2 * DAY
    assert catalog.sweep() == 0
    assert {path.name.partition("-")[2] or path.name for path in (folder / "quarantine").iterdir()} == {
        later,
        "notes.txt",
    }


def test_without_days_orphans_are_removed_at_the_next_purge(
    open_catalog: Callable[[float], Catalog], folder: Path, clock: _Clock
) -> None:
    catalog = open_catalog(0)
    orphan = write_orphan(catalog, b"orphan")
    assert catalog.sweep() == 1
    assert quarantined_files(folder) == {orphan}
    assert catalog.quarantine.purge() == len(b"orphan")
    assert quarantined_files(folder) == set()


def test_deletions_and_refusals_leave_nothing_in_quarantine(
    open_catalog: Callable[[float], Catalog], folder: Path
) -> None:
    catalog = open_catalog(7)
    put(catalog, "acme", 1)
    put(catalog, "acme", 1)
    catalog.delete("acme", tenant="default", purge=True)
    assert catalog.sweep() == 0
    assert not (folder / "quarantine").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, where we may mount one."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mounted)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        skip_or_fail("mounting a file system needs root")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def test_the_quarantine_holds_a_twentieth_of_the_disk_and_the_oldest_go_first(disk: Path, clock: _Clock) -> None:
    catalog = Catalog(disk / "data", now=clock)
    orphans = []
    for _ in range(8):
        orphans.append(write_orphan(catalog, bytes(50_000)))
        catalog.sweep()
        clock.seconds += 60
    # 5 % of 4 MiB are 209,715 bytes.
    assert quarantined_files(disk / "data") == set(orphans[-4:])
    catalog.database.close()


def test_a_full_disk_empties_the_quarantine_and_the_blob_is_stored(disk: Path, clock: _Clock) -> None:
    catalog = Catalog(disk / "data", now=clock)
    write_orphan(catalog, bytes(150_000))
    catalog.sweep()
    free = shutil.disk_usage(disk).free
    (disk / "others").write_bytes(bytes(free - 60_000))
    with pytest.raises(StorageFull):
        write_orphan(catalog, bytes(400_000))
    assert quarantined_files(disk / "data") == set()
    assert catalog.blobs.read(write_orphan(catalog, bytes(150_000))) == bytes(150_000)

    (disk / "others").unlink()
    orphan = catalog.blobs.local(write_orphan(catalog, bytes(200_000)))
    shutil.move(orphan, disk / "data" / "quarantine" / f"20010909T014640Z-{orphan.name}")
    (disk / "others").write_bytes(bytes(shutil.disk_usage(disk).free - 120_000))
    put(catalog, "acme", 1)
    with upload_file(disk) as raw:
        raw.write(b"x\n" + b"1\n" * 15_000)
        (disk / "more").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 30_000)))
        reading = Ingestion(raw, Format.CSV, memory_bytes=2**28, max_bytes=2**20)
        datasets = Datasets(catalog.database, catalog.writer, now=clock)
        assert datasets.add("rows", reading, content_type="text/csv", tenant="default")[0].rows == 15_000
    assert quarantined_files(disk / "data") == set()
    catalog.database.close()


@pytest.fixture
def orphaned(serve: Serve) -> tuple[Service, Callable[[], set[str]]]:
    """A service with one file in quarantine."""
    _, service = serve()
    write_orphan(service.catalog, b"orphan")
    service.catalog.sweep()
    folder = service.settings.data_dir
    assert quarantined_files(folder)
    return service, lambda: quarantined_files(folder)


def test_a_catalogue_that_cannot_grow_empties_the_quarantine(orphaned: tuple[Service, Callable[[], set[str]]]) -> None:
    service, in_quarantine = orphaned

    def grow() -> None:
        with service.catalog.database.write() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
            connection.exec_driver_sql("CREATE TABLE large AS SELECT zeroblob(1000000)")

    with pytest.raises(StorageFull):
        grow()
    assert in_quarantine() == set()


def test_a_temporary_file_that_does_not_fit_empties_the_quarantine(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, service = serve()
    write_orphan(service.catalog, b"orphan")
    service.catalog.sweep()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("app.http.routes.datasets._write", full)
    answer = client.put("/datasets/rows", content=b"x\n1\n", headers={"Content-Type": "text/csv"})
    assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
    assert quarantined_files(service.settings.data_dir) == set()


def test_what_cannot_be_moved_is_no_reason_not_to_start(
    open_catalog: Callable[[float], Catalog], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = open_catalog(7)
    orphan = write_orphan(catalog, b"orphan")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", full)
        assert catalog.sweep() == 0
    assert stored_files(folder) == {orphan}


def test_blobs_on_a_mount_of_their_own_are_moved_too(folder: Path, disk: Path, clock: _Clock) -> None:
    folder.mkdir()
    (folder / "blobs").symlink_to(disk)
    catalog = Catalog(folder, now=clock)
    orphan = write_orphan(catalog, b"orphan")
    assert catalog.sweep() == 1
    assert stored_files(folder) == set()
    assert quarantined_files(folder) == {orphan}
    catalog.database.close()


def test_the_name_of_a_blob_has_the_revision_of_when_it_was_written(
    open_catalog: Callable[[float], Catalog], folder: Path
) -> None:
    catalog = open_catalog(7)
    names = [put(catalog, "acme", seed).file for seed in range(3)]
    assert [adapters.storage.blobs.revision_of(name) for name in names] == [0, 1, 2]
    assert adapters.storage.blobs.revision_of("0" * 32) == 0
    other = Catalog(folder, now=lambda: 0.0)
    put(other, "other", 1)
    assert adapters.storage.blobs.revision_of(put(catalog, "acme", 9).file) == 4
    check_store(folder)
    other.database.close()


def test_what_is_no_file_of_ours_stays_and_stops_no_sweep(
    tmp_path: Path, clock: _Clock, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    catalog = Catalog(folder, now=clock, blobs=BlobLocation(folder=folder, quarantine_days=0))
    orphan = write_orphan(catalog, b"orphan")
    foreign = [folder / "quarantine" / "20200101T000000Z-folder", folder / "blobs" / "folder.tmp"]
    for path in foreign:
        path.mkdir(parents=True)
    for _ in range(2):
        catalog.sweep()
        clock.seconds += 60
    assert all(path.is_dir() for path in foreign)
    assert "folder" not in caplog.text
    assert not (folder / "blobs" / orphan).exists()
    catalog.database.close()


@pytest.mark.parametrize("orphans", [5, 6])
def test_orphans_are_moved_in_the_order_of_their_names_and_the_first_are_logged(
    tmp_path: Path, clock: _Clock, caplog: pytest.LogCaptureFixture, orphans: int
) -> None:
    catalog = Catalog(tmp_path / "data", now=clock)
    names = sorted(write_orphan(catalog, b"orphan") for _ in range(orphans))
    assert catalog.sweep() == orphans
    (line,) = caplog.messages
    assert line.endswith(f"quarantine: {', '.join(names[:5])}" + (", …" if orphans > 5 else ""))
    catalog.close()


def test_a_file_in_place_of_the_quarantine_stops_no_sweep(tmp_path: Path, clock: _Clock) -> None:
    folder = tmp_path / "data"
    catalog = Catalog(folder, now=clock, blobs=BlobLocation(folder=folder, quarantine_days=7))
    orphan = write_orphan(catalog, b"orphan")
    (folder / "quarantine").touch()
    catalog.sweep()
    assert (folder / "blobs" / orphan).exists()
    catalog.database.close()
