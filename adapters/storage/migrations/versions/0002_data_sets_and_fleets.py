"""Data sets, the adapters of a job, and what a version and a job tell about a training."""

import time

import sqlalchemy as sa
from alembic import op

from adapters.clock import rfc3339
from adapters.storage.schema import BIG_INTEGER, NAME

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add columns to versions and jobs, and the tables of data sets and of the adapters that a job trains."""
    op.add_column("versions", sa.Column("labels", sa.JSON(none_as_null=True)))
    op.add_column("versions", sa.Column("lineage", sa.JSON(none_as_null=True)))
    op.add_column("versions", sa.Column("statistics", sa.String))
    op.add_column("jobs", sa.Column("log", sa.JSON(none_as_null=True)))
    op.create_table(
        "job_adapters",
        sa.Column("job", sa.String, primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("name", NAME, nullable=False),
        sa.Column("group", sa.String),
        sa.Column("rows", BIG_INTEGER, nullable=False),
        sa.Column("deletions", sa.Integer, nullable=False),
        sa.Column("version", BIG_INTEGER),
        sa.Column("digest", sa.String),
        sa.Column("metrics", sa.JSON(none_as_null=True)),
        sa.Column("error", sa.JSON(none_as_null=True)),
        sa.Column("moved_live", sa.Boolean, nullable=False),
        sa.Column("replaced", BIG_INTEGER),
    )
    op.create_index("ix_job_adapters_name", "job_adapters", ["name"])
    op.create_table(
        "datasets",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("name", NAME, primary_key=True),
        sa.Column("created_at", sa.String, nullable=False),
        sa.Column("next_version", BIG_INTEGER, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
    )
    op.create_table(
        "dataset_versions",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("dataset", NAME, primary_key=True),
        sa.Column("version", BIG_INTEGER, primary_key=True),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("created_at", sa.String, nullable=False),
        sa.Column("content_type", sa.String, nullable=False),
        sa.Column("rows", BIG_INTEGER, nullable=False),
        sa.Column("columns", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("bad_rows", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("file", sa.String, nullable=False),
        sa.Column("bytes", BIG_INTEGER, nullable=False),
    )
    connection = op.get_bind()
    _fail_queued_jobs(connection)
    _add_job_adapters(connection)
    op.drop_column("jobs", "deletions")


_JSON = sa.JSON(none_as_null=True)
_JOBS = sa.table(
    "jobs",
    *map(sa.column, ("id", "status", "adapter", "deletions", "data_file", "lease_until", "finished_at")),
    *(sa.column(name, _JSON) for name in ("spec", "result", "metrics", "error")),
)
_JOB_ADAPTERS = sa.table(
    "job_adapters",
    *map(sa.column, ("job", "position", "name", "rows", "deletions", "version", "digest", "moved_live")),
    *(sa.column(name, _JSON) for name in ("metrics", "error")),
)


def _fail_queued_jobs(connection: sa.Connection) -> None:
    """End the jobs that an older release queued: its trainers read them, and this one's cannot."""
    error = {
        "type": "urn:loraplex:fit_failed",
        "title": "The training stopped on an error of its own",
        "detail": "the job was queued by an older release: send it again",
        "code": "fit_failed",
    }
    ended = {"data_file": None, "lease_until": None, "finished_at": rfc3339(time.time())}
    waiting = _JOBS.c.status.in_(["queued", "running"])
    connection.execute(sa.update(_JOBS).where(waiting).values(status="failed", error=error, **ended))


def _add_job_adapters(connection: sa.Connection) -> None:
    """Add the row of the one adapter that each job trained before this release."""
    for job in connection.execute(sa.select(_JOBS)).all():
        result = job.result or {}
        row = {
            "job": job.id,
            "position": 0,
            "name": job.adapter,
            "rows": ((job.spec.get("shown") or {}).get("data") or {}).get("rows") or 0,
            "deletions": job.deletions,
            "version": result.get("version"),
            "digest": result.get("digest"),
            "metrics": job.metrics if job.status == "succeeded" else None,
            "error": job.error,
            "moved_live": False,
        }
        connection.execute(sa.insert(_JOB_ADAPTERS), row)
