"""The tenant of each adapter of a job, and indexes that list the jobs of one tenant."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the column, and replace the index by name by one that begins with the tenant."""
    # Only the default tenant has jobs of earlier releases.
    op.add_column("job_adapters", sa.Column("tenant", sa.String, nullable=False, server_default="default"))
    op.drop_index("ix_job_adapters_name", "job_adapters")
    op.create_index("ix_job_adapters_tenant_name", "job_adapters", ["tenant", "name", "job"])
    for name, columns in {"sequence": ["sequence"], "status": ["status", "sequence"], "id": ["id"]}.items():
        op.create_index(f"ix_jobs_tenant_{name}", "jobs", ["tenant", *columns])
