"""Doctor, repair, scrub, gc, backup and restore of a store whose catalogue is in PostgreSQL."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer
from typer.testing import CliRunner, Result

from adapters.catalog.adapter_cache import read_adapter
from adapters.catalog.catalog import Catalog
from adapters.errors import BackupFailed, CatalogNotLoadable
from adapters.jobs.queue import JobQueue
from adapters.maintenance.backup import back_up
from adapters.maintenance.blob_checks import Problem
from adapters.maintenance.doctor import Drift, Finding, diagnose, find_drifts
from adapters.maintenance.repair import repair
from adapters.maintenance.restore import restore
from adapters.maintenance.scrub import ScrubTurn, read_state, scrub
from adapters.names import Reference
from adapters.storage.blob_location import BlobLocation
from adapters.storage.postgres_database import PostgresDatabase
from adapters.storage.schema import metadata
from app import cli_maintenance
from tests.integration.maintenance.conftest import Filled, fill
from tests.support.catalog_factories import make_adapter, put, submit_fleet, write_orphan
from tests.support.object_server import bucket_of, new_url
from tests.support.postgres_server import PostgresServer

Opened = tuple[Filled, PostgresDatabase]


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    """A database."""
    return postgres_server.new_database()


@pytest.fixture
def opened(url: str, location: BlobLocation) -> Iterator[Opened]:
    """A filled store with its catalogue in PostgreSQL, open as in a running service."""
    database = PostgresDatabase(url)
    filled = fill(location.folder, location, database)
    yield filled, database
    filled.catalog.close()


def execute(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Change or read the catalogue past the code under test."""
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def rows_in(url: str, table: str) -> list[str]:
    names = ", ".join(f'"{column.name}"::text' for column in metadata.tables[table].columns)
    return sorted(map(repr, execute(url, f'SELECT {names} FROM "{table}"')))


def damage_object(location: BlobLocation, name: str, content: bytes | None) -> None:
    """Replace a blob, or remove it if there is no content."""
    if location.url is None:
        path = location.folder / "blobs" / name
        path.unlink() if content is None else path.write_bytes(content)
    elif content is None:
        bucket_of(location).delete(f"blobs/{name}")
    else:
        bucket_of(location).put(f"blobs/{name}", content)


def findings_of(filled: Filled, database: PostgresDatabase, location: BlobLocation) -> list[Finding]:
    """What the doctor finds, without the setting of the tests' server."""
    found = diagnose(filled.folder, location.open(), database).findings
    assert [one.detail for one in found if one.problem is Problem.NOT_DURABLE] == [
        "fsync=off: a crash of the server's machine may damage the catalogue"
    ]
    return [one for one in found if one.problem is not Problem.NOT_DURABLE]


def test_each_fault_is_found_and_repaired(opened: Opened, url: str, location: BlobLocation) -> None:
    filled, database = opened
    assert findings_of(filled, database, location) == []
    put(filled.catalog, "twin", 1)
    damage_object(location, filled.acme.file, None)
    damage_object(location, filled.rows, b"y" * 3000)
    orphan = write_orphan(filled.catalog, b"no row")
    execute(url, "UPDATE aliases SET version = 9 WHERE adapter = 'a'")
    execute(url, "UPDATE totals SET adapters = adapters + 2")
    found = {(one.problem, one.subject) for one in findings_of(filled, database, location)}
    assert found == {
        (Problem.DANGLING_REFERENCE, "aliases a@live"),
        (Problem.MISSING_BLOB, "adapter acme@1"),
        (Problem.WRONG_BYTES, "data set rows@1"),
        (Problem.ORPHAN, f"blobs/{orphan}"),
        (Problem.WRONG_TOTAL, "totals of the tenant default"),
    }
    blobs = location.open()
    repairs = repair(filled.folder, diagnose(filled.folder, blobs, database), blobs, database, remove_lost=True)
    assert {one.finding.problem for one in repairs if not one.is_repaired} == {Problem.NOT_DURABLE}
    assert findings_of(filled, database, location) == []
    assert (
        read_adapter(filled.catalog.find(Reference("acme"), tenant="default"), blobs).digest == make_adapter(1).digest
    )
    assert execute(url, "SELECT count(*) FROM dataset_versions") == [(0,)]


def test_repairs_on_two_machines_at_once_correct_each_total_and_tally_once(
    opened: Opened, url: str, location: BlobLocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled, database = opened
    submit_fleet(filled.queue, ["x", "y", "z"], "fleet")
    right = rows_in(url, "totals")
    execute(url, "UPDATE totals SET adapters = adapters + 2")
    execute(url, 'UPDATE jobs SET tally = \'{"total": 3, "waiting": 1, "failed": 2}\' WHERE id = \'fleet\'')
    blobs = location.open()
    diagnosis = diagnose(filled.folder, blobs, database)
    counts: list[list[str]] = []

    def count_before_the_other_corrects(_: PostgresDatabase) -> Iterator[Drift]:
        """Have another machine repair all after the first count of this one."""
        drifts = list(find_drifts(database))
        counts.append([drift.subject for drift in drifts])
        if len(counts) == 1:
            with monkeypatch.context() as other, closing(PostgresDatabase(url)) as elsewhere:
                other.setattr("adapters.maintenance.repair.find_drifts", find_drifts)
                repair(tmp_path / "other", diagnosis, blobs, elsewhere)
        yield from drifts

    (tmp_path / "other").mkdir()
    monkeypatch.setattr("adapters.maintenance.repair.find_drifts", count_before_the_other_corrects)
    repair(filled.folder, diagnosis, blobs, database)
    assert counts[0] == ["totals of the tenant default", "tally of the job fleet"]
    assert not any(counts[1:])
    assert rows_in(url, "totals") == right
    assert findings_of(filled, database, location) == []


def test_what_a_process_is_writing_is_no_orphan(opened: Opened, location: BlobLocation) -> None:
    filled, database = opened
    with filled.catalog.writer.upload() as upload:
        name = upload.write(b"on its way")
        assert findings_of(filled, database, location) == []
        assert name in filled.catalog.blobs.names()


def test_an_index_whose_creation_did_not_end_is_built_again(opened: Opened, url: str, location: BlobLocation) -> None:
    filled, database = opened
    execute(url, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_versions_file'::regclass")
    (finding,) = findings_of(filled, database, location)
    assert (finding.problem, finding.subject) == (Problem.DAMAGED_INDEX, "ix_versions_file")
    blobs = location.open()
    repair(filled.folder, diagnose(filled.folder, blobs, database), blobs, database)
    assert findings_of(filled, database, location) == []


def test_an_index_with_wrong_entries_is_found_if_the_extension_is_there(
    opened: Opened, url: str, location: BlobLocation
) -> None:
    filled, database = opened
    if not execute(url, "SELECT 1 FROM pg_available_extensions WHERE name = 'amcheck'"):
        pytest.skip("amcheck is not installed")
    execute(url, "CREATE EXTENSION amcheck")
    assert findings_of(filled, database, location) == []
    # An index that PostgreSQL does not keep up to date misses what is inserted meanwhile.
    execute(url, "UPDATE pg_index SET indisready = false WHERE indexrelid = 'ix_versions_file'::regclass")
    put(filled.catalog, "unindexed", 41)
    execute(url, "UPDATE pg_index SET indisready = true WHERE indexrelid = 'ix_versions_file'::regclass")
    (finding,) = [one for one in findings_of(filled, database, location) if one.problem is Problem.DAMAGED_INDEX]
    assert (finding.subject, "lacks matching index tuple" in finding.detail) == ("ix_versions_file", True)
    blobs = location.open()
    repair(filled.folder, diagnose(filled.folder, blobs, database), blobs, database)
    assert findings_of(filled, database, location) == []


def test_a_catalogue_of_other_blobs_is_a_mismatch(opened: Opened, url: str, location: BlobLocation) -> None:
    filled, database = opened
    execute(url, "UPDATE catalog SET store_id = 'another'")
    assert Problem.STORE_MISMATCH in {one.problem for one in findings_of(filled, database, location)}


def test_one_process_of_several_scrubs(opened: Opened, url: str, location: BlobLocation) -> None:
    filled, database = opened
    damage_object(location, filled.acme.file, b"other")
    began = time.time()
    for now in (began, began + 2 * 86_400):
        scrub(filled.folder, location.open(), database=database, days=2, now=lambda now=now: now)  # type: ignore[misc]
    assert list(read_state(filled.folder).damaged) == [filled.acme.file]
    with closing(PostgresDatabase(url)) as other:
        first, second = ScrubTurn(database.writer_locks()), ScrubTurn(other.writer_locks())
        assert (first.take(), second.take(), first.take()) == (True, False, True)


def test_a_backup_can_be_restored_on_each_kind_of_storage(
    opened: Opened, url: str, location: BlobLocation, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    filled, database = opened
    file = tmp_path / "backup.tar"
    made = back_up(filled.folder, file, location.open(), database)
    assert (made.blobs, made.damages) == (6, ())
    put(filled.catalog, "later", 40)

    restored = restore(file, tmp_path / "folder")
    assert (restored.revision, restored.blobs, restored.findings) == (made.revision, 6, ())
    assert diagnose(tmp_path / "folder").findings == []
    with closing(sqlite3.connect(tmp_path / "folder" / "catalog.sqlite3")) as catalog:
        assert catalog.execute("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'").fetchall() == [(1,)]

    # And from there to another database, with the blobs in each place.
    back_up(tmp_path / "folder", tmp_path / "again.tar")
    places = [BlobLocation(folder=tmp_path / "first")]
    places += [] if location.url is None else [replace(location, folder=tmp_path / "second", url=new_url())]
    for place, source in zip(places, (file, tmp_path / "again.tar"), strict=False):
        target = postgres_server.new_database()
        with closing(PostgresDatabase(target)) as other:
            restore(source, place.folder, place if place.url else None, other)
            assert {one.problem for one in diagnose(place.folder, place.open(), other).findings} == {
                Problem.NOT_DURABLE
            }
            for table in set(metadata.tables) - {"pending_blobs", "adapters", "versions", "aliases"}:
                if table not in ("catalog", "changes", "audit", "totals"):
                    assert rows_in(target, table) == rows_in(url, table), table
            with closing(Catalog(place.folder, now=time.time, blobs=place, database=other)) as opened_again:
                found = opened_again.find(Reference("acme"), tenant="default")
                assert read_adapter(found, opened_again.blobs).digest == make_adapter(1).digest
                assert "later" not in {row[0] for row in execute(target, "SELECT name FROM adapters")}


def test_a_restore_that_failed_is_repeated_and_no_service_accepts_what_it_left(
    opened: Opened, location: BlobLocation, postgres_server: PostgresServer, tmp_path: Path, monkeypatch: Any
) -> None:
    filled, database = opened
    back_up(filled.folder, tmp_path / "backup.tar", location.open(), database)
    place = replace(location, folder=tmp_path / "new", url=location.url and new_url())
    arguments = (tmp_path / "backup.tar", place.folder, place if place.url else None)
    with closing(PostgresDatabase(postgres_server.new_database())) as other:
        with monkeypatch.context() as patch:
            patch.setattr("adapters.maintenance.move.finish_copy", _fail)
            with pytest.raises(ZeroDivisionError, match="power"):
                restore(*arguments, other)
        with pytest.raises(CatalogNotLoadable, match="unfinished copy"):
            Catalog(place.folder, now=time.time, blobs=place, database=other)
        # What the refused start has made.
        if place.folder.exists():
            place.folder.rmdir()
        restore(*arguments, other)
        with closing(Catalog(place.folder, now=time.time, blobs=place, database=other)) as catalog:
            assert catalog.revision() == filled.catalog.revision()
        with pytest.raises(BackupFailed):
            restore(*arguments, other)


def _fail(*_: object) -> None:
    raise ZeroDivisionError("the power failed")


def test_a_job_that_is_being_stored_is_not_in_a_backup(
    opened: Opened, url: str, location: BlobLocation, tmp_path: Path
) -> None:
    filled, database = opened
    with filled.catalog.writer.pending("half"):
        execute(
            url,
            "INSERT INTO job_adapters (job, position, name, rows, deletions, moved_live)"
            " VALUES ('half', 0, 'x', 1, 0, false)",
        )
        back_up(filled.folder, tmp_path / "backup.tar", location.open(), database)
        restore(tmp_path / "backup.tar", tmp_path / "restored")
        with closing(sqlite3.connect(tmp_path / "restored" / "catalog.sqlite3")) as catalog:
            assert catalog.execute("SELECT count(*) FROM job_adapters WHERE job = 'half'").fetchall() == [(0,)]


Run = Callable[..., Result]


@pytest.fixture
def run(opened: Opened, url: str, location: BlobLocation, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command with the settings of the store."""
    monkeypatch.setenv("LORAPLEX_DATA_DIR", str(location.folder))
    monkeypatch.setenv("LORAPLEX_DATABASE_URL", url)
    monkeypatch.setenv("LORAPLEX_ALLOW_MIXED_STORAGE", "true")
    if location.url is not None:
        monkeypatch.setenv("LORAPLEX_BLOB_URL", location.url)

    def call(name: str, *arguments: Any) -> Result:
        app = typer.Typer()
        app.command()(getattr(cli_maintenance, name))
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


def test_the_commands_work_on_the_storage_of_the_settings(
    opened: Opened, run: Run, tmp_path: Path, url: str, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled, _ = opened
    queue = JobQueue(filled.catalog.database, filled.catalog.writer, now=time.time, lease_seconds=15)
    submit_fleet(queue, ["x", "y"], "fleet")
    doctor = run("doctor")
    assert (doctor.exit_code, "checked 7 blobs: 1 findings" in doctor.stdout) == (1, True), doctor.output
    assert "not_durable " in doctor.stdout
    collected = run("gc", "--vacuum")
    assert collected.exit_code == 0, collected.output
    assert collected.stdout.splitlines()[-1].startswith("catalogue: ")
    backup = run("backup", tmp_path / "backup.tar")
    assert (backup.exit_code, "7 blobs" in backup.stdout) == (0, True), backup.output
    put(filled.catalog, "later", 40)
    refused = run("restore", tmp_path / "backup.tar", "--data-dir", tmp_path / "new")
    assert refused.exit_code == 1
    monkeypatch.setenv("LORAPLEX_DATABASE_URL", postgres_server.new_database())
    monkeypatch.delenv("LORAPLEX_BLOB_URL", raising=False)
    restored = run("restore", tmp_path / "backup.tar", "--data-dir", tmp_path / "new")
    assert (restored.exit_code, "7 blobs, every digest checked" in restored.stdout) == (0, True), restored.output


@pytest.mark.parametrize("command", ["doctor", "backup", "gc"])
def test_commands_leave_the_tables_of_another_release_as_they_are(
    run: Run, url: str, tmp_path: Path, command: str
) -> None:
    execute(url, "UPDATE alembic_version SET version_num = '0001'")
    refused = run(command, *([tmp_path / "backup.tar"] if command == "backup" else []))
    assert (refused.exit_code, "has the tables of another release: 0001;" in refused.stderr) == (78, True)
    assert execute(url, "SELECT version_num FROM alembic_version") == [("0001",)]
