"""The audit log, and the actor that submitted each job."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Create the table and add the column, which is null for the jobs of earlier releases."""
    text = sa.String
    op.create_table(
        "audit",
        sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        *(sa.Column(name, text, nullable=False) for name in ("time", "action", "resource")),
        sa.Column("tenant", text().with_variant(text(collation="C"), "postgresql"), nullable=False),
        *(sa.Column(name, text) for name in ("key_id", "digest_before", "digest_after", "request_id")),
        sa.Column("client_address", text),
    )
    for name, columns in {"time": [], "key_id": ["key_id"], "resource": ["resource"]}.items():
        op.create_index(f"ix_audit_tenant_{name}", "audit", ["tenant", *columns, "time", "sequence"])
    op.add_column("jobs", sa.Column("submitted_by", sa.JSON(none_as_null=True)))
