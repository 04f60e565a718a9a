"""References to immutable versions, cached for as long as the catalogue does not change."""

from collections.abc import Iterator, Sequence

from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Version
from adapters.names import Reference

# References. Above this number a snapshot stops caching, so that a client cannot fill memory with names.
_MAX_CACHED = 100_000


class Snapshot:
    """The versions that references mean, read at one revision of the catalogue or later."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._versions: dict[Reference, Version] = {}

    def cached(self, reference: Reference) -> Version | None:
        """Return the version that a reference means if it was read before; None otherwise."""
        return self._versions.get(reference)

    def version(self, reference: Reference) -> Version:
        """Return the version that a reference means; raise a `NotFound` that lists what exists instead."""
        ((_, version),) = self.versions([reference])
        if isinstance(version, Exception):
            raise version
        return version

    def versions(self, references: Sequence[Reference]) -> Iterator[tuple[Reference, Version | Exception]]:
        """Yield each reference with the version that it means, or with the error that `version` would raise."""
        uncached = [reference for reference in references if reference not in self._versions]
        versions = self._catalog.find_all(uncached) if uncached else {}
        # References that mean nothing are not cached: a client could send any number of them.
        if len(self._versions) < _MAX_CACHED:
            self._versions |= versions
        for reference in references:
            version = self._versions.get(reference) or versions.get(reference)
            try:
                yield reference, version or self._catalog.find(reference)
            except Exception as error:
                yield reference, error


class Resolver:
    """Provides snapshots that are never older than the last commit of any process on this machine."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._watch = catalog.database.catalog_watch()
        self._revision = -1
        self._snapshot = Snapshot(catalog)

    def close(self) -> None:
        """Close the connection that watches the catalogue."""
        self._watch.close()

    def fresh(self) -> Snapshot:
        """Return a snapshot that caches nothing from before this call."""
        return Snapshot(self._catalog)

    def current(self) -> Snapshot:
        """Return a snapshot that includes every change acknowledged before this call.

        Raises `CatalogBusy` if a commit is under way at this moment: try again in a millisecond.
        """
        revision = self._watch.revision()
        if revision != self._revision:
            # A new snapshot, not a cleared one: a thread that read a row before the commit still holds the old one,
            # and caches the old row there.
            self._snapshot, self._revision = Snapshot(self._catalog), revision
        return self._snapshot
