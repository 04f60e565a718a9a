"""The audit log: who changed what, in entries that are written in the transaction of the change.

Whoever starts something that may change data names its actor by `acting_as`: the middleware for a request, the trainer
for the request that submitted its job, and a command that works on the data folder. The code that makes the change
calls `record` in its transaction, so that there is an entry if, and only if, the change is stored. Entries are never
changed, and only `AuditLog.remove_before` removes any.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect

from adapters.clock import rfc3339
from adapters.storage.database import Database
from adapters.storage.schema import audit, tenants
from adapters.storage.slices import slices_to_delete, write_in_slices


class Action(StrEnum):
    """Kind of a change."""

    ADAPTER_PUBLISH = "adapter.publish"
    """A new version, which is live."""
    ADAPTER_ADD = "adapter.add"
    """A new version, while live stays where it was."""
    ADAPTER_LIVE = "adapter.live"
    """Live points at another version."""
    ADAPTER_REVERT = "adapter.revert"
    """Live points again at the version before that of a job."""
    ADAPTER_DELETE = "adapter.delete"
    ADAPTER_RESTORE = "adapter.restore"
    """An adapter came back from the trash."""
    ADAPTER_PURGE = "adapter.purge"
    """The bytes of an adapter were removed, or of some of its versions in the trash."""
    ADAPTER_REPAIR = "adapter.repair"
    """Damaged bytes were replaced by an intact copy."""
    ADAPTER_LOSE = "adapter.lose"
    """`loraplex doctor` removed a version, or its statistics, because the bytes are lost, or an alias of no version."""
    DATASET_PUBLISH = "dataset.publish"
    DATASET_DELETE = "dataset.delete"
    DATASET_REPAIR = "dataset.repair"
    DATASET_LOSE = "dataset.lose"
    JOB_SUBMIT = "job.submit"
    JOB_CANCEL = "job.cancel"
    KEY_CREATE = "key.create"
    KEY_REVOKE = "key.revoke"
    SESSION_OPEN = "session.open"
    """Someone signed in to the page."""
    SESSION_CLOSE = "session.close"
    TENANT_CREATE = "tenant.create"
    TENANT_UPDATE = "tenant.update"
    """A tenant got other limits."""
    AUDIT_REMOVE = "audit.remove"
    """Old entries of all tenants were removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who makes a change."""

    key_id: str | None = None
    """Id of the key; None for a request without a key."""
    request_id: str | None = None
    client_address: str | None = None


# The service on its own account, such as when it empties the trash, and commands that work on the data folder. Neither
# name can be the id of a key.
SERVICE, COMMAND_LINE = Actor(key_id="service"), Actor(key_id="cli")

_actor = ContextVar("actor", default=SERVICE)


@contextmanager
def acting_as(actor: Actor) -> Iterator[None]:
    """Name the actor of all changes within the block, and within the threads and tasks that it starts."""
    token = _actor.set(actor)
    try:
        yield
    finally:
        _actor.reset(token)


def current_actor() -> Actor:
    """Return the actor of the changes that are made now."""
    return _actor.get()


class Change(NamedTuple):
    """One change of one resource."""

    action: Action
    resource: str
    """Path of the resource in the API, without the slash at its beginning."""
    digest_before: str | None = None
    """Digest of the bytes that were live before; of a data set, those of the newest version."""
    digest_after: str | None = None
    """Digest of the bytes that are live afterwards, or of the version that was added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One change, with its actor."""

    sequence: int
    """Orders the entries of the same time."""
    time: str
    key_id: str | None
    tenant: str
    action: str
    """An `Action` of this release or of another."""
    resource: str
    digest_before: str | None
    digest_after: str | None
    request_id: str | None
    client_address: str | None


def record(connection: Connection, changes: Iterable[Change], *, tenant: str, key_id: str | None = None) -> None:
    """Add an entry for each change, in the transaction that makes them.

    key_id: that of the actor, if its request was not authenticated by it.
    """
    actor = asdict(_actor.get())
    if key_id is not None:
        actor["key_id"] = key_id
    shared = {"time": rfc3339(time.time()), "tenant": tenant, **actor}
    if entries := [shared | change._asdict() for change in changes]:
        # Without SQLAlchemy's handling of each value, which takes as long as the database does.
        statement, to_row = _insertion(connection.dialect)
        connection.exec_driver_sql(statement, list(map(to_row, entries)))


@lru_cache(maxsize=4)
def _insertion(dialect: Dialect) -> tuple[str, Callable[[dict[str, str | None]], Any]]:
    """Return the statement that adds an entry, and a function from an entry to what the driver takes as its row."""
    columns = [column.name for column in audit.c if column is not audit.c.sequence]
    compiled = sa.insert(audit).inline().compile(dialect=dialect, column_keys=columns)
    return str(compiled), dict if compiled.positiontup is None else itemgetter(*compiled.positiontup)


class AuditLog:
    """Entries of all tenants in one catalogue. Safe to use from any thread and from several processes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def list(
        self,
        *,
        tenant: str,
        since: str | None = None,
        actor: str | None = None,
        resource: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Sequence[AuditEntry]:
        """Return entries of a tenant, newest first, behind the one with the sequence number `before`.

        since: the earliest time. actor: the id of a key, or that of `SERVICE` or `COMMAND_LINE`.
        """
        columns = audit.c
        statement = sa.select(audit).where(columns.tenant == tenant)
        if since is not None:
            statement = statement.where(columns.time >= since)
        if actor is not None:
            statement = statement.where(columns.key_id == actor)
        if resource is not None:
            statement = statement.where(columns.resource == resource)
        statement = statement.order_by(columns.time.desc(), columns.sequence.desc()).limit(limit)
        with self._database.read() as connection:
            if before is not None:
                last = sa.select(columns.time).where(columns.tenant == tenant, columns.sequence == before)
                if (last_time := connection.scalars(last).one_or_none()) is None:
                    return []  # removed meanwhile, and all older ones with it
                statement = statement.where(sa.tuple_(columns.time, columns.sequence) < (last_time, before))
            return [AuditEntry(**row._mapping) for row in connection.execute(statement)]

    def remove_before(self, until: str, *, tenant: str) -> int:
        """Remove the entries of all tenants from before a time; return their number.

        The removal is an entry of `tenant` itself, so that it cannot be hidden.
        """
        removed = 0

        def remove(connection: Connection, are_next: Sequence[sa.ColumnElement[bool]]) -> None:
            nonlocal removed
            if removed == 0:
                record(connection, [Change(Action.AUDIT_REMOVE, "audit")], tenant=tenant)
            removed += connection.execute(sa.delete(audit).where(*are_next)).rowcount

        with self._database.read() as connection:
            names = connection.scalars(sa.select(tenants.c.name)).all()
        for name in names:
            old = slices_to_delete(self._database, audit.c.time, audit.c.tenant == name, audit.c.time < until)
            write_in_slices(self._database, old, remove)
        return removed
