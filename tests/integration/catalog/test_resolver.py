"""What a reference means, right after it changed, whoever changed it."""

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.catalog.catalog import Catalog, Resolver, Snapshot
from adapters.catalog.versions import Version
from adapters.errors import AdapterNotFound, CatalogBusy
from adapters.jobs.queue import JobQueue
from adapters.names import Reference
from tests.support.catalog_factories import publication, put, submit

ACME = Reference("acme")


@pytest.fixture
def resolver(catalog: Catalog) -> Iterator[Resolver]:
    """A resolver on the catalogue."""
    opened = Resolver(catalog)
    yield opened
    opened.close()


@pytest.fixture
def other(folder: Path, catalog: Catalog) -> Iterator[Catalog]:
    """The same folder, through connections of its own, as another process has it."""
    opened = Catalog(folder, now=lambda: 0.0)
    yield opened
    opened.database.close()


@pytest.mark.parametrize("writer", ["own", "other"])
def test_each_look_sees_every_commit_before_it(
    catalog: Catalog, other: Catalog, resolver: Resolver, writer: str
) -> None:
    changing = catalog if writer == "own" else other
    for seed in range(20):
        published = put(changing, "acme", seed)
        assert _version(resolver.current()) == published
    changing.set_live("acme", 3)
    assert _version(resolver.current()).version == 3
    changing.delete("acme")
    with pytest.raises(AdapterNotFound):
        _version(resolver.current())
    assert put(changing, "acme", 0).version == 21
    assert _version(resolver.current()).version == 21


def _version(snapshot: Snapshot) -> Version:
    """Return the version that `ACME` means in a snapshot; raise the error that it gives instead."""
    ((_, version),) = snapshot.versions([ACME])
    if isinstance(version, Exception):
        raise version
    return version


def test_a_view_in_hand_goes_on_meaning_what_it_meant(catalog: Catalog, resolver: Resolver) -> None:
    first = put(catalog, "acme", 1)
    view = resolver.current()
    assert _version(view) == first
    put(catalog, "acme", 2)
    assert _version(view) == first


def test_progress_of_jobs_does_not_make_it_forget(catalog: Catalog, queue: JobQueue, resolver: Resolver) -> None:
    put(catalog, "acme", 1)
    view = resolver.current()
    submit(queue, "j", adapter="b")
    claim = queue.claim(base="")
    assert claim is not None
    for step in range(5):
        queue.heartbeat(claim, progress={"step": step}, history=[])
    queue.cancel("j")
    assert resolver.current() is view
    put(catalog, "acme", 2)
    assert resolver.current() is not view


def test_a_look_while_somebody_commits_says_so_at_once(catalog: Catalog, resolver: Resolver, folder: Path) -> None:
    put(catalog, "acme", 1)
    resolver.current()
    committing = sqlite3.connect(folder / "catalog.sqlite3", isolation_level=None)
    committing.execute("BEGIN EXCLUSIVE")
    with pytest.raises(CatalogBusy):
        resolver.current()
    committing.execute("ROLLBACK")
    committing.close()
    assert _version(resolver.current()).version == 1


def test_a_name_that_is_not_there_is_looked_up_again_once_it_is(catalog: Catalog, resolver: Resolver) -> None:
    with pytest.raises(AdapterNotFound):
        _version(resolver.current())
    put(catalog, "acme", 1)
    assert _version(resolver.current()).version == 1


def test_what_is_remembered_of_a_version_does_not_grow_with_its_training(catalog: Catalog) -> None:
    told = {"loss": "binary_cross_entropy", "spec": {"rank": 2}, "data": {"rows": 10}}
    made = publication("acme", 1, lineage=told, metrics={"train_loss": 1.0})
    catalog.publish([made])
    for reference in (Reference("acme"), Reference("acme", version=1)):
        assert catalog.find(reference).lineage == told
        served = catalog.find_all([reference])[reference]
        assert (served.metrics, served.lineage, served.loss) == (None, None, "binary_cross_entropy")
        assert replace(served, metrics=made.metrics, lineage=told) == catalog.find(reference)
