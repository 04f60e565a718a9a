"""The file: its tables, its settings, its opening by several processes at once."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from adapters.catalog.catalog import Catalog
from adapters.errors import CatalogNotLoadable
from adapters.storage.schema import metadata
from tests.support.catalog_factories import put
from tests.support.fork_server import ForkedPopen

_OPEN_AT_ONCE = """
import sys
from pathlib import Path
from adapters.storage.sqlite_database import SqliteDatabase
print("imported", flush=True)
sys.stdin.readline()
SqliteDatabase(Path(sys.argv[1])).close()
"""


def test_the_migrations_make_the_tables_that_the_code_describes(catalog: Catalog) -> None:
    with catalog.database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_the_migrations_make_the_same_columns_keys_and_indexes_one_by_one(catalog: Catalog) -> None:
    described = sa.create_engine("sqlite://")
    metadata.create_all(described)
    with catalog.database.read() as connection, described.connect() as other:
        made, wanted = sa.inspect(connection), sa.inspect(other)
        assert set(made.get_table_names()) == set(wanted.get_table_names()) | {"alembic_version"}
        for table in wanted.get_table_names():
            assert _shape(made, table) == _shape(wanted, table)


def _shape(inspector: sa.Inspector, table: str) -> list[object]:
    columns = sorted(
        (column["name"], str(column["type"]), column["nullable"], column.get("primary_key"))
        for column in inspector.get_columns(table)
    )
    indexes = sorted((str(index["name"]), tuple(index["column_names"])) for index in inspector.get_indexes(table))
    unique = [tuple(constraint["column_names"]) for constraint in inspector.get_unique_constraints(table)]
    return [columns, indexes, unique, inspector.get_pk_constraint(table)["constrained_columns"]]


def test_job_sequence_numbers_are_never_given_out_twice(catalog: Catalog) -> None:
    with catalog.database.read() as connection:
        sql = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = 'jobs'").scalar_one()
    assert "AUTOINCREMENT" in str(sql)


def test_every_connection_syncs_commits_and_the_removal_of_the_journal(catalog: Catalog) -> None:
    with ExitStack() as stack:
        # Held together, so that each is a connection of its own.
        held = [stack.enter_context(catalog.database.read()) for _ in range(12)]
        for connection in held:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "truncate"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 15_000


def test_the_writing_connection_has_the_same_settings(catalog: Catalog) -> None:
    with catalog.database.write() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "truncate"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2


def test_processes_that_open_a_new_folder_at_once_all_find_its_tables_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    openers = [
        ForkedPopen(
            [sys.executable, "-c", _OPEN_AT_ONCE, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == b"imported\n"
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write(b"go\n")
        opener.stdin.flush()
    errors = [opener.communicate(timeout=60)[1] for opener in openers]
    assert [opener.returncode for opener in openers] == [0, 0, 0], errors
    catalog = Catalog(folder, now=lambda: 0.0)
    assert catalog.revision() == 0
    assert put(catalog, "acme").version == 1
    with catalog.database.read() as connection:
        assert len(connection.exec_driver_sql("SELECT * FROM alembic_version").all()) == 1
    catalog.database.close()


def test_opening_a_folder_again_keeps_what_is_in_it(catalog: Catalog, folder: Path) -> None:
    put(catalog, "acme")
    again = Catalog(folder, now=lambda: 0.0)
    assert [adapter.name for adapter in again.adapters(tenant="default")] == ["acme"]
    again.database.close()


def test_a_file_that_is_no_database_is_said_to_be_none(folder: Path) -> None:
    folder.mkdir()
    (folder / "catalog.sqlite3").write_bytes(b"not a database, and long enough to have a header" * 100)
    with pytest.raises(CatalogNotLoadable, match=r"catalog\.sqlite3"):
        Catalog(folder, now=lambda: 0.0)


def test_a_folder_of_a_newer_release_is_left_as_it_is(catalog: Catalog, folder: Path) -> None:
    put(catalog, "acme")
    with catalog.database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    before = (folder / "catalog.sqlite3").read_bytes()
    with pytest.raises(CatalogNotLoadable, match="9999"):
        Catalog(folder, now=lambda: 0.0)
    assert (folder / "catalog.sqlite3").read_bytes() == before
