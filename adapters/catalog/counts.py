"""Counts of the catalogue's rows for metrics and warnings, read in slices so that writers do not wait."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.clock import seconds_since
from adapters.jobs.job import JobStatus
from adapters.names import LIVE
from adapters.storage.database import SqliteDatabase
from adapters.storage.schema import TENANT, adapters, aliases, dataset_versions, datasets, jobs, versions

# Names in one read transaction of about ten milliseconds, during which no other process can commit.
_NAMES_AT_ONCE = 10_000
# Sorts after every name: names are ASCII without DEL.
_AFTER_NAMES = "\x7f"


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
        counted = sa.select(sa.func.count()).select_from(datasets).where(~datasets.c.deleted)
        number_of_datasets = connection.scalar(counted)
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
    for connection, after, last in _slices(database, adapters.c.name):
        in_slice = (adapters.c.tenant == TENANT, ~adapters.c.deleted, _between(adapters.c.name, after, last))
        names += connection.scalar(sa.select(sa.func.count()).select_from(adapters).where(*in_slice)) or 0
        sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(versions.c.bytes), 0))
        sums = sums.where(versions.c.tenant == TENANT, _between(versions.c.adapter, after, last))
        number, number_of_bytes = connection.execute(sums).one()
        number_of_versions, version_bytes = number_of_versions + number, version_bytes + number_of_bytes
    return names, number_of_versions, version_bytes


def count_live_by_base(database: SqliteDatabase) -> dict[tuple[str, str | None], int]:
    """Count adapters by the base layer (its fingerprint) and the feature space that their live version was made for.

    Raises `CatalogBusy`.
    """
    totals: Counter[tuple[str, str | None]] = Counter()
    is_target = (versions.c.adapter == aliases.c.adapter) & (versions.c.version == aliases.c.version)
    origin = (versions.c.base, versions.c.feature_space)
    statement = sa.select(*origin, sa.func.count()).select_from(aliases)
    statement = statement.join(versions, is_target & (versions.c.tenant == TENANT)).group_by(*origin)
    for connection, after, last in _slices(database, aliases.c.adapter):
        in_slice = (aliases.c.tenant == TENANT, aliases.c.alias == LIVE, _between(aliases.c.adapter, after, last))
        for base, feature_space, total in connection.execute(statement.where(*in_slice)):
            totals[base, feature_space] += total
    return dict(totals)


def _slices(database: SqliteDatabase, column: sa.Column[str]) -> Iterator[tuple[Connection, str, str]]:
    """Yield a read transaction for each slice of a column of names: those after one name and up to another."""
    after = ""
    while after < _AFTER_NAMES:
        names = sa.select(column).where(column.table.c.tenant == TENANT, column > after).order_by(column)
        with database.read() as connection:
            last = connection.scalar(names.offset(_NAMES_AT_ONCE).limit(1)) or _AFTER_NAMES
            yield connection, after, last
        after = last


def _between(column: sa.Column[str], after: str, last: str) -> sa.ColumnElement[bool]:
    return (column > after) & (column <= last)


def count_queued_by_base(database: SqliteDatabase) -> dict[str, int]:
    """Count the queued jobs by the base layer (its fingerprint) that they are for. Raises `CatalogBusy`."""
    counted = sa.select(jobs.c.base, sa.func.count().label("total")).where(jobs.c.status == JobStatus.QUEUED)
    statement = counted.group_by(jobs.c.base)
    with database.read() as connection:
        return {row.base: row.total for row in connection.execute(statement)}
