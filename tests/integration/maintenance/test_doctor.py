"""The doctor finds each kind of fault beside a service that has the folder open, and repairs what can be repaired."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from adapters.catalog.adapter_cache import read_adapter
from adapters.catalog.catalog import Catalog
from adapters.errors import AdapterNotFound, AdapterNotLive, CatalogNotLoadable
from adapters.maintenance.blob_checks import Problem
from adapters.maintenance.doctor import diagnose
from adapters.maintenance.repair import repair
from adapters.names import Reference
from tests.integration.maintenance.conftest import Filled, add_rows
from tests.support.catalog_factories import (
    claimed,
    make_adapter,
    migrate,
    put,
    quarantined_files,
    submit_fleet,
    write_orphan,
)
from tests.support.totals_oracle import count_totals, stored_totals


def _findings(folder: Path) -> list[tuple[Problem, str]]:
    return [(finding.problem, finding.subject) for finding in diagnose(folder).findings]


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def test_nothing_is_found_in_a_folder_that_is_whole(filled: Filled) -> None:
    diagnosis = diagnose(filled.folder)
    assert diagnosis.findings == []
    # That of acme, the pack, those of kept, the data set and the data of the job.
    assert diagnosis.blobs == 6
    assert repair(filled.folder, diagnosis) == []


FAULTS: dict[str, tuple[Callable[[Filled], object], list[tuple[Problem, str]]]] = {
    "flipped bit": (
        lambda filled: _flip(filled.blob(filled.acme.file), filled.acme.bytes - 1),
        [(Problem.WRONG_BYTES, "adapter acme@1")],
    ),
    "flipped bit in a fleet": (
        lambda filled: _flip(filled.blob(filled.pack[1].file), filled.pack[1].offset + 200),
        [(Problem.WRONG_BYTES, "adapter b@1")],
    ),
    "flipped bit in the trash": (
        lambda filled: _flip(filled.blob(filled.pack[2].file), filled.pack[2].offset + 200),
        [(Problem.WRONG_BYTES, "deleted adapter c@1")],
    ),
    "flipped bit in a data set": (
        lambda filled: _flip(filled.blob(filled.rows), 7),
        [(Problem.WRONG_BYTES, "data set rows@1")],
    ),
    "short blob": (
        lambda filled: os.truncate(filled.blob(filled.pack[0].file), filled.pack[1].offset + 9),
        [(Problem.SHORT_BLOB, "adapter b@1"), (Problem.SHORT_BLOB, "deleted adapter c@1")],
    ),
    "long data set": (
        lambda filled: os.truncate(filled.blob(filled.rows), 3001),
        [(Problem.WRONG_BYTES, "data set rows@1")],
    ),
    "missing blob": (
        lambda filled: filled.blob(filled.pack[0].file).unlink(),
        [(Problem.MISSING_BLOB, name) for name in ("adapter a@1", "adapter b@1", "deleted adapter c@1")],
    ),
    "missing statistics": (
        lambda filled: filled.blob(filled.kept.statistics).unlink(),
        [(Problem.MISSING_BLOB, "statistics of kept@1")],
    ),
    "row without blob": (
        lambda filled: filled.execute("UPDATE versions SET statistics = 'never-written' WHERE adapter = 'a'"),
        [(Problem.MISSING_BLOB, "statistics of a@1")],
    ),
    "folder in place of a blob": (
        lambda filled: _replace_by_folder(filled.blob(filled.acme.file)),
        [(Problem.MISSING_BLOB, "adapter acme@1")],
    ),
    "alias to no version": (
        lambda filled: filled.execute("UPDATE aliases SET version = 9 WHERE adapter = 'a'"),
        [(Problem.DANGLING_REFERENCE, "aliases a@live")],
    ),
    "version of no adapter": (
        lambda filled: filled.execute("DELETE FROM adapters WHERE name = 'b'"),
        [(Problem.DANGLING_REFERENCE, "versions b@1"), (Problem.WRONG_TOTAL, "totals of the tenant default")],
    ),
    "number to be given again": (
        lambda filled: filled.execute("UPDATE adapters SET next_version = 1 WHERE name = 'b'"),
        [(Problem.DANGLING_REFERENCE, "versions b@1")],
    ),
    "value that is not JSON": (
        lambda filled: filled.execute("UPDATE jobs SET spec = '{' || spec"),
        [(Problem.DAMAGED_CATALOG, "jobs.spec")],
    ),
    "blobs of another store": (
        lambda filled: filled.blob("store-id").write_text("another"),
        [(Problem.STORE_MISMATCH, "data")],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(filled: Filled, fault: str) -> None:
    break_it, expected = FAULTS[fault]
    break_it(filled)
    found = [(problem, Path(subject).name) for problem, subject in _findings(filled.folder)]
    assert sorted(found) == sorted(expected)


def test_orphans_are_found_and_moved_to_quarantine(filled: Filled) -> None:
    orphan = write_orphan(filled.catalog, b"no row ever came")
    filled.blob("half.tmp").write_bytes(b"half")
    with filled.catalog.writer.upload() as upload:
        # What a process is writing is no orphan.
        upload.write(b"being written")
        diagnosis = diagnose(filled.folder)
        assert sorted(finding.subject for finding in diagnosis.findings) == [f"blobs/{orphan}", "blobs/half.tmp"]
        assert {finding.problem for finding in diagnosis.findings} == {Problem.ORPHAN}
        assert all(done.is_repaired for done in repair(filled.folder, diagnosis))
        assert filled.blob(upload.names[0]).exists()
    assert quarantined_files(filled.folder) == {orphan}
    assert diagnose(filled.folder).findings == []


def test_a_blob_that_a_dead_process_was_writing_is_an_orphan(filled: Filled) -> None:
    orphan = write_orphan(filled.catalog, b"half published")
    filled.execute("INSERT INTO pending_blobs VALUES (?, 'a process that ended')", orphan.rpartition("-")[2])
    assert _findings(filled.folder) == [(Problem.ORPHAN, f"blobs/{orphan}")]


def test_lost_bytes_are_restored_from_another_version_with_the_same_digest(filled: Filled) -> None:
    twin = put(filled.catalog, "twin", 6)
    assert twin.digest == filled.pack[1].digest
    filled.blob(filled.pack[0].file).unlink()
    done = {str(one.finding.part): one for one in repair(filled.folder, diagnose(filled.folder))}
    assert {name: one.is_repaired for name, one in done.items()} == {
        "adapter a@1": False,
        "adapter b@1": True,
        "deleted adapter c@1": False,
    }
    repaired = filled.catalog.find(Reference("b"), tenant="default")
    assert read_adapter(repaired, filled.catalog.blobs).digest == filled.pack[1].digest
    # It has a copy of its own.
    filled.catalog.delete("twin", purge=True, tenant="default")
    assert read_adapter(repaired, filled.catalog.blobs).digest == filled.pack[1].digest
    assert [subject for _, subject in _findings(filled.folder)] == ["adapter a@1", "deleted adapter c@1"]


def test_lost_bytes_are_restored_from_quarantine(filled: Filled) -> None:
    for name in (filled.pack[0].file, filled.rows):
        filled.catalog.blobs.set_aside([name])
    # A file of the same size with other bytes is not taken.
    (filled.folder / "quarantine" / "20200101T000000Z-other").write_bytes(bytes(3000))
    damaged = diagnose(filled.folder)
    assert len(damaged.findings) == 4
    assert all(done.is_repaired for done in repair(filled.folder, damaged))
    assert diagnose(filled.folder).findings == []
    for version in filled.pack[:2]:
        assert (
            read_adapter(filled.catalog.find(Reference(version.adapter), tenant="default"), filled.catalog.blobs).digest
            == version.digest
        )
    assert filled.catalog.restore("c", tenant="default").name == "c"


def test_a_data_set_that_is_restored_from_another_has_a_blob_of_its_own(filled: Filled) -> None:
    other = add_rows(filled.catalog, "same-rows", b"x" * 3000)
    _flip(filled.blob(filled.rows), 5)
    assert [done.is_repaired for done in repair(filled.folder, diagnose(filled.folder))] == [True]
    ((file,),) = filled.execute("SELECT file FROM dataset_versions WHERE dataset = 'rows'")
    assert file not in (other, filled.rows)
    assert filled.rows in quarantined_files(filled.folder)
    assert diagnose(filled.folder).findings == []


def test_what_is_lost_is_removed_only_on_request(filled: Filled) -> None:
    second = put(filled.catalog, "acme", 3)
    for file in (second.file, filled.kept.file, filled.kept.statistics, filled.rows):
        filled.blob(file).unlink()
    done = repair(filled.folder, diagnose(filled.folder))
    assert [one.is_repaired for one in done] == [False] * 4
    assert filled.catalog.find(Reference("acme"), tenant="default") == second
    revision = filled.catalog.revision()
    done = repair(filled.folder, diagnose(filled.folder), remove_lost=True)
    assert {str(one.finding.part): one.action for one in done} == {
        "adapter acme@2": "the version was removed",
        "adapter kept@1": "the version was removed",
        "statistics of kept@1": "the reference to the statistics was removed",
        "data set rows@1": "the version was removed",
    }
    assert diagnose(filled.folder).findings == []
    lost = filled.execute("SELECT DISTINCT action, resource FROM audit WHERE action LIKE '%.lose' ORDER BY resource")
    assert lost == [
        ("adapter.lose", "adapters/acme"),
        ("adapter.lose", "adapters/kept"),
        ("dataset.lose", "datasets/rows"),
    ]
    assert filled.catalog.revision() > revision
    with pytest.raises(AdapterNotLive, match="there are: acme@1"):
        filled.catalog.find(Reference("acme"), tenant="default")
    with pytest.raises(AdapterNotFound):
        filled.catalog.find(Reference("kept"), tenant="default")
    assert put(filled.catalog, "acme", 4).version == 3


def test_an_alias_to_no_version_is_removed_only_on_request(filled: Filled) -> None:
    filled.execute("UPDATE aliases SET version = 9 WHERE adapter = 'a'")
    assert not repair(filled.folder, diagnose(filled.folder))[0].is_repaired
    assert repair(filled.folder, diagnose(filled.folder), remove_lost=True)[0].is_repaired
    assert diagnose(filled.folder).findings == []


def test_totals_and_tallies_that_no_count_confirms_are_corrected(filled: Filled) -> None:
    submit_fleet(filled.queue, ["x", "y", "z"], "fleet")
    filled.execute("UPDATE totals SET versions = versions + 5, dataset_bytes = 0")
    filled.execute("INSERT INTO totals VALUES ('gone', 1, 2, 3, 4, 5, 6)")
    filled.execute('UPDATE jobs SET tally = \'{"total": 3, "waiting": 1, "failed": 2}\' WHERE id = \'fleet\'')
    diagnosis = diagnose(filled.folder)
    assert [(finding.problem, finding.subject) for finding in diagnosis.findings] == [
        (Problem.WRONG_TOTAL, "totals of the tenant default"),
        (Problem.WRONG_TOTAL, "totals of the tenant gone"),
        (Problem.WRONG_TOTAL, "tally of the job fleet"),
    ]
    assert [finding.detail for finding in diagnosis.findings][::2] == [
        "versions -5, dataset_bytes +3,000 by a count",
        "failed -2, waiting +2 by a count",
    ]
    # What changes after the diagnosis counts too.
    put(filled.catalog, "late", 9)
    assert all(one.is_repaired for one in repair(filled.folder, diagnosis))
    assert stored_totals(filled.folder) == count_totals(filled.folder)
    _, fleet = claimed(filled.queue), claimed(filled.queue)
    assert filled.queue.tally(fleet) == {"published": 0, "failed": 0, "total": 3}
    assert diagnose(filled.folder).findings == []


def _damage_page(filled: Filled, name: str) -> None:
    """Overwrite the first page of a table or an index."""
    filled.catalog.close()
    ((root,),) = filled.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", name)
    ((size,),) = filled.execute("PRAGMA page_size")
    assert isinstance(root, int)
    assert isinstance(size, int)
    with (filled.folder / "catalog.sqlite3").open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * size)


def test_a_damaged_page_of_a_table_is_found_and_left_alone(filled: Filled) -> None:
    _damage_page(filled, "versions")
    before = (filled.folder / "catalog.sqlite3").read_bytes()
    diagnosis = diagnose(filled.folder)
    assert {finding.problem for finding in diagnosis.findings} == {Problem.DAMAGED_CATALOG}
    done = repair(filled.folder, diagnosis)
    assert not any(one.is_repaired for one in done)
    assert "restore a backup" in done[0].action
    assert (filled.folder / "catalog.sqlite3").read_bytes() == before


def test_a_schema_that_is_no_text_is_found(filled: Filled) -> None:
    filled.catalog.close()
    file = filled.folder / "catalog.sqlite3"
    file.write_bytes(file.read_bytes().replace(b"CREATE TABLE versions", b"CR\xc5ATE TABLE versions"))
    assert {finding.problem for finding in diagnose(filled.folder).findings} <= {
        Problem.STORE_MISMATCH,
        Problem.DAMAGED_CATALOG,
    }
    assert diagnose(filled.folder).has(Problem.DAMAGED_CATALOG)
    with pytest.raises(CatalogNotLoadable, match="damaged"):
        Catalog(filled.folder, now=lambda: 0.0)


def test_a_damaged_page_of_an_index_is_built_again(filled: Filled) -> None:
    _damage_page(filled, "ix_versions_file")
    diagnosis = diagnose(filled.folder)
    assert diagnosis.findings
    damaged = (filled.folder / "catalog.sqlite3").read_bytes()
    assert all(one.is_repaired for one in repair(filled.folder, diagnosis))
    assert diagnose(filled.folder).findings == []
    (kept,) = (filled.folder / "quarantine").glob("kept-*/catalog.sqlite3")
    assert len(kept.read_bytes()) == len(damaged)
    opened = Catalog(filled.folder, now=lambda: 0.0)
    assert read_adapter(opened.find(Reference("acme"), tenant="default"), opened.blobs).digest == make_adapter(1).digest
    opened.close()


def test_an_index_that_is_out_of_order_is_found_and_built_again(filled: Filled) -> None:
    filled.catalog.close()
    names = [str(name) for (name,) in filled.execute("SELECT DISTINCT file FROM versions ORDER BY file")]
    ((root,),) = filled.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ix_versions_file'")
    ((size,),) = filled.execute("PRAGMA page_size")
    assert isinstance(root, int)
    assert isinstance(size, int)
    with (filled.folder / "catalog.sqlite3").open("r+b") as file:
        file.seek((root - 1) * size)
        page = file.read(size)
        # A name in the middle is now greater than all others: a search for names after the last one finds it again.
        file.seek((root - 1) * size)
        file.write(page.replace(names[1].encode(), b"~" + names[1][1:].encode()))
    diagnosis = diagnose(filled.folder)
    assert diagnosis.has(Problem.DAMAGED_INDEX)
    assert all(one.is_repaired for one in repair(filled.folder, diagnosis))
    assert diagnose(filled.folder).findings == []


def test_an_index_without_a_row_is_found_and_built_again(filled: Filled) -> None:
    with closing(sqlite3.connect(filled.folder / "catalog.sqlite3")) as connection, connection:
        ((sql,),) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'ix_versions_file'").fetchall()
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = sql || ' WHERE 0' WHERE name = 'ix_versions_file'")
    with closing(sqlite3.connect(filled.folder / "catalog.sqlite3")) as connection, connection:
        connection.execute("REINDEX ix_versions_file")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'ix_versions_file'", (sql,))
    diagnosis = diagnose(filled.folder)
    assert diagnosis.has(Problem.DAMAGED_INDEX)
    assert all(one.is_repaired for one in repair(filled.folder, diagnosis))
    assert diagnose(filled.folder).findings == []


def test_the_catalogue_of_an_older_release_is_checked_and_not_migrated(tmp_path: Path) -> None:
    migrate(tmp_path / "catalog.sqlite3", "0001")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / f"{0:012x}-{'a' * 32}").write_bytes(b"?")
    diagnosis = diagnose(tmp_path)
    assert [finding.problem for finding in diagnosis.findings] == [Problem.ORPHAN]
    with pytest.raises(CatalogNotLoadable, match="another release"):
        repair(tmp_path, diagnosis)


def test_without_a_catalogue_there_is_nothing_to_check(filled: Filled, tmp_path: Path) -> None:
    with pytest.raises(CatalogNotLoadable, match="nothing to check"):
        diagnose(tmp_path / "elsewhere")
    shutil.copytree(filled.folder / "blobs", tmp_path / "copy" / "blobs")
    assert _findings(tmp_path / "copy") == [(Problem.STORE_MISMATCH, str(tmp_path / "copy"))]
