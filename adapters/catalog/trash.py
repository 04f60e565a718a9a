"""Trash: the versions of deleted adapters, whose bytes are kept for some days.

A deletion moves the rows of versions and aliases to tables of their own, so that no other statement finds them.
Restoring a name moves back everything that the trash has of it: an adapter that was made again and deleted again comes
back with the versions of both, because its numbers went on counting. Its aliases are those of the last deletion.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.access.audit import Action, Change, record
from adapters.catalog import queries
from adapters.errors import AdapterNotFound, NameTaken
from adapters.storage.schema import adapters, aliases, trashed_aliases, trashed_versions, versions
from adapters.storage.totals import add_to_totals

# Most versions that one transaction purges: deleting their rows takes a few milliseconds.
_VERSIONS_AT_ONCE = 250
_ROWS = sa.select(*(trashed_versions.c[name] for name in ("tenant", "adapter", "version", "file", "bytes")))


def add(connection: Connection, name: str, deleted_at: str, *, tenant: str) -> None:
    """Copy an adapter's versions, without their statistics, and its aliases to the trash.

    The caller then deletes the adapter.
    """
    kept = versions.c
    values = [sa.null() if column.name == "statistics" else kept[column.name] for column in kept]
    rows = sa.select(*values, sa.literal(deleted_at)).where(*_of(versions, name, tenant))
    connection.execute(sa.insert(trashed_versions).from_select([*kept.keys(), "deleted_at"], rows))
    number_of_bytes = connection.scalar(sa.select(sa.func.sum(kept.bytes)).where(*_of(versions, name, tenant))) or 0
    add_to_totals(connection, tenant=tenant, trashed_bytes=number_of_bytes)
    # Those of an earlier deletion.
    connection.execute(sa.delete(trashed_aliases).where(*_of(trashed_aliases, name, tenant)))
    pointing = sa.select(aliases).where(*_of(aliases, name, tenant))
    connection.execute(sa.insert(trashed_aliases).from_select(aliases.c.keys(), pointing))


def restore(connection: Connection, name: str, *, tenant: str) -> None:
    """Move everything that the trash has of a name back. Raises `NameTaken` and `AdapterNotFound`."""
    if queries.exists(connection, name, tenant=tenant):
        detail = f"there is an adapter {name!r}: delete it before you restore what was deleted"
        raise NameTaken(detail, field="name", given=name)
    of_name = _of(trashed_versions, name, tenant)
    columns = versions.c.keys()
    rows = sa.select(*(trashed_versions.c[column] for column in columns)).where(*of_name)
    sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(trashed_versions.c.bytes), 0)).where(*of_name)
    number, number_of_bytes = connection.execute(sums).one()
    connection.execute(sa.insert(versions).from_select(columns, rows))
    if number == 0:
        raise AdapterNotFound(f"the trash has no adapter {name!r}", field="name", given=name)
    connection.execute(sa.delete(trashed_versions).where(*of_name))
    pointing = _of(trashed_aliases, name, tenant)
    connection.execute(sa.insert(aliases).from_select(aliases.c.keys(), sa.select(trashed_aliases).where(*pointing)))
    connection.execute(sa.delete(trashed_aliases).where(*pointing))
    is_adapter = (adapters.c.tenant == tenant, adapters.c.name == name)
    connection.execute(sa.update(adapters).where(*is_adapter).values(deleted=False))
    moved = {"version_bytes": number_of_bytes, "trashed_bytes": -number_of_bytes}
    add_to_totals(connection, tenant=tenant, adapters=1, versions=number, **moved)


def purge(connection: Connection, name: str, *, tenant: str) -> set[str]:
    """Delete everything that the trash has of a name; return the blobs that are no longer needed."""
    statement = _ROWS.where(*_of(trashed_versions, name, tenant))
    return _delete(connection, connection.execute(statement).all())


def purge_deleted_until(connection: Connection, deleted_at: str) -> tuple[set[str], bool]:
    """Delete versions that were deleted by a time, at most as many as one transaction may.

    Return the blobs that are no longer needed, and whether there may be more to delete.
    """
    due = _ROWS.where(trashed_versions.c.deleted_at <= deleted_at).limit(_VERSIONS_AT_ONCE)
    rows = connection.execute(due).all()
    names: dict[str, set[str]] = {}
    for row in rows:
        names.setdefault(row.tenant, set()).add(row.adapter)
    for tenant, purged in names.items():
        changes = [Change(Action.ADAPTER_PURGE, f"adapters/{name}") for name in sorted(purged)]
        record(connection, changes, tenant=tenant)
    return _delete(connection, rows), len(rows) == _VERSIONS_AT_ONCE


def has_deleted_until(connection: Connection, deleted_at: str) -> bool:
    """Return whether the trash has a version that was deleted by a time."""
    return connection.execute(_ROWS.where(trashed_versions.c.deleted_at <= deleted_at).limit(1)).first() is not None


def holds(connection: Connection, name: str, *, tenant: str) -> bool:
    """Return whether the trash has a version of a name."""
    statement = _ROWS.where(*_of(trashed_versions, name, tenant))
    return connection.execute(statement.limit(1)).first() is not None


def _of(table: sa.Table, name: str, tenant: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (table.c.tenant == tenant, table.c.adapter == name)


def _delete(connection: Connection, rows: Sequence[sa.Row[Any]]) -> set[str]:
    """Delete rows of the trash, and the aliases of adapters that it no longer has; return the unused blobs."""
    if not rows:
        return set()
    # One row at a time: for a list of keys, SQLite would read the whole trash to compare it with the list.
    is_row = [trashed_versions.c[name] == sa.bindparam(f"of_{name}") for name in ("tenant", "adapter", "version")]
    keys = [{"of_tenant": row.tenant, "of_adapter": row.adapter, "of_version": row.version} for row in rows]
    connection.execute(sa.delete(trashed_versions).where(*is_row), keys)
    number_of_bytes: Counter[str] = Counter()
    for row in rows:
        number_of_bytes[row.tenant] += row.bytes
    for tenant, total in number_of_bytes.items():
        add_to_totals(connection, tenant=tenant, trashed_bytes=-total)
    has_target = sa.exists().where(
        *(trashed_versions.c[name] == trashed_aliases.c[name] for name in ("tenant", "adapter", "version"))
    )
    of_adapter = [trashed_aliases.c[name] == sa.bindparam(f"of_{name}") for name in ("tenant", "adapter")]
    names = {(row.tenant, row.adapter): {"of_tenant": row.tenant, "of_adapter": row.adapter} for row in rows}
    connection.execute(sa.delete(trashed_aliases).where(*of_adapter, ~has_target), list(names.values()))
    # The versions of a fleet share one blob.
    return {file for file in {row.file for row in rows} if not queries.is_used(connection, file)}
