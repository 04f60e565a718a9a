"""Totals of each tenant, in place of counts of its rows."""

import sqlalchemy as sa
from alembic import op

from adapters.storage.schema import BIG_INTEGER

revision = "0011"
down_revision = "0010"

_NAMES = ("adapters", "versions", "version_bytes", "trashed_bytes", "datasets", "dataset_bytes")
_COUNTS = {
    "SELECT tenant, {} FROM adapters WHERE NOT deleted": {"adapters": "1"},
    "SELECT tenant, {} FROM versions": {"versions": "1", "version_bytes": "bytes"},
    "SELECT tenant, {} FROM trashed_versions": {"trashed_bytes": "bytes"},
    "SELECT tenant, {} FROM datasets WHERE NOT deleted": {"datasets": "1"},
    "SELECT tenant, {} FROM dataset_versions": {"dataset_bytes": "bytes"},
}


def upgrade() -> None:
    """Create the table, and count the rows of each tenant once."""
    op.create_table(
        "totals",
        sa.Column("tenant", sa.String, primary_key=True),
        *(sa.Column(name, BIG_INTEGER, nullable=False) for name in _NAMES),
    )
    rows = " UNION ALL ".join(
        statement.format(", ".join(f"{values.get(name, 0)} AS {name}" for name in _NAMES))
        for statement, values in _COUNTS.items()
    )
    sums = ", ".join(f"SUM({name})" for name in _NAMES)
    columns = ", ".join(_NAMES)
    op.execute(f"INSERT INTO totals (tenant, {columns}) SELECT tenant, {sums} FROM ({rows}) AS counted GROUP BY tenant")
