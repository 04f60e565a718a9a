"""Statements on the catalogue's rows, each within a transaction that the caller holds."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.catalog.versions import AdapterSummary, Source, Version
from adapters.errors import AdapterNotFound, AdapterNotLive, AliasNotFound, VersionNotFound, shorten
from adapters.names import LIVE, MAX_VERSION, Reference
from adapters.storage.schema import TENANT, adapters, aliases, batched, catalog, rows_in, versions

_OF_ADAPTER = adapters.c.tenant == TENANT
_OF_VERSION = versions.c.tenant == TENANT
_OF_ALIAS = aliases.c.tenant == TENANT
_IS_TARGET = (aliases.c.adapter == versions.c.adapter) & (aliases.c.version == versions.c.version)
# Versions that an error lists.
_LISTED_VERSIONS = 10
_FIELDS = frozenset(Version.__dataclass_fields__)
_DESCRIBED = [column for column in versions.c if column.name not in ("tenant", "evidence")]
# The columns that serving needs of a version, which is cached: metrics and lineage may be long.
_SERVED = [column for column in _DESCRIBED if column.name not in ("metrics", "lineage")]
_NUMBERED = sa.select(*_SERVED).where(
    _OF_VERSION,
    versions.c.adapter.in_(sa.bindparam("names", expanding=True)),
    versions.c.version.in_(sa.bindparam("numbers", expanding=True)),
)
_ALIASED = (
    sa.select(*_SERVED, aliases.c.alias)
    .join(aliases, _IS_TARGET)
    .where(_OF_ALIAS, _OF_VERSION, versions.c.adapter.in_(sa.bindparam("names", expanding=True)))
)


def name_range(column: sa.ColumnElement[str], *, prefix: str, after: str) -> list[sa.ColumnElement[bool]]:
    """Return the conditions on a column of names for those that begin with `prefix` and follow `after`.

    There is one lower bound, the higher of the two. With both, SQLite begins at the one that it reads first and scans
    every name up to the other.
    """
    bounds = [column > after if after >= prefix else column >= prefix]
    # Names are ASCII without DEL: every name with the prefix lies below prefix + DEL.
    return [*bounds, column < prefix + "\x7f"] if prefix else bounds


def exists(connection: Connection, name: str, table: sa.Table = adapters) -> bool:
    """Return whether a table of names, such as that of adapters, has a name; a tombstone does not count."""
    columns = table.c
    statement = sa.select(columns.name).where(columns.tenant == TENANT, columns.name == name, ~columns.deleted)
    return connection.execute(statement).one_or_none() is not None


def list_names(connection: Connection, table: sa.Table, *, prefix: str, after: str, limit: int) -> Sequence[str]:
    """Return the names in a table of names that begin with `prefix` and follow `after`, in byte order."""
    name = table.c.name
    statement = sa.select(name).where(table.c.tenant == TENANT, ~table.c.deleted)
    statement = statement.where(*name_range(name, prefix=prefix, after=after))
    return connection.scalars(statement.order_by(name).limit(limit)).all()


def require(connection: Connection, name: str) -> None:
    """Raise `AdapterNotFound` if there is no adapter of that name."""
    if not exists(connection, name):
        raise AdapterNotFound(f"there is no adapter {name!r}", field="name", given=name)


def deletions(connection: Connection, names: Iterable[str]) -> dict[str, int]:
    """Return how often adapters of these names have been deleted; names that never existed are absent."""
    statement = sa.select(adapters.c.name, adapters.c.deletions).where(_OF_ADAPTER)
    return {row.name: row.deletions for row in rows_in(connection, statement, adapters.c.name, names)}


def find(connection: Connection, reference: Reference) -> Version:
    """Return the version that a reference means now; raise a `NotFound` that lists what exists instead."""
    name = reference.name
    require(connection, name)
    if reference.version is not None:
        return get_version(connection, name, reference.version)
    number = alias_targets(connection, [name], reference.alias).get(name)
    if number is not None:
        return get_version(connection, name, number)
    if reference.alias != LIVE:
        raise AliasNotFound(f"{name!r} has no alias {reference.alias!r}", field="adapter", given=str(reference))
    newest = _newest(connection, name)
    existing = ", ".join(f"{name}@{row.version}" for row in newest)
    trained = next((f"; job {row.job} trained {name}@{row.version}" for row in newest if row.job is not None), "")
    detail = f"no version of {name!r} is live; there are: {existing}{trained}"
    raise AdapterNotLive(detail, field="adapter", given=name, expected=existing)


def find_all(connection: Connection, references: Collection[Reference]) -> dict[Reference, Version]:
    """Return what `find` returns, without metrics and lineage; references that mean no version are absent."""
    names = sorted({reference.name for reference in references})
    numbers = sorted({reference.version or 0 for reference in references} - {0})
    numbers = [number for number in numbers if number <= MAX_VERSION]
    targets: dict[Reference, Version] = {}
    for part in batched(names):
        for row in connection.execute(_ALIASED, {"names": part}):
            targets[Reference(row.adapter, alias=row.alias)] = version_from_row(row)
        if numbers:
            for row in connection.execute(_NUMBERED, {"names": part, "numbers": numbers}):
                targets[Reference(row.adapter, version=row.version)] = version_from_row(row)
    return {reference: targets[reference] for reference in references if reference in targets}


def find_live(connection: Connection, name: str) -> Version | None:
    """Return the live version of a name; None if there is none."""
    try:
        return find(connection, Reference(name))
    except (AdapterNotFound, AdapterNotLive):
        return None


def get_version(connection: Connection, name: str, number: int) -> Version:
    """Return one version of an adapter that exists; raise `VersionNotFound`."""
    row = None
    if number <= MAX_VERSION:
        statement = sa.select(*_DESCRIBED).where(_OF_VERSION, versions.c.adapter == name, versions.c.version == number)
        row = connection.execute(statement).one_or_none()
    if row is None:
        existing = ", ".join(str(row.version) for row in _newest(connection, name))
        detail = f"{name!r} has no version {shorten(number)}; there are: {existing}"
        raise VersionNotFound(detail, field="version", given=number, expected=f"one of {existing}")
    return version_from_row(row)


def version_from_row(row: sa.Row[*tuple[Any, ...]]) -> Version:
    """Return the version in a row of the table of versions; metrics and lineage are None if they were not read."""
    values = {name: value for name, value in row._mapping.items() if name in _FIELDS}
    return Version(**{"metrics": None} | values | {"source": Source(values["source"])})


def allocate_numbers(
    connection: Connection, names: Sequence[str], created_at: str, table: sa.Table = adapters
) -> list[int]:
    """Return the next version number for each of the names, and create or restore the rows that are missing."""
    is_tenant, statement = table.c.tenant == TENANT, sa.select(table).where(table.c.tenant == TENANT)
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
    if new:
        connection.execute(sa.insert(table).values(tenant=TENANT, deleted=False), new)
    if known:
        of_name = table.c.name == sa.bindparam("of_name")
        connection.execute(sa.update(table).where(is_tenant, of_name).values(deleted=False), known)
    return numbers


def insert_versions(connection: Connection, new: Iterable[tuple[Version, bytes | None]]) -> None:
    """Add the rows of versions, each with its evidence."""
    common = {"tenant": TENANT}
    values = [
        {name: getattr(version, name) for name in _FIELDS} | common | {"evidence": evidence}
        for version, evidence in new
    ]
    connection.execute(sa.insert(versions), values)


def versions_at(connection: Connection, keys: Iterable[tuple[str, int]]) -> Iterator[tuple[Version, bytes | None]]:
    """Yield the versions at these pairs of a name and a number that exist, each with its evidence."""
    statement = sa.select(*_DESCRIBED, versions.c.evidence).where(_OF_VERSION)
    for row in rows_in(connection, statement, sa.tuple_(versions.c.adapter, versions.c.version), keys):
        yield version_from_row(row), row.evidence


def list_versions(connection: Connection, name: str, *, below: int, limit: int) -> list[Version]:
    """Return an adapter's versions with numbers below one, newest first."""
    statement = sa.select(*_DESCRIBED).where(_OF_VERSION, versions.c.adapter == name, versions.c.version < below)
    rows = connection.execute(statement.order_by(versions.c.version.desc()).limit(limit))
    return [version_from_row(row) for row in rows]


def relocate_version(connection: Connection, version: Version, moved: Version) -> set[str]:
    """Point a version at the copy of its bytes that `moved` has; return the blob that is no longer needed."""
    is_version = (_OF_VERSION, versions.c.adapter == version.adapter, versions.c.version == version.version)
    connection.execute(sa.update(versions).where(*is_version).values(file=moved.file, offset=moved.offset))
    return set() if _is_used(connection, version.file) else {version.file}


def existing_versions(connection: Connection, keys: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
    """Return those of these pairs of a name and a version number that exist."""
    statement = sa.select(versions.c.adapter, versions.c.version).where(_OF_VERSION)
    key = sa.tuple_(versions.c.adapter, versions.c.version)
    return {(row.adapter, row.version) for row in rows_in(connection, statement, key, keys)}


def alias_targets(connection: Connection, names: Iterable[str], alias: str) -> dict[str, int]:
    """Return the version that an alias of each of these names means; names without the alias are absent."""
    statement = sa.select(aliases.c.adapter, aliases.c.version).where(_OF_ALIAS, aliases.c.alias == alias)
    return {row.adapter: row.version for row in rows_in(connection, statement, aliases.c.adapter, names)}


def set_alias(connection: Connection, alias: str, numbers: Mapping[str, int]) -> None:
    """Point an alias of each of these names at that version."""
    # Not an upsert, which every database spells differently.
    remove_alias(connection, alias, numbers)
    common = {"tenant": TENANT, "alias": alias}
    values = [{"adapter": name, "version": number, **common} for name, number in numbers.items()]
    if values:
        connection.execute(sa.insert(aliases), values)


def remove_alias(connection: Connection, alias: str, names: Iterable[str]) -> None:
    """Remove an alias of these names."""
    for part in batched(names):
        connection.execute(sa.delete(aliases).where(_OF_ALIAS, aliases.c.alias == alias, aliases.c.adapter.in_(part)))


def delete_adapter(connection: Connection, name: str) -> set[str]:
    """Remove an adapter's versions and aliases, leave its tombstone, and return the blobs that are no longer needed."""
    is_version = (_OF_VERSION, versions.c.adapter == name)
    rows = connection.execute(sa.select(versions.c.file, versions.c.statistics).where(*is_version)).all()
    connection.execute(sa.delete(versions).where(*is_version))
    connection.execute(sa.delete(aliases).where(_OF_ALIAS, aliases.c.adapter == name))
    tombstone = {"deleted": True, "deletions": adapters.c.deletions + 1}
    connection.execute(sa.update(adapters).where(_OF_ADAPTER, adapters.c.name == name).values(tombstone))
    statistics = {row.statistics for row in rows} - {None}
    # The versions of a fleet share one blob, and those of other names stay.
    return {file for file in {row.file for row in rows} if not _is_used(connection, file)} | statistics


def increment_revision(connection: Connection) -> None:
    """Raise the revision, so that every process drops what it has cached of the catalogue."""
    connection.execute(sa.update(catalog).values(revision=catalog.c.revision + 1))


def summaries(connection: Connection, names: Sequence[str]) -> list[AdapterSummary]:
    """Return the adapters of these names, in that order; all of them exist."""
    created = sa.select(adapters.c.name, adapters.c.created_at).where(_OF_ADAPTER, adapters.c.name.in_(names))
    totals = sa.select(versions.c.adapter, sa.func.count().label("total")).where(_OF_VERSION)
    counted = totals.where(versions.c.adapter.in_(names)).group_by(versions.c.adapter)
    pointing = sa.select(aliases).where(_OF_ALIAS, aliases.c.adapter.in_(names)).order_by(aliases.c.alias)
    is_live = (_OF_ALIAS, aliases.c.alias == LIVE, versions.c.adapter.in_(names))
    living = sa.select(*_DESCRIBED).join(aliases, _IS_TARGET).where(_OF_VERSION, *is_live)
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


def _newest(connection: Connection, name: str) -> Sequence[sa.Row[*tuple[Any, ...]]]:
    """Return the numbers of an adapter's newest versions, newest first, each with the job that trained it."""
    statement = sa.select(versions.c.version, versions.c.job).where(_OF_VERSION, versions.c.adapter == name)
    return connection.execute(statement.order_by(versions.c.version.desc()).limit(_LISTED_VERSIONS)).all()


def _is_used(connection: Connection, file: str) -> bool:
    return connection.execute(sa.select(versions.c.file).where(versions.c.file == file).limit(1)).first() is not None
