"""Versions and aliases of deleted adapters, kept for some days."""

import sqlalchemy as sa
from alembic import op

from adapters.storage.schema import BIG_INTEGER, NAME

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Create the two tables of the trash, with the columns of those of versions and aliases."""
    json = sa.JSON(none_as_null=True)
    op.create_table(
        "trashed_versions",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("adapter", NAME, primary_key=True),
        sa.Column("version", BIG_INTEGER, primary_key=True),
        *(sa.Column(name, sa.String, nullable=False) for name in ("digest", "base", "created_at", "source")),
        *(sa.Column(name, sa.String) for name in ("feature_space", "job", "module")),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("alpha", sa.Float, nullable=False),
        sa.Column("rslora", sa.Boolean, nullable=False),
        sa.Column("relative_norm", sa.Float),
        *(sa.Column(name, json) for name in ("metrics", "labels", "lineage")),
        sa.Column("loss", sa.String),
        sa.Column("file", sa.String, nullable=False),
        *(sa.Column(name, BIG_INTEGER, nullable=False) for name in ("offset", "bytes")),
        sa.Column("statistics", sa.String),
        sa.Column("evidence", sa.LargeBinary),
        sa.Column("deleted_at", sa.String, nullable=False),
    )
    for name in ("file", "deleted_at"):
        op.create_index(f"ix_trashed_versions_{name}", "trashed_versions", [name])
    op.create_table(
        "trashed_aliases",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("adapter", NAME, primary_key=True),
        sa.Column("alias", NAME, primary_key=True),
        sa.Column("version", BIG_INTEGER, nullable=False),
    )
