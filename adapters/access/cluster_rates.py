"""Rate limits of tenants on several machines: the token buckets are rows of the database.

No request waits for the database. Each worker counts with a bucket of its own, which has the tenant's whole rate, and a
thread takes the counted tokens from the shared bucket, at most once in 50 ms. While the shared bucket is in debt, the
worker refuses. A tenant can exceed its rate for a moment, by what all workers accept between two such settlements, and
the debt makes up for it: averaged over seconds, the rate holds on all machines together.

If the database cannot be reached, each worker enforces the whole rate by itself.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from adapters.access.rates import BURST_SECONDS, Bucket, Rate
from adapters.errors import LoraplexError
from adapters.storage.database import Database
from adapters.storage.schema import rate_buckets

_SETTLE_SECONDS = 0.05
_SECONDS_TO_CLOSE = 1.0
# More than the clocks of a primary and of its standby differ.
_MAX_CLOCK_ERROR_SECONDS = 10.0
_SERVER_TIME: sa.ColumnElement[float] = sa.literal_column("extract(epoch FROM clock_timestamp())::float8")

log = logging.getLogger(__name__)


class _Key(NamedTuple):
    tenant: str
    rate: Rate


@dataclass(slots=True)
class _Share:
    """This worker's bucket of one rate of one tenant, and the tokens that were not taken from the shared bucket yet."""

    bucket: Bucket
    per_second: float
    unsettled: float = 0.0
    closed_until: float = 0.0
    """Monotonic time at which the debt of the shared bucket is paid."""


class ClusterBuckets:
    """Buckets of all tenants in the database, for all processes of all machines."""

    def __init__(self, database: Database, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Create buckets, whose thread starts with the first lease."""
        self._database = database
        self._monotonic = monotonic
        self._shares: dict[_Key, _Share] = {}
        self._lock = threading.Lock()
        self._due, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._has_failed = False

    def close(self) -> None:
        """End the thread, and wait up to a second for it. Tokens that were not settled are lost."""
        self._closing.set()
        self._due.set()
        if self._thread is not None:
            self._thread.join(_SECONDS_TO_CLOSE)

    def lease(self, tenant: str, rate: Rate, tokens: float, *, per_second: float) -> float:
        """Take tokens from a bucket and return 0, or take none and return the seconds after which to try again."""
        now = self._monotonic()
        with self._lock:
            share = self._shares.setdefault(_Key(tenant, rate), _Share(Bucket(0.0, now), per_second))
            if share.per_second != per_second:
                # The shared bucket still has the debt, which is now paid at the new rate.
                share.per_second, share.bucket, share.closed_until = per_second, Bucket(0.0, now), 0.0
            if share.closed_until > now:
                return share.closed_until - now
            share.bucket, wait = share.bucket.lease(tokens, per_second=per_second, now=now)
            if wait > 0:
                return wait
            share.unsettled += tokens
        self._due.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._settle_often, name="rates", daemon=True)
            self._thread.start()
        return 0.0

    def _settle_often(self) -> None:
        while not self._closing.wait(_SETTLE_SECONDS):
            self._due.wait()
            self._due.clear()
            if not self._closing.is_set():
                self.settle()

    def settle(self) -> None:
        """Take what this worker has counted from the shared buckets, and refuse while they are in debt."""
        with self._lock:
            spent = {key: share for key, share in self._shares.items() if share.unsettled}
            rows = [
                {**key._asdict(), "per_second": share.per_second, "level": -share.unsettled}
                for key, share in spent.items()
            ]
            # Even if the transaction fails: the tokens of an outage would be a debt that blocks the tenant after it.
            for share in spent.values():
                share.unsettled = 0.0
        if not rows:
            return
        try:
            levels = self._spend(rows)
            self._has_failed = False
        except Exception as error:  # the thread goes on
            if not self._has_failed:
                is_defect = not isinstance(error, LoraplexError)
                log.warning("each worker limits the rates of tenants by itself: %s", error, exc_info=is_defect)
            self._has_failed = True
            return
        now = self._monotonic()
        with self._lock:
            for key, level in levels.items():
                share = self._shares[key]
                if level < 0:
                    share.closed_until = now - level / share.per_second
                    # All workers resume at that moment, with empty buckets, so that no burst follows.
                    share.bucket = Bucket(0.0, share.closed_until)

    def _spend(self, rows: list[dict[str, object]]) -> Mapping[_Key, float]:
        """Add the levels of rows, which are negative, to the shared buckets; return the new levels."""
        # In one order in all processes, to avoid deadlocks.
        rows = sorted(rows, key=lambda row: (row["tenant"], row["rate"]))
        statement = insert(rate_buckets).values([{**row, "at": _SERVER_TIME} for row in rows])
        new, old = statement.excluded, rate_buckets.c
        # A row of the future begins anew: the clock was set back, and the row would get no tokens until then.
        is_future = old.at > new.at + _MAX_CLOCK_ERROR_SECONDS
        filled = old.level + sa.func.greatest(new.at - old.at, 0.0) * new.per_second
        level = sa.case((is_future, 0.0), else_=sa.func.least(filled, BURST_SECONDS * new.per_second)) + new.level
        at = sa.case((is_future, new.at), else_=sa.func.greatest(new.at, old.at))
        statement = statement.on_conflict_do_update(
            index_elements=[old.tenant, old.rate], set_={"level": level, "at": at, "per_second": new.per_second}
        )
        # It does not take the catalogue's lock, so that publishes do not wait.
        with self._database.write_job() as connection:
            result = connection.execute(statement.returning(old.tenant, old.rate, old.level))
            return {_Key(tenant, Rate(rate)): level for tenant, rate, level in result}
