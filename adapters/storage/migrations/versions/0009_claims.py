"""Indexes that find the oldest job that waits of each tenant, and when the tenant was served last."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Replace the index on status by one in which the waiting jobs of each tenant are together, and add one."""
    op.drop_index("ix_jobs_status", "jobs")
    op.create_index("ix_jobs_status_tenant", "jobs", ["status", "base", "tenant", "sequence"])
    op.create_index("ix_jobs_tenant_started_at", "jobs", ["tenant", "started_at"])
