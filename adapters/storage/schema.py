"""The catalogue's tables. `migrations/` creates them, and a test compares the two."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

# Tenant of every root row until there are keys.
TENANT = "default"
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


def rows_in(connection: Connection, statement: sa.Select[Any], column: Any, values: Iterable[object]) -> Iterator[Any]:
    """Yield the rows of a statement whose column has one of these values, as many at once as one statement takes."""
    for part in batched(values):
        yield from connection.execute(statement.where(column.in_(part)))


def _key(**types: Any) -> list[sa.Column[Any]]:
    """Return the columns of a primary key, with their types by name."""
    return [sa.Column(name, column_type, primary_key=True) for name, column_type in types.items()]


def _columns(column_type: Any, *names: str, nullable: bool = False) -> list[sa.Column[Any]]:
    """Return columns of one type."""
    return [sa.Column(name, column_type, nullable=nullable) for name in names]


metadata = sa.MetaData()
_JSON = sa.JSON(none_as_null=True)

adapters = sa.Table(
    "adapters",
    metadata,
    *_key(tenant=sa.String, name=NAME),
    *_columns(sa.String, "created_at"),
    *_columns(BIG_INTEGER, "next_version"),
    # A deleted adapter's row stays as a tombstone, so that a name made again goes on counting.
    *_columns(sa.Boolean, "deleted"),
    sa.Column("deletions", sa.Integer, nullable=False, default=0),
)

versions = sa.Table(
    "versions",
    metadata,
    *_key(tenant=sa.String, adapter=NAME, version=BIG_INTEGER),
    *_columns(sa.String, "digest", "base", "created_at", "source"),
    *_columns(sa.String, "feature_space", "job", "module", nullable=True),
    *_columns(sa.Integer, "rank"),
    *_columns(sa.Float, "alpha"),
    *_columns(sa.Boolean, "rslora"),
    *_columns(sa.Float, "relative_norm", nullable=True),
    *_columns(_JSON, "metrics", "labels", "lineage", nullable=True),
    # Of the lineage: each prediction needs it, and the rest may be long.
    *_columns(sa.String, "loss", nullable=True),
    sa.Column("file", sa.String, nullable=False, index=True),
    *_columns(BIG_INTEGER, "offset", "bytes"),
    # The blob with the sums that a closed form came from, if the job kept them.
    *_columns(sa.String, "statistics", nullable=True),
    # Keys and out-of-sample errors of the rows that it was trained on, as `RowEvidence` writes them. Only a training
    # reads it.
    *_columns(sa.LargeBinary, "evidence", nullable=True),
)

aliases = sa.Table(
    "aliases", metadata, *_key(tenant=sa.String, adapter=NAME, alias=NAME), *_columns(BIG_INTEGER, "version")
)

catalog = sa.Table(
    "catalog",
    metadata,
    *_key(id=sa.Integer),
    *_columns(BIG_INTEGER, "revision"),
    # Random; the folder of blobs has the same (`adapters.storage.store_identity`).
    *_columns(sa.String, "store_id", nullable=True),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("sequence", BIG_INTEGER, primary_key=True, autoincrement=True),
    sa.Column("id", NAME, nullable=False, unique=True),
    sa.Column("adapter", NAME, nullable=False, index=True),
    sa.Column("status", sa.String, nullable=False, index=True),
    *_columns(sa.String, "tenant", "base", "created_at"),
    *_columns(sa.String, "feature_space", "started_at", "finished_at", "data_file", nullable=True),
    *_columns(sa.Integer, "attempt", "fence"),
    *_columns(sa.Float, "lease_until", nullable=True),
    *_columns(_JSON, "spec", "history"),
    *_columns(_JSON, "progress", "metrics", "result", "error", "log", nullable=True),
    # Null in the rows of older releases, whose spec says it.
    *_columns(sa.String, "kind", nullable=True),
    # Evaluation, decision and what `auto` chose; of a fleet, the summary of its adapters.
    *_columns(_JSON, "report", "suspects", nullable=True),
    sqlite_autoincrement=True,
)

# One row for each adapter that a job trains: a fleet has many.
job_adapters = sa.Table(
    "job_adapters",
    metadata,
    *_key(job=sa.String, position=sa.Integer),
    sa.Column("name", NAME, nullable=False, index=True),
    *_columns(BIG_INTEGER, "rows"),
    # How often the name had been deleted when the job was queued.
    *_columns(sa.Integer, "deletions"),
    *_columns(sa.String, "group", "digest", nullable=True),
    *_columns(_JSON, "metrics", "error", nullable=True),
    # Whether publishing moved live, and where live pointed before (null: nowhere).
    *_columns(sa.Boolean, "moved_live"),
    *_columns(BIG_INTEGER, "version", "replaced", nullable=True),
    # Last, so that a count does not read the reports, which are long.
    *_columns(sa.String, "outcome", nullable=True),
    *_columns(sa.Float, "gain", nullable=True),
    *_columns(_JSON, "report", nullable=True),
)
for _name in ("name", "outcome", "gain"):
    sa.Index(f"ix_job_adapters_job_{_name}", job_adapters.c.job, job_adapters.c[_name])

datasets = sa.Table(
    "datasets",
    metadata,
    *_key(tenant=sa.String, name=NAME),
    *_columns(sa.String, "created_at"),
    *_columns(BIG_INTEGER, "next_version"),
    # As for adapters: a tombstone, so that a name made again goes on counting.
    *_columns(sa.Boolean, "deleted"),
)

dataset_versions = sa.Table(
    "dataset_versions",
    metadata,
    *_key(tenant=sa.String, dataset=NAME, version=BIG_INTEGER),
    *_columns(sa.String, "digest", "created_at", "content_type"),
    *_columns(BIG_INTEGER, "rows", "bytes"),
    *_columns(_JSON, "columns", "bad_rows"),
    sa.Column("file", sa.String, nullable=False, index=True),
)

# Keys of the blobs that are being written, or may be next (`adapters.storage.blob_writer`).
pending_blobs = sa.Table(
    "pending_blobs", metadata, *_key(key=sa.String), *_columns(sa.String, "owner"), sqlite_with_rowid=False
)

# Only the rows that have a value are in these indexes.
for _column in (versions.c.statistics, jobs.c.data_file):
    _name, _present = f"ix_{_column.table.name}_{_column.name}", _column.is_not(None)
    sa.Index(_name, _column, sqlite_where=_present, postgresql_where=_present)
