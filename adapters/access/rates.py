"""Rate limits: the token buckets of tenants, which all workers share, and what each worker leases of them.

A request takes tokens that its worker has leased before, so it needs no lock and no round trip. A lease has the tokens
of 20 ms; if they are used up, the worker leases again from `SharedBuckets`. A bucket may go into debt, so that one
request can have more rows than a second allows; the next lease then waits until the debt is paid. A worker that dies
takes its leased tokens with it, which are those of 20 ms at most. `cluster_rates` has the buckets of several machines.
"""

import asyncio
import fcntl
import logging
import math
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Protocol

from adapters.access.tenants import Limits
from adapters.errors import LoraplexError, RateLimited
from adapters.storage.database import CatalogWatch

# File, in the data folder, of the buckets.
RATES = "rates"
_LEASE_SECONDS = 0.02
# Tokens that an idle tenant saves up. A second of them would let a tenant exceed its rate by a third over 3 s.
BURST_SECONDS = 0.1
_LOCK_TRIES = 20
_LOCK_PAUSE_SECONDS = 0.00005
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RECORD_BYTES = 96
_TENANT_BYTES = 64
# Level of a bucket, and the monotonic time of that level.
_BUCKET = struct.Struct("<dd")

log = logging.getLogger(__name__)


class Rate(StrEnum):
    """Unit that a rate limit counts."""

    REQUESTS = "requests"
    ROWS = "rows"


_RATES = tuple(Rate)


class Bucket(NamedTuple):
    """Token bucket of one rate of one tenant."""

    level: float
    """Tokens in it; negative for a debt."""
    at: float
    """Monotonic time, in seconds, at which it had them."""

    def lease(self, tokens: float, *, per_second: float, now: float) -> tuple["Bucket", float]:
        """Take tokens: return the new bucket and 0. A bucket in debt gives none, and the seconds until it is paid.

        The tokens may be more than there are: the bucket then goes into debt.
        """
        # A damaged record begins anew, because it could refuse its tenant for good. A time in the future is damage too:
        # the monotonic clock never goes back.
        stored = self if math.isfinite(self.level) and self.at <= now else Bucket(0.0, now)
        filled = stored.level + (now - stored.at) * per_second
        level = min(filled, BURST_SECONDS * per_second)
        return (Bucket(level - tokens, now), 0.0) if level >= 0 else (Bucket(level, now), -level / per_second)


class Buckets(Protocol):
    """Token buckets that several processes share: `SharedBuckets` on one machine, `ClusterBuckets` on several."""

    def lease(self, tenant: str, rate: Rate, tokens: float, *, per_second: float) -> float:
        """Take tokens from a bucket and return 0, or take none and return the seconds after which to try again."""

    def close(self) -> None:
        """Close what this process has open."""


class SharedBuckets:
    """Buckets of all tenants in one file, for all processes of this machine. For one thread.

    The file has a record for each tenant, and before them one with the id of this start of the machine: its monotonic
    clock begins anew with each. If the file cannot be used, this process counts alone.
    """

    def __init__(self, path: Path, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Name the file, which the first lease creates."""
        self._path = path
        self._monotonic = monotonic
        self._file: int | None = None
        # Offset of each tenant's record.
        self._offsets: dict[str, int] = {}
        # Buckets of this process alone.
        self._own: dict[tuple[str, Rate], Bucket] = {}
        self._has_failed = False

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def lease(self, tenant: str, rate: Rate, tokens: float, *, per_second: float) -> float:
        """Take tokens from a bucket and return 0, or take none and return the seconds after which to try again."""
        try:
            with self._locked() as file:
                offset = self._offset(file, tenant) + _TENANT_BYTES + _RATES.index(rate) * _BUCKET.size
                stored = Bucket(*_BUCKET.unpack(os.pread(file, _BUCKET.size, offset)))
                bucket, wait = stored.lease(tokens, per_second=per_second, now=self._monotonic())
                os.pwrite(file, _BUCKET.pack(*bucket), offset)
            self._has_failed = False
        except (OSError, struct.error) as error:
            self._log_failure(error)
            self._offsets.clear()  # the file may have been cut off: the next lease begins it anew
            now = self._monotonic()
            own = self._own.get((tenant, rate), Bucket(0.0, now))
            self._own[tenant, rate], wait = own.lease(tokens, per_second=per_second, now=now)
        return wait

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Yield the locked file. The kernel releases the lock of a process that dies."""
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        file = self._file
        for attempt in range(_LOCK_TRIES):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Give up after a millisecond: a process that was stopped (SIGSTOP) may hold the lock for long.
                if attempt == _LOCK_TRIES - 1:
                    raise
                time.sleep(_LOCK_PAUSE_SECONDS)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    def _offset(self, file: int, tenant: str) -> int:
        """Return the offset of a tenant's record in the locked file; append a record if there is none."""
        if not self._offsets:
            _empty_after_reboot(file)
        offset = self._offsets.get(tenant)
        if offset is None:
            content = os.pread(file, os.fstat(file).st_size, 0)
            name = tenant.encode().ljust(_TENANT_BYTES, b"\0")
            # Without an incomplete record at the end, whose process died while it wrote: the new one replaces it.
            end = len(content) - len(content) % _RECORD_BYTES
            offset = next((at for at in range(_RECORD_BYTES, end, _RECORD_BYTES) if content.startswith(name, at)), end)
            if offset == end:
                os.pwrite(file, name + _BUCKET.pack(0.0, self._monotonic()) * len(_RATES), end)
            self._offsets[tenant] = offset
        return offset

    def _log_failure(self, error: Exception) -> None:
        if not self._has_failed and not isinstance(error, BlockingIOError):
            log.warning("each worker limits the rates of tenants by itself: %s cannot be used: %s", self._path, error)
        self._has_failed = True


def _empty_after_reboot(file: int) -> None:
    """Empty the locked file if it was written before the machine started, or is not a file of rates."""
    boot_id = b""
    with suppress(OSError):
        boot_id = _BOOT_ID.read_bytes().strip()
    head = (b"loraplex rates 1 " + boot_id)[:_RECORD_BYTES].ljust(_RECORD_BYTES, b"\0")
    if os.pread(file, _RECORD_BYTES, 0) != head:
        os.ftruncate(file, 0)
        os.pwrite(file, head, 0)


@dataclass(slots=True)
class _Allowance:
    """Leased tokens of one rate of one tenant."""

    per_second: float
    tokens: float = 0.0
    closed_until: float = 0.0
    """Monotonic time before which there is nothing to lease."""


class _TenantRates(NamedTuple):
    """Rates of one tenant, as they were at an access revision."""

    revision: int
    limits: Limits
    allowances: dict[Rate, _Allowance]


class RateLimiter:
    """Rates of all tenants in one worker. For the event loop only."""

    def __init__(
        self, watch: CatalogWatch, buckets: Buckets, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Create a limiter. It reads the limits of a tenant again if `watch` has read another access revision since."""
        self._watch = watch
        self._buckets = buckets
        self._monotonic = monotonic
        self._tenants: dict[str, _TenantRates] = {}

    def close(self) -> None:
        """Close the buckets."""
        self._buckets.close()

    def refresh(self) -> None:
        """Read the access revision, unless the catalogue is locked. For predictions, the batcher reads it.

        If that takes a round trip, the next call sees the change.
        """
        with suppress(LoraplexError):
            if self._watch.begin_read() is None:
                self._watch.revision()

    async def refresh_now(self) -> None:
        """Read the access revision, and wait for it if that takes a round trip."""
        with suppress(LoraplexError):
            reading = self._watch.begin_read()
            if reading is None:
                self._watch.revision()
            else:
                await asyncio.shield(reading)

    def take(self, tenant: str, rate: Rate, tokens: int = 1) -> bool:
        """Count requests or rows of a tenant, and return whether it has any rate; raise `RateLimited` past it."""
        rates = self._tenants.get(tenant)
        if rates is None or rates.revision != self._watch.access_revision:
            rates = self._load(tenant, rates)
        if not rates.allowances:
            return False
        allowance = rates.allowances.get(rate)
        if allowance is not None:
            if allowance.tokens < tokens:
                self._lease(tenant, rate, allowance, tokens - allowance.tokens)
            allowance.tokens -= tokens
        return True

    def give_back(self, tenant: str, rate: Rate) -> None:
        """Undo a `take` of one token, because the request will be counted again."""
        rates = self._tenants.get(tenant)
        if rates is not None and rate in rates.allowances:
            rates.allowances[rate].tokens += 1

    def _lease(self, tenant: str, rate: Rate, allowance: _Allowance, missing: float) -> None:
        now, per_second = self._monotonic(), allowance.per_second
        wait = allowance.closed_until - now
        if wait <= 0:
            tokens = max(missing, _LEASE_SECONDS * per_second)
            wait = self._buckets.lease(tenant, rate, tokens, per_second=per_second)
            if wait <= 0:
                allowance.tokens += tokens
                return
            # Until then, requests are refused without the lock.
            allowance.closed_until = now + wait
        limit = f"{per_second:g} {rate} per second"
        detail = f"the tenant sends more than its limit of {limit}: try again in {wait:.3g} s"
        raise RateLimited(detail, policy=rate, per_second=per_second, wait_seconds=wait, expected=f"at most {limit}")

    def _load(self, tenant: str, known: _TenantRates | None) -> _TenantRates:
        """Read the limits of a tenant. If the catalogue cannot be read, return the known ones, and keep trying."""
        revision = self._watch.access_revision
        try:
            limits = Limits(**self._watch.limits(tenant))
        except LoraplexError:
            return known or _TenantRates(revision, Limits(), {})
        per_second = {Rate.REQUESTS: limits.requests_per_second, Rate.ROWS: limits.rows_per_second}
        old = {} if known is None else known.allowances
        allowances = {
            rate: old[rate] if rate in old and old[rate].per_second == number else _Allowance(number)
            for rate, number in per_second.items()
            if number is not None
        }
        rates = self._tenants[tenant] = _TenantRates(revision, limits, allowances)
        return rates
