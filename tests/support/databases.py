"""The databases and buckets that tests run on, and their rows, read past the code under test."""

import shutil
import sqlite3
import uuid
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.catalog.catalog import Catalog
from adapters.storage.blob_location import BlobLocation
from adapters.storage.database import Database
from adapters.storage.sqlite_database import SqliteDatabase

if TYPE_CHECKING:
    import psycopg

# In a data folder of a test: the URLs of its database and its bucket, if they are not in the folder.
_URL, _BUCKET_URL = "database-url", "bucket-url"


def place_database(folder: Path, url: str) -> None:
    """Have what opens the catalogue of a folder here take this database."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _URL).write_text(url)


def place_bucket(folder: Path, url: str) -> None:
    """Have what opens the blobs of a folder here take this prefix of a bucket."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _BUCKET_URL).write_text(url)


def database_url(folder: Path) -> str | None:
    """The URL of the database of a folder; None for SQLite."""
    return _url_in(folder / _URL)


def blob_location(folder: Path) -> BlobLocation:
    """The place of the blobs of a folder."""
    return BlobLocation(folder=folder, url=_url_in(folder / _BUCKET_URL))


def forget_machine(folder: Path) -> None:
    """Leave of a data folder what another machine has: the URLs of its database and its bucket."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (_URL, _BUCKET_URL):
            path.unlink()


def copy_storage(source: Path, target: Path) -> Path:
    """Copy a data folder, its database and its bucket; no process may use them."""
    shutil.copytree(source, target)
    if (url := database_url(source)) is not None:
        name, copy = sa.make_url(url).database, f"test_{uuid.uuid4().hex}"
        with _connect(_with_database(url, "postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {copy} TEMPLATE {name}".encode())
        place_database(target, _with_database(url, copy))
    if (location := blob_location(source)).url is not None:
        # What it needs is an extra.
        from tests.support.object_server import copy_objects, new_url

        place_bucket(target, new_url())
        copy_objects(location, blob_location(target))
    return target


def _with_database(url: str, name: str) -> str:
    return sa.make_url(url).set(database=name).render_as_string(hide_password=False)


def _url_in(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


def _postgres_without_clock(url: str) -> Database:
    """Open a database whose leases follow the clock of the test."""
    # The driver is an extra.
    from adapters.storage.postgres_database import PostgresDatabase

    class Timeless(PostgresDatabase):
        def server_time(self, _connection: Connection) -> float | None:
            return None

    return Timeless(url)


def _connect(url: str, *, autocommit: bool = False) -> "psycopg.Connection[tuple[Any, ...]]":
    import psycopg

    return psycopg.connect(url.replace("+psycopg", ""), autocommit=autocommit)


def open_database(folder: Path) -> Database:
    """Open the database of a folder."""
    url = database_url(folder)
    return SqliteDatabase(folder) if url is None else _postgres_without_clock(url)


def open_catalog(folder: Path, **arguments: Any) -> Catalog:
    """Open the catalogue of a folder."""
    url = database_url(folder)
    database = None if url is None else _postgres_without_clock(url)
    return Catalog(folder, database=database, **{"blobs": blob_location(folder)} | arguments)


def database_settings(folder: Path) -> dict[str, Any]:
    """The settings of a service on the database and the blobs of a folder."""
    url, blob_url = database_url(folder), blob_location(folder).url
    chosen = {"database_url": url, "blob_url": blob_url, "allow_mixed_storage": (url is None) != (blob_url is None)}
    return {name: value for name, value in chosen.items() if value}


def change_rows(folder: Path, statement: str) -> None:
    """Execute a statement in portable SQL."""
    url = database_url(folder)
    if url is not None:
        with _connect(url) as connection:
            connection.execute(statement.encode())
        return
    with closing(sqlite3.connect(folder / "catalog.sqlite3")) as file, file:
        file.execute(statement)


def rows_of(folder: Path, statement: str) -> Sequence[tuple[Any, ...]]:
    """The rows of a statement in portable SQL."""
    url = database_url(folder)
    if url is not None:
        with _connect(url) as connection:
            return connection.execute(statement.encode()).fetchall()
    with closing(sqlite3.connect(f"file:{folder / 'catalog.sqlite3'}?mode=ro", uri=True, timeout=15)) as file:
        return file.execute(statement).fetchall()
