"""Totals of each tenant: numbers of adapters, versions, data sets and bytes, so that nothing has to count rows.

The transaction that changes what a total counts changes the total too.
"""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.storage.schema import adapters, dataset_versions, datasets, totals, trashed_versions, versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Running totals of one tenant, or of all tenants."""

    adapters: int = 0
    versions: int = 0
    version_bytes: int = 0
    trashed_bytes: int = 0
    """Bytes of versions of deleted adapters, which can be restored."""
    datasets: int = 0
    dataset_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of versions, with those in the trash."""
        return self.version_bytes + self.trashed_bytes


_NAMES = tuple(Totals.__dataclass_fields__)


def read_totals(connection: Connection, *, tenant: str | None) -> Totals:
    """Return the totals of one tenant, or of all."""
    statement = sa.select(*(sa.func.coalesce(sa.func.sum(totals.c[name]), 0).label(name) for name in _NAMES))
    if tenant is not None:
        statement = statement.where(totals.c.tenant == tenant)
    return Totals(**{name: int(total) for name, total in connection.execute(statement).one()._mapping.items()})


def add_to_totals(connection: Connection, *, tenant: str, **changes: int) -> None:
    """Add to some of a tenant's totals, by name; numbers may be negative."""
    values = {name: totals.c[name] + number for name, number in changes.items() if number}
    if not values:
        return
    if connection.execute(sa.update(totals).where(totals.c.tenant == tenant).values(values)).rowcount == 0:
        connection.execute(sa.insert(totals).values(tenant=tenant, **asdict(Totals(**changes))))


def find_drift(connection: Connection) -> dict[str, dict[str, int]]:
    """Return what has to be added to totals of each tenant, by name, to make them those of a count.

    Tenants and names whose totals are right are absent.
    """
    counted = count_rows(connection)
    stored = {row.tenant: dict(row._mapping) for row in connection.execute(sa.select(totals))}
    drift = {}
    for tenant in sorted(counted.keys() | stored.keys()):
        right, kept = asdict(counted.get(tenant, Totals())), stored.get(tenant, {})
        differences = {name: right[name] - int(kept.get(name, 0)) for name in _NAMES}
        if any(differences.values()):
            drift[tenant] = {name: number for name, number in differences.items() if number}
    return drift


def count_rows(connection: Connection) -> dict[str, Totals]:
    """Return the totals of each tenant that has any rows, counted; takes seconds for a million adapters."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for table, conditions, names in (
        (adapters, [~adapters.c.deleted], ("adapters", None)),
        (versions, [], ("versions", "version_bytes")),
        (trashed_versions, [], (None, "trashed_bytes")),
        (datasets, [~datasets.c.deleted], ("datasets", None)),
        (dataset_versions, [], (None, "dataset_bytes")),
    ):
        for tenant, number, number_of_bytes in connection.execute(_counted(table).where(*conditions)):
            pairs = zip(names, (number, number_of_bytes), strict=True)
            counts[tenant].update({name: int(value) for name, value in pairs if name is not None})
    return {tenant: Totals(**numbers) for tenant, numbers in counts.items()}


def _counted(table: sa.Table) -> sa.Select[Any]:
    number_of_bytes = sa.func.sum(table.c.bytes) if "bytes" in table.c else sa.literal(0)
    return sa.select(table.c.tenant, sa.func.count(), number_of_bytes).group_by(table.c.tenant)
