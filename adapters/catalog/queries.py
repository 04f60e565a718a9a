"""Statements on the catalogue's rows, each within a transaction that the caller holds."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import Connection

from adapters.catalog.versions import AdapterSummary, Source, Version
from adapters.errors import AdapterNotFound, AdapterNotLive, AliasNotFound, VersionNotFound, shorten
from adapters.names import LIVE, MAX_VERSION, Reference
from adapters.storage.schema import DEFAULT_TENANT as TENANT
from adapters.storage.schema import adapters, aliases, catalog, versions

_OF_ADAPTER = adapters.c.tenant == TENANT
_OF_VERSION = versions.c.tenant == TENANT
_OF_ALIAS = aliases.c.tenant == TENANT
_AT_ONCE = 500
"""Names in one statement."""
_FIELDS = frozenset(Version.__dataclass_fields__)
_TOLD_ONLY = ("tenant", "metrics", "lineage")
# What answering needs of a version, which is remembered: of its lineage, what its outputs are.
_SERVED = [
    *(column for column in versions.c if column.name not in _TOLD_ONLY),
    versions.c.lineage["loss"].as_string().label("loss"),
]
_NUMBERED = sa.select(*_SERVED).where(
    _OF_VERSION,
    versions.c.adapter.in_(sa.bindparam("names", expanding=True)),
    versions.c.version.in_(sa.bindparam("numbers", expanding=True)),
)
_ALIASED = (
    sa.select(*_SERVED, aliases.c.alias)
    .join(aliases, (aliases.c.adapter == versions.c.adapter) & (aliases.c.version == versions.c.version))
    .where(_OF_ALIAS, _OF_VERSION, versions.c.adapter.in_(sa.bindparam("names", expanding=True)))
)

Item = TypeVar("Item")


def batched(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in lists of as many as one statement takes."""
    rest = iter(items)
    while some := list(islice(rest, _AT_ONCE)):
        yield some


def name_range(column: sa.ColumnElement[str], *, prefix: str, after: str) -> list[sa.ColumnElement[bool]]:
    """Conditions on a column of names: those that begin with `prefix`, in a list from past `after` on.

    One lower bound, the higher of the two: with both, SQLite begins at whichever it reads first and passes over every
    name up to the other.
    """
    bounds = [column > after if after >= prefix else column >= prefix]
    # Names are ASCII without DEL: every name with the prefix lies below prefix + DEL.
    return [*bounds, column < prefix + "\x7f"] if prefix else bounds


def exists(connection: Connection, name: str) -> bool:
    """Whether there is an adapter of that name; a tombstone is none."""
    statement = sa.select(adapters.c.name).where(_OF_ADAPTER, adapters.c.name == name, adapters.c.deleted.is_(False))
    return connection.execute(statement).one_or_none() is not None


def require(connection: Connection, name: str) -> None:
    """Raises `AdapterNotFound` where there is no adapter of that name."""
    if not exists(connection, name):
        raise AdapterNotFound(f"there is no adapter {name!r}", field="name", given=name)


def deletions(connection: Connection, names: Iterable[str]) -> dict[str, int]:
    """How often adapters of these names have been deleted, of those that there have been."""
    found: dict[str, int] = {}
    for some in batched(names):
        statement = sa.select(adapters.c.name, adapters.c.deletions).where(_OF_ADAPTER, adapters.c.name.in_(some))
        found.update((row.name, row.deletions) for row in connection.execute(statement))
    return found


def find(connection: Connection, reference: Reference) -> Version:
    """What a reference means now; raises a `NotFound` that says what there is instead."""
    name = reference.name
    require(connection, name)
    if reference.version is not None:
        return get_version(connection, name, reference.version)
    statement = sa.select(aliases.c.version).where(
        _OF_ALIAS, aliases.c.adapter == name, aliases.c.alias == reference.alias
    )
    number = connection.scalars(statement).one_or_none()
    if number is not None:
        return get_version(connection, name, number)
    if reference.alias != LIVE:
        raise AliasNotFound(f"{name!r} has no alias {reference.alias!r}", field="adapter", given=str(reference))
    there = ", ".join(f"{name}@{number}" for number in _newest_numbers(connection, name))
    raise AdapterNotLive(
        f"no version of {name!r} is live; there are: {there}", field="adapter", given=name, expected=there
    )


def find_all(connection: Connection, references: Collection[Reference]) -> dict[Reference, Version]:
    """What `find` would return for each of the references that it would return something for, to answer with: without
    metrics, and with no more of the lineage than its `loss`."""
    names = sorted({reference.name for reference in references})
    numbers = sorted({reference.version or 0 for reference in references} - {0})
    numbers = [number for number in numbers if number <= MAX_VERSION]
    found: dict[Reference, Version] = {}
    for some in batched(names):
        for row in connection.execute(_ALIASED, {"names": some}):
            found[Reference(row.adapter, alias=row.alias)] = _as_served(row)
        if numbers:
            for row in connection.execute(_NUMBERED, {"names": some, "numbers": numbers}):
                found[Reference(row.adapter, version=row.version)] = _as_served(row)
    return {reference: found[reference] for reference in references if reference in found}


def find_live(connection: Connection, name: str) -> Version | None:
    """The version that a bare name means, where there is one."""
    try:
        return find(connection, Reference(name))
    except (AdapterNotFound, AdapterNotLive):
        return None


def get_version(connection: Connection, name: str, number: int) -> Version:
    """One version of an adapter that exists; raises `VersionNotFound`."""
    row = None
    if number <= MAX_VERSION:
        statement = sa.select(versions).where(_OF_VERSION, versions.c.adapter == name, versions.c.version == number)
        row = connection.execute(statement).one_or_none()
    if row is None:
        there = ", ".join(str(number) for number in _newest_numbers(connection, name))
        raise VersionNotFound(
            f"{name!r} has no version {shorten(number)}; there are: {there}",
            field="version",
            given=number,
            expected=f"one of {there}",
        )
    return version_from_row(row)


def version_from_row(row: sa.Row[tuple[object, ...]]) -> Version:
    """A row of the versions table as the value that the rest of the house knows."""
    values = {name: value for name, value in row._mapping.items() if name in _FIELDS}
    return Version(**values | {"source": Source(values["source"])})


def _as_served(row: sa.Row[*tuple[Any, ...]]) -> Version:
    values = {name: value for name, value in row._mapping.items() if name in _FIELDS}
    lineage = None if row.loss is None else {"loss": row.loss}
    return Version(**values | {"source": Source(values["source"]), "metrics": None, "lineage": lineage})


def allocate_numbers(connection: Connection, names: Sequence[str], created_at: str) -> list[int]:
    """The next version's number for each of the names, with rows made, or brought back, where they are missing."""
    found: dict[str, sa.Row[tuple[object, ...]]] = {}
    for some in batched(dict.fromkeys(names)):
        statement = sa.select(adapters).where(_OF_ADAPTER, adapters.c.name.in_(some))
        found.update((row.name, row) for row in connection.execute(statement))
    next_number = {name: row.next_version for name, row in found.items()}
    taken = []
    for name in names:
        taken.append(next_number.get(name, 1))
        next_number[name] = taken[-1] + 1
    made = sqlite_insert(adapters)
    made = made.on_conflict_do_update(
        index_elements=[adapters.c.tenant, adapters.c.name],
        set_={name: made.excluded[name] for name in ("next_version", "created_at", "deleted")},
    )
    values = [
        {
            "tenant": TENANT,
            "name": name,
            "created_at": found[name].created_at if name in found and not found[name].deleted else created_at,
            "next_version": number,
            "deleted": False,
            "deletions": 0,
        }
        for name, number in next_number.items()
    ]
    connection.execute(made, values)
    return taken


def insert_versions(connection: Connection, made: Sequence[Version]) -> None:
    """Add the rows of versions."""
    values = [{name: getattr(version, name) for name in _FIELDS} | {"tenant": TENANT} for version in made]
    connection.execute(sa.insert(versions), values)


def relocate_version(connection: Connection, version: Version, moved: Version) -> set[str]:
    """Point a version at the copy of its bytes that `moved` has; return the blob that is no longer needed."""
    mine = (_OF_VERSION, versions.c.adapter == version.adapter, versions.c.version == version.version)
    connection.execute(sa.update(versions).where(*mine).values(file=moved.file, offset=moved.offset))
    return set() if _is_used(connection, version.file) else {version.file}


def existing_versions(connection: Connection, wanted: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
    """Those of these names' versions that there are."""
    found: set[tuple[str, int]] = set()
    for some in batched(wanted):
        statement = sa.select(versions.c.adapter, versions.c.version).where(
            _OF_VERSION, sa.tuple_(versions.c.adapter, versions.c.version).in_(some)
        )
        found.update((row.adapter, row.version) for row in connection.execute(statement))
    return found


def alias_targets(connection: Connection, names: Iterable[str], alias: str) -> dict[str, int]:
    """The versions that an alias of these names means, of those that have it."""
    found: dict[str, int] = {}
    for some in batched(names):
        statement = sa.select(aliases.c.adapter, aliases.c.version).where(
            _OF_ALIAS, aliases.c.alias == alias, aliases.c.adapter.in_(some)
        )
        found.update((row.adapter, row.version) for row in connection.execute(statement))
    return found


def set_alias(connection: Connection, alias: str, numbers: Mapping[str, int]) -> None:
    """Let an alias of each of these names mean that version."""
    made = sqlite_insert(aliases)
    made = made.on_conflict_do_update(
        index_elements=[aliases.c.tenant, aliases.c.adapter, aliases.c.alias],
        set_={"version": made.excluded.version},
    )
    values = [
        {"tenant": TENANT, "adapter": name, "alias": alias, "version": number} for name, number in numbers.items()
    ]
    if values:
        connection.execute(made, values)


def remove_alias(connection: Connection, alias: str, names: Iterable[str]) -> None:
    """Remove an alias of these names."""
    for some in batched(names):
        connection.execute(sa.delete(aliases).where(_OF_ALIAS, aliases.c.alias == alias, aliases.c.adapter.in_(some)))


def delete_adapter(connection: Connection, name: str) -> set[str]:
    """Remove an adapter's versions and aliases, leave its tombstone; returns the blobs that nobody needs now."""
    mine = (_OF_VERSION, versions.c.adapter == name)
    files = set(connection.scalars(sa.select(versions.c.file).where(*mine)))
    sums = set(connection.scalars(sa.select(versions.c.statistics).where(*mine, versions.c.statistics.is_not(None))))
    connection.execute(sa.delete(versions).where(*mine))
    connection.execute(sa.delete(aliases).where(_OF_ALIAS, aliases.c.adapter == name))
    connection.execute(
        sa.update(adapters)
        .where(_OF_ADAPTER, adapters.c.name == name)
        .values(deleted=True, deletions=adapters.c.deletions + 1)
    )
    # A fleet's versions share one blob, and those of other names stay.
    return {file for file in files if not _is_used(connection, file)} | sums


def increment_revision(connection: Connection) -> None:
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
    live = {row.adapter: version_from_row(row) for row in connection.execute(living)}
    meant: dict[str, dict[str, int]] = {name: {} for name in names}
    for row in connection.execute(pointing):
        meant[row.adapter][row.alias] = row.version
    return [
        AdapterSummary(
            name=name,
            created_at=created_at[name],
            aliases=meant[name],
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
