"""Claims: which job a trainer takes next, and whether it still has the one that it took."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.access.quotas import may_run_job, tenants_without_free_job
from adapters.clock import rfc3339
from adapters.errors import ClaimLost
from adapters.jobs.job import Job, JobStatus, job_from_row
from adapters.storage.schema import jobs

SHOWN = [column for column in jobs.c if column.name not in ("suspects", "tally")]
"""Columns that a job is made of."""


def lock_job(connection: Connection, job_id: str) -> None:
    """Keep trainers from claiming a job, and from renewing its lease, until the end of the transaction."""
    connection.execute(sa.select(jobs.c.sequence).where(jobs.c.id == job_id).with_for_update())


def check_claim(connection: Connection, claim: Job, *, locks: bool = True) -> None:
    """Raise `ClaimLost` if the job was cancelled or claimed again since `claim`.

    With `locks`, neither can happen until the end of the transaction.
    """
    # Called five times a second: history and spec, which may be long, are not read.
    statement = sa.select(jobs.c.status, jobs.c.fence).where(jobs.c.id == claim.id)
    if locks:
        statement = statement.with_for_update()
    status, fence = connection.execute(statement).one()
    if status != JobStatus.RUNNING or fence != claim.fence:
        raise ClaimLost(f"job {claim.id} is {status} at fence {fence}; this claim has fence {claim.fence}")


def lock_claimable(connection: Connection, now: float, base: str) -> Job | None:
    """Return the job that is claimed next for this base layer, by its fingerprint, with its row locked.

    Other trainers may claim at the same time: each skips the rows that others have locked. None if no job can be
    claimed.
    """
    passed: list[int] = []
    while (sequence := next_claimable(connection, now, base, passed)) is not None:
        is_free = sa.or_(*(sa.and_(*conditions) for conditions in _claimable_statuses(now)))
        statement = sa.select(*SHOWN).where(jobs.c.sequence == sequence, is_free).with_for_update(skip_locked=True)
        row = connection.execute(statement).one_or_none()
        if row is not None and may_run_job(connection, tenant=row.tenant, is_running=row.status == JobStatus.RUNNING):
            return job_from_row(row)
        passed.append(sequence)
    return None


def next_claimable(connection: Connection, now: float, base: str, passed: Sequence[int] = ()) -> int | None:
    """Return the sequence number of the job to claim next, but for those of `passed`; None if there is none."""
    full = tenants_without_free_job(connection, base=base)
    sequence: int | None = connection.scalar(_next_of_each_tenant(now, base, full, passed).limit(1))
    return sequence


def _claimable_statuses(now: float) -> Sequence[Sequence[sa.ColumnElement[bool]]]:
    return ((jobs.c.status == JobStatus.QUEUED,), (jobs.c.status == JobStatus.RUNNING, jobs.c.lease_until <= now))


def _next_of_each_tenant(now: float, base: str, full: Sequence[str], passed: Sequence[int]) -> sa.Select[Any]:
    """Select sequence number and tenant of each tenant's oldest job that can be claimed, and its running jobs.

    Queued jobs of the tenants in `full` cannot be claimed.

    The first is of the tenant with the fewest running jobs; among equals, of the one whose last job began first.
    """
    queued, expired = _claimable_statuses(now)
    statuses = ((*queued, jobs.c.tenant.not_in(full)), expired)
    # Without it, the statement is simpler, and there is nothing to leave out but under contention.
    others = [jobs.c.sequence.not_in(passed)] if passed else []
    # Grouped by themselves, in the order of the index on status, because a tenant may have many thousands queued.
    parts = [
        sa.select(jobs.c.tenant, sa.func.min(jobs.c.sequence).label("sequence"))
        .where(*conditions, jobs.c.base == base, *others)
        .group_by(jobs.c.tenant)
        for conditions in statuses
    ]
    waiting = sa.union_all(*parts).subquery("waiting")
    other = jobs.alias("other")
    of_tenant = other.c.tenant == waiting.c.tenant
    is_running = other.c.status == JobStatus.RUNNING, other.c.lease_until > now
    running = sa.select(sa.func.count()).select_from(other).where(of_tenant, *is_running).scalar_subquery()
    # A job that began before the clock was set back does not count until then.
    began = sa.select(sa.func.max(other.c.started_at)).where(of_tenant, other.c.started_at <= rfc3339(now))
    oldest = sa.func.min(waiting.c.sequence)
    return (
        sa.select(oldest, waiting.c.tenant, running.label("running"))
        .group_by(waiting.c.tenant)
        .order_by("running", sa.func.coalesce(began.scalar_subquery(), ""), oldest)
    )
