"""How much there is in the catalogue, counted without keeping those who write to it waiting."""

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from adapters.clock import seconds_since
from adapters.database import Database
from adapters.jobs import Status
from adapters.tables import DEFAULT_TENANT as TENANT
from adapters.tables import adapters, dataset_versions, datasets, jobs, versions

_NAMES_AT_ONCE = 10_000
"""Some ten milliseconds of reading, in which nobody can commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What there is; each number is true at some moment of the count."""

    adapters: int
    versions: int
    version_bytes: int
    datasets: int
    dataset_bytes: int
    jobs: Mapping[Status, int]
    """Of every status, also of those that no job has."""
    oldest_queued_seconds: float
    """How long the oldest job that waits has waited; 0 where none does."""


def count(database: Database, *, now: float) -> Census:
    """Count; raises `CatalogBusy` where the catalogue stays locked."""
    names, made, version_bytes = _published(database)
    with database.read() as connection:
        by_status = connection.execute(sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)).all()
        oldest = connection.scalar(
            sa.select(jobs.c.created_at).where(jobs.c.status == Status.QUEUED).order_by(jobs.c.sequence).limit(1)
        )
        tables_of_data = connection.scalar(sa.select(sa.func.count()).select_from(datasets).where(~datasets.c.deleted))
        dataset_bytes = connection.scalar(sa.select(sa.func.sum(dataset_versions.c.bytes)))
    return Census(
        adapters=names,
        versions=made,
        version_bytes=version_bytes,
        datasets=tables_of_data or 0,
        dataset_bytes=dataset_bytes or 0,
        jobs={**dict.fromkeys(Status, 0), **{Status(status): number for status, number in by_status}},
        oldest_queued_seconds=0.0 if oldest is None else max(0.0, seconds_since(oldest, now)),
    )


def _published(database: Database) -> tuple[int, int, int]:
    """Adapters, their versions and these versions' bytes: counted from name to name, so that no look takes long."""
    names = made = version_bytes = 0
    after: str | None = ""
    while after is not None:
        rest = adapters.c.tenant == TENANT, adapters.c.name > after
        end = sa.select(adapters.c.name).where(*rest).order_by(adapters.c.name).offset(_NAMES_AT_ONCE).limit(1)
        with database.read() as connection:
            last = connection.scalar(end)
            some = [*rest] if last is None else [*rest, adapters.c.name <= last]
            counted = sa.select(sa.func.count()).select_from(adapters).where(*some, ~adapters.c.deleted)
            names += connection.scalar(counted) or 0
            of_some = [versions.c.tenant == TENANT, versions.c.adapter > after]
            of_some += [] if last is None else [versions.c.adapter <= last]
            sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(versions.c.bytes), 0)).where(*of_some)
            more, more_bytes = connection.execute(sums).one()
        made, version_bytes, after = made + more, version_bytes + more_bytes, last
    return names, made, version_bytes
