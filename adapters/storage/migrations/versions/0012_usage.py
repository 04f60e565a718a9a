"""Answered predictions and their rows by hour."""

import sqlalchemy as sa
from alembic import op

from adapters.storage.schema import BIG_INTEGER, NAME

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Create the table of the counts, and that of the processes which add to it."""
    op.create_table(
        "usage",
        sa.Column("tenant", NAME, primary_key=True),
        sa.Column("dimension", sa.String, primary_key=True),
        sa.Column("hour", BIG_INTEGER, primary_key=True),
        sa.Column("name", NAME, primary_key=True),
        *(sa.Column(name, BIG_INTEGER, nullable=False) for name in ("requests", "rows")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage_writers",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("sequence", BIG_INTEGER, nullable=False),
        sa.Column("stored_at", sa.String, nullable=False),
    )
