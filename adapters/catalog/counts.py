"""Counts of the catalogue's rows for metrics and warnings, read in slices so that writers do not wait."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from adapters.clock import seconds_since
from adapters.jobs.job import JobStatus
from adapters.names import LIVE
from adapters.storage.database import SqliteDatabase
from adapters.storage.schema import DEFAULT_TENANT as TENANT
from adapters.storage.schema import adapters, aliases, dataset_versions, datasets, jobs, versions

_NAMES_AT_ONCE = 10_000
"""Names in one read transaction of about ten milliseconds, during which no other process can commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogCounts:
    """Numbers of rows. Each one was true at some moment of the count, not all at the same moment."""

    adapters: int
    versions: int
    version_bytes: int
    datasets: int
    dataset_bytes: int
    jobs: Mapping[JobStatus, int]
    """Number of jobs of every status, with zeros."""
    oldest_queued_seconds: float
    """Seconds that the oldest queued job of this base layer has waited; 0 if none waits."""


def count_catalog(database: SqliteDatabase, *, base: str, now: float) -> CatalogCounts:
    """Count the rows; raise `CatalogBusy` if the catalogue stays locked.

    base: fingerprint of this service's base layer.
    """
    names, number_of_versions, version_bytes = _count_published(database)
    with database.read() as connection:
        by_status = connection.execute(sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)).all()
        oldest = connection.scalar(
            # By status, as `jobs.job.claimable` does: a job for another base layer may wait for good.
            sa.select(jobs.c.created_at)
            .where(jobs.c.status == JobStatus.QUEUED, jobs.c.base == base)
            .order_by(jobs.c.sequence)
            .limit(1)
        )
        number_of_datasets = connection.scalar(
            sa.select(sa.func.count()).select_from(datasets).where(~datasets.c.deleted)
        )
        dataset_bytes = connection.scalar(sa.select(sa.func.sum(dataset_versions.c.bytes)))
    return CatalogCounts(
        adapters=names,
        versions=number_of_versions,
        version_bytes=version_bytes,
        datasets=number_of_datasets or 0,
        dataset_bytes=dataset_bytes or 0,
        jobs={**dict.fromkeys(JobStatus, 0), **{JobStatus(status): number for status, number in by_status}},
        oldest_queued_seconds=0.0 if oldest is None else max(0.0, seconds_since(oldest, now)),
    )


def _count_published(database: SqliteDatabase) -> tuple[int, int, int]:
    """Return the numbers of adapters, of versions and of their bytes."""
    names = number_of_versions = version_bytes = 0
    after: str | None = ""
    while after is not None:
        rest = adapters.c.tenant == TENANT, adapters.c.name > after
        end = sa.select(adapters.c.name).where(*rest).order_by(adapters.c.name).offset(_NAMES_AT_ONCE).limit(1)
        with database.read() as connection:
            last = connection.scalar(end)
            in_slice = [*rest] if last is None else [*rest, adapters.c.name <= last]
            counted = sa.select(sa.func.count()).select_from(adapters).where(*in_slice, ~adapters.c.deleted)
            names += connection.scalar(counted) or 0
            in_versions = [versions.c.tenant == TENANT, versions.c.adapter > after]
            in_versions += [] if last is None else [versions.c.adapter <= last]
            sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(versions.c.bytes), 0)).where(*in_versions)
            more, more_bytes = connection.execute(sums).one()
        number_of_versions, version_bytes, after = number_of_versions + more, version_bytes + more_bytes, last
    return names, number_of_versions, version_bytes


def count_live_by_base(database: SqliteDatabase) -> dict[tuple[str, str | None], int]:
    """Count adapters by the base layer (its fingerprint) and the feature space that their live version was made for.

    Reads the names in slices, as `count_catalog` does. Raises `CatalogBusy`.
    """
    totals: Counter[tuple[str, str | None]] = Counter()
    after: str | None = ""
    while after is not None:
        rest = aliases.c.tenant == TENANT, aliases.c.adapter > after
        end = sa.select(aliases.c.adapter).where(*rest).order_by(aliases.c.adapter).offset(_NAMES_AT_ONCE).limit(1)
        with database.read() as connection:
            last = connection.scalar(end)
            in_slice = [*rest, aliases.c.alias == LIVE]
            in_slice += [] if last is None else [aliases.c.adapter <= last]
            same = (versions.c.adapter == aliases.c.adapter) & (versions.c.version == aliases.c.version)
            origin = (versions.c.base, versions.c.feature_space)
            statement = sa.select(*origin, sa.func.count()).select_from(aliases)
            statement = (
                statement.join(versions, same & (versions.c.tenant == TENANT)).where(*in_slice).group_by(*origin)
            )
            for base, feature_space, total in connection.execute(statement):
                totals[base, feature_space] += total
        after = last
    return dict(totals)


def count_queued_by_base(database: SqliteDatabase) -> dict[str, int]:
    """Count the queued jobs by the base layer (its fingerprint) that they are for. Raises `CatalogBusy`."""
    counted = sa.select(jobs.c.base, sa.func.count().label("total")).where(jobs.c.status == JobStatus.QUEUED)
    statement = counted.group_by(jobs.c.base)
    with database.read() as connection:
        return {row.base: row.total for row in connection.execute(statement)}
