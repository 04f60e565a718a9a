"""Tenants, keys, sessions, and the revision that makes every process read keys again."""

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_TENANT = "default"


def upgrade() -> None:
    """Create the tables, with the tenant that owns every row of earlier releases."""
    name = sa.String().with_variant(sa.String(collation="C"), "postgresql")
    text, json = sa.String, sa.JSON(none_as_null=True)
    tenants = op.create_table(
        "tenants",
        sa.Column("name", name, primary_key=True),
        sa.Column("created_at", text, nullable=False),
        sa.Column("limits", json, nullable=False),
    )
    created_at = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    op.bulk_insert(tenants, [{"name": _TENANT, "created_at": created_at, "limits": {}}])
    op.create_table(
        "keys",
        sa.Column("id", name, primary_key=True),
        sa.Column("tenant", name, nullable=False),
        sa.Column("name", text, nullable=False),
        sa.Column("scopes", json, nullable=False),
        sa.Column("digest", text, nullable=False),
        sa.Column("created_at", text, nullable=False),
        sa.Column("expires_at", text),
        sa.Column("revoked_at", text),
    )
    op.create_index("ix_keys_tenant", "keys", ["tenant", "id"])
    op.create_table(
        "sessions",
        sa.Column("digest", text, primary_key=True),
        sa.Column("key", name, nullable=False),
        sa.Column("expires_at", text, nullable=False),
    )
    op.create_index("ix_sessions_expires_at", "sessions", ["expires_at"])
    big_integer = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("catalog", sa.Column("access_revision", big_integer, nullable=False, server_default="0"))
