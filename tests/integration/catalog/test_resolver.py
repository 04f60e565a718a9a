"""What a reference means, right after it changed, whoever changed it."""

import multiprocessing
import random
import sqlite3
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.catalog import resolver as resolving
from adapters.catalog.catalog import Catalog
from adapters.catalog.resolver import Resolver, Snapshot
from adapters.catalog.versions import Version
from adapters.errors import AdapterNotFound, CatalogBusy
from adapters.jobs.queue import JobQueue
from adapters.names import Reference
from adapters.storage import sqlite_database
from adapters.storage.schema import catalog as catalog_table
from tests.support.catalog_factories import publication, put, submit
from tests.support.fork_server import ForkedPopen

ACME = Reference("acme")
_ROOT = Path(__file__).parents[3]


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
    changing.set_live("acme", 3, tenant="default")
    assert _version(resolver.current()).version == 3
    changing.delete("acme", tenant="default")
    with pytest.raises(AdapterNotFound):
        _version(resolver.current())
    assert put(changing, "acme", 0).version == 21
    assert _version(resolver.current()).version == 21


def _version(snapshot: Snapshot) -> Version:
    """Return the version that `ACME` means in a snapshot; raise the error that it gives instead."""
    ((_, version),) = snapshot.versions([ACME], tenant="default")
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
    queue.cancel("j", tenant="default")
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
    catalog.publish([made], tenant="default")
    for reference in (Reference("acme"), Reference("acme", version=1)):
        assert catalog.find(reference, tenant="default").lineage == told
        served = catalog.find_all([reference], tenant="default")[reference]
        assert (served.metrics, served.lineage, served.loss) == (None, None, "binary_cross_entropy")
        assert replace(served, metrics=made.metrics, lineage=told) == catalog.find(reference, tenant="default")


Looked = list[tuple[str, Reference]]


def _looks(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Looked:
    """Return a list to which each reference is appended that is looked up in the catalogue."""
    looked: Looked = []
    find_all = catalog.find_all

    def recorded(references: Collection[Reference], *, tenant: str) -> dict[Reference, Version]:
        looked.extend((tenant, reference) for reference in references)
        return find_all(references, tenant=tenant)

    monkeypatch.setattr(catalog, "find_all", recorded)
    return looked


def _all(snapshot: Snapshot, references: Sequence[Reference], tenant: str = "default") -> dict[str, int | None]:
    """Return the number of the version that each reference means; None for an error."""
    found = snapshot.versions(references, tenant=tenant)
    return {str(reference): v.version if isinstance(v, Version) else None for reference, v in found}


def test_a_change_drops_only_what_it_names(
    catalog: Catalog, other: Catalog, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [Reference(f"name-{number}") for number in range(30)]
    for tenant in ("default", "another"):
        catalog.publish([publication(name.name) for name in names], tenant=tenant)
        _all(resolver.current(), [*names, Reference("name-3", version=1), Reference("name-4", version=1)], tenant)
    looked = _looks(catalog, monkeypatch)
    put(other, "name-3", 5)
    other.delete("name-4", tenant="default")
    for tenant in ("default", "another"):
        found = _all(
            resolver.current(), [*names, Reference("name-3", version=1), Reference("name-4", version=1)], tenant
        )
        assert (found["name-3"], found["name-4"]) == ((2, None) if tenant == "default" else (1, 1))
        assert (found["name-3@1"], found["name-4@1"]) == (1, None if tenant == "default" else 1)
    assert {(tenant, reference.name) for tenant, reference in looked} == {("default", "name-3"), ("default", "name-4")}


def test_a_row_that_was_read_before_a_commit_is_not_cached_after_it(
    catalog: Catalog, other: Catalog, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(catalog, "acme", 1)
    put(catalog, "warm", 1)
    _all(resolver.current(), [Reference("warm")])
    find_all = catalog.find_all

    def overtaken(references: Collection[Reference], *, tenant: str) -> dict[Reference, Version]:
        rows = find_all(references, tenant=tenant)
        put(other, "acme", 2)
        assert ACME not in resolver.current().cached("default")
        return rows

    held = resolver.current()
    with monkeypatch.context() as patched:
        patched.setattr(catalog, "find_all", overtaken)
        assert _version(held).version == 1
    assert ACME not in resolver.current().cached("default")
    assert _version(resolver.current()).version == 2


@pytest.mark.parametrize("cause", ["unlisted", "too many", "too old"])
def test_everything_is_dropped_if_the_changes_are_not_listed(
    catalog: Catalog, other: Catalog, resolver: Resolver, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    for name in ("acme", "b", "c"):
        put(catalog, name, 1)
    _all(resolver.current(), [ACME, Reference("b"), Reference("c")])
    put(other, "acme", 2)
    if cause == "unlisted":
        with other.database.write() as connection:
            connection.execute(sa.update(catalog_table).values(revision=catalog_table.c.revision + 1))
        put(other, "b", 2)
    elif cause == "too many":
        monkeypatch.setattr(sqlite_database, "MAX_CHANGES", 1)
        other.publish([publication("b", 2), publication("d", 2)], tenant="default")
    else:
        with other.database.write() as connection:
            connection.execute(sa.text("DELETE FROM changes"))
    snapshot = resolver.current()
    assert len(snapshot.cached("default")) == 0
    assert _all(snapshot, [ACME, Reference("c")]) == {"acme": 2, "c": 1}


def test_the_references_cached_first_make_room_for_others(
    catalog: Catalog, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolving, "MAX_CACHED", 10)
    # Which names share a part is chance.
    monkeypatch.setattr(resolving, "_PARTS", 1)
    names = [Reference(f"name-{number:02}") for number in range(20)]
    catalog.publish([publication(name.name) for name in names], tenant="default")
    catalog.publish([publication("acme")], tenant="quiet")
    _all(resolver.current(), [ACME], "quiet")
    for name in names:
        assert _all(resolver.current(), [name, Reference(name.name, version=1)]) == {str(name): 1, f"{name}@1": 1}
    cached = resolver.current().cached("default")
    assert [name in cached for name in names] == [False] * 16 + [True] * 4
    assert ACME in resolver.current().cached("quiet")
    # A name that made room is forgotten with its numbered references too.
    put(catalog, "name-19", 3)
    assert Reference("name-19", version=1) not in resolver.current().cached("default")


_NAMES = [f"name-{number}" for number in range(12)]
_TENANTS = ("default", "another")


_CHANGING = """
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from tests.integration.catalog.test_resolver import change_at_random

change_at_random(Path(sys.argv[1]), Connection(int(sys.argv[2])))
"""


def change_at_random(folder: Path, pipe: Connection) -> None:
    """Change the catalogue, in a process of its own; send, after each change, what the names of each tenant mean."""
    catalog, draw = Catalog(folder, now=lambda: 0.0), random.Random(3)
    states: dict[str, dict[str, list[int]]] = {tenant: {} for tenant in _TENANTS}
    while pipe.recv():
        tenant, name = draw.choice(_TENANTS), draw.choice(_NAMES)
        action = draw.choice(("publish", "publish", "many", "live", "delete", "restore"))
        state = states[tenant]
        exists = name in {adapter.name for adapter in catalog.adapters(tenant=tenant)}
        if action in ("publish", "many") or not state:
            made = [name] if action == "publish" else draw.sample(_NAMES, 5)
            catalog.publish([publication(one, draw.randrange(10**6)) for one in made], tenant=tenant)
        elif action == "live" and exists:
            catalog.set_live(name, draw.choice(catalog.version_numbers(name, tenant=tenant)), tenant=tenant)
        elif action == "delete" and exists:
            catalog.delete(name, tenant=tenant)
        elif action == "restore" and not exists and name in state:
            catalog.restore(name, tenant=tenant)
        for one in catalog.adapters(tenant=tenant):
            state[one.name] = [one.aliases.get("live", 0), *catalog.version_numbers(one.name, tenant=tenant)]
        living = {one.name for one in catalog.adapters(tenant=tenant)}
        pipe.send((tenant, {one: numbers for one, numbers in state.items() if one in living}))
    catalog.close()


def test_what_another_process_has_changed_is_never_stale_after_its_acknowledgement(
    catalog: Catalog, resolver: Resolver, folder: Path
) -> None:
    ours, theirs = multiprocessing.Pipe()
    with theirs:
        command = [sys.executable, "-c", _CHANGING, str(folder), str(theirs.fileno())]
        process = ForkedPopen(command, cwd=_ROOT, pass_fds=[theirs.fileno()])
    means: dict[str, dict[str, list[int]]] = {tenant: {} for tenant in _TENANTS}
    try:
        for _ in range(60):
            ours.send(True)
            tenant, state = ours.recv()
            means[tenant] = state
            snapshot = resolver.current()
            for each in _TENANTS:
                for name in _NAMES:
                    live, *numbers = means[each].get(name, [0])
                    references = [Reference(name), *(Reference(name, version=number) for number in range(1, 5))]
                    expected: list[int | None] = [live or None]
                    expected += [number if number in numbers else None for number in range(1, 5)]
                    assert list(_all(snapshot, references, each).values()) == expected, (each, name)
        ours.send(False)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        ours.close()
