"""Statements on the catalogue's rows, each within a transaction that the caller holds."""

from collections.abc import Collection, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.errors import AdapterNotFound, AdapterNotLive, AliasNotFound, VersionNotFound, shown
from adapters.names import LIVE, MAX_VERSION, Reference
from adapters.tables import DEFAULT_TENANT as TENANT
from adapters.tables import adapters, aliases, catalog, versions
from adapters.versions import AdapterSummary, Source, Version

_OF_ADAPTER = adapters.c.tenant == TENANT
_OF_VERSION = versions.c.tenant == TENANT
_OF_ALIAS = aliases.c.tenant == TENANT
_NAMES_AT_ONCE = 500
_FIELDS = frozenset(Version.__dataclass_fields__)
_NUMBERED = sa.select(versions).where(
    _OF_VERSION,
    versions.c.adapter.in_(sa.bindparam("names", expanding=True)),
    versions.c.version.in_(sa.bindparam("numbers", expanding=True)),
)
_ALIASED = (
    sa.select(versions, aliases.c.alias)
    .join(aliases, (aliases.c.adapter == versions.c.adapter) & (aliases.c.version == versions.c.version))
    .where(_OF_ALIAS, _OF_VERSION, versions.c.adapter.in_(sa.bindparam("names", expanding=True)))
)


def exists(connection: Connection, name: str) -> bool:
    """Whether there is an adapter of that name; a tombstone is none."""
    statement = sa.select(adapters.c.name).where(_OF_ADAPTER, adapters.c.name == name, adapters.c.deleted.is_(False))
    return connection.execute(statement).one_or_none() is not None


def require(connection: Connection, name: str) -> None:
    """Raises `AdapterNotFound` where there is no adapter of that name."""
    if not exists(connection, name):
        raise AdapterNotFound(f"there is no adapter {name!r}", field="name", given=name)


def deletions(connection: Connection, name: str) -> int:
    """How often an adapter of that name has been deleted."""
    statement = sa.select(adapters.c.deletions).where(_OF_ADAPTER, adapters.c.name == name)
    return connection.scalars(statement).one_or_none() or 0


def find(connection: Connection, reference: Reference) -> Version:
    """What a reference means now; raises a `NotFound` that says what there is instead."""
    name = reference.name
    require(connection, name)
    if reference.version is not None:
        return version(connection, name, reference.version)
    statement = sa.select(aliases.c.version).where(
        _OF_ALIAS, aliases.c.adapter == name, aliases.c.alias == reference.alias
    )
    number = connection.scalars(statement).one_or_none()
    if number is not None:
        return version(connection, name, number)
    if reference.alias != LIVE:
        raise AliasNotFound(f"{name!r} has no alias {reference.alias!r}", field="adapter", given=str(reference))
    there = ", ".join(f"{name}@{number}" for number in _newest_numbers(connection, name))
    raise AdapterNotLive(
        f"no version of {name!r} is live; there are: {there}", field="adapter", given=name, expected=there
    )


def find_all(connection: Connection, references: Collection[Reference]) -> dict[Reference, Version]:
    """What `find` would return for each of the references that it would return something for."""
    names = sorted({reference.name for reference in references})
    numbers = sorted({reference.version or 0 for reference in references} - {0})
    numbers = [number for number in numbers if number <= MAX_VERSION]
    found: dict[Reference, Version] = {}
    for begin in range(0, len(names), _NAMES_AT_ONCE):
        some = names[begin : begin + _NAMES_AT_ONCE]
        for row in connection.execute(_ALIASED, {"names": some}):
            found[Reference(row.adapter, alias=row.alias)] = as_version(row)
        if numbers:
            for row in connection.execute(_NUMBERED, {"names": some, "numbers": numbers}):
                found[Reference(row.adapter, version=row.version)] = as_version(row)
    return {reference: found[reference] for reference in references if reference in found}


def live_or_none(connection: Connection, name: str) -> Version | None:
    """The version that a bare name means, where there is one."""
    try:
        return find(connection, Reference(name))
    except (AdapterNotFound, AdapterNotLive):
        return None


def version(connection: Connection, name: str, number: int) -> Version:
    """One version of an adapter that exists; raises `VersionNotFound`."""
    row = None
    if number <= MAX_VERSION:
        statement = sa.select(versions).where(_OF_VERSION, versions.c.adapter == name, versions.c.version == number)
        row = connection.execute(statement).one_or_none()
    if row is None:
        there = ", ".join(str(number) for number in _newest_numbers(connection, name))
        raise VersionNotFound(
            f"{name!r} has no version {shown(number)}; there are: {there}",
            field="version",
            given=number,
            expected=f"one of {there}",
        )
    return as_version(row)


def as_version(row: sa.Row[tuple[object, ...]]) -> Version:
    """A row of the versions table as the value that the rest of the house knows."""
    values = {name: value for name, value in row._mapping.items() if name in _FIELDS}
    return Version(**values | {"source": Source(values["source"])})


def take_number(connection: Connection, name: str, created_at: str) -> int:
    """The next version's number, with the adapter's row made, or brought back, where it is missing."""
    mine = (_OF_ADAPTER, adapters.c.name == name)
    row = connection.execute(sa.select(adapters.c.next_version, adapters.c.deleted).where(*mine)).one_or_none()
    if row is None:
        connection.execute(
            sa.insert(adapters).values(
                tenant=TENANT, name=name, created_at=created_at, next_version=2, deleted=False, deletions=0
            )
        )
        return 1
    back = {"deleted": False, "created_at": created_at} if row.deleted else {}
    connection.execute(sa.update(adapters).where(*mine).values(next_version=row.next_version + 1, **back))
    return int(row.next_version)


def insert(connection: Connection, made: Version) -> None:
    """Add a version's row."""
    values = {name: getattr(made, name) for name in Version.__dataclass_fields__}
    connection.execute(sa.insert(versions).values(tenant=TENANT, **values))


def point(connection: Connection, name: str, alias: str, number: int) -> None:
    """Let an alias mean a version."""
    mine = (_OF_ALIAS, aliases.c.adapter == name, aliases.c.alias == alias)
    if connection.execute(sa.update(aliases).where(*mine).values(version=number)).rowcount == 0:
        connection.execute(sa.insert(aliases).values(tenant=TENANT, adapter=name, alias=alias, version=number))


def bury(connection: Connection, name: str) -> set[str]:
    """Remove an adapter's versions and aliases, leave its tombstone; returns the blobs that nobody needs now."""
    mine = (_OF_VERSION, versions.c.adapter == name)
    files = set(connection.scalars(sa.select(versions.c.file).where(*mine)))
    connection.execute(sa.delete(versions).where(*mine))
    connection.execute(sa.delete(aliases).where(_OF_ALIAS, aliases.c.adapter == name))
    connection.execute(
        sa.update(adapters)
        .where(_OF_ADAPTER, adapters.c.name == name)
        .values(deleted=True, deletions=adapters.c.deletions + 1)
    )
    # A fleet's versions share one blob, and those of other names stay.
    return {file for file in files if not _is_used(connection, file)}


def next_revision(connection: Connection) -> None:
    """Tell every process that what it remembers of the catalogue may be old."""
    connection.execute(sa.update(catalog).values(revision=catalog.c.revision + 1))


def summaries(connection: Connection, names: Sequence[str]) -> list[AdapterSummary]:
    """The adapters of these names, in that order; all of them exist."""
    created = sa.select(adapters.c.name, adapters.c.created_at).where(_OF_ADAPTER, adapters.c.name.in_(names))
    counted = (
        sa.select(versions.c.adapter, sa.func.count().label("total"))
        .where(_OF_VERSION, versions.c.adapter.in_(names))
        .group_by(versions.c.adapter)
    )
    pointing = sa.select(aliases).where(_OF_ALIAS, aliases.c.adapter.in_(names)).order_by(aliases.c.alias)
    same = (aliases.c.adapter == versions.c.adapter) & (aliases.c.version == versions.c.version)
    living = (
        sa.select(versions)
        .join(aliases, same & _OF_ALIAS)
        .where(_OF_VERSION, aliases.c.alias == LIVE, versions.c.adapter.in_(names))
    )
    created_at = {row.name: row.created_at for row in connection.execute(created)}
    counts = {row.adapter: row.total for row in connection.execute(counted)}
    live = {row.adapter: as_version(row) for row in connection.execute(living)}
    pointed: dict[str, dict[str, int]] = {name: {} for name in names}
    for row in connection.execute(pointing):
        pointed[row.adapter][row.alias] = row.version
    return [
        AdapterSummary(
            name=name,
            created_at=created_at[name],
            aliases=pointed[name],
            live=live.get(name),
            versions=counts.get(name, 0),
        )
        for name in names
    ]


def _newest_numbers(connection: Connection, name: str) -> Sequence[int]:
    statement = (
        sa.select(versions.c.version)
        .where(_OF_VERSION, versions.c.adapter == name)
        .order_by(versions.c.version.desc())
        .limit(10)
    )
    return connection.scalars(statement).all()


def _is_used(connection: Connection, file: str) -> bool:
    return connection.execute(sa.select(versions.c.file).where(versions.c.file == file).limit(1)).first() is not None
