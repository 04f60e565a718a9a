"""Token buckets that two limiters share, as two workers do, under a clock that the tests set."""

import fcntl
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.access.rates import RATES, Bucket, Rate, RateLimiter, SharedBuckets
from adapters.access.tenants import Limits, Tenants
from adapters.errors import RateLimited
from adapters.storage.sqlite_database import SqliteDatabase


class Clock:
    """A monotonic clock that the tests set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[SqliteDatabase]:
    database = SqliteDatabase(tmp_path)
    yield database
    database.close()


@pytest.fixture
def limit(database: SqliteDatabase) -> Callable[..., None]:
    """Set the limits of a tenant."""
    tenants = Tenants(database, now=lambda: 0.0)

    def put(tenant: str = "acme", **limits: float) -> None:
        tenants.put(tenant, Limits(**limits))  # type: ignore[arg-type]

    return put


@pytest.fixture
def worker(database: SqliteDatabase, tmp_path: Path, clock: Clock) -> Iterator[Callable[[], RateLimiter]]:
    """Make the limiter of another worker."""
    made = []

    def make() -> RateLimiter:
        watch = database.catalog_watch()
        watch.revision()
        limiter = RateLimiter(watch, SharedBuckets(tmp_path / RATES, monotonic=clock), monotonic=clock)
        made.append((limiter, watch))
        return limiter

    yield make
    for limiter, watch in made:
        limiter.close()
        watch.close()


def _accepts(limiter: RateLimiter, rate: Rate = Rate.REQUESTS, tokens: int = 1, tenant: str = "acme") -> bool:
    try:
        limiter.take(tenant, rate, tokens)
    except RateLimited:
        return False
    return True


@pytest.mark.parametrize("per_second", [0.5, 7, 200, 12_345])
def test_two_workers_together_accept_the_rate(
    per_second: float, limit: Callable[..., None], worker: Callable[[], RateLimiter], clock: Clock
) -> None:
    limit(requests_per_second=per_second)
    workers = [worker(), worker()]
    accepted, seconds = 0, max(10, round(20 / per_second))
    for _ in range(round(seconds * 1000)):
        clock.now += 0.001
        # More than the rate, and more of it at one worker than at the other.
        accepted += sum(_accepts(workers[number % 3 == 0]) for number in range(3 + round(per_second / 500)))
    assert accepted == pytest.approx(per_second * seconds, rel=0.03, abs=1.5)


def test_an_idle_tenant_saves_up_a_tenth_of_a_second(
    limit: Callable[..., None], worker: Callable[[], RateLimiter], clock: Clock
) -> None:
    limit(requests_per_second=1000)
    limiter = worker()
    limiter.take("acme", Rate.REQUESTS)
    clock.now += 3600
    # What was leased before, the tenth of a second, and one lease of 20 ms on credit.
    assert 100 <= sum(_accepts(limiter) for _ in range(1000)) <= 140


def test_a_request_of_many_rows_is_paid_off_afterwards(
    limit: Callable[..., None], worker: Callable[[], RateLimiter], clock: Clock
) -> None:
    limit(rows_per_second=100)
    one, other = worker(), worker()
    one.take("acme", Rate.ROWS, 1000)
    for limiter in (one, other):
        with pytest.raises(RateLimited) as refused:
            limiter.take("acme", Rate.ROWS, 1)
        assert refused.value.policy == "rows"
        assert refused.value.wait_seconds == pytest.approx(10, abs=0.1)
    assert _accepts(one, Rate.REQUESTS), "the other rate has no limit"
    clock.now += 10.01
    assert _accepts(other, Rate.ROWS)


def test_a_refusal_says_when_the_next_request_is_accepted(
    limit: Callable[..., None], worker: Callable[[], RateLimiter], clock: Clock
) -> None:
    limit(requests_per_second=2)
    limiter = worker()
    limiter.take("acme", Rate.REQUESTS)
    with pytest.raises(RateLimited) as refused:
        limiter.take("acme", Rate.REQUESTS)
    wait = refused.value.wait_seconds
    clock.now += wait - 0.01
    assert not _accepts(limiter)
    clock.now += 0.02
    assert _accepts(limiter)


def test_tenants_do_not_share_tokens(limit: Callable[..., None], worker: Callable[[], RateLimiter]) -> None:
    limit("acme", requests_per_second=1)
    limit("globex", requests_per_second=1)
    limiter = worker()
    assert [_accepts(limiter), _accepts(limiter)] == [True, False]
    assert _accepts(limiter, tenant="globex")
    assert all(_accepts(limiter, tenant="without-limits") for _ in range(100))


def test_a_changed_limit_applies_after_the_next_reading_of_the_revision(
    limit: Callable[..., None], worker: Callable[[], RateLimiter], clock: Clock
) -> None:
    limit(requests_per_second=0.001)
    limiter = worker()
    assert [_accepts(limiter), _accepts(limiter)] == [True, False]
    limit(requests_per_second=1000)
    limiter.refresh()
    clock.now += 0.1  # the debt of one request is paid off at the new rate
    assert _accepts(limiter)
    limit()
    limiter.refresh()
    assert all(_accepts(limiter) for _ in range(5000))


def test_a_locked_catalogue_leaves_the_limits_as_they_were(
    limit: Callable[..., None], worker: Callable[[], RateLimiter], database: SqliteDatabase
) -> None:
    limit(requests_per_second=1)
    limiter = worker()
    assert _accepts(limiter)
    with database.write():
        limiter.refresh()
        assert not _accepts(limiter)


@pytest.mark.parametrize(
    "content", [b"", b"garbage" * 100, b"loraplex rates 1 another start of the machine".ljust(288, b"\0")]
)
def test_a_file_of_another_start_or_a_damaged_one_is_begun_anew(
    content: bytes, limit: Callable[..., None], worker: Callable[[], RateLimiter], tmp_path: Path
) -> None:
    (tmp_path / RATES).write_bytes(content)
    limit(requests_per_second=1)
    one, other = worker(), worker()
    assert _accepts(one)
    assert not _accepts(other)


def test_a_file_that_is_cut_off_is_begun_anew(
    limit: Callable[..., None], worker: Callable[[], RateLimiter], tmp_path: Path, clock: Clock
) -> None:
    limit(requests_per_second=1)
    one, other = worker(), worker()
    assert _accepts(one)
    os.truncate(tmp_path / RATES, 0)
    clock.now += 1
    assert [_accepts(one) for _ in range(3)] == [True, True, False], "it limits by itself once"
    clock.now += 1
    assert [_accepts(one), _accepts(other)] == [True, False], "they share again"


def test_a_worker_whose_file_cannot_be_used_limits_by_itself(
    limit: Callable[..., None], worker: Callable[[], RateLimiter], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / RATES).mkdir()
    limit(requests_per_second=1)
    limiter = worker()
    assert [_accepts(limiter) for _ in range(3)] == [True, False, False]
    assert sum("each worker limits" in message for message in caplog.messages) == 1


def test_a_process_that_was_stopped_with_the_lock_holds_nobody_up(
    limit: Callable[..., None], worker: Callable[[], RateLimiter], tmp_path: Path
) -> None:
    limit(requests_per_second=1)
    file = os.open(tmp_path / RATES, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert _accepts(worker())
    finally:
        os.close(file)


@pytest.mark.parametrize(
    "damaged", [Bucket(math.nan, 1.0), Bucket(-math.inf, 1.0), Bucket(0.0, 1e300), Bucket(0.0, math.nan)]
)
def test_a_damaged_record_keeps_no_tenant_out(damaged: Bucket) -> None:
    bucket, wait = damaged.lease(1.0, per_second=10.0, now=5.0)
    assert (bucket, wait) == (Bucket(-1.0, 5.0), 0.0)
