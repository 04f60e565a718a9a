"""Quotas: limits on what a tenant stores and on its jobs, checked in the transaction that would use more of them.

What a tenant uses is read only if it has a limit.
"""

from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.access.tenants import Limits
from adapters.errors import QuotaExceeded
from adapters.storage.schema import adapters, jobs, rows_in, tenants
from adapters.storage.totals import read_totals

# Values of the column `status` of jobs.
_QUEUED, _RUNNING = "queued", "running"


class AdapterQuota:
    """Check of a tenant's limits `adapters` and `stored_bytes` in one transaction."""

    def __init__(self, connection: Connection, names: Iterable[str], *, tenant: str) -> None:
        """Read the limits, what the tenant uses, and which of the adapters with these names exist already."""
        self._limits = _limits(connection, tenant)
        self._adapters = self._bytes = 0
        self._existing: set[str] = set()
        if self._limits.adapters is not None or self._limits.stored_bytes is not None:
            totals = read_totals(connection, tenant=tenant)
            self._adapters, self._bytes = totals.adapters, totals.stored_bytes
        if self._limits.adapters is not None:
            named = sa.select(adapters.c.name).where(adapters.c.tenant == tenant, ~adapters.c.deleted)
            self._existing = {row.name for row in rows_in(connection, named, adapters.c.name, set(names))}

    def take(self, name: str, number_of_bytes: int) -> None:
        """Count a new version of an adapter. Raises `QuotaExceeded`, and then counts nothing.

        number_of_bytes: 0 for an adapter that comes back from the trash, because the trash counts its bytes already.
        """
        is_new = self._limits.adapters is not None and name not in self._existing
        if is_new:
            _check("adapters", self._limits.adapters, used=self._adapters)
        if number_of_bytes:
            _check("stored_bytes", self._limits.stored_bytes, used=self._bytes, adds=number_of_bytes)
        self._bytes += number_of_bytes
        if is_new:
            self._adapters += 1
            self._existing.add(name)


def check_dataset_bytes(connection: Connection, number_of_bytes: int, *, tenant: str) -> None:
    """Raise `QuotaExceeded` if the data sets of a tenant may not grow by this many bytes."""
    limit = _limits(connection, tenant).dataset_bytes
    if limit is not None:
        used = read_totals(connection, tenant=tenant).dataset_bytes
        _check("dataset_bytes", limit, used=used, adds=number_of_bytes)


def check_queued_jobs(connection: Connection, *, tenant: str) -> None:
    """Raise `QuotaExceeded` if a tenant may not queue another job."""
    limit = _limits(connection, tenant).queued_jobs
    if limit is not None:
        _check("queued_jobs", limit, used=_count_jobs(connection, tenant, _QUEUED))


def tenants_without_free_job(connection: Connection, *, base: str) -> list[str]:
    """Return the tenants that already run as many jobs as their limits allow, of those with queued jobs for a base."""
    queued = sa.select(jobs.c.tenant).where(jobs.c.status == _QUEUED, jobs.c.base == base).distinct()
    rows = connection.execute(sa.select(tenants).where(tenants.c.name.in_(queued)))
    limits = {row.name: Limits(**row.limits).concurrent_jobs for row in rows}
    return [
        name for name, limit in limits.items() if limit is not None and _count_jobs(connection, name, _RUNNING) >= limit
    ]


def may_run_job(connection: Connection, *, tenant: str, is_running: bool) -> bool:
    """Return whether the limit of a tenant allows another running job, or one that runs already.

    Claims of jobs of one tenant wait for each other until the end of the transaction if it has a limit.
    """
    if is_running or (limit := _limits(connection, tenant).concurrent_jobs) is None:
        return True
    connection.execute(sa.select(tenants.c.name).where(tenants.c.name == tenant).with_for_update())
    return _count_jobs(connection, tenant, _RUNNING) < limit


def _limits(connection: Connection, tenant: str) -> Limits:
    stored = connection.scalar(sa.select(tenants.c.limits).where(tenants.c.name == tenant))
    return Limits(**(stored or {}))


def _count_jobs(connection: Connection, tenant: str, status: str) -> int:
    counted = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.tenant == tenant, jobs.c.status == status)
    return connection.scalar(counted) or 0


def _check(limit: str, value: int | None, *, used: int, adds: int = 1) -> None:
    """Raise `QuotaExceeded` if `adds` more would exceed a limit of this value; None for no limit."""
    if value is not None and used + adds > value:
        raise QuotaExceeded(limit, value=value, used=used, adds=adds)
