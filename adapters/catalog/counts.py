"""Counts for metrics and warnings. Those that read many rows do so in slices, so that writers do not wait."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.catalog.queries import IS_TARGET
from adapters.clock import seconds_since
from adapters.jobs.job import JobStatus
from adapters.names import LIVE
from adapters.storage.database import Database
from adapters.storage.schema import aliases, jobs, versions
from adapters.storage.totals import Totals, read_totals

# Names in one read transaction of about ten milliseconds, during which no other process can commit.
_NAMES_AT_ONCE = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogCounts(Totals):
    """Totals of the catalogue, and numbers of jobs."""

    jobs: Mapping[JobStatus, int]
    """Number of jobs of every status, with zeros."""
    oldest_queued_seconds: float
    """Seconds that the oldest queued job of this base layer has waited; 0 if none waits."""


def count_catalog(database: Database, *, base: str, now: float, tenant: str | None = None) -> CatalogCounts:
    """Count the rows of one tenant, or of all; raise `CatalogBusy` if the catalogue stays locked.

    base: fingerprint of this service's base layer.
    """
    of_jobs = [] if tenant is None else [jobs.c.tenant == tenant]
    with database.read() as connection:
        statuses = sa.select(jobs.c.status, sa.func.count()).where(*of_jobs).group_by(jobs.c.status)
        by_status = connection.execute(statuses).all()
        oldest = connection.scalar(
            # By status, as `jobs.job.claimable` does: a job for another base layer may wait for good.
            sa.select(jobs.c.created_at)
            .where(jobs.c.status == JobStatus.QUEUED, jobs.c.base == base, *of_jobs)
            .order_by(jobs.c.sequence)
            .limit(1)
        )
        totals = read_totals(connection, tenant=tenant)
    return CatalogCounts(
        **asdict(totals),
        jobs={**dict.fromkeys(JobStatus, 0), **{JobStatus(status): number for status, number in by_status}},
        oldest_queued_seconds=0.0 if oldest is None else max(0.0, seconds_since(oldest, now)),
    )


def count_live_by_base(database: Database) -> dict[tuple[str, str | None], int]:
    """Count adapters by the base layer (its fingerprint) and the feature space that their live version was made for.

    Raises `CatalogBusy`.
    """
    totals: Counter[tuple[str, str | None]] = Counter()
    origin = (versions.c.base, versions.c.feature_space)
    statement = sa.select(*origin, sa.func.count()).select_from(aliases).join(versions, IS_TARGET).group_by(*origin)
    for connection, part in _slices(database, aliases.c.adapter):
        in_slice = (aliases.c.alias == LIVE, *part.contains(aliases.c.adapter))
        for base, feature_space, total in connection.execute(statement.where(*in_slice)):
            totals[base, feature_space] += total
    return dict(totals)


@dataclass(frozen=True, slots=True)
class _Slice:
    """Names after one name and up to another; None for no bound."""

    after: tuple[str, str] | None
    """A tenant and a name of it."""
    last: tuple[str, str] | None = None

    def contains(self, name: sa.Column[str]) -> list[sa.ColumnElement[bool]]:
        """Return the conditions on a column of names, and on the tenant beside it, for the rows of the slice."""
        conditions, key = [], sa.tuple_(name.table.c.tenant, name)
        if self.after is not None:
            conditions.append(key > sa.tuple_(*self.after))
        if self.last is not None:
            conditions.append(key <= sa.tuple_(*self.last))
        return conditions


def _slices(database: Database, name: sa.Column[str]) -> Iterator[tuple[Connection, _Slice]]:
    """Yield a read transaction for each slice of a table with a column of names."""
    key, after = (name.table.c.tenant, name), None
    while True:
        rest = sa.select(*key).where(*_Slice(after).contains(name)).order_by(*key)
        with database.read() as connection:
            row = connection.execute(rest.offset(_NAMES_AT_ONCE).limit(1)).one_or_none()
            last = None if row is None else (row[0], row[1])
            yield connection, _Slice(after, last)
        if last is None:
            return
        after = last


def count_queued_by_base(database: Database) -> dict[str, int]:
    """Count the queued jobs by the base layer (its fingerprint) that they are for. Raises `CatalogBusy`."""
    counted = sa.select(jobs.c.base, sa.func.count().label("total")).where(jobs.c.status == JobStatus.QUEUED)
    statement = counted.group_by(jobs.c.base)
    with database.read() as connection:
        return {row.base: row.total for row in connection.execute(statement)}
