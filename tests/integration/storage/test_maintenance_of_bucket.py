"""Doctor, repair, scrub, gc, sweep, backup and restore of a store whose blobs are in a bucket."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.catalog.adapter_cache import read_adapter
from adapters.catalog.catalog import Catalog
from adapters.errors import BackupFailed, CatalogNotLoadable, StorageFailed
from adapters.maintenance.backup import back_up
from adapters.maintenance.blob_checks import Problem
from adapters.maintenance.doctor import diagnose
from adapters.maintenance.repair import repair
from adapters.maintenance.restore import restore
from adapters.maintenance.scrub import read_state, scrub
from adapters.names import Reference
from adapters.storage.blob_location import BLOB_CACHE, BlobLocation
from adapters.storage.postgres_database import PostgresDatabase
from adapters.storage.store_identity import UNFINISHED, check_store
from tests.integration.maintenance.conftest import Filled, fill
from tests.support.catalog_factories import make_adapter, put, write_orphan
from tests.support.hostile_proxy import HostileProxy, refuse
from tests.support.object_server import bucket_of, new_url, objects_in
from tests.support.postgres_server import PostgresServer


@pytest.fixture
def filled(in_bucket: BlobLocation) -> Iterator[Filled]:
    filled = fill(in_bucket.folder, in_bucket)
    yield filled
    filled.catalog.close()


def test_a_whole_store_has_no_findings_and_each_fault_has_one(filled: Filled, in_bucket: BlobLocation) -> None:
    blobs = in_bucket.open()
    assert diagnose(filled.folder, blobs).findings == []
    bucket = bucket_of(in_bucket)
    bucket.delete(f"blobs/{filled.acme.file}")
    bucket.put(f"blobs/{filled.rows}", b"y" * 3000)
    pack = bytes(bucket.get(f"blobs/{filled.pack[0].file}").bytes())
    bucket.put(f"blobs/{filled.pack[0].file}", pack[:-1])
    orphan = write_orphan(filled.catalog, b"no row")
    findings = {(finding.problem, finding.subject) for finding in diagnose(filled.folder, blobs).findings}
    assert findings == {
        (Problem.MISSING_BLOB, "adapter acme@1"),
        (Problem.WRONG_BYTES, "data set rows@1"),
        (Problem.SHORT_BLOB, "deleted adapter c@1"),
        (Problem.ORPHAN, f"blobs/{orphan}"),
    }
    assert not list((filled.folder / BLOB_CACHE).glob("*.tmp"))


def test_lost_bytes_come_from_another_version_and_orphans_are_moved(filled: Filled, in_bucket: BlobLocation) -> None:
    twin = put(filled.catalog, "twin", 1)
    assert twin.digest == filled.acme.digest
    bucket_of(in_bucket).delete(f"blobs/{filled.acme.file}")
    orphan = write_orphan(filled.catalog, b"no row")
    blobs = in_bucket.open()
    repairs = repair(filled.folder, diagnose(filled.folder, blobs), blobs)
    assert [one.is_repaired for one in repairs] == [True, True]
    assert diagnose(filled.folder, blobs).findings == []
    found = filled.catalog.find(Reference("acme"), tenant="default")
    assert read_adapter(found, in_bucket.open()).digest == make_adapter(1).digest
    assert {name.partition("-")[2] for name in objects_in(in_bucket, "quarantine")} == {orphan}


def test_the_scrub_reads_the_bucket_and_not_the_copies(filled: Filled, in_bucket: BlobLocation) -> None:
    bucket_of(in_bucket).put(f"blobs/{filled.acme.file}", b"other")
    began = time.time()
    scrub(filled.folder, in_bucket.open(), days=2, now=lambda: began)
    scrub(filled.folder, in_bucket.open(), days=2, now=lambda: began + 2 * 86_400)
    assert list(read_state(filled.folder).damaged) == [filled.acme.file]


def test_gc_removes_what_was_purged_and_a_sweep_leaves_what_rows_refer_to(
    filled: Filled, in_bucket: BlobLocation
) -> None:
    stored = objects_in(in_bucket, "blobs")
    assert filled.catalog.sweep() == 0
    assert objects_in(in_bucket, "blobs") == stored
    filled.catalog.delete("acme", tenant="default", purge=True)
    assert objects_in(in_bucket, "blobs") == stored - {filled.acme.file}
    filled.catalog.restore("c", tenant="default")
    assert diagnose(filled.folder, in_bucket.open()).findings == []


def test_a_backup_is_restored_into_a_folder_and_into_another_prefix(
    filled: Filled, in_bucket: BlobLocation, tmp_path: Path
) -> None:
    file = tmp_path / "backup.tar"
    made = back_up(filled.folder, file, in_bucket.open())
    assert (made.damages, made.blobs) == ((), len(objects_in(in_bucket, "blobs")))
    assert restore(file, tmp_path / "in-a-folder").findings == ()
    assert diagnose(tmp_path / "in-a-folder").findings == []
    with pytest.raises(BackupFailed, match="belongs to the store"):
        restore(file, tmp_path / "other", in_bucket)
    fresh = BlobLocation(folder=tmp_path / "other", url=new_url())
    assert restore(file, fresh.folder, fresh).findings == ()
    assert objects_in(fresh, "blobs") == objects_in(in_bucket, "blobs")
    catalog = Catalog(fresh.folder, now=time.time, blobs=fresh)
    found = catalog.find(Reference("acme"), tenant="default")
    assert read_adapter(found, catalog.blobs).digest == make_adapter(1).digest
    catalog.close()
    assert diagnose(fresh.folder, fresh.open()).findings == []


def test_the_bucket_of_a_service_is_no_place_for_a_restore_to_a_new_database(
    filled: Filled, in_bucket: BlobLocation, tmp_path: Path, postgres_server: PostgresServer
) -> None:
    file, stored = tmp_path / "backup.tar", objects_in(in_bucket, "blobs")
    back_up(filled.folder, file, in_bucket.open())
    with closing(PostgresDatabase(postgres_server.new_database())) as database:
        with pytest.raises(BackupFailed, match="has the blobs of the store"):
            restore(file, tmp_path / "other", in_bucket, database)
        identity = database.identity(with_references=False)
    assert identity is not None
    assert not str(identity.store_id).startswith(UNFINISHED)
    assert objects_in(in_bucket, "blobs") == stored


def test_a_catalogue_and_the_bucket_of_another_store_are_refused(filled: Filled, tmp_path: Path) -> None:
    other = BlobLocation(folder=tmp_path / "other", url=new_url())
    Catalog(other.folder, now=time.time, blobs=other).close()
    with pytest.raises(CatalogNotLoadable, match="do not belong together"):
        check_store(filled.folder, blobs=other.open())
    empty = BlobLocation(folder=tmp_path / "none", url=new_url())
    with pytest.raises(CatalogNotLoadable, match="do not belong together"):
        check_store(filled.folder, blobs=empty.open())


def test_an_older_catalogue_beside_newer_objects_is_refused(filled: Filled, in_bucket: BlobLocation) -> None:
    newer = f"{filled.catalog.revision() + 5:012x}-{7:032x}"
    in_bucket.open().write(newer, b"x")
    with pytest.raises(CatalogNotLoadable, match="older than the blobs"):
        check_store(filled.folder, blobs=in_bucket.open())


def test_maintenance_without_the_bucket_changes_nothing(
    filled: Filled, in_bucket: BlobLocation, proxy: HostileProxy, tmp_path: Path
) -> None:
    blobs = replace(in_bucket, folder=tmp_path / "other").open()
    stored = objects_in(in_bucket, "blobs")
    assert scrub(filled.folder, blobs, days=1, now=lambda: 0.0) == 0
    with proxy.failing(refuse):
        for check in (
            lambda: diagnose(filled.folder, blobs),
            lambda: scrub(filled.folder, blobs, days=1, now=lambda: 4e9),
            lambda: back_up(filled.folder, tmp_path / "backup.tar", blobs),
        ):
            with pytest.raises(StorageFailed):
                check()
    assert objects_in(in_bucket, "blobs") == stored
    assert not (tmp_path / "backup.tar").exists()
