"""Usage: the answered predictions of each tenant and their rows, by hour and adapter, and by hour and key.

A process counts in memory and adds its counts every few seconds. Each batch of counts has a number, which is stored in
the transaction of the batch. If the outcome of a commit is unknown, the process adds the same batch again, and the
number shows whether it is stored already: a batch is never counted twice.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.clock import rfc3339
from adapters.errors import InvalidCursor
from adapters.storage.database import Database
from adapters.storage.schema import tenants, usage, usage_writers
from adapters.storage.slices import delete_in_slices

HOUR_SECONDS = 3600
RETENTION_DAYS = 62
"""The month before the current one is complete until the current one ends."""
# Name of the rows of adapters that could not be counted one by one. No adapter can have it.
OTHER_ADAPTERS = "*"
# Stored for null, which a primary key cannot have: the bare base layer, or a caller without a key.
_NULL = ""
# A process repeats a batch for a day at most. After a week, no batch of a writer can come any more.
LONGEST_REPETITION_SECONDS = 24 * 3600.0
_WRITER_SECONDS = 7 * 24 * 3600.0
_LARGEST_STATEMENT = 512
_POSITION = re.compile(r"([0-9]{1,15}) (.*)", re.DOTALL)


class UsageBy(StrEnum):
    """Dimension by which the usage of an hour is divided."""

    ADAPTER = "adapter"
    KEY = "key"


class UsageSlot(NamedTuple):
    """Identity of a count: one hour of an adapter or of a key, in a tenant."""

    tenant: str
    by: UsageBy
    hour: int
    """Hours since the epoch."""
    name: str
    """Name of the adapter or id of the key; empty for none."""


class UsageCount(NamedTuple):
    """Requests and rows to add to a slot."""

    slot: UsageSlot
    requests: int
    rows: int


@dataclass(frozen=True, slots=True)
class HourlyUsage:
    """Usage of one tenant in one hour: of an adapter, of a key, or in total."""

    hour: str
    """RFC 3339 time at which the hour begins."""
    name: str | None
    """Name of the adapter or id of the key; None for the bare base layer, for callers without a key, and in total."""
    requests: int
    rows: int
    position: str
    """Position in the list."""


class NamedUsage(NamedTuple):
    """Usage of an adapter or of a key in several hours; its name is None as in `HourlyUsage`."""

    name: str | None
    requests: int
    rows: int


class Usage:
    """Usage of all tenants in one catalogue. Safe to use from any thread and from several processes."""

    def __init__(self, database: Database, *, now: Callable[[], float]) -> None:
        self._database = database
        self._now = now

    def add(self, counts: Sequence[UsageCount], *, writer: str, sequence: int) -> None:
        """Add counts of distinct slots in one transaction, unless the batch of this number is stored already.

        A writer numbers its batches 1, 2, 3 …, and repeats a number only with the same counts. Raises the errors of
        `Database.write_job`.
        """
        values = {"writer": writer, "sequence": sequence, "stored_at": rfc3339(self._now())}
        with self._database.write_job() as connection:
            # First, so that a repetition waits for the end of the transaction that it repeats.
            if connection.execute(_STORE_SEQUENCE, values).rowcount:
                _add_counts(connection, counts)

    def list(
        self,
        *,
        tenant: str,
        by: UsageBy | None,
        begins: float,
        ends: float | None,
        after: str | None = None,
        limit: int = 100,
    ) -> Sequence[HourlyUsage]:
        """Return the usage of a tenant in the hours that begin from `begins` on and before `ends`, oldest first.

        Both are in seconds since the epoch. Without `by`, return the sum of each hour. `after` is a position. Raises
        `InvalidCursor` if it is not one.
        """
        # Every request counts once by its key, but once for each of its adapters.
        conditions = usage.c.tenant == tenant, usage.c.dimension == (by or UsageBy.KEY)
        statement = sa.select(usage).where(*conditions, usage.c.hour >= _first_hour(begins))
        if ends is not None:
            statement = statement.where(usage.c.hour < _first_hour(ends))
        last_hour, last_name = _parse_position(after)
        if by is not None:
            statement = statement.where(sa.tuple_(usage.c.hour, usage.c.name) > sa.tuple_(last_hour, last_name))
            statement = statement.order_by(usage.c.hour, usage.c.name)
        else:
            sums = (sa.func.sum(usage.c[name]).label(name) for name in ("requests", "rows"))
            columns = (usage.c.hour, sa.literal(_NULL).label("name"), *sums)
            statement = statement.with_only_columns(*columns).where(usage.c.hour > last_hour)
            statement = statement.group_by(usage.c.hour).order_by(usage.c.hour)
        with self._database.read() as connection:
            return [_usage_from_row(row) for row in connection.execute(statement.limit(limit))]

    def largest(self, *, tenant: str, by: UsageBy, begins: float, limit: int) -> Sequence[NamedUsage]:
        """Return the adapters or keys of a tenant with the most rows in the hours that begin from `begins` on."""
        conditions = usage.c.tenant == tenant, usage.c.dimension == by, usage.c.hour >= _first_hour(begins)
        sums = [sa.func.sum(usage.c[name]).label(name) for name in ("requests", "rows")]
        statement = sa.select(usage.c.name, *sums).where(*conditions).group_by(usage.c.name)
        statement = statement.order_by(sums[1].desc(), usage.c.name).limit(limit)
        with self._database.read() as connection:
            return [NamedUsage(row.name or None, row.requests, row.rows) for row in connection.execute(statement)]

    def remove_expired(self) -> int:
        """Remove the hours that are older than `RETENTION_DAYS`; return the number of removed rows."""
        now, removed = self._now(), 0
        for hour in self._expired_hours(int(now // HOUR_SECONDS) - RETENTION_DAYS * 24):
            # An hour may have a row of every adapter.
            removed += delete_in_slices(self._database, usage.c.name, *hour)
        idle = usage_writers.c.stored_at < rfc3339(now - _WRITER_SECONDS)
        with self._database.read() as connection:
            has_idle = connection.execute(sa.select(usage_writers.c.id).where(idle).limit(1)).first() is not None
        if has_idle:
            with self._database.write() as connection:
                connection.execute(sa.delete(usage_writers).where(idle))
        return removed

    def _expired_hours(self, before: int) -> Iterator[tuple[sa.ColumnElement[bool], ...]]:
        """Yield the conditions for the rows of each expired hour, oldest first. The caller deletes them."""
        with self._database.read() as connection:
            names = connection.scalars(sa.select(tenants.c.name)).all()
        for tenant in names:
            for by in UsageBy:
                conditions = usage.c.tenant == tenant, usage.c.dimension == by
                oldest = sa.select(sa.func.min(usage.c.hour)).where(*conditions, usage.c.hour < before)
                while (hour := self._scalar(oldest)) is not None:
                    yield *conditions, usage.c.hour == hour

    def _scalar(self, statement: sa.Select[Any]) -> int | None:
        with self._database.read() as connection:
            number: int | None = connection.scalar(statement)
            return number


def _add_counts(connection: Connection, counts: Iterable[UsageCount]) -> None:
    # In the order of the table, so that neighbours change the same pages, and processes that add to the same rows wait
    # for each other in one order.
    for part in _parts(sorted(counts)):
        values = {
            f"{name}{index}": value
            for index, (slot, requests, rows) in enumerate(part)
            for name, value in zip(_COLUMNS, (*slot, requests, rows), strict=True)
        }
        connection.execute(_addition(len(part)), values)


# Changes no row if the batch is stored already.
_STORE_SEQUENCE = sa.text(
    "INSERT INTO usage_writers (id, sequence, stored_at) VALUES (:writer, :sequence, :stored_at) "
    "ON CONFLICT (id) DO UPDATE SET sequence = excluded.sequence, stored_at = excluded.stored_at "
    "WHERE usage_writers.sequence < excluded.sequence"
)
_COLUMNS = ("tenant", "dimension", "hour", "name", "requests", "rows")


@cache
def _addition(rows: int) -> sa.TextClause:
    """Return a statement that adds some rows at once.

    The driver gives up the interpreter lock for every execution. In a process that answers requests, each return takes
    up to milliseconds: 10,000 executions held the write lock for four seconds.
    """
    values = ", ".join(f"({', '.join(f':{name}{index}' for name in _COLUMNS)})" for index in range(rows))
    sums = ", ".join(f"{name} = usage.{name} + excluded.{name}" for name in ("requests", "rows"))
    return sa.text(
        f"INSERT INTO usage ({', '.join(_COLUMNS)}) VALUES {values} "
        f"ON CONFLICT (tenant, dimension, hour, name) DO UPDATE SET {sums}"
    )


def _parts(counts: Sequence[UsageCount]) -> Iterator[Sequence[UsageCount]]:
    """Yield parts whose lengths are powers of two, so that there are few different statements to compile."""
    begin = 0
    while left := len(counts) - begin:
        length = min(_LARGEST_STATEMENT, 1 << (left.bit_length() - 1))
        yield counts[begin : begin + length]
        begin += length


def _first_hour(seconds: float) -> int:
    """Return the first hour that begins at this time or later."""
    return math.ceil(seconds / HOUR_SECONDS)


def _parse_position(position: str | None) -> tuple[int, str]:
    if position is None:
        return -1, _NULL
    # Clients can make cursors of their own.
    match = _POSITION.fullmatch(position)
    if match is None:
        raise InvalidCursor("cursor is not of this list", field="cursor", expected="a next_cursor")
    return int(match[1]), match[2]


def _usage_from_row(row: sa.Row[tuple[object, ...]]) -> HourlyUsage:
    begins = datetime.fromtimestamp(row.hour * HOUR_SECONDS, UTC)
    hour = begins.isoformat().replace("+00:00", "Z")
    return HourlyUsage(hour, row.name or None, row.requests, row.rows, position=f"{row.hour} {row.name}")
