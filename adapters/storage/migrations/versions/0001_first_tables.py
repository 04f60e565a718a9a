"""The first tables: adapters, versions, aliases, the catalogue's revision, jobs."""

import sqlalchemy as sa
from alembic import op

from adapters.storage.schema import BIG_INTEGER, NAME

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make every table, and the one row that counts revisions."""
    op.create_table(
        "adapters",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("name", NAME, primary_key=True),
        sa.Column("created_at", sa.String, nullable=False),
        sa.Column("next_version", BIG_INTEGER, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
        sa.Column("deletions", sa.Integer, nullable=False),
    )
    op.create_table(
        "versions",
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
        sa.Column("file", sa.String, nullable=False),
        sa.Column("offset", BIG_INTEGER, nullable=False),
        sa.Column("bytes", BIG_INTEGER, nullable=False),
    )
    op.create_index("ix_versions_file", "versions", ["file"])
    op.create_table(
        "aliases",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("adapter", NAME, primary_key=True),
        sa.Column("alias", NAME, primary_key=True),
        sa.Column("version", BIG_INTEGER, nullable=False),
    )
    catalog = op.create_table(
        "catalog", sa.Column("id", sa.Integer, primary_key=True), sa.Column("revision", BIG_INTEGER, nullable=False)
    )
    op.create_table(
        "jobs",
        sa.Column("sequence", BIG_INTEGER, primary_key=True, autoincrement=True),
        sa.Column("id", NAME, nullable=False, unique=True),
        sa.Column("tenant", sa.String, nullable=False),
        sa.Column("adapter", NAME, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("created_at", sa.String, nullable=False),
        sa.Column("started_at", sa.String),
        sa.Column("finished_at", sa.String),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("lease_until", sa.Float),
        sa.Column("base", sa.String, nullable=False),
        sa.Column("feature_space", sa.String),
        sa.Column("deletions", sa.Integer, nullable=False),
        sa.Column("spec", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("data_file", sa.String),
        sa.Column("progress", sa.JSON(none_as_null=True)),
        sa.Column("history", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("metrics", sa.JSON(none_as_null=True)),
        sa.Column("result", sa.JSON(none_as_null=True)),
        sa.Column("error", sa.JSON(none_as_null=True)),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_adapter", "jobs", ["adapter"])
    op.create_index("ix_jobs_status", "jobs", ["status"])
    op.bulk_insert(catalog, [{"id": 1, "revision": 0}])
