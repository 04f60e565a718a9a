"""The catalogue's tables. `migrations/` creates them, and a test compares the two."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

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

# Versions and aliases of deleted adapters (`adapters.catalog.trash`). An adapter made again goes on counting, so that
# its versions in the two tables never have the same number.
trashed_versions = versions.to_metadata(metadata, name="trashed_versions")
trashed_versions.append_column(sa.Column("deleted_at", sa.String, nullable=False, index=True))
trashed_aliases = aliases.to_metadata(metadata, name="trashed_aliases")

catalog = sa.Table(
    "catalog",
    metadata,
    *_key(id=sa.Integer),
    *_columns(BIG_INTEGER, "revision"),
    # Random; the folder of blobs has the same (`adapters.storage.store_identity`).
    *_columns(sa.String, "store_id", nullable=True),
    # Incremented if something that processes cache of keys or limits stops being true.
    sa.Column("access_revision", BIG_INTEGER, nullable=False, server_default="0"),
)

# The names that each of the last revisions changed. A revision without rows may have changed any name.
changes = sa.Table(
    "changes", metadata, *_key(revision=BIG_INTEGER, tenant=sa.String, name=NAME), sqlite_with_rowid=False
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("sequence", BIG_INTEGER, primary_key=True, autoincrement=True),
    sa.Column("id", NAME, nullable=False, unique=True),
    sa.Column("adapter", NAME, nullable=False, index=True),
    *_columns(sa.String, "status", "tenant", "base", "created_at"),
    *_columns(sa.String, "feature_space", "started_at", "finished_at", "data_file", nullable=True),
    *_columns(sa.Integer, "attempt", "fence"),
    *_columns(sa.Float, "lease_until", nullable=True),
    *_columns(_JSON, "spec", "history"),
    *_columns(_JSON, "progress", "metrics", "result", "error", "log", nullable=True),
    # Null in the rows of older releases, whose spec says it.
    *_columns(sa.String, "kind", nullable=True),
    # Evaluation, decision and what `auto` chose; of a fleet, the summary of its adapters.
    *_columns(_JSON, "report", "suspects", nullable=True),
    # Actor of the request that submitted it; null in the rows of older releases.
    *_columns(_JSON, "submitted_by", nullable=True),
    # Numbers of the adapters of the job by their state. Null in the rows of older releases, until one of them changes.
    *_columns(_JSON, "tally", nullable=True),
    sqlite_autoincrement=True,
)

sa.Index("ix_jobs_tenant_sequence", jobs.c.tenant, jobs.c.sequence)
sa.Index("ix_jobs_tenant_status", jobs.c.tenant, jobs.c.status, jobs.c.sequence)
sa.Index("ix_jobs_tenant_id", jobs.c.tenant, jobs.c.id)
# A claim compares the tenants of the jobs that wait, and when each of them was served.
sa.Index("ix_jobs_status_tenant", jobs.c.status, jobs.c.base, jobs.c.tenant, jobs.c.sequence)
sa.Index("ix_jobs_tenant_started_at", jobs.c.tenant, jobs.c.started_at)

# One row for each adapter that a job trains: a fleet has many.
job_adapters = sa.Table(
    "job_adapters",
    metadata,
    *_key(job=sa.String, position=sa.Integer),
    *_columns(NAME, "name"),
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
    # That of the job.
    sa.Column("tenant", sa.String, nullable=False, server_default="default"),
)
sa.Index("ix_job_adapters_tenant_name", job_adapters.c.tenant, job_adapters.c.name, job_adapters.c.job)
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

# Keys of the blobs that are being written, or may be next (`adapters.storage.pending_blobs`).
pending_blobs = sa.Table(
    "pending_blobs", metadata, *_key(key=sa.String), *_columns(sa.String, "owner"), sqlite_with_rowid=False
)

tenants = sa.Table(
    "tenants", metadata, *_key(name=NAME), *_columns(sa.String, "created_at"), *_columns(_JSON, "limits")
)

# What each tenant has (`adapters.storage.totals`).
totals = sa.Table(
    "totals",
    metadata,
    *_key(tenant=sa.String),
    *_columns(BIG_INTEGER, "adapters", "versions", "version_bytes", "trashed_bytes", "datasets", "dataset_bytes"),
)

keys = sa.Table(
    "keys",
    metadata,
    *_key(id=NAME),
    *_columns(NAME, "tenant"),
    *_columns(sa.String, "name"),
    *_columns(_JSON, "scopes"),
    # SHA-256 of the key's text.
    *_columns(sa.String, "digest", "created_at"),
    *_columns(sa.String, "expires_at", "revoked_at", nullable=True),
)
sa.Index("ix_keys_tenant", keys.c.tenant, keys.c.id)

# Sessions of the page: each counts as its key.
sessions = sa.Table(
    "sessions",
    metadata,
    # SHA-256 of the cookie's value.
    *_key(digest=sa.String),
    *_columns(NAME, "key"),
    sa.Column("expires_at", sa.String, nullable=False, index=True),
)

# Idempotency keys of requests that store jobs (`adapters.access.idempotency`).
idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    *_key(tenant=NAME, key=NAME),
    # The random id of a request, and its process.
    *_columns(sa.String, "fingerprint", "claim", "owner"),
    # Null while the request runs.
    *_columns(sa.String, "job", nullable=True),
    sa.Column("expires_at", sa.String, nullable=False, index=True),
)

# Entries of the audit log (`adapters.access.audit`).
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("sequence", BIG_INTEGER, primary_key=True, autoincrement=True),
    *_columns(sa.String, "time", "action", "resource"),
    *_columns(NAME, "tenant"),
    *_columns(sa.String, "key_id", "digest_before", "digest_after", "request_id", "client_address", nullable=True),
)
sa.Index("ix_audit_tenant_time", audit.c.tenant, audit.c.time, audit.c.sequence)
for _name in ("key_id", "resource"):
    sa.Index(f"ix_audit_tenant_{_name}", audit.c.tenant, audit.c[_name], audit.c.time, audit.c.sequence)

# Hours are numbered from the epoch (`adapters.access.usage`).
usage = sa.Table(
    "usage",
    metadata,
    *_key(tenant=NAME, dimension=sa.String, hour=BIG_INTEGER, name=NAME),
    *_columns(BIG_INTEGER, "requests", "rows"),
    sqlite_with_rowid=False,
)

# The last batch of counts that each process has added to `usage`.
usage_writers = sa.Table(
    "usage_writers",
    metadata,
    *_key(id=sa.String),
    *_columns(BIG_INTEGER, "sequence"),
    *_columns(sa.String, "stored_at"),
)

# Token buckets of tenants on several machines (`adapters.access.cluster_rates`).
rate_buckets = sa.Table(
    "rate_buckets",
    metadata,
    *_key(tenant=NAME, rate=sa.String),
    # `at` is a time by the clock of the database.
    *_columns(sa.Float, "per_second", "level", "at"),
)

# When each task of maintenance was last begun (`turns`).
turns = sa.Table("turns", metadata, *_key(task=sa.String), *_columns(sa.Float, "began_at"))

# Only the rows that have a value are in these indexes.
for _column in (versions.c.statistics, jobs.c.data_file):
    _name, _present = f"ix_{_column.table.name}_{_column.name}", _column.is_not(None)
    sa.Index(_name, _column, sqlite_where=_present, postgresql_where=_present)
