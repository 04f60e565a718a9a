"""Resolver: what references mean, cached for serving and never older than the last commit of any process."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Version
from adapters.names import Reference

# References of all tenants that are cached; each takes 0.7 KB.
MAX_CACHED = 2**16
# A change of a name copies one of the parts of its tenant's cache.
_PARTS = 16


class _Part:
    """Versions by the reference that means them, of some names of one tenant."""

    __slots__ = ("_others", "versions")

    def __init__(self) -> None:
        self.versions: dict[Reference, Version] = {}
        # References of each name that have a number or another alias: few, because most requests name live.
        self._others: dict[str, tuple[Reference, ...]] = {}

    def add(self, reference: Reference, version: Version) -> None:
        """Cache a version."""
        if reference not in self.versions and reference != Reference(reference.name):
            self._others[reference.name] = (*self._others.get(reference.name, ()), reference)
        self.versions[reference] = version

    def forget(self, name: str) -> None:
        """Drop every reference to a name."""
        for reference in (Reference(name), *self._others.pop(name, ())):
            self.versions.pop(reference, None)

    def copy(self) -> "_Part":
        """Return a copy."""
        copy = _Part()
        copy.versions, copy._others = self.versions.copy(), self._others.copy()
        return copy


class TenantCache:
    """Versions of one tenant by the reference that means them."""

    def __init__(self, parts: Sequence[_Part] | None = None) -> None:
        self._parts = [_Part() for _ in range(_PARTS)] if parts is None else list(parts)
        # The two mappings of a part change together: a copy would otherwise have references that it cannot forget.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(len(part.versions) for part in self._parts)

    def __contains__(self, reference: Reference) -> bool:
        return self.get(reference) is not None

    def get(self, reference: Reference) -> Version | None:
        """Return the version that a reference means, if it is cached."""
        return self._parts[hash(reference.name) % _PARTS].versions.get(reference)

    def add(self, versions: Mapping[Reference, Version]) -> None:
        """Cache versions."""
        with self._lock:
            for reference, version in versions.items():
                self._part(reference.name).add(reference, version)

    def evict(self, number: int) -> None:
        """Forget names until at least `number` references are gone: those cached first in the largest parts."""
        with self._lock:
            left = len(self) - number
            while len(self) > max(left, 0):
                largest = max(self._parts, key=lambda part: len(part.versions))
                largest.forget(next(iter(largest.versions)).name)

    def without(self, names: Iterable[str]) -> "TenantCache":
        """Return a cache that has no reference to these names. It shares the parts that have none of them."""
        cache, copied = TenantCache(self._parts), set[int]()
        cache._lock = self._lock
        with self._lock:
            for name in names:
                index = hash(name) % _PARTS
                if index not in copied:
                    cache._parts[index] = self._parts[index].copy()
                    copied.add(index)
                cache._parts[index].forget(name)
        return cache

    def _part(self, name: str) -> _Part:
        return self._parts[hash(name) % _PARTS]


_EMPTY = TenantCache()


class Snapshot:
    """The versions that references of each tenant mean, read at one revision of the catalogue or later."""

    def __init__(self, catalog: Catalog, tenants: Mapping[str, TenantCache] = MappingProxyType({})) -> None:
        self._catalog = catalog
        self._tenants = dict(tenants)

    def cached(self, tenant: str) -> TenantCache:
        """Return the versions that were read before, by the reference of the tenant that means them."""
        return self._tenants.get(tenant, _EMPTY)

    def versions(
        self, references: Sequence[Reference], *, tenant: str
    ) -> Iterator[tuple[Reference, Version | Exception]]:
        """Yield each reference with the version that it means, or with the error that `Catalog.find` raises."""
        cached = self.cached(tenant)
        uncached = [reference for reference in references if reference not in cached]
        versions = self._catalog.find_all(uncached, tenant=tenant) if uncached else {}
        # References that mean nothing are not cached: a client could send any number of them.
        if versions:
            self._add(versions, tenant=tenant)
        for reference in references:
            version = cached.get(reference) or versions.get(reference)
            try:
                yield reference, version or self._catalog.find(reference, tenant=tenant)
            except Exception as error:
                yield reference, error

    def without(self, changes: Iterable[tuple[str, str]]) -> "Snapshot":
        """Return a snapshot of a later revision: what this one has cached, but for the given names of tenants.

        What has a changed name is copied, because a thread that read a row before the change still holds this snapshot,
        and caches the old row here. The rest is shared: every row of it that was read since this snapshot was made is
        still right.
        """
        tenants = self._tenants.copy()
        names: dict[str, list[str]] = {}
        for tenant, name in changes:
            names.setdefault(tenant, []).append(name)
        for tenant in names.keys() & tenants.keys():
            tenants[tenant] = tenants[tenant].without(names[tenant])
        return Snapshot(self._catalog, tenants)

    def _add(self, versions: Mapping[Reference, Version], *, tenant: str) -> None:
        self._tenants.setdefault(tenant, TenantCache()).add(versions)
        excess = sum(map(len, self._tenants.values())) - MAX_CACHED
        if excess > 0:
            # That of the tenant with the most, so that a client cannot make the service forget another tenant's names.
            max(self._tenants.values(), key=len).evict(excess)


class Resolver:
    """Provides snapshots that are never older than the last commit of any process."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.watch = catalog.database.catalog_watch()
        self._revision = -1
        self._snapshot = Snapshot(catalog)

    def close(self) -> None:
        """Close the connection that watches the catalogue."""
        self.watch.close()

    def fresh(self) -> Snapshot:
        """Return a snapshot that caches nothing from before this call."""
        return Snapshot(self._catalog)

    def current(self) -> Snapshot:
        """Return a snapshot that includes every change acknowledged before this call.

        If `watch.begin_read` has returned a future, its result comes first, and the changes are those acknowledged
        before that call. Raises `CatalogBusy` if a commit is under way at this moment: try again in a millisecond.
        """
        revision = self.watch.revision()
        if revision != self._revision:
            # Read after the revision: they may include later changes, which are then dropped twice.
            changes = self.watch.changes_since(self._revision)
            self._snapshot = self.fresh() if changes is None else self._snapshot.without(changes)
            self._revision = revision
        return self._snapshot
