"""`loraplex migrate`: every row and every blob arrives, the source stays as it is, and a crash only delays it."""

import hashlib
import json
import sqlite3
import subprocess
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import typer
from typer.testing import CliRunner, Result

from adapters.catalog.adapter_cache import read_adapter
from adapters.catalog.catalog import Catalog
from adapters.errors import CatalogNotLoadable, StorageFailed
from adapters.jobs.queue import JobQueue
from adapters.maintenance import move
from adapters.maintenance.doctor import diagnose
from adapters.names import Reference
from adapters.storage.blob_location import BlobLocation
from adapters.storage.postgres_database import PostgresDatabase
from adapters.storage.schema import metadata
from adapters.storage.store_identity import check_store
from app.cli_migrate import migrate
from tests.integration.maintenance.conftest import fill
from tests.support.catalog_factories import make_adapter, put, submit
from tests.support.databases import rows_of
from tests.support.object_server import ObjectServer, bucket_of, new_url, objects_in
from tests.support.postgres_server import PostgresServer
from tests.support.service import LORAPLEX, environment, eventually

Row = tuple[Any, ...]
# Of processes, and not of the store.
NOT_COPIED = {"pending_blobs"}
WITH_BLOBS = {"versions", "trashed_versions", "dataset_versions", "jobs"}
CHECKPOINT = b"checkpoint of a fit" * 9


class Target:
    """An empty database and an empty prefix."""

    def __init__(self, server: PostgresServer, folder: Path) -> None:
        self.url = server.new_database()
        self.location = BlobLocation(folder=folder, url=new_url())

    def arguments(self, direction: str = "to") -> list[str]:
        """The options that name it."""
        return [f"--{direction}-database", self.url, f"--{direction}-blobs", str(self.location.url)]

    def rows(self, table: str) -> list[Row]:
        """The rows of a table, without the code under test."""
        import psycopg

        with psycopg.connect(self.url.replace("+psycopg", "")) as connection:
            rows = connection.execute(f'SELECT {_columns(table)} FROM "{table}"'.encode()).fetchall()
        return _sorted(rows)

    def open(self) -> Catalog:
        """The catalogue, as a service opens it."""
        database = PostgresDatabase(self.url)
        try:
            return Catalog(self.location.folder, now=time.time, blobs=self.location, database=database)
        except CatalogNotLoadable:
            database.close()
            raise


def _columns(table: str) -> str:
    return ", ".join(f'"{column.name}"' for column in metadata.tables[table].columns)


def _sorted(rows: Any) -> list[Row]:
    return sorted((tuple(map(_plain, row)) for row in rows), key=repr)


def _plain(value: Any) -> Any:
    """A value in the form that both drivers have: texts of JSON are read, and truth values are numbers."""
    if isinstance(value, bytes | memoryview):
        return bytes(value)
    if isinstance(value, str) and value[:1] in ("[", "{"):
        return json.loads(value)
    return int(value) if isinstance(value, bool) else value


def source_rows(folder: Path, table: str) -> list[Row]:
    with closing(sqlite3.connect(f"file:{folder / 'catalog.sqlite3'}?mode=ro", uri=True)) as file:
        return _sorted(file.execute(f'SELECT {_columns(table)} FROM "{table}"').fetchall())


def tree_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and digest of each file, and the time of each folder."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [folder, *folder.rglob("*")]
    }


def add_every_kind_of_row(folder: Path) -> None:
    """Add a row to each table, with unusual values of each type; those with blobs have rows already."""
    engine = sa.create_engine(f"sqlite:///{folder / 'catalog.sqlite3'}")
    with engine.begin() as connection:
        for table in metadata.sorted_tables:
            if table.name not in WITH_BLOBS | {"catalog"}:
                connection.execute(sa.insert(table).values({c.name: _value(c) for c in table.columns}))
            assert connection.scalar(sa.select(sa.func.count()).select_from(table)), table.name
        # Numbers that were given to rows which are gone are not given again.
        connection.exec_driver_sql("UPDATE sqlite_sequence SET seq = 5000000000 WHERE name = 'jobs'")
    engine.dispose()


def _value(column: sa.Column[Any]) -> Any:
    if isinstance(column.type, sa.JSON):
        return {"b": [1.5, None, "\u0000 \ud83d\ude00"], "a": {"z": 2**53 + 1, "nested": [[]]}}
    values: dict[type, Any] = {bool: True, int: 2**40 + 7, float: 0.1 + 0.2, bytes: bytes(range(256))}
    if column.type.python_type is int and not isinstance(column.type, sa.BigInteger):
        return 2**31 - 1
    return values.get(column.type.python_type, f"é ☃ \U0001f600 '\"\\%s {column.name}")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A data folder that no process has open, with a row of each kind and a checkpoint."""
    folder = tmp_path / "data"
    filled = fill(folder)
    filled.catalog.close()
    add_every_kind_of_row(folder)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "waiting.1.safetensors").write_bytes(CHECKPOINT)
    return folder


@pytest.fixture
def target(postgres_server: PostgresServer, s3: ObjectServer, tmp_path: Path) -> Target:
    return Target(postgres_server, tmp_path / "elsewhere")


def run(*arguments: Any) -> Result:
    """Run the command in this process."""
    app = typer.Typer()
    app.command()(migrate)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_is_copy(target: Target, source: Path) -> None:
    """Compare every row and every byte."""
    assert set(metadata.tables) > NOT_COPIED
    for table in set(metadata.tables) - NOT_COPIED:
        assert target.rows(table) == source_rows(source, table), table
    bucket, blobs = bucket_of(target.location), source / "blobs"
    assert objects_in(target.location, "blobs") == {path.name for path in blobs.iterdir()} - {"store-id"}
    for path in blobs.iterdir():
        key = "store-id" if path.name == "store-id" else f"blobs/{path.name}"
        assert bytes(bucket.get(key).bytes()) == path.read_bytes(), path.name


def test_every_row_and_every_blob_arrives_and_the_source_stays_as_it_is(source: Path, target: Target) -> None:
    before = tree_of(source)
    done = run(*target.arguments(), "--data-dir", source, "--json")
    assert done.exit_code == 0, done.output
    assert tree_of(source) == before
    assert_is_copy(target, source)
    assert bytes(bucket_of(target.location).get("checkpoints/waiting.1").bytes()) == CHECKPOINT
    result = json.loads(done.stdout)
    assert set(result["tables"]) == set(metadata.tables) - {"catalog"} - NOT_COPIED
    assert (result["is_complete"], result["blobs"]["copied"], result["checkpoints"]) == (True, 6, 1)
    assert "table versions: 4 rows" in done.stderr
    with closing(target.open()) as catalog:
        found = catalog.find(Reference("acme"), tenant="default")
        assert read_adapter(found, catalog.blobs).digest == make_adapter(1).digest
        # Numbers go on after the greatest that was ever given.
        put(catalog, "new", 77)
        assert _last(target.rows("audit")) == _last(source_rows(source, "audit")) + 1
        submit(JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=15), "new")
        assert _last(target.rows("jobs")) == 5_000_000_001


def _last(rows: list[Row]) -> int:
    return max(int(row[0]) for row in rows)


def test_a_repetition_compares_and_refuses_a_target_that_was_used(source: Path, target: Target) -> None:
    assert run(*target.arguments(), "--data-dir", source).exit_code == 0
    again = run(*target.arguments(), "--data-dir", source)
    assert (again.exit_code, "blobs: 0 copied (0 bytes), 6 there already" in again.stdout) == (0, True), again.output
    with closing(target.open()) as catalog:
        put(catalog, "new", 77)
    used = run(*target.arguments(), "--data-dir", source)
    assert used.exit_code == 1
    assert "is a complete copy, and it or the source has changed since" in used.stderr
    assert "new" in {row[1] for row in target.rows("adapters")}


def test_blobs_are_copied_beside_a_service_and_the_rest_when_it_has_stopped(tmp_path: Path, target: Target) -> None:
    filled = fill(tmp_path / "data")
    arguments = (*target.arguments(), "--data-dir", filled.folder)
    refused = run(*arguments)
    assert (refused.exit_code, "stop it to copy the rows" in refused.stderr) == (1, True)
    first = run(*arguments, "--blobs-only")
    assert (first.exit_code, "no rows were copied" in first.stdout) == (0, True), first.output
    assert target.rows("versions") == []
    with pytest.raises(CatalogNotLoadable, match="unfinished copy"):
        target.open()
    # Of what was copied, one blob is gone when the service stops, and there is a new one.
    filled.catalog.delete("acme", tenant="default", purge=True)
    put(filled.catalog, "late", 55)
    filled.catalog.close()
    last = run(*arguments, "--trust-copies", "--json")
    assert last.exit_code == 0, last.output
    counts = json.loads(last.stdout)["blobs"]
    assert (counts["copied"], counts["present"], counts["trusted"]) == (1, 5, 5)
    assert_is_copy(target, filled.folder)
    # No row refers to it, but it is not for this command to remove bytes.
    assert len(objects_in(target.location, "quarantine")) == 1


def test_damage_in_the_source_is_reported_and_nothing_is_published(source: Path, target: Target) -> None:
    ((file,),) = rows_of(source, "SELECT file FROM versions WHERE adapter = 'acme'")
    blob = source / "blobs" / file
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    damaged = run(*target.arguments(), "--data-dir", source)
    assert damaged.exit_code == 1
    assert f"adapter acme@1: the bytes 0 to {len(content)} of the file {file} do not have the digest" in damaged.stderr
    assert file not in objects_in(target.location, "blobs")
    with pytest.raises(CatalogNotLoadable, match="unfinished copy"):
        target.open()
    content[-1] ^= 1
    blob.write_bytes(content)
    assert run(*target.arguments(), "--data-dir", source).exit_code == 0
    assert_is_copy(target, source)


def test_a_copy_that_was_damaged_in_the_bucket_is_made_again(source: Path, target: Target) -> None:
    assert run(*target.arguments(), "--data-dir", source, "--blobs-only").exit_code == 0
    name = min(objects_in(target.location, "blobs"))
    bucket_of(target.location).put(f"blobs/{name}", b"other")
    assert run(*target.arguments(), "--data-dir", source).exit_code == 0
    assert_is_copy(target, source)


def test_a_target_of_another_store_is_refused(
    source: Path, target: Target, tmp_path: Path, postgres_server: PostgresServer
) -> None:
    other = fill(tmp_path / "other").folder
    assert run(*target.arguments(), "--data-dir", source).exit_code == 0
    rows = target.rows("adapters")
    blobs = run("--to-database", postgres_server.new_database(), *target.arguments()[2:], "--data-dir", other)
    assert (blobs.exit_code, "the blobs of the target belong to the store" in blobs.stderr) == (1, True), blobs.output
    database = run(*target.arguments()[:2], "--to-blobs", new_url(), "--data-dir", other, "--blobs-only")
    assert (database.exit_code, "has the store" in database.stderr) == (1, True), database.output
    assert target.rows("adapters") == rows


def test_a_store_comes_back_into_a_folder(source: Path, target: Target, tmp_path: Path) -> None:
    assert run(*target.arguments(), "--data-dir", source).exit_code == 0
    back = tmp_path / "back"
    done = run(*target.arguments("from"), "--data-dir", back)
    assert done.exit_code == 0, done.output
    for table in set(metadata.tables) - NOT_COPIED:
        assert source_rows(back, table) == source_rows(source, table), table
    for path in [*(source / "blobs").iterdir(), *(source / "checkpoints").iterdir()]:
        assert (back / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert rows_of(back, "SELECT seq FROM sqlite_sequence WHERE name = 'jobs'") == [(5_000_000_000,)]
    check_store(back)
    assert {finding.problem for finding in diagnose(back).findings} == {
        finding.problem for finding in diagnose(source).findings
    }
    again = run(*target.arguments("from"), "--data-dir", back)
    assert (again.exit_code, "take an empty folder" in again.stderr) == (1, True)


def test_a_session_of_a_service_keeps_rows_from_being_copied_back(source: Path, target: Target, tmp_path: Path) -> None:
    assert run(*target.arguments(), "--data-dir", source).exit_code == 0
    with closing(target.open()):
        refused = run(*target.arguments("from"), "--data-dir", tmp_path / "back")
    assert (refused.exit_code, "stop all services" in refused.stderr) == (1, True), refused.output


def is_unfinished(target: Target) -> bool:
    """Whether a service refuses the target."""
    try:
        target.open().close()
    except CatalogNotLoadable as error:
        return "unfinished copy" in error.detail
    return False


def test_the_bucket_of_a_service_is_refused_with_a_new_database(
    source: Path, target: Target, postgres_server: PostgresServer
) -> None:
    assert run(*target.arguments(), "--data-dir", source).exit_code == 0
    with closing(target.open()) as catalog:
        put(catalog, "new", 77)
    before = objects_in(target.location, "blobs")
    database = ["--to-database", postgres_server.new_database()]
    refused = run(*database, *target.arguments()[2:], "--data-dir", source)
    assert (refused.exit_code, f"{target.location.url} has the blobs of the store" in refused.stderr) == (1, True)
    assert objects_in(target.location, "blobs") == before
    assert objects_in(target.location, "quarantine") == set()


def test_a_first_run_that_ended_before_the_bucket_had_its_id_is_repeated(
    source: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StorageFailed("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr("adapters.storage.object_blobs.ObjectBlobs.write_store_id", fail)
        assert run(*target.arguments(), "--data-dir", source).exit_code == 1
    assert is_unfinished(target)
    assert run(*target.arguments(), "--data-dir", source).exit_code == 0
    assert_is_copy(target, source)


def test_a_copy_back_of_rows_that_were_changed_meanwhile_is_refused(
    source: Path, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    assert run(*target.arguments(), "--data-dir", source).exit_code == 0

    def copy_and_change(*arguments: Any, **options: Any) -> move.BlobCounts:
        # The revision stays as it is.
        url = target.url.replace("+psycopg", "")
        with psycopg.connect(url, application_name=move.APPLICATION) as connection:
            connection.execute("UPDATE usage SET requests = requests + 1")
        return copy_blobs(*arguments, **options)

    copy_blobs = move.copy_blobs
    with monkeypatch.context() as patch:
        patch.setattr(move, "copy_blobs", copy_and_change)
        changed = run(*target.arguments("from"), "--data-dir", tmp_path / "back")
    assert (changed.exit_code, "was changed during the copy" in changed.stderr) == (1, True), changed.output
    assert not (tmp_path / "back" / "catalog.sqlite3").exists()
    assert run(*target.arguments("from"), "--data-dir", tmp_path / "back").exit_code == 0


def test_sessions_of_another_role_keep_rows_from_being_copied_back(
    source: Path, target: Target, tmp_path: Path, postgres_server: PostgresServer
) -> None:
    import psycopg

    assert run(*target.arguments(), "--data-dir", source).exit_code == 0
    role = f"reader_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server.dsn("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN IN ROLE pg_read_all_data".encode())
    url = sa.make_url(target.url).set(username=role).render_as_string(hide_password=False)
    arguments = ["--from-database", url, *target.arguments("from")[2:], "--data-dir", tmp_path / "back"]
    with psycopg.connect(target.url.replace("+psycopg", "")):
        refused = run(*arguments)
    assert (refused.exit_code, "stop all services" in refused.stderr) == (1, True), refused.output
    eventually(lambda: run(*arguments).exit_code == 0, what="the end of the session")


def test_a_copy_back_that_was_killed_while_it_wrote_a_blob_is_repeated(
    source: Path, target: Target, tmp_path: Path
) -> None:
    assert run(*target.arguments(), "--data-dir", source).exit_code == 0
    arguments = (*target.arguments("from"), "--data-dir", tmp_path / "back")
    assert run(*arguments, "--blobs-only").exit_code == 0
    blobs = tmp_path / "back" / "blobs"
    name = min(objects_in(target.location, "blobs"))
    (blobs / name).unlink()
    (blobs / f"{name}.tmp").write_bytes(b"half")
    again = run(*arguments)
    assert again.exit_code == 0, again.output
    assert {path.name for path in blobs.iterdir()} == {path.name for path in (source / "blobs").iterdir()}


def test_a_copy_back_leaves_the_tables_of_another_release_as_they_are(target: Target, tmp_path: Path) -> None:
    import psycopg

    with psycopg.connect(target.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
        refused = run(*target.arguments("from"), "--data-dir", tmp_path / "back")
        assert (refused.exit_code, "has the tables of another release: 0001;" in refused.stderr) == (78, True)
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]


def test_copies_are_trusted_before_the_target_is_complete_and_the_result_says_so(source: Path, target: Target) -> None:
    assert run(*target.arguments(), "--data-dir", source, "--blobs-only").exit_code == 0
    trusting = (*target.arguments(), "--data-dir", source, "--trust-copies")
    assert "6 of those there already were trusted, and not compared" in run(*trusting).stdout
    compared = run(*trusting)
    assert (compared.exit_code, "trusted" in compared.stdout) == (0, False), compared.output
    bucket_of(target.location).put(f"blobs/{min(objects_in(target.location, 'blobs'))}", b"other")
    damaged = run(*trusting)
    assert (damaged.exit_code, "is missing or damaged there" in damaged.stderr) == (1, True), damaged.output


KILLED_AT = ["blobs: ", "table adapters", "table versions", "table usage"]


@pytest.mark.parametrize("line", KILLED_AT)
def test_a_command_that_was_killed_is_repeated(source: Path, target: Target, line: str) -> None:
    command = [str(LORAPLEX), "migrate", *target.arguments(), "--data-dir", str(source)]
    before = tree_of(source)
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment()) as process:
        assert process.stderr is not None
        assert any(text.decode().startswith(line) for text in process.stderr)
        process.kill()
    # It may have been faster than the signal.
    assert is_unfinished(target) or target.rows("catalog") == source_rows(source, "catalog")
    assert run(*target.arguments(), "--data-dir", source).exit_code == 0
    assert tree_of(source) == before
    assert_is_copy(target, source)
