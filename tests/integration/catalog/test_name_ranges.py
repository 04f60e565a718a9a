"""A list of names reads the names that it returns, however many there are before and after them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.datasets.store import Datasets
from adapters.storage import schema as tables

MANY = 3000
WANTED = ["m0", "m1", "m2"]


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The steps of SQLite's virtual machine that every statement takes meanwhile."""
    steps = [0]

    def step() -> int:
        steps[0] += 1
        return 0

    def begin(_connection: Any, cursor: Any, *_: Any) -> None:
        cursor.connection.set_progress_handler(step, 1)

    def end(_connection: Any, cursor: Any, *_: Any) -> None:
        cursor.connection.set_progress_handler(None, 1)

    sa.event.listen(sa.Engine, "before_cursor_execute", begin)
    sa.event.listen(sa.Engine, "after_cursor_execute", end)
    try:
        yield steps
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", begin)
        sa.event.remove(sa.Engine, "after_cursor_execute", end)


def _adapters(catalog: Catalog, names: list[str]) -> None:
    common = {"tenant": "default", "created_at": "", "next_version": 2, "deleted": False, "deletions": 0}
    with catalog.database.write() as connection:
        connection.execute(sa.insert(tables.adapters), [common | {"name": name} for name in names])


def _datasets(catalog: Catalog, names: list[str]) -> None:
    common: dict[str, Any] = {"tenant": "default", "created_at": ""}
    version = {"version": 1, "digest": "", "content_type": "", "rows": 1, "columns": [], "bad_rows": [], "file": ""}
    with catalog.database.write() as connection:
        entries = [common | {"name": name, "next_version": 2, "deleted": False} for name in names]
        connection.execute(sa.insert(tables.datasets), entries)
        versions = [common | version | {"bytes": 0, "dataset": name} for name in names]
        connection.execute(sa.insert(tables.dataset_versions), versions)


def _steps(catalog: Catalog, kind: str, **given: Any) -> tuple[int, list[str]]:
    with _counted() as steps:
        found: list[Any] = (
            catalog.adapters(**given)
            if kind == "adapters"
            else list(Datasets(catalog.database, catalog.writer, now=lambda: 0.0).list(**given))
        )
    return steps[0], [one.name for one in found]


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
