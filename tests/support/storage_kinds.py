"""The kinds of storage that tests run on.

| kind | database | blobs |
|---|---|---|
| `SQLITE` | SQLite | the data folder |
| `POSTGRES` | PostgreSQL | the data folder |
| `CLUSTER` | PostgreSQL | a bucket |
"""

import pytest

SQLITE, POSTGRES, CLUSTER = "sqlite", "postgres", "cluster"
on_both_databases = pytest.mark.on_both_databases
"""Marks tests that run once on each database, if they use the fixture `database_kind`."""
on_both_storages = pytest.mark.on_both_storages
"""Marks tests that run once on SQLite and a folder, and once on PostgreSQL and a bucket."""
