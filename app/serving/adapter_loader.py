"""What a question's references mean, and their adapters: at hand, or fetched by threads off the event loop."""

import asyncio
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from copy import copy
from typing import Generic, NamedTuple, TypeVar

from adapters.catalog.adapter_cache import AdapterCache
from adapters.catalog.resolver import Resolver, Snapshot
from adapters.catalog.versions import Version
from adapters.errors import BlobCorrupt, LoraplexError
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.names import Reference
from app.serving.queue_entry import QueueEntry

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
_TOGETHER_SECONDS = 0.002


class SingleFlight(Generic[K, V]):
    """What is on its way, by key. Nothing is remembered once it has come.

    `fetch`, which a thread runs, yields for each of its keys the value or the error, one by one as they come.
    """

    def __init__(self, fetch: Callable[[Sequence[K]], Iterator[tuple[K, V | Exception]]], threads: Executor) -> None:
        self._fetch = fetch
        self._threads = threads
        self._coming: dict[K, asyncio.Future[V]] = {}
        self._asked: list[K] = []

    def get(self, key: K) -> "asyncio.Future[V]":
        """The value of a key, when it comes; whoever waits for it must not cancel it."""
        future = self._coming.get(key)
        if future is None:
            loop = asyncio.get_running_loop()
            future = self._coming[key] = loop.create_future()
            if not self._asked:
                loop.call_soon(self._send, loop)
            self._asked.append(key)
        return future

    def _send(self, loop: asyncio.AbstractEventLoop) -> None:
        keys, self._asked = self._asked, []
        self._threads.submit(self._work, loop, keys)

    def _work(self, loop: asyncio.AbstractEventLoop, keys: Sequence[K]) -> None:
        missing = dict.fromkeys(keys)
        failure: Exception = AssertionError("a key was neither fetched nor refused")
        come: list[tuple[K, V | Exception]] = []
        told = time.monotonic()
        try:
            for key, result in self._fetch(keys):
                del missing[key]
                come.append((key, result))
                # Each telling may start a batch: what comes quickly comes together.
                if time.monotonic() - told > _TOGETHER_SECONDS:
                    loop.call_soon_threadsafe(self._come, come)
                    come, told = [], time.monotonic()
        except Exception as error:
            failure = error
        loop.call_soon_threadsafe(self._come, come + [(key, failure) for key in missing])

    def _come(self, results: Sequence[tuple[K, V | Exception]]) -> None:
        for key, result in results:
            future = self._coming.pop(key)
            if isinstance(result, Exception):
                future.set_exception(result)
                future.exception()  # seen, even where everybody who asked has gone
            else:
                future.set_result(result)


_THREADS = 1
_AT_ONCE_SECONDS = 0.001
"""So long a batch takes in what the kernel has in memory: a hop to a thread costs several times what that does."""
Found = tuple[Sequence[Version | None], Sequence[Adapter | None]]
_Asked = tuple[Snapshot, Reference]


class CacheStats(NamedTuple):
    """Sums since the start, and what is in memory now."""

    hits: int
    """Adapters asked for that were resident."""
    misses: int
    loads: int
    evictions: int
    resident_bytes: int
    resident_adapters: int


class AdapterLoader:
    """References → versions that may answer on this base → resident adapters."""

    def __init__(
        self, base: BaseLayer, resolver: Resolver, residency: AdapterCache, *, feature_space: str | None
    ) -> None:
        self._base = base
        self._resolver = resolver
        self._residency = residency
        self._feature_space = feature_space
        # Apart: after a publish even warm adapters' names are looked up, and must not wait for slow loads.
        self._resolving = ThreadPoolExecutor(_THREADS, "resolve")
        self._loading = ThreadPoolExecutor(_THREADS, "load")
        # By view: what was asked before a commit must not answer what is asked after it.
        self._versions: SingleFlight[_Asked, Version] = SingleFlight(_resolve, self._resolving)
        self._adapters: SingleFlight[Version, Adapter] = SingleFlight(self._load, self._loading)
        self._at_once_until = 0.0
        self._hits = self._misses = 0

    def close(self) -> None:
        """Give back the threads."""
        self._resolving.shutdown()
        self._loading.shutdown()

    def counted(self) -> CacheStats:
        """For an observer."""
        residency = self._residency
        return CacheStats(
            self._hits, self._misses, residency.loads, residency.evictions, residency.bytes, len(residency)
        )

    def current(self) -> Snapshot:
        """A view that is not older than this call; raises `CatalogBusy`."""
        self._at_once_until = time.perf_counter() + _AT_ONCE_SECONDS
        return self._resolver.current()

    def at_hand(self, view: Snapshot, ticket: QueueEntry) -> Found | None:
        """What a ticket asks for where all of it is known and resident; raises as `fetch` does."""
        versions: list[Version | None] = []
        adapters: list[Adapter | None] = []
        hits = misses = 0
        for reference in ticket.choices:
            if reference is None:
                versions.append(None)
                adapters.append(None)
                continue
            version = view.cached(reference)
            if version is None:
                return None
            self._check(version, reference, ticket)
            adapter = self._residency.get(version.digest)
            if adapter is not None:
                hits += 1
            else:
                misses += 1
                if time.perf_counter() < self._at_once_until:
                    adapter = self._residency.load_cached(version)
                if adapter is None:
                    # `fetch` looks again, and counts.
                    return None
            versions.append(version)
            adapters.append(adapter)
        self._hits += hits
        if misses:
            self._misses += misses
        return versions, adapters

    async def fetch(self, view: Snapshot, ticket: QueueEntry) -> Found:
        """What a ticket asks for, its unknown references read from the catalogue and its adapters from their blobs.

        Raises a `NotFound`, `BaseMismatch` or `FeatureSpaceMismatch` that names the row, or `BlobCorrupt`.
        """
        before: list[Version | None] | None = None
        while True:
            versions = await self._find(view, ticket)
            # All are asked for before the first is waited for.
            coming = [None if version is None else self._adapter(version) for version in versions]
            try:
                adapters = [None if adapter is None else await adapter for adapter in coming]
            except BlobCorrupt:
                # Deleted between the look and the read, and perhaps made again: only what still stands is corrupt.
                if versions == before:
                    raise
                view, before = self._resolver.fresh(), versions
                continue
            for version, adapter in zip(versions, adapters, strict=True):
                if version is not None and adapter is not None:
                    self._residency.add(version.digest, adapter)
            return versions, adapters

    async def _find(self, view: Snapshot, ticket: QueueEntry) -> list[Version | None]:
        asked = [None if reference is None else self._version(view, reference) for reference in ticket.choices]
        versions: list[Version | None] = []
        for reference, coming in zip(ticket.choices, asked, strict=True):
            if reference is None or coming is None:
                versions.append(None)
                continue
            try:
                version = await coming
            except LoraplexError as error:
                # Others may have asked the same: each names its own field and row.
                raise _named(copy(error), reference, ticket) from None
            self._check(version, reference, ticket)
            versions.append(version)
        return versions

    def _version(self, view: Snapshot, reference: Reference) -> "asyncio.Future[Version]":
        version = view.cached(reference)
        return self._versions.get((view, reference)) if version is None else _here(version)

    def _adapter(self, version: Version) -> "asyncio.Future[Adapter]":
        adapter = self._residency.get(version.digest)
        if adapter is None:
            self._misses += 1
            return self._adapters.get(version)
        self._hits += 1
        return _here(adapter)

    def _check(self, version: Version, reference: Reference, ticket: QueueEntry) -> None:
        try:
            version.check_servable(self._base, self._feature_space)
        except LoraplexError as error:
            raise _named(error, reference, ticket) from None

    def _load(self, versions: Sequence[Version]) -> Iterator[tuple[Version, Adapter | Exception]]:
        for version in versions:
            try:
                yield version, self._residency.load(version)
            except Exception as error:
                yield version, error


def _resolve(asked: Sequence[_Asked]) -> Iterator[tuple[_Asked, Version | Exception]]:
    for view in {view for view, _ in asked}:
        for reference, found in view.versions([reference for of, reference in asked if of is view]):
            yield (view, reference), found


def _named(error: LoraplexError, reference: Reference, ticket: QueueEntry) -> LoraplexError:
    if ticket.question.by_row:
        return error.at(field="adapters", row=ticket.question.references.index(reference))
    return error.at(field="adapter")


def _here(value: V) -> "asyncio.Future[V]":
    future: asyncio.Future[V] = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future
