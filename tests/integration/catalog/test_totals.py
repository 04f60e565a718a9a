"""The totals of each tenant after changes at random, refused ones among them, are what a count of the rows says."""

import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sqlalchemy.engine import Connection

from adapters.catalog.versions import Published
from adapters.datasets.ingest import Format, Ingestion, upload_file
from adapters.datasets.store import Datasets
from adapters.errors import LoraplexError, NotFound
from adapters.storage.totals import count_rows, find_drift, read_totals
from tests.support.catalog_factories import publication
from tests.support.databases import open_catalog
from tests.support.storage_kinds import on_both_databases
from tests.support.totals_oracle import count_totals, stored_totals

pytestmark = on_both_databases

TENANTS, NAMES = ("default", "another"), [f"name-{number}" for number in range(5)]
ACTIONS = ("publish", "put", "refused", "delete", "delete", "purge", "restore", "age", "data", "drop")


def _refuse(_: Connection, __: Sequence[Published]) -> None:
    raise NotFound("refused")


def test_totals_are_what_a_count_says_after_changes_at_random(data_folder: Path) -> None:
    now = [0.0]
    catalog, draw = open_catalog(data_folder, now=lambda: now[0], trash_days=1), random.Random(5)
    datasets = Datasets(catalog.database, catalog.writer, now=lambda: 0.0)
    for step in range(80):
        tenant, name, seed = draw.choice(TENANTS), draw.choice(NAMES), draw.randrange(3)
        now[0] += 40_000 * draw.random()
        with suppress(LoraplexError):
            match draw.choice(
                ("publish", "put", "refused", "delete", "delete", "purge", "restore", "age", "data", "drop")
            ):
                case "publish":
                    made = [publication(one, seed) for one in draw.choices(NAMES, k=3)]
                    catalog.publish(made, tenant=tenant)
                case "put":
                    catalog.put(publication(name, seed, statistics=b"sums"), tenant=tenant)
                case "refused":
                    catalog.publish([publication(name, seed)], tenant=tenant, record=_refuse)
                case "delete" | "purge" as action:
                    catalog.delete(name, tenant=tenant, purge=action == "purge")
                case "restore":
                    catalog.restore(name, tenant=tenant)
                case "age":
                    catalog.purge_trash()
                case "data":
                    with upload_file(data_folder / "tmp") as raw:
                        raw.write(f"a\n{seed}\n".encode())
                        rows = Ingestion(raw, Format.CSV, memory_bytes=2**28, max_bytes=2**20)
                        datasets.add(name, rows, tenant=tenant, content_type="text/csv")
                case "drop":
                    datasets.delete(name, tenant=tenant)
        assert stored_totals(data_folder) == count_totals(data_folder), step
    with catalog.database.write() as connection:
        assert find_drift(connection) == {}
        assert read_totals(connection, tenant="default") == count_rows(connection)["default"]
        both = [read_totals(connection, tenant=tenant) for tenant in TENANTS]
        assert read_totals(connection, tenant=None).stored_bytes == sum(one.stored_bytes for one in both) > 0
    catalog.close()
