"""Publishing: one blob, one transaction, numbers that never repeat."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.catalog.adapter_cache import read_adapter
from adapters.catalog.catalog import Catalog
from adapters.errors import AdapterNotFound, VersionNotFound
from adapters.lora.adapter import digest_of
from adapters.names import Reference
from tests.support.catalog_factories import make_adapter, publication, put, referenced_files, stored_files, write_orphan
from tests.support.databases import open_catalog
from tests.support.storage_kinds import on_both_storages

pytestmark = on_both_storages


class _SecondThoughts(Exception):
    """Raised inside the transaction of a publish."""


def test_a_fleet_is_one_file_and_each_version_knows_its_part_of_it(catalog: Catalog, folder: Path) -> None:
    fleet = [publication(f"device-{n}", n, adapter=make_adapter(n, rank=1 + n % 4)) for n in range(20)]
    versions = [published.version for published in catalog.publish(fleet, tenant="default")]
    (file,) = {version.file for version in versions}
    assert stored_files(folder) == {file}
    whole = catalog.blobs.local(file).read_bytes()
    assert [version.offset for version in versions] == [
        sum(version.bytes for version in versions[:n]) for n in range(20)
    ]
    assert sum(version.bytes for version in versions) == len(whole)
    for version, made in zip(versions, fleet, strict=True):
        assert digest_of(whole[version.offset : version.offset + version.bytes]) == version.digest
        assert read_adapter(version, catalog.blobs).a_OR.equal(made.adapter.a_OR)


def test_a_fleet_is_one_transaction_and_one_revision(catalog: Catalog, folder: Path) -> None:
    put(catalog, "device-1", seed=100)
    before = catalog.revision()

    def refuse(*_: object) -> None:
        raise _SecondThoughts

    fleet = [publication(f"device-{n}", n) for n in range(3)]
    with pytest.raises(_SecondThoughts):
        catalog.publish(fleet, record=refuse, tenant="default")
    assert catalog.revision() == before
    assert [adapter.name for adapter in catalog.adapters(tenant="default")] == ["device-1"]
    assert catalog.adapter("device-1", tenant="default").versions == 1
    catalog.publish(fleet, tenant="default")
    assert catalog.revision() == before + 1
    assert catalog.adapter("device-1", tenant="default").aliases == {"live": 2}
    assert catalog.sweep() == 1  # the blob of the fleet that was refused
    assert stored_files(folder) == referenced_files(folder)


def test_one_name_twice_in_a_fleet_gets_two_numbers_and_the_last_is_live(catalog: Catalog) -> None:
    first, second = catalog.publish([publication("acme", 1), publication("acme", 2)], tenant="default")
    assert (first.version.version, second.version.version) == (1, 2)
    assert (first.replaced, second.replaced) == (None, 1)
    assert catalog.find(Reference("acme"), tenant="default").digest == make_adapter(2).digest


def test_a_shared_file_stays_until_its_last_version_goes(catalog: Catalog, folder: Path) -> None:
    names = ["a", "b", "c"]
    versions = [
        one.version
        for one in catalog.publish([publication(name, seed) for seed, name in enumerate(names)], tenant="default")
    ]
    file = versions[0].file
    for name, next_one in (("a", 1), ("b", 2)):
        catalog.delete(name, tenant="default", purge=True)
        assert file in stored_files(folder)
        assert read_adapter(versions[next_one], catalog.blobs).digest == versions[next_one].digest
        assert catalog.sweep() == 0
    catalog.delete("c", tenant="default", purge=True)
    assert stored_files(folder) == set()


def test_threads_that_put_one_name_at_once_get_different_numbers(catalog: Catalog, folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda seed: put(catalog, "acme", seed), range(40)))
    assert sorted(version.version for version in versions) == list(range(1, 41))
    assert len({version.digest for version in versions}) == 40
    assert catalog.adapter("acme", tenant="default").aliases == {"live": 40}
    assert stored_files(folder) == referenced_files(folder)


def test_catalogues_of_two_processes_that_put_one_name_at_once_give_different_numbers(
    catalog: Catalog, folder: Path
) -> None:
    # Two engines and two writer locks, as two processes have: only SQLite's own lock stands between them.
    other = open_catalog(folder, now=lambda: 0.0)
    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(lambda seed: put((catalog, other)[seed % 2], "acme", seed), range(24)))
    assert sorted(version.version for version in versions) == list(range(1, 25))
    other.database.close()


def test_the_same_bytes_again_are_no_new_version_and_leave_no_file(catalog: Catalog, folder: Path) -> None:
    first = put(catalog, "acme", 1)
    assert catalog.put(publication("acme", 1), tenant="default") == (first, False)
    assert stored_files(folder) == {first.file}


def test_the_same_bytes_under_two_names_are_files_of_their_own(catalog: Catalog) -> None:
    first, second = put(catalog, "a", 1), put(catalog, "b", 1)
    assert first.digest == second.digest
    assert first.file != second.file
    catalog.delete("a", tenant="default")
    assert read_adapter(second, catalog.blobs).digest == second.digest


def test_a_name_made_again_goes_on_counting(catalog: Catalog) -> None:
    put(catalog, "acme", 1)
    put(catalog, "acme", 2)
    catalog.delete("acme", tenant="default")
    with pytest.raises(AdapterNotFound):
        catalog.find(Reference("acme", version=1), tenant="default")
    assert put(catalog, "acme", 1).version == 3
    with pytest.raises(VersionNotFound):
        catalog.find(Reference("acme", version=1), tenant="default")


def test_a_sweep_removes_what_no_row_refers_to_and_nothing_else(catalog: Catalog, folder: Path) -> None:
    kept = put(catalog, "acme", 1)
    write_orphan(catalog, b"no row ever came")
    assert catalog.sweep() == 1
    assert stored_files(folder) == {kept.file}


@pytest.mark.only_on_sqlite
def test_a_sweep_removes_temporary_files(catalog: Catalog, folder: Path) -> None:
    kept = put(catalog, "acme", 1)
    (folder / "blobs" / "0123.tmp").write_bytes(b"torn")
    assert catalog.sweep() == 1
    assert stored_files(folder) == {kept.file}


def test_a_sweep_leaves_alone_what_somebody_is_publishing(catalog: Catalog, folder: Path) -> None:
    swept = []
    other = open_catalog(folder, now=lambda: 0.0)
    # Another process starts while the blob is written and its row is not: nobody refers to it yet.
    (published,) = catalog.publish(
        [publication("acme", 1)], record=lambda *_: swept.append(other.sweep()), tenant="default"
    )
    assert swept == [0]
    assert read_adapter(published.version, catalog.blobs).digest == published.version.digest
    other.database.close()
