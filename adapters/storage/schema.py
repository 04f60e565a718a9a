"""The catalogue's tables. `migrations/` creates them, and a test compares the two."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

# Tenant of every root row until there are keys.
DEFAULT_TENANT = "default"
# 64 bits on every database. SQLite's INTEGER has them, and only it can number the rows of a table.
BIG_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
# Text that every database orders by its bytes.
NAME = sa.String().with_variant(sa.String(collation="C"), "postgresql")
_ITEMS_AT_ONCE = 500

Item = TypeVar("Item")


def batched(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield items in lists of as many as one statement takes."""
    rest = iter(items)
    while batch := list(islice(rest, _ITEMS_AT_ONCE)):
        yield batch


def rows_in(
    connection: Connection, statement: sa.Select[Any], column: sa.ColumnElement[Any], values: Iterable[object]
) -> Iterator[sa.Row[Any]]:
    """Yield the rows of a statement whose column has one of these values, as many at once as one statement takes."""
    for part in batched(values):
        yield from connection.execute(statement.where(column.in_(part)))


def _index_present(column: sa.Column[str]) -> None:
    """Index the rows in which a column has a value."""
    present = column.is_not(None)
    sa.Index(f"ix_{column.table.name}_{column.name}", column, sqlite_where=present, postgresql_where=present)


metadata = sa.MetaData()

adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("name", NAME, primary_key=True),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("next_version", BIG_INTEGER, nullable=False),
    # A deleted adapter's row stays as a tombstone, so that a name made again goes on counting.
    sa.Column("deleted", sa.Boolean, nullable=False),
    sa.Column("deletions", sa.Integer, nullable=False, default=0),
)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("adapter", NAME, primary_key=True),
    sa.Column("version", BIG_INTEGER, primary_key=True),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("alpha", sa.Float, nullable=False),
    sa.Column("rslora", sa.Boolean, nullable=False),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("feature_space", sa.String),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("job", sa.String),
    sa.Column("module", sa.String),
    sa.Column("metrics", sa.JSON(none_as_null=True)),
    sa.Column("relative_norm", sa.Float),
    sa.Column("file", sa.String, nullable=False, index=True),
    sa.Column("offset", BIG_INTEGER, nullable=False),
    sa.Column("bytes", BIG_INTEGER, nullable=False),
    sa.Column("labels", sa.JSON(none_as_null=True)),
    sa.Column("lineage", sa.JSON(none_as_null=True)),
    # The blob with the sums that a closed form came from, if the job kept them.
    sa.Column("statistics", sa.String),
    # Of the lineage: each prediction needs it, and the rest may be long.
    sa.Column("loss", sa.String),
)
_index_present(versions.c.statistics)

aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("adapter", NAME, primary_key=True),
    sa.Column("alias", NAME, primary_key=True),
    sa.Column("version", BIG_INTEGER, nullable=False),
)

catalog = sa.Table(
    "catalog",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("revision", BIG_INTEGER, nullable=False),
    # Random; the folder of blobs has the same (`adapters.storage.store_identity`).
    sa.Column("store_id", sa.String),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("sequence", BIG_INTEGER, primary_key=True, autoincrement=True),
    sa.Column("id", NAME, nullable=False, unique=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("adapter", NAME, nullable=False, index=True),
    sa.Column("status", sa.String, nullable=False, index=True),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("started_at", sa.String),
    sa.Column("finished_at", sa.String),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("lease_until", sa.Float),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("feature_space", sa.String),
    sa.Column("spec", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("data_file", sa.String),
    sa.Column("progress", sa.JSON(none_as_null=True)),
    sa.Column("history", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("metrics", sa.JSON(none_as_null=True)),
    sa.Column("result", sa.JSON(none_as_null=True)),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("log", sa.JSON(none_as_null=True)),
    sqlite_autoincrement=True,
)
_index_present(jobs.c.data_file)

job_adapters = sa.Table(
    "job_adapters",
    metadata,
    # One row for each adapter that a job trains: a fleet has many.
    sa.Column("job", sa.String, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("name", NAME, nullable=False, index=True),
    sa.Column("group", sa.String),
    sa.Column("rows", BIG_INTEGER, nullable=False),
    # How often the name had been deleted when the job was queued.
    sa.Column("deletions", sa.Integer, nullable=False),
    sa.Column("version", BIG_INTEGER),
    sa.Column("digest", sa.String),
    sa.Column("metrics", sa.JSON(none_as_null=True)),
    sa.Column("error", sa.JSON(none_as_null=True)),
    # Whether publishing moved live, and where live pointed before (null: nowhere).
    sa.Column("moved_live", sa.Boolean, nullable=False),
    sa.Column("replaced", BIG_INTEGER),
)

datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("name", NAME, primary_key=True),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("next_version", BIG_INTEGER, nullable=False),
    # As for adapters: a tombstone, so that a name made again goes on counting.
    sa.Column("deleted", sa.Boolean, nullable=False),
)

dataset_versions = sa.Table(
    "dataset_versions",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("dataset", NAME, primary_key=True),
    sa.Column("version", BIG_INTEGER, primary_key=True),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("content_type", sa.String, nullable=False),
    sa.Column("rows", BIG_INTEGER, nullable=False),
    sa.Column("columns", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("bad_rows", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("file", sa.String, nullable=False, index=True),
    sa.Column("bytes", BIG_INTEGER, nullable=False),
)

# Keys of the blobs that are being written, or may be next (`adapters.storage.blob_writer`).
pending_blobs = sa.Table(
    "pending_blobs",
    metadata,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("owner", sa.String, nullable=False),
    sqlite_with_rowid=False,
)
