"""The names that each of the last revisions of the catalogue changed, and running tallies of jobs."""

import sqlalchemy as sa
from alembic import op

from adapters.storage.schema import BIG_INTEGER, NAME

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Create the table. It is empty, so processes first drop everything that they have cached.

    A job without a tally has its adapters counted when the first of them changes.
    """
    op.create_table(
        "changes",
        sa.Column("revision", BIG_INTEGER, primary_key=True),
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("name", NAME, primary_key=True),
        sqlite_with_rowid=False,
    )
    op.add_column("jobs", sa.Column("tally", sa.JSON(none_as_null=True)))
