"""Data sets, the adapters of a job, and what a version and a job tell about a training."""

import sqlalchemy as sa
from alembic import op

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
        sa.Column("name", sa.String, nullable=False),
        sa.Column("group", sa.String),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("deletions", sa.Integer, nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("digest", sa.String),
        sa.Column("metrics", sa.JSON(none_as_null=True)),
        sa.Column("error", sa.JSON(none_as_null=True)),
        sa.Column("moved_live", sa.Boolean, nullable=False),
        sa.Column("replaced", sa.Integer),
    )
    op.create_index("ix_job_adapters_name", "job_adapters", ["name"])
    op.create_table(
        "datasets",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("created_at", sa.String, nullable=False),
        sa.Column("next_version", sa.Integer, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
    )
    op.create_table(
        "dataset_versions",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("dataset", sa.String, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("created_at", sa.String, nullable=False),
        sa.Column("content_type", sa.String, nullable=False),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("columns", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("bad_rows", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("file", sa.String, nullable=False),
        sa.Column("bytes", sa.Integer, nullable=False),
    )
    # A job that waits was written for another trainer: say so, rather than have this one stumble over it.
    op.execute("""
        UPDATE jobs SET status = 'failed', data_file = NULL, lease_until = NULL,
            finished_at = strftime('%Y-%m-%dT%H:%M:%f000Z', 'now'),
            error = json_object('type', 'urn:loraplex:fit_failed',
                'title', 'The training stopped on an error of its own',
                'detail', 'the job was queued by an older release: send it again', 'code', 'fit_failed')
        WHERE status IN ('queued', 'running')
    """)
    # Each job before this trained one adapter: give it its row.
    op.execute("""
        INSERT INTO job_adapters
            (job, position, name, rows, deletions, version, digest, metrics, error, moved_live)
        SELECT id, 0, adapter, coalesce(json_extract(spec, '$.shown.data.rows'), 0), deletions,
            json_extract(result, '$.version'), json_extract(result, '$.digest'),
            CASE status WHEN 'succeeded' THEN metrics END, error, 0
        FROM jobs
    """)
    op.drop_column("jobs", "deletions")
