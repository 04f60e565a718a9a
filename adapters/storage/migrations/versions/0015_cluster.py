"""Token buckets of the rates of tenants, and turns of maintenance, for processes on several machines."""

import sqlalchemy as sa
from alembic import op

from adapters.storage.schema import NAME

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    """Create the two tables."""
    # After a crash of the server, the buckets begin anew. In return, a commit of theirs waits for no disk.
    prefixes = ["UNLOGGED"] if op.get_bind().dialect.name == "postgresql" else []
    op.create_table(
        "rate_buckets",
        sa.Column("tenant", NAME, primary_key=True),
        sa.Column("rate", sa.String, primary_key=True),
        *(sa.Column(name, sa.Float, nullable=False) for name in ("per_second", "level", "at")),
        prefixes=prefixes,
    )
    op.create_table(
        "turns", sa.Column("task", sa.String, primary_key=True), sa.Column("began_at", sa.Float, nullable=False)
    )
