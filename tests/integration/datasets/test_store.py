"""Names, versions and tombstones of data sets, and the files behind them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.datasets.columns import ColumnSelector
from adapters.datasets.ingest import Format, Ingestion, upload_file
from adapters.datasets.store import Datasets, DatasetVersion
from adapters.datasets.table import Table
from adapters.errors import (
    AliasNotFound,
    BlobCorrupt,
    DatasetNotFound,
    InvalidDataset,
    NotFound,
    PreconditionFailed,
    VersionNotFound,
)
from adapters.names import parse_reference
from tests.support.catalog_factories import put, stored_files, write_orphan
from tests.support.databases import open_catalog
from tests.support.storage_kinds import on_both_storages

pytestmark = on_both_storages


class Store:
    """One data folder, and CSV that goes into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog = open_catalog(folder, now=lambda: 1.0)
        self.datasets = Datasets(self.catalog.database, self.catalog.writer, now=lambda: 1.0)

    def add(self, name: str, text: str) -> tuple[DatasetVersion, bool]:
        with upload_file(self.folder / "tmp") as raw:
            raw.write(text.encode())
            reading = Ingestion(raw, Format.CSV, memory_bytes=2**28, max_bytes=2**20)
            return self.datasets.add(name, reading, content_type="text/csv", tenant="default")

    def files(self) -> set[str]:
        return stored_files(self.folder) | {path.name for path in (self.folder / "tmp").iterdir()}


@pytest.fixture
def store(data_folder: Path) -> Iterator[Store]:
    made = Store(data_folder)
    yield made
    made.catalog.database.close()


def test_versions_are_numbered_and_references_find_them(store: Store) -> None:
    first, is_new = store.add("rows", "x,y\n1,a\n2,\n")
    second, _ = store.add("rows", "x\n1\n")
    assert is_new
    assert (first.version, second.version, str(second)) == (1, 2, "rows@2")
    assert (first.rows, first.content_type, first.created_at) == (2, "text/csv", "1970-01-01T00:00:01.000000Z")
    assert [(bad.row, bad.column, bad.reason) for bad in first.bad_rows] == [(1, "y", "null")]
    for reference, found in (("rows", second), ("rows@live", second), ("rows@1", first), ("rows@2", second)):
        assert store.datasets.find(parse_reference(reference), tenant="default") == found
    assert [entry.version for entry in store.datasets.versions("rows", tenant="default")] == [2, 1]
    assert [entry.version for entry in store.datasets.versions("rows", before=2, tenant="default")] == [1]
    summary = store.datasets.get("rows", tenant="default")
    assert (summary.newest.version, summary.versions) == (2, 2)
    table = Table.open(store.datasets.local(first))
    assert table.numbers(ColumnSelector(column="x"), field="inputs").tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("reference", "error"),
    [
        ("none", DatasetNotFound),
        ("rows@3", VersionNotFound),
        (f"rows@{10**30}", VersionNotFound),
        ("rows@old", AliasNotFound),
    ],
)
def test_a_reference_to_nothing_says_what_is_missing(store: Store, reference: str, error: type[NotFound]) -> None:
    store.add("rows", "x\n1\n")
    with pytest.raises(error) as caught:
        store.datasets.find(parse_reference(reference), field="data.dataset", tenant="default")
    assert caught.value.field == "data.dataset"


def test_the_content_that_is_newest_already_makes_no_version(store: Store) -> None:
    first, _ = store.add("rows", "x\n1\n")
    again, is_new = store.add("rows", '"x"\n 1\n')
    assert (again, is_new) == (first, False)
    assert len(store.files()) == 1
    store.add("rows", "x\n2\n")
    assert store.add("rows", "x\n1\n")[0].version == 3


def test_a_deleted_name_leaves_no_file_and_goes_on_counting(store: Store) -> None:
    store.add("rows", "x\n1\n")
    store.add("rows", "x\n2\n")
    kept, _ = store.add("other", "x\n1\n")
    store.datasets.delete("rows", tenant="default")
    assert store.files() == {kept.file}
    for gone in (store.datasets.get, store.datasets.versions, store.datasets.delete):
        with pytest.raises(DatasetNotFound):
            gone("rows", tenant="default")
    assert store.add("rows", "x\n1\n")[0].version == 3
    assert [summary.name for summary in store.datasets.list(tenant="default")] == ["other", "rows"]


def test_lists_go_by_prefix_in_byte_order(store: Store) -> None:
    for name in ("b", "a-2", "a-1", "B", "a"):
        store.add(name, "x\n1\n")
    names = [summary.name for summary in store.datasets.list(tenant="default")]
    assert names == ["B", "a", "a-1", "a-2", "b"]
    assert [summary.name for summary in store.datasets.list(prefix="a", after="a", limit=1, tenant="default")] == [
        "a-1"
    ]


# The bucket has another copy, which is fetched.
@pytest.mark.only_on_sqlite
def test_a_table_with_a_flipped_bit_is_not_opened(store: Store) -> None:
    version, _ = store.add("rows", "x\n1\n2\n")
    path = store.datasets.local(version)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BlobCorrupt, match="rows@1"):
        store.datasets.local(version, is_read_whole=True)
    again = Datasets(store.catalog.database, store.catalog.writer, now=lambda: 1.0)
    with pytest.raises(BlobCorrupt, match="rows@1"):
        again.local(version)


def test_what_is_refused_leaves_nothing(store: Store) -> None:
    with pytest.raises(InvalidDataset):
        store.add("rows", "x,x\n1,2\n")
    with pytest.raises(InvalidDataset, match="stored in more than"):
        store.add("rows", "x\n" + "1\n" * 200_000)
    assert store.files() == set()
    assert store.datasets.list(tenant="default") == []


def test_a_failed_condition_leaves_nothing(store: Store) -> None:
    def refuse(exists: bool, digest: str | None) -> None:
        raise PreconditionFailed(f"{exists} {digest}")

    with upload_file(store.folder / "tmp") as raw:
        raw.write(b"x\n1\n")
        reading = Ingestion(raw, Format.CSV, memory_bytes=2**28, max_bytes=2**20)
        with pytest.raises(PreconditionFailed, match="False None"):
            store.datasets.add("rows", reading, content_type="text/csv", precondition=refuse, tenant="default")
    assert store.files() == set()


def test_the_sweep_keeps_data_sets_and_takes_what_a_crash_left(store: Store) -> None:
    version, _ = store.add("rows", "x\n1\n")
    adapter = put(store.catalog, "acme")
    write_orphan(store.catalog, b"no row ever came")
    assert store.catalog.sweep() == 1
    assert store.files() == {version.file, adapter.file}
