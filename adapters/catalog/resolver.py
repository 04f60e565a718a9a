"""References → immutable versions, remembered for as long as the catalogue stays as it is."""

from collections.abc import Iterator, Sequence

from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Version
from adapters.names import Reference
from adapters.storage.database import CatalogWatch

_REMEMBERED = 100_000
"""References: past this a view stops remembering, so that a client cannot fill it with names."""


class Snapshot:
    """What references mean, as of one look at the catalogue or later."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._known: dict[Reference, Version] = {}

    def cached(self, reference: Reference) -> Version | None:
        """The version that a reference means, where that has been asked before."""
        return self._known.get(reference)

    def version(self, reference: Reference) -> Version:
        """The version that a reference means; raises the `NotFound` that says what there is instead."""
        ((_, found),) = self.versions([reference])
        if isinstance(found, Exception):
            raise found
        return found

    def versions(self, references: Sequence[Reference]) -> Iterator[tuple[Reference, Version | Exception]]:
        """Each reference with the version that it means, or the error that `version` would raise."""
        unknown = [reference for reference in references if reference not in self._known]
        found = self._catalog.find_all(unknown) if unknown else {}
        if len(self._known) < _REMEMBERED:
            self._known |= found
        for reference in references:
            version = self._known.get(reference) or found.get(reference)
            try:
                yield reference, version or self._catalog.find(reference)
            except Exception as error:
                yield reference, error


class Resolver:
    """Hands out views that are never older than the last commit of any process on this machine."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._watch = CatalogWatch(catalog.database.path)
        self._data_version = -1
        self._revision = -1
        self._view = Snapshot(catalog)

    def close(self) -> None:
        """Close the connection that watches for commits."""
        self._watch.close()

    def fresh(self) -> Snapshot:
        """A view that remembers nothing from before this call."""
        return Snapshot(self._catalog)

    def current(self) -> Snapshot:
        """A view in which everything that was acknowledged before this call is seen.

        Raises `CatalogBusy` where a commit is under way this very moment: try again in a millisecond.
        """
        # Read before the revision: a commit in between moves it again, and the next look sees that.
        data_version = self._watch.data_version()
        if data_version != self._data_version:
            revision = self._watch.revision()
            if revision != self._revision:
                # A new view, not a cleared one: a thread that read a row before the commit still holds the
                # old one, and remembers the old row there.
                self._view = Snapshot(self._catalog)
            self._data_version, self._revision = data_version, revision
        return self._view
