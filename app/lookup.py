"""What a question's references mean, and their adapters: at hand, or fetched by threads off the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from adapters.adapter import Adapter
from adapters.base_layer import BaseLayer
from adapters.errors import BlobCorrupt, LoraplexError
from adapters.names import Reference
from adapters.residency import Residency
from adapters.resolution import Resolver, View
from adapters.versions import Version
from app.tickets import Ticket

_THREADS = 4
Found = tuple[Sequence[Version | None], Sequence[Adapter | None]]


class Lookup:
    """References → versions that may answer on this base → resident adapters."""

    def __init__(
        self,
        base: BaseLayer,
        resolver: Resolver,
        residency: Residency,
        *,
        feature_space: str | None,
    ) -> None:
        self._base = base
        self._resolver = resolver
        self._residency = residency
        self._feature_space = feature_space
        self._loads: dict[str, asyncio.Task[Adapter]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, "load")

    def close(self) -> None:
        """Give back the threads."""
        self._threads.shutdown()

    def look(self) -> View:
        """A view that is not older than this call; raises `CatalogBusy`."""
        return self._resolver.look()

    def at_hand(self, view: View, ticket: Ticket) -> Found | None:
        """What a ticket asks for where all of it is known and resident; raises as `fetch` does."""
        versions = self._versions(ticket, view.known)
        adapters: list[Adapter | None] = []
        for reference, version in zip(ticket.choices, versions, strict=True):
            adapter = None if version is None else self._residency.get(version.digest)
            if adapter is None and reference is not None:
                return None
            adapters.append(adapter)
        return versions, adapters

    async def fetch(self, view: View, ticket: Ticket) -> Found:
        """What a ticket asks for, its unknown references read from the catalogue and its adapters from their blobs.

        Raises a `NotFound`, `BaseMismatch` or `FeatureSpaceMismatch` that names the row, or `BlobCorrupt`.
        """
        find, before = view.version, None
        while True:
            versions = await asyncio.get_running_loop().run_in_executor(self._threads, self._versions, ticket, find)
            try:
                return versions, await asyncio.gather(*map(self._adapter, versions))
            except BlobCorrupt:
                # Deleted between the look and the read, and perhaps made again: only what still stands is corrupt.
                if versions == before:
                    raise
                find, before = self._resolver.find, versions

    def _versions(self, ticket: Ticket, find: Callable[[Reference], Version | None]) -> list[Version | None]:
        versions: list[Version | None] = []
        for reference in ticket.choices:
            try:
                version = None if reference is None else find(reference)
                if version is not None:
                    version.check_answers_on(self._base, self._feature_space)
            except LoraplexError as error:
                error.field = "adapter"
                if ticket.question.by_row:
                    error.field, error.row = "adapters", ticket.question.references.index(reference)
                raise
            versions.append(version)
        return versions

    async def _adapter(self, version: Version | None) -> Adapter | None:
        if version is None:
            return None
        adapter = self._residency.get(version.digest)
        if adapter is not None:
            return adapter
        load = self._loads.get(version.digest)
        if load is None:
            load = self._loads[version.digest] = asyncio.get_running_loop().create_task(self._load(version))
        return await load

    async def _load(self, version: Version) -> Adapter:
        try:
            adapter = await asyncio.get_running_loop().run_in_executor(self._threads, self._residency.load, version)
        finally:
            del self._loads[version.digest]
        self._residency.keep(version.digest, adapter)
        return adapter
