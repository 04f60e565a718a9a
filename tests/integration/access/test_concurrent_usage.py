"""Usage on PostgreSQL, where processes add their counts at the same time and without the catalogue's lock."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psycopg
import pytest

from adapters.access.usage import Usage, UsageBy, UsageCount, UsageSlot
from adapters.storage.postgres_database import PostgresDatabase
from tests.support.deadlines import scaled
from tests.support.postgres_server import PostgresServer
from tests.support.service import eventually
from tests.support.storage_kinds import POSTGRES

NAMES = [f"a{number}" for number in range(20)]
HOUR = 400_000
WRITERS, BATCHES = 4, 10
pytestmark = pytest.mark.xdist_group(POSTGRES)


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    return postgres_server.new_database()


@pytest.fixture
def database(url: str) -> Iterator[PostgresDatabase]:
    with closing(PostgresDatabase(url)) as opened:
        yield opened


def _counts(*names: str) -> list[UsageCount]:
    return [UsageCount(UsageSlot("default", UsageBy.ADAPTER, HOUR, name), 1, 3) for name in names]


def _stored(usage: Usage) -> dict[str | None, tuple[int, int]]:
    lines = usage.list(tenant="default", by=UsageBy.ADAPTER, begins=0.0, ends=None)
    return {line.name: (line.requests, line.rows) for line in lines}


def test_processes_that_add_to_the_same_rows_at_once_lose_no_count(database: PostgresDatabase) -> None:
    usage = Usage(database, now=time.time)

    def add(writer: int) -> None:
        names = NAMES if writer % 2 else NAMES[::-1]
        for sequence in range(1, BATCHES + 1):
            usage.add(_counts(*names), writer=f"writer-{writer}", sequence=sequence)

    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(add, range(WRITERS)))
    assert _stored(usage) == dict.fromkeys(NAMES, (WRITERS * BATCHES, 3 * WRITERS * BATCHES))


def test_usage_is_added_while_another_process_changes_the_catalogue(database: PostgresDatabase) -> None:
    usage = Usage(database, now=time.time)
    with database.write():
        usage.add(_counts("acme"), writer="writer", sequence=1)
    assert _stored(usage) == {"acme": (1, 3)}


@pytest.mark.parametrize("stored", [None, 1], ids=["first batch", "second batch"])
def test_a_repetition_waits_for_the_transaction_that_it_repeats(
    database: PostgresDatabase, url: str, stored: int | None
) -> None:
    """The connection of the first attempt was lost, and the server is still at work on it."""
    usage = Usage(database, now=time.time)
    dsn, sequence = url.replace("+psycopg", ""), (stored or 0) + 1
    if stored is not None:
        usage.add([], writer="writer", sequence=stored)
    with (
        psycopg.connect(dsn) as attempt,
        psycopg.connect(dsn, autocommit=True) as observer,
        ThreadPoolExecutor(1) as thread,
    ):

        def is_waiting() -> bool:
            return observer.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone() is not None

        attempt.execute(
            "INSERT INTO usage_writers VALUES ('writer', %s, '') ON CONFLICT (id) DO UPDATE SET sequence = %s",
            [sequence, sequence],
        )
        repetition = thread.submit(usage.add, _counts("acme"), writer="writer", sequence=sequence)
        eventually(is_waiting, what="the repetition that waits")
        attempt.commit()
        repetition.result(scaled(30))
    assert _stored(usage) == {}
