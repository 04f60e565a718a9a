"""A data folder with every kind of blob."""

import hashlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Version
from adapters.clock import rfc3339
from adapters.jobs.queue import JobQueue
from adapters.storage.blob_location import BlobLocation
from adapters.storage.database import Database
from adapters.storage.schema import dataset_versions, datasets
from adapters.storage.totals import add_to_totals
from tests.support.catalog_factories import publication, put, submit


def add_rows(catalog: Catalog, name: str, content: bytes) -> str:
    """Store a data set without the process that reads it; return its blob."""
    with catalog.writer.upload() as upload:
        file = upload.write(content)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        common = {"tenant": "default", "created_at": rfc3339(0)}
        described = {"content_type": "text/csv", "rows": 1, "columns": [], "bad_rows": []}
        with catalog.database.write() as connection:
            connection.execute(sa.insert(datasets).values(name=name, next_version=2, deleted=False, **common))
            stored = {"dataset": name, "version": 1, "digest": digest, "bytes": len(content), "file": file}
            connection.execute(sa.insert(dataset_versions).values(**stored, **described, **common))
            add_to_totals(connection, tenant="default", datasets=1, dataset_bytes=len(content))
            upload.publish(connection)
    return file


@dataclass(frozen=True)
class Filled:
    """An open data folder, and what it holds."""

    folder: Path
    catalog: Catalog
    queue: JobQueue
    acme: Version
    """In a blob of its own."""
    pack: list[Version]
    """`a`, `b` and `c`, in one blob; `c` is in the trash."""
    kept: Version
    """With statistics."""
    rows: str
    """Blob of the data set `rows@1`."""

    def blob(self, name: str | None) -> Path:
        """The file of a blob."""
        assert name is not None
        return self.folder / "blobs" / name

    def execute(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        """Change or read the catalogue past the code under test."""
        with closing(sqlite3.connect(self.folder / "catalog.sqlite3", timeout=15)) as connection, connection:
            return connection.execute(statement, values).fetchall()


def fill(folder: Path, blobs: BlobLocation | None = None, database: Database | None = None) -> Filled:
    """Open a catalogue in a folder, and publish one blob of each kind."""
    catalog = Catalog(folder, now=time.time, blobs=blobs, database=database)
    queue = JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=15)
    acme = put(catalog, "acme", 1)
    pack = [
        one.version
        for one in catalog.publish([publication(name, seed) for seed, name in enumerate("abc", 5)], tenant="default")
    ]
    catalog.delete("c", tenant="default")
    (kept,) = catalog.publish([publication("kept", 2, statistics=b"sums" * 99)], tenant="default")
    submit(queue, "waiting")
    return Filled(folder, catalog, queue, acme, pack, kept.version, add_rows(catalog, "rows", b"x" * 3000))


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    """A folder that its catalogue is open on, as in a running service."""
    filled = fill(tmp_path / "data")
    yield filled
    filled.catalog.close()
