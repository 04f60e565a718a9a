"""Pending blobs, the loss of a version in a column, and indexes by which a sweep finds references."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_ROWS_AT_ONCE = 500


def upgrade() -> None:
    """Create the table of pending blobs, add the column of the loss and fill it, and create the indexes."""
    op.create_table(
        "pending_blobs",
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("owner", sa.String, nullable=False),
        sqlite_with_rowid=False,
    )
    op.add_column("versions", sa.Column("loss", sa.String))
    _fill_loss(op.get_bind())
    op.create_index("ix_dataset_versions_file", "dataset_versions", ["file"])
    for table, column in (("versions", "statistics"), ("jobs", "data_file")):
        is_set = sa.column(column).is_not(None)
        op.create_index(f"ix_{table}_{column}", table, [column], sqlite_where=is_set, postgresql_where=is_set)


def _fill_loss(connection: sa.Connection) -> None:
    """Copy `loss` out of the lineage of each version, a part of the rows at a time: lineages may be long."""
    # As text, and read by Python: old releases stored NaN, which the JSON functions of databases refuse.
    versions = sa.table(
        "versions", *map(sa.column, ("tenant", "adapter", "version", "loss")), sa.column("lineage", sa.Text)
    )
    key = (versions.c.tenant, versions.c.adapter, versions.c.version)
    update = sa.update(versions).where(
        versions.c.tenant == sa.bindparam("of_tenant"),
        versions.c.adapter == sa.bindparam("of_adapter"),
        versions.c.version == sa.bindparam("of_version"),
    )
    page = sa.select(versions).where(versions.c.lineage.is_not(None)).order_by(*key).limit(_ROWS_AT_ONCE)
    rows = connection.execute(page).all()
    while rows:
        losses = [
            {"of_tenant": row.tenant, "of_adapter": row.adapter, "of_version": row.version, "loss": loss}
            for row in rows
            if isinstance(loss := (json.loads(row.lineage) or {}).get("loss"), str)
        ]
        if losses:
            connection.execute(update, losses)
        last = rows[-1]
        rows = connection.execute(
            page.where(sa.tuple_(*key) > sa.tuple_(last.tenant, last.adapter, last.version))
        ).all()
