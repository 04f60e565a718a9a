"""Token buckets in the database: workers on several machines share a tenant's rate, and no request waits for them."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import sqlalchemy as sa

from adapters.access.cluster_rates import ClusterBuckets
from adapters.access.rates import Rate
from adapters.errors import CatalogUnavailable
from adapters.storage.postgres_database import PostgresDatabase
from adapters.storage.schema import rate_buckets
from tests.support.postgres_server import PostgresServer
from tests.support.service import eventually
from tests.support.storage_kinds import POSTGRES

# A token takes 100 s: the time that a test takes is nothing.
PER_SECOND = 0.01
pytestmark = pytest.mark.xdist_group(POSTGRES)


@pytest.fixture
def database(postgres_server: PostgresServer) -> Iterator[PostgresDatabase]:
    opened = PostgresDatabase(postgres_server.new_database())
    yield opened
    opened.close()


@pytest.fixture
def worker(database: PostgresDatabase) -> Iterator[Callable[[], ClusterBuckets]]:
    """Make the buckets of another worker."""
    made: list[ClusterBuckets] = []

    def make() -> ClusterBuckets:
        made.append(ClusterBuckets(database))
        return made[-1]

    yield make
    for buckets in made:
        buckets.close()


def _take(buckets: ClusterBuckets, tokens: float = 1, *, tenant: str = "acme", per_second: float = PER_SECOND) -> float:
    return buckets.lease(tenant, Rate.ROWS, tokens, per_second=per_second)


def _waits_for(buckets: ClusterBuckets, tokens: float) -> bool:
    """Whether a worker refuses for as long as this many tokens take."""
    return bool(_take(buckets) == pytest.approx(tokens / PER_SECOND, rel=0.1))


def _level(database: PostgresDatabase) -> float | None:
    """The level of the one shared bucket."""
    with database.read() as connection:
        return connection.scalar(sa.select(rate_buckets.c.level))


def test_what_one_worker_accepts_is_a_debt_of_all(worker: Callable[[], ClusterBuckets]) -> None:
    one, other, third = worker(), worker(), worker()
    assert _take(one, 10) == 0
    assert _waits_for(one, 10)
    one.settle()
    # Nobody has asked the database for it.
    assert _take(other) == 0
    eventually(lambda: _waits_for(other, 11), what="the settlement")
    assert _take(third) == 0
    eventually(lambda: _waits_for(third, 12), what="the settlement")
    assert _take(third, tenant="globex") == 0


def test_a_debt_is_paid_by_the_clock_of_the_database(
    worker: Callable[[], ClusterBuckets], database: PostgresDatabase
) -> None:
    one, other = worker(), worker()
    assert _take(one, 10) == 0
    one.settle()
    with database.write() as connection:
        connection.execute(sa.update(rate_buckets).values(at=rate_buckets.c.at - 5 / PER_SECOND))
    assert _take(other) == 0
    eventually(lambda: _waits_for(other, 6), what="the settlement")
    # However long it was idle, a tenant has saved up the tokens of a tenth of a second.
    with database.write() as connection:
        connection.execute(sa.update(rate_buckets).values(at=rate_buckets.c.at - 1000 / PER_SECOND))
    third = worker()
    assert _take(third, 3) == 0
    third.settle()
    eventually(lambda: _level(database) == pytest.approx(0.1 * PER_SECOND - 3), what="the settlement")


def test_a_higher_rate_applies_at_once_and_pays_the_debt(worker: Callable[[], ClusterBuckets]) -> None:
    buckets = worker()
    assert _take(buckets, 10) == 0
    buckets.settle()
    eventually(lambda: _waits_for(buckets, 10), what="the settlement")
    higher = 1000 * PER_SECOND
    assert _take(buckets, per_second=higher) == 0
    buckets.settle()
    eventually(lambda: 0 < _take(buckets, per_second=higher) <= 11 / higher, what="the settlement")


def test_a_bucket_of_the_future_begins_anew(worker: Callable[[], ClusterBuckets], database: PostgresDatabase) -> None:
    one, other = worker(), worker()
    assert _take(one, 10) == 0
    one.settle()
    eventually(lambda: _level(database) == pytest.approx(-10), what="the settlement")
    with database.write() as connection:
        connection.execute(sa.update(rate_buckets).values(at=rate_buckets.c.at + 3600))
    assert _take(other) == 0
    eventually(lambda: _level(database) == pytest.approx(-1), what="the settlement")


def test_a_defect_does_not_end_the_settlements(
    worker: Callable[[], ClusterBuckets],
    database: PostgresDatabase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> AbstractContextManager[sa.Connection]:
        raise RuntimeError("a defect")

    buckets = worker()
    with monkeypatch.context() as patch:
        patch.setattr(database, "write_job", fail)
        assert _take(buckets) == 0
        eventually(lambda: "a defect" in caplog.text, what="the warning")
    assert "Traceback" in caplog.text
    assert _take(buckets, tenant="globex") == 0
    eventually(lambda: _level(database) == -1, what="the settlement")


def test_a_settlement_waits_for_no_writer_of_the_catalogue(
    worker: Callable[[], ClusterBuckets], database: PostgresDatabase
) -> None:
    one, other = worker(), worker()
    with database.write():
        assert _take(one, 10) == 0
        one.settle()
    assert _take(other) == 0
    eventually(lambda: _waits_for(other, 11), what="the settlement")


def test_without_the_database_a_worker_limits_by_itself(
    database: PostgresDatabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [time.monotonic()]
    buckets = ClusterBuckets(database, monotonic=lambda: now[0])
    accepted = 0

    def unreachable() -> AbstractContextManager[sa.Connection]:
        raise CatalogUnavailable("the catalogue's database cannot be reached")

    monkeypatch.setattr(database, "write_job", unreachable)
    for _ in range(20):
        accepted += _take(buckets, per_second=1) == 0
        buckets.settle()
        now[0] += 0.5
    assert accepted == 10
    eventually(lambda: "each worker limits" in caplog.text, what="the warning")
    assert sum("each worker limits" in message for message in caplog.messages) == 1
    monkeypatch.undo()
    assert _take(buckets, per_second=1) == 0
    buckets.settle()
    # Nothing of the outage is owed.
    eventually(lambda: _level(database) == -1, what="the settlement")
    buckets.close()
