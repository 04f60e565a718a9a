"""Statements on the catalogue's rows, each within a transaction that the caller holds."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from sys import intern
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.catalog.versions import AdapterSummary, Source, Version
from adapters.errors import AdapterNotFound, AdapterNotLive, AliasNotFound, VersionNotFound, shorten
from adapters.names import LIVE, MAX_VERSION, Reference
from adapters.storage.database import MAX_CHANGES
from adapters.storage.schema import adapters, aliases, batched, catalog, changes, rows_in, trashed_versions, versions
from adapters.storage.totals import add_to_totals

# Joins each alias with the version that it means.
IS_TARGET = sa.and_(*(aliases.c[name] == versions.c[name] for name in ("tenant", "adapter", "version")))
# Revisions whose changes are listed. A process that looks at the catalogue less often drops everything.
_LISTED_REVISIONS = 1000
# Versions that an error lists.
_LISTED_VERSIONS = 10
_FIELDS = frozenset(Version.__dataclass_fields__)
_DESCRIBED = [column for column in versions.c if column.name not in ("tenant", "evidence")]
# The columns that serving needs of a version, which is cached: metrics and lineage may be long.
_SERVED = [column for column in _DESCRIBED if column.name not in ("metrics", "lineage")]
_NUMBERED = sa.select(*_SERVED).where(
    versions.c.tenant == sa.bindparam("tenant"),
    versions.c.adapter.in_(sa.bindparam("names", expanding=True)),
    versions.c.version.in_(sa.bindparam("numbers", expanding=True)),
)
_ALIASED = (
    sa.select(*_SERVED, aliases.c.alias)
    .join(aliases, IS_TARGET)
    .where(versions.c.tenant == sa.bindparam("tenant"), versions.c.adapter.in_(sa.bindparam("names", expanding=True)))
)


def name_range(column: sa.ColumnElement[str], *, prefix: str, after: str) -> list[sa.ColumnElement[bool]]:
    """Return the conditions on a column of names for those that begin with `prefix` and follow `after`.

    There is one lower bound, the higher of the two. With both, SQLite begins at the one that it reads first and scans
    every name up to the other.
    """
    bounds = [column > after if after >= prefix else column >= prefix]
    # Names are ASCII without DEL: every name with the prefix lies below prefix + DEL.
    return [*bounds, column < prefix + "\x7f"] if prefix else bounds


def exists(connection: Connection, name: str, *, tenant: str, table: sa.Table = adapters) -> bool:
    """Return whether a table of names, such as that of adapters, has a name; a tombstone does not count."""
    columns = table.c
    statement = sa.select(columns.name).where(columns.tenant == tenant, columns.name == name, ~columns.deleted)
    return connection.execute(statement).one_or_none() is not None


def list_names(
    connection: Connection, table: sa.Table, *, tenant: str, prefix: str, after: str, limit: int
) -> Sequence[str]:
    """Return the names in a table of names that begin with `prefix` and follow `after`, in byte order."""
    name = table.c.name
    statement = sa.select(name).where(table.c.tenant == tenant, ~table.c.deleted)
    statement = statement.where(*name_range(name, prefix=prefix, after=after))
    return connection.scalars(statement.order_by(name).limit(limit)).all()


def require(connection: Connection, name: str, *, tenant: str) -> None:
    """Raise `AdapterNotFound` if the tenant has no adapter of that name."""
    if not exists(connection, name, tenant=tenant):
        raise AdapterNotFound(f"there is no adapter {name!r}", field="name", given=name)


def deletions(connection: Connection, names: Iterable[str], *, tenant: str) -> dict[str, int]:
    """Return how often adapters of these names have been deleted; names that never existed are absent."""
    statement = sa.select(adapters.c.name, adapters.c.deletions).where(adapters.c.tenant == tenant)
    return {row.name: row.deletions for row in rows_in(connection, statement, adapters.c.name, names)}


def find(connection: Connection, reference: Reference, *, tenant: str) -> Version:
    """Return the version that a reference means now; raise a `NotFound` that lists what exists instead."""
    name = reference.name
    require(connection, name, tenant=tenant)
    if reference.version is not None:
        return get_version(connection, name, reference.version, tenant=tenant)
    number = alias_targets(connection, [name], reference.alias, tenant=tenant).get(name)
    if number is not None:
        return get_version(connection, name, number, tenant=tenant)
    if reference.alias != LIVE:
        raise AliasNotFound(f"{name!r} has no alias {reference.alias!r}", field="adapter", given=str(reference))
    newest = _newest(connection, name, tenant=tenant)
    existing = ", ".join(f"{name}@{row.version}" for row in newest)
    trained = next((f"; job {row.job} trained {name}@{row.version}" for row in newest if row.job is not None), "")
    detail = f"no version of {name!r} is live; there are: {existing}{trained}"
    raise AdapterNotLive(detail, field="adapter", given=name, expected=existing)


def find_all(connection: Connection, references: Collection[Reference], *, tenant: str) -> dict[Reference, Version]:
    """Return what `find` returns, without metrics and lineage; references that mean no version are absent."""
    names = sorted({reference.name for reference in references})
    numbers = sorted({reference.version or 0 for reference in references} - {0})
    numbers = [number for number in numbers if number <= MAX_VERSION]
    targets: dict[Reference, Version] = {}
    for part in batched(names):
        for row in connection.execute(_ALIASED, {"tenant": tenant, "names": part}):
            targets[Reference(row.adapter, alias=row.alias)] = version_from_row(row)
        if numbers:
            for row in connection.execute(_NUMBERED, {"tenant": tenant, "names": part, "numbers": numbers}):
                targets[Reference(row.adapter, version=row.version)] = version_from_row(row)
    return {reference: targets[reference] for reference in references if reference in targets}


def find_live(connection: Connection, name: str, *, tenant: str) -> Version | None:
    """Return the live version of a name; None if there is none."""
    try:
        return find(connection, Reference(name), tenant=tenant)
    except (AdapterNotFound, AdapterNotLive):
        return None


def get_version(connection: Connection, name: str, number: int, *, tenant: str) -> Version:
    """Return one version of an adapter that exists; raise `VersionNotFound`."""
    row = None
    if number <= MAX_VERSION:
        statement = sa.select(*_DESCRIBED).where(*_is_version(name, number, tenant=tenant))
        row = connection.execute(statement).one_or_none()
    if row is None:
        existing = ", ".join(str(row.version) for row in _newest(connection, name, tenant=tenant))
        detail = f"{name!r} has no version {shorten(number)}; there are: {existing}"
        raise VersionNotFound(detail, field="version", given=number, expected=f"one of {existing}")
    return version_from_row(row)


def version_from_row(row: sa.Row[*tuple[Any, ...]]) -> Version:
    """Return the version in a row of the table of versions; metrics and lineage are None if they were not read."""
    values = {name: value for name, value in row._mapping.items() if name in _FIELDS}
    # Many versions have these in common, and a worker caches many versions.
    values |= {name: intern(values[name]) for name in ("base", "created_at", "file", "job") if values[name] is not None}
    return Version(**{"metrics": None} | values | {"source": Source(values["source"])})


def allocate_numbers(
    connection: Connection, names: Sequence[str], created_at: str, *, tenant: str, table: sa.Table = adapters
) -> list[int]:
    """Return the next version number for each of the names, and create or restore the rows that are missing."""
    is_tenant = table.c.tenant == tenant
    statement = sa.select(table).where(is_tenant)
    rows = {row.name: row for row in rows_in(connection, statement, table.c.name, dict.fromkeys(names))}
    next_numbers = {name: row.next_version for name, row in rows.items()}
    numbers = []
    for name in names:
        numbers.append(next_numbers.get(name, 1))
        next_numbers[name] = numbers[-1] + 1
    new, known = [], []
    for name, number in next_numbers.items():
        if (row := rows.get(name)) is None:
            new.append({"name": name, "created_at": created_at, "next_version": number})
        else:
            created = created_at if row.deleted else row.created_at
            known.append({"of_name": name, "created_at": created, "next_version": number})
    add_to_totals(connection, tenant=tenant, **{table.name: len(new) + sum(row.deleted for row in rows.values())})
    if new:
        connection.execute(sa.insert(table).values(tenant=tenant, deleted=False), new)
    if known:
        of_name = table.c.name == sa.bindparam("of_name")
        connection.execute(sa.update(table).where(is_tenant, of_name).values(deleted=False), known)
    return numbers


def insert_versions(connection: Connection, new: Iterable[tuple[Version, bytes | None]], *, tenant: str) -> None:
    """Add the rows of versions, each with its evidence."""
    common = {"tenant": tenant}
    values = [
        {name: getattr(version, name) for name in _FIELDS} | common | {"evidence": evidence}
        for version, evidence in new
    ]
    connection.execute(sa.insert(versions), values)
    number_of_bytes = sum(row["bytes"] for row in values)
    add_to_totals(connection, tenant=tenant, versions=len(values), version_bytes=number_of_bytes)


def versions_at(
    connection: Connection, keys: Iterable[tuple[str, int]], *, tenant: str
) -> Iterator[tuple[Version, bytes | None]]:
    """Yield the versions at these pairs of a name and a number that exist, each with its evidence."""
    for row in _rows_at(connection, sa.select(*_DESCRIBED, versions.c.evidence), keys, tenant=tenant):
        yield version_from_row(row), row.evidence


def list_versions(connection: Connection, name: str, *, tenant: str, below: int, limit: int) -> list[Version]:
    """Return an adapter's versions with numbers below one, newest first."""
    statement = sa.select(*_DESCRIBED).where(*_is_version(name, tenant=tenant), versions.c.version < below)
    rows = connection.execute(statement.order_by(versions.c.version.desc()).limit(limit))
    return [version_from_row(row) for row in rows]


def relocate_version(connection: Connection, version: Version, moved: Version, *, tenant: str) -> set[str]:
    """Point a version at the copy of its bytes that `moved` has; return the blob that is no longer needed."""
    is_version = _is_version(version.adapter, version.version, tenant=tenant)
    connection.execute(sa.update(versions).where(*is_version).values(file=moved.file, offset=moved.offset))
    return set() if is_used(connection, version.file) else {version.file}


def digests(connection: Connection, keys: Iterable[tuple[str, int]], *, tenant: str) -> dict[tuple[str, int], str]:
    """Return the digests of the versions at these pairs of a name and a number; those that do not exist are absent."""
    statement = sa.select(versions.c.adapter, versions.c.version, versions.c.digest)
    rows = _rows_at(connection, statement, keys, tenant=tenant)
    return {(row.adapter, row.version): row.digest for row in rows}


def _rows_at(
    connection: Connection, statement: sa.Select[Any], keys: Iterable[tuple[str, int]], *, tenant: str
) -> Iterator[sa.Row[Any]]:
    """Yield the rows of a statement on versions at these pairs of a name and a number."""
    for part in batched(keys):
        # Not a list of pairs: SQLite would read all versions of the tenant to compare them with it.
        names, numbers, pairs = {name for name, _ in part}, {number for _, number in part}, set(part)
        are_near = (versions.c.adapter.in_(names), versions.c.version.in_(numbers))
        for row in connection.execute(statement.where(versions.c.tenant == tenant, *are_near)):
            if (row.adapter, row.version) in pairs:
                yield row


def alias_targets(connection: Connection, names: Iterable[str], alias: str, *, tenant: str) -> dict[str, int]:
    """Return the version that an alias of each of these names means; names without the alias are absent."""
    is_alias = (aliases.c.tenant == tenant, aliases.c.alias == alias)
    statement = sa.select(aliases.c.adapter, aliases.c.version).where(*is_alias)
    return {row.adapter: row.version for row in rows_in(connection, statement, aliases.c.adapter, names)}


def live_digests(connection: Connection, names: Iterable[str], *, tenant: str) -> dict[str, tuple[int, str | None]]:
    """Return the number and the digest of the live version of each of these names; names without one are absent.

    The digest is None if the alias points to no version.
    """
    is_alias = (aliases.c.tenant == tenant, aliases.c.alias == LIVE)
    statement = sa.select(aliases.c.adapter, aliases.c.version, versions.c.digest).outerjoin(versions, IS_TARGET)
    rows = rows_in(connection, statement.where(*is_alias), aliases.c.adapter, names)
    return {row.adapter: (row.version, row.digest) for row in rows}


def set_alias(connection: Connection, alias: str, numbers: Mapping[str, int], *, tenant: str) -> None:
    """Point an alias of each of these names at that version."""
    # Not an upsert, which every database spells differently.
    remove_alias(connection, alias, numbers, tenant=tenant)
    common = {"tenant": tenant, "alias": alias}
    values = [{"adapter": name, "version": number, **common} for name, number in numbers.items()]
    if values:
        connection.execute(sa.insert(aliases), values)


def remove_alias(connection: Connection, alias: str, names: Iterable[str], *, tenant: str) -> None:
    """Remove an alias of these names."""
    is_alias = (aliases.c.tenant == tenant, aliases.c.alias == alias)
    for part in batched(names):
        connection.execute(sa.delete(aliases).where(*is_alias, aliases.c.adapter.in_(part)))


def delete_adapter(connection: Connection, name: str, *, tenant: str) -> set[str]:
    """Remove an adapter's versions and aliases, leave its tombstone, and return the blobs that are no longer needed."""
    is_version = _is_version(name, tenant=tenant)
    columns = (versions.c.file, versions.c.statistics, versions.c.bytes)
    rows = connection.execute(sa.select(*columns).where(*is_version)).all()
    connection.execute(sa.delete(versions).where(*is_version))
    connection.execute(sa.delete(aliases).where(aliases.c.tenant == tenant, aliases.c.adapter == name))
    tombstone = {"deleted": True, "deletions": adapters.c.deletions + 1}
    is_adapter = (adapters.c.tenant == tenant, adapters.c.name == name)
    connection.execute(sa.update(adapters).where(*is_adapter).values(tombstone))
    removed = {"versions": -len(rows), "version_bytes": -sum(row.bytes for row in rows)}
    add_to_totals(connection, tenant=tenant, adapters=-1, **removed)
    statistics = {row.statistics for row in rows} - {None}
    # The versions of a fleet share one blob, and those of other names stay.
    return {file for file in {row.file for row in rows} if not is_used(connection, file)} | statistics


def increment_revision(connection: Connection, names: Collection[str], *, tenant: str) -> None:
    """Raise the revision, and list the names that changed, so that every process drops what it has cached of them."""
    connection.execute(sa.update(catalog).values(revision=catalog.c.revision + 1))
    revision = connection.scalars(sa.select(catalog.c.revision)).one()
    connection.execute(sa.delete(changes).where(changes.c.revision <= revision - _LISTED_REVISIONS))
    # A revision that lists no name means that any name may have changed.
    if len(names) <= MAX_CHANGES:
        of_revision = {"revision": revision, "tenant": tenant}
        connection.execute(sa.insert(changes), [of_revision | {"name": name} for name in dict.fromkeys(names)])


def summaries(connection: Connection, names: Sequence[str], *, tenant: str) -> list[AdapterSummary]:
    """Return the adapters of these names, in that order; all of them exist."""
    is_adapter = (adapters.c.tenant == tenant, adapters.c.name.in_(names))
    is_version = (versions.c.tenant == tenant, versions.c.adapter.in_(names))
    is_alias = (aliases.c.tenant == tenant, aliases.c.adapter.in_(names))
    created = sa.select(adapters.c.name, adapters.c.created_at).where(*is_adapter)
    totals = sa.select(versions.c.adapter, sa.func.count().label("total"))
    counted = totals.where(*is_version).group_by(versions.c.adapter)
    pointing = sa.select(aliases).where(*is_alias).order_by(aliases.c.alias)
    living = sa.select(*_DESCRIBED).join(aliases, IS_TARGET).where(*is_version, aliases.c.alias == LIVE)
    created_at = {row.name: row.created_at for row in connection.execute(created)}
    counts = {row.adapter: row.total for row in connection.execute(counted)}
    live = {row.adapter: version_from_row(row) for row in connection.execute(living)}
    targets: dict[str, dict[str, int]] = {name: {} for name in names}
    for row in connection.execute(pointing):
        targets[row.adapter][row.alias] = row.version
    return [
        AdapterSummary(
            name=name,
            created_at=created_at[name],
            aliases=targets[name],
            live=live.get(name),
            versions=counts.get(name, 0),
        )
        for name in names
    ]


def _is_version(name: str, number: int | None = None, *, tenant: str) -> list[sa.ColumnElement[bool]]:
    """Return the conditions for the versions of an adapter, or for one of them."""
    conditions = [versions.c.tenant == tenant, versions.c.adapter == name]
    return conditions if number is None else [*conditions, versions.c.version == number]


def _newest(connection: Connection, name: str, *, tenant: str) -> Sequence[sa.Row[*tuple[Any, ...]]]:
    """Return the numbers of an adapter's newest versions, newest first, each with the job that trained it."""
    statement = sa.select(versions.c.version, versions.c.job).where(*_is_version(name, tenant=tenant))
    return connection.execute(statement.order_by(versions.c.version.desc()).limit(_LISTED_VERSIONS)).all()


def is_used(connection: Connection, file: str) -> bool:
    """Return whether a version, deleted or not, has its bytes in a blob."""
    statements = (
        sa.select(table.c.file).where(table.c.file == file).limit(1) for table in (versions, trashed_versions)
    )
    return any(connection.execute(statement).first() is not None for statement in statements)
