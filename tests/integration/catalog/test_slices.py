"""Changes of many rows: in slices, between which others write, and as complete as in one transaction."""

import random
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.errors import LoraplexError, QueueFull
from adapters.jobs import job_adapters
from adapters.jobs.queue import JobQueue
from adapters.storage import slices
from adapters.storage.schema import idempotency_keys
from adapters.storage.slices import delete_in_slices, slices_to_delete
from tests.support.catalog_factories import submit, submit_fleet
from tests.support.databases import change_rows, open_catalog, rows_of
from tests.support.storage_kinds import on_both_storages

pytestmark = on_both_storages

NAMES = [f"tenant-{number}" for number in range(10)]


def test_rows_are_deleted_in_slices_between_which_others_write(
    catalog: Catalog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "_DELETED_AT_ONCE", 7)
    draw = random.Random(3)
    # Few different times, so that slices end between rows of one time.
    stored = {(f"key-{number}", f"2026-01-01T{draw.randrange(24):02}") for number in range(100)}
    values = {"tenant": "default", "fingerprint": "", "claim": "", "owner": ""}
    with catalog.database.write() as connection:
        rows = [values | {"key": key, "expires_at": time} for key, time in stored]
        connection.execute(sa.insert(idempotency_keys), rows)
    left: list[int] = []

    def write(_: float) -> None:
        left.append(len(rows_of(folder, "SELECT key FROM idempotency_keys")))
        change_rows(folder, "UPDATE catalog SET access_revision = access_revision + 1")

    monkeypatch.setattr(slices, "let_others_write", write)
    expires_at = idempotency_keys.c.expires_at
    number = delete_in_slices(catalog.database, expires_at, expires_at <= "2026-01-01T17")
    kept = {(key, time) for key, time in stored if time > "2026-01-01T17"}
    assert set(rows_of(folder, "SELECT key, expires_at FROM idempotency_keys")) == kept
    assert number == len(stored) - len(kept)
    most = max(sum(time == one for _, time in stored) for _, one in stored)
    steps = [before - after for before, after in zip([len(stored), *left], left, strict=False)]
    assert len(steps) > 5
    assert all(7 <= step < 7 + most for step in steps)


def test_slices_end_if_a_row_cannot_be_deleted(catalog: Catalog) -> None:
    row = {"tenant": "default", "key": "one", "fingerprint": "", "claim": "", "owner": "", "expires_at": ""}
    with catalog.database.write() as connection:
        connection.execute(sa.insert(idempotency_keys), [row])
    # Nothing deletes it, as nothing can delete the row of a damaged index that has no row of its table.
    assert len(list(slices_to_delete(catalog.database, idempotency_keys.c.key))) == 1


def test_a_large_job_that_is_not_stored_yet_is_neither_found_nor_claimed(
    queue: JobQueue, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_adapters, "STORED_AT_ONCE", 4)
    seen: list[int] = []

    def look(_: float) -> None:
        seen.append(len(rows_of(folder, "SELECT name FROM job_adapters")))
        assert queue.claim(base="") is None
        assert list(queue.list(tenant="default")) == list(queue.list(tenant="default", adapter=NAMES[0])) == []
        other = open_catalog(folder, now=lambda: 0.0)
        other.sweep()
        other.close()

    monkeypatch.setattr(slices, "let_others_write", look)
    submit_fleet(queue, NAMES)
    assert seen == [4, 8]
    assert [adapter.name for adapter in queue.adapters("j", tenant="default")] == NAMES
    assert queue.claim(base="") is not None
    assert rows_of(folder, "SELECT key FROM pending_blobs WHERE key = 'j'") == []


def test_of_a_large_job_that_is_refused_at_last_nothing_is_left(
    queue: JobQueue, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_adapters, "STORED_AT_ONCE", 4)
    others = iter(["first", "second"])
    with monkeypatch.context() as patched:
        patched.setattr(slices, "let_others_write", lambda _: submit(queue, next(others)))
        with pytest.raises(QueueFull):
            submit_fleet(queue, NAMES, max_queued=2)
    with monkeypatch.context() as patched:
        # As after a sweep by a process that takes this one for dead.
        patched.setattr(
            slices, "let_others_write", lambda _: change_rows(folder, "DELETE FROM pending_blobs WHERE key = 'j'")
        )
        with pytest.raises(LoraplexError, match="pending row"):
            submit_fleet(queue, NAMES)
    assert {job.id for job in queue.list(tenant="default")} == {"first", "second"}
    assert rows_of(folder, "SELECT key FROM pending_blobs WHERE key = 'j'") == []
    assert rows_of(folder, "SELECT job FROM job_adapters WHERE job = 'j'") == []
    submit_fleet(queue, NAMES, "again")
    assert len(queue.adapters("again", tenant="default")) == len(NAMES)
