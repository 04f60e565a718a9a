"""Evaluations and decisions of jobs and of their adapters, and the out-of-sample errors that a version keeps."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the columns, all of which may be null, and the indexes of the lists of a job's adapters."""
    json = sa.JSON(none_as_null=True)
    columns: dict[str, list[sa.Column[Any]]] = {
        "versions": [sa.Column("evidence", sa.LargeBinary)],
        "jobs": [sa.Column("kind", sa.String), sa.Column("report", json), sa.Column("suspects", json)],
        "job_adapters": [sa.Column("outcome", sa.String), sa.Column("gain", sa.Float), sa.Column("report", json)],
    }
    for table, added in columns.items():
        for column in added:
            op.add_column(table, column)
    job_adapters = sa.table("job_adapters", sa.column("outcome"), sa.column("error"))
    op.execute(sa.update(job_adapters).where(job_adapters.c.error.is_not(None)).values(outcome="failed"))
    for name in ("name", "outcome", "gain"):
        op.create_index(f"ix_job_adapters_job_{name}", "job_adapters", ["job", name])
