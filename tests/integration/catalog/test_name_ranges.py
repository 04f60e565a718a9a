"""A list of names reads the names that it returns, however many other names and other tenants there are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.datasets.store import Datasets
from adapters.jobs.job import JobStatus
from adapters.jobs.queue import JobQueue
from adapters.storage import schema as tables
from tests.support.catalog_factories import put

MANY = 3000
WANTED = ["m0", "m1", "m2"]


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The steps of SQLite's virtual machine that every statement takes meanwhile, and the reading of its rows."""
    steps, connections = [0], set()

    def step() -> int:
        steps[0] += 1
        return 0

    def begin(_connection: Any, cursor: Any, *_: Any) -> None:
        cursor.connection.set_progress_handler(step, 1)
        connections.add(cursor.connection)

    sa.event.listen(sa.Engine, "before_cursor_execute", begin)
    try:
        yield steps
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", begin)
        for connection in connections:
            connection.set_progress_handler(None, 1)


def _adapters(catalog: Catalog, names: list[str], tenant: str = "default") -> None:
    common = {"tenant": tenant, "created_at": "", "next_version": 2, "deleted": False, "deletions": 0}
    with catalog.database.write() as connection:
        connection.execute(sa.insert(tables.adapters), [common | {"name": name} for name in names])


def _datasets(catalog: Catalog, names: list[str], tenant: str = "default") -> None:
    common: dict[str, Any] = {"tenant": tenant, "created_at": ""}
    version = {"version": 1, "digest": "", "content_type": "", "rows": 1, "columns": [], "bad_rows": [], "file": ""}
    with catalog.database.write() as connection:
        entries = [common | {"name": name, "next_version": 2, "deleted": False} for name in names]
        connection.execute(sa.insert(tables.datasets), entries)
        versions = [common | version | {"bytes": 0, "dataset": name} for name in names]
        connection.execute(sa.insert(tables.dataset_versions), versions)


def _steps(catalog: Catalog, kind: str, **given: Any) -> tuple[int, list[str]]:
    with _counted() as steps:
        found: list[Any] = (
            catalog.adapters(tenant="default", **given)
            if kind == "adapters"
            else list(Datasets(catalog.database, catalog.writer, now=lambda: 0.0).list(tenant="default", **given))
        )
    return steps[0], [one.name for one in found]


def test_other_versions_cost_nothing_where_some_are_read_or_purged(catalog: Catalog) -> None:
    for name in ("kept", "second", "gone", "gone-later"):
        for seed in range(2):
            put(catalog, name, seed)
    catalog.delete("gone", tenant="default")

    def read_and_purge(purged: str) -> int:
        with _counted() as steps:
            assert set(catalog.live_versions(["kept", "second"], tenant="default")) == {"kept", "second"}
            catalog.delete(purged, tenant="default", purge=True)
        return steps[0]

    before = read_and_purge("gone")
    catalog.delete("gone-later", tenant="default")
    with catalog.database.write() as connection:
        for table in (tables.versions, tables.trashed_versions):
            row = dict(connection.execute(sa.select(table).limit(1)).mappings().one())
            connection.execute(sa.insert(table), [row | {"adapter": f"other-{number}"} for number in range(MANY)])
    assert read_and_purge("gone-later") < before + MANY / 10


def _jobs(catalog: Catalog, prefix: str, count: int, tenant: str) -> None:
    """Jobs of one tenant, each for an adapter of the same name, as rows: a queue would take a transaction for each."""
    job = {"status": "succeeded", "base": "", "created_at": "", "attempt": 1, "fence": 1, "spec": {}, "history": []}
    ids = [f"{prefix}{number:05}" for number in range(count)]
    with catalog.database.write() as connection:
        rows = [{"id": job_id, "tenant": tenant, "adapter": "acme"} | job for job_id in ids]
        connection.execute(sa.insert(tables.jobs), rows)
        trained = {"tenant": tenant, "position": 0, "name": "acme", "rows": 1, "deletions": 0, "moved_live": True}
        connection.execute(sa.insert(tables.job_adapters), [trained | {"job": job_id} for job_id in ids])


def test_the_jobs_of_other_tenants_cost_nothing(catalog: Catalog, queue: JobQueue) -> None:
    _jobs(catalog, "own-", 3, "default")
    own = ["own-00002", "own-00001", "own-00000"]
    filters: list[dict[str, Any]] = [
        {},
        {"adapter": "acme"},
        {"status": JobStatus.SUCCEEDED},
        {"prefix": "own-"},
        {"adapter": "acme", "before": 1000},
        {"adapter": "acme", "status": JobStatus.SUCCEEDED, "before": 1000},
    ]
    before = [_counted_jobs(queue, **given) for given in filters]
    assert [ids for _, ids in before] == [own] * len(filters)
    for other in ("another", "neighbour"):
        _jobs(catalog, f"own-{other}-", MANY, other)
    for (steps, _), given in zip(before, filters, strict=True):
        now, ids = _counted_jobs(queue, **given)
        assert ids == own
        assert now < steps + MANY / 10, given


def _counted_jobs(queue: JobQueue, **given: Any) -> tuple[int, list[str]]:
    with _counted() as steps:
        ids = [job.id for job in queue.list(tenant="default", limit=10, **given)]
    return steps[0], ids


@pytest.mark.parametrize("kind", ["adapters", "datasets"])
def test_names_before_and_after_those_that_are_listed_cost_nothing(tmp_path: Path, kind: str) -> None:
    catalog = Catalog(tmp_path, now=lambda: 0.0)
    add = _adapters if kind == "adapters" else _datasets
    add(catalog, WANTED)
    asked: list[dict[str, Any]] = [
        {"prefix": "m"},
        {"prefix": "m", "after": "m0"},
        {"prefix": "m", "after": "c"},
        {"after": "m", "limit": 3},
        {"prefix": "m2"},
    ]
    before = [_steps(catalog, kind, **given) for given in asked]
    assert [names for _, names in before] == [WANTED, WANTED[1:], WANTED, WANTED, WANTED[2:]]
    add(catalog, [f"{letter}{number}" for letter in "az" for number in range(MANY)])
    for other in ("another", "neighbour"):
        add(catalog, [f"m{number}" for number in range(MANY)], other)
    for (steps, names), given in zip(before, asked, strict=True):
        now, still = _steps(catalog, kind, **given)
        assert still == names
        # Looking a row up takes a few steps more in a larger index, and never one for each of its names.
        assert now < steps + MANY / 10, given
    # The page after the first of a prefix begins where that ended.
    some, _ = _steps(catalog, kind, prefix="a", limit=3)
    later, names = _steps(catalog, kind, prefix="a", after="a8", limit=3)
    assert (names, later < some + MANY / 10) == (["a80", "a800", "a801"], True)
    catalog.database.close()
