"""Idempotency keys of requests that store jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Create the table."""
    name = sa.String().with_variant(sa.String(collation="C"), "postgresql")
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant", name, primary_key=True),
        sa.Column("key", name, primary_key=True),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("claim", sa.String, nullable=False),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("job", sa.String),
        sa.Column("expires_at", sa.String, nullable=False),
    )
    op.create_index("ix_idempotency_keys_expires_at", "idempotency_keys", ["expires_at"])
