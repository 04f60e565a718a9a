"""The catalogue's tables. `migrations/` makes them; a test holds the two against each other."""

import sqlalchemy as sa

DEFAULT_TENANT = "default"
"""What every root row carries until there are keys, and with them tenants."""

metadata = sa.MetaData()

adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("next_version", sa.Integer, nullable=False),
    # A deleted adapter's row stays as a tombstone, so that a name made again goes on counting.
    sa.Column("deleted", sa.Boolean, nullable=False),
    sa.Column("deletions", sa.Integer, nullable=False),
)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("adapter", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("alpha", sa.Float, nullable=False),
    sa.Column("rslora", sa.Boolean, nullable=False),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("feature_space", sa.String),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("job", sa.String),
    sa.Column("module", sa.String),
    sa.Column("metrics", sa.JSON(none_as_null=True)),
    sa.Column("relative_norm", sa.Float),
    sa.Column("file", sa.String, nullable=False, index=True),
    sa.Column("offset", sa.Integer, nullable=False),
    sa.Column("bytes", sa.Integer, nullable=False),
    sa.Column("labels", sa.JSON(none_as_null=True)),
    sa.Column("lineage", sa.JSON(none_as_null=True)),
    # The blob with the sums that a closed form came from, where the job was to keep them.
    sa.Column("statistics", sa.String),
)

aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("adapter", sa.String, primary_key=True),
    sa.Column("alias", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
)

catalog = sa.Table(
    "catalog",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("revision", sa.Integer, nullable=False),
    # Random; the folder of blobs has the same (`adapters.storage.store_identity`).
    sa.Column("store_id", sa.String),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String, nullable=False, unique=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("adapter", sa.String, nullable=False, index=True),
    sa.Column("status", sa.String, nullable=False, index=True),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("started_at", sa.String),
    sa.Column("finished_at", sa.String),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("lease_until", sa.Float),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("feature_space", sa.String),
    sa.Column("spec", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("data_file", sa.String),
    sa.Column("progress", sa.JSON(none_as_null=True)),
    sa.Column("history", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("metrics", sa.JSON(none_as_null=True)),
    sa.Column("result", sa.JSON(none_as_null=True)),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("log", sa.JSON(none_as_null=True)),
    sqlite_autoincrement=True,
)

job_adapters = sa.Table(
    "job_adapters",
    metadata,
    # One row for each adapter that a job trains: a fleet has many.
    sa.Column("job", sa.String, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("name", sa.String, nullable=False, index=True),
    sa.Column("group", sa.String),
    sa.Column("rows", sa.Integer, nullable=False),
    # How often the name had been deleted when the job was queued.
    sa.Column("deletions", sa.Integer, nullable=False),
    sa.Column("version", sa.Integer),
    sa.Column("digest", sa.String),
    sa.Column("metrics", sa.JSON(none_as_null=True)),
    sa.Column("error", sa.JSON(none_as_null=True)),
    # Whether publishing moved live, and where live pointed before (null: nowhere).
    sa.Column("moved_live", sa.Boolean, nullable=False),
    sa.Column("replaced", sa.Integer),
)

datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("created_at", sa.String, nullable=False),
    sa.Column("next_version", sa.Integer, nullable=False),
    # As for adapters: a tombstone, so that a name made again goes on counting.
    sa.Column("deleted", sa.Boolean, nullable=False),
)

dataset_versions = sa.Table(
    "dataset_versions",
    metadata,
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
