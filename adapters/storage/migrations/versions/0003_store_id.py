"""The id that the catalogue and its folder of blobs have in common."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the id to the catalogue; opening the store then writes it into the folder."""
    op.add_column("catalog", sa.Column("store_id", sa.String))
    op.execute(sa.text("UPDATE catalog SET store_id = :id").bindparams(id=secrets.token_hex(16)))
