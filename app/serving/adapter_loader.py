"""Adapter loader: resolves the references of a queue entry, and loads its adapters off the event loop."""

import asyncio
import time
from collections import deque
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
from app.serving.queue_entry import QueueEntry, Resolution

_THREADS = 1
# Time for which a batch reads adapters from the page cache on the event loop. A switch to a thread takes several times
# as long as reading one.
_INLINE_SECONDS = 0.001
_REPORT_SECONDS = 0.002
# Calls that a thread has at a time: the one that it runs, and the next, so that it need not wait for the event loop.
_CALLS_IN_THREAD = 2
_NAMES_AT_ONCE = 500
_LOADS_AT_ONCE = 32

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
# A snapshot, a tenant, and a reference of the tenant.
_ReferenceKey = tuple[Snapshot, str, Reference]


class CacheStats(NamedTuple):
    """Counts of the adapter cache since the start, and its size now."""

    hits: int
    """Requested adapters that were in memory."""
    misses: int
    loads: int
    evictions: int
    resident_bytes: int
    resident_adapters: int


class SingleFlight(Generic[K, V]):
    """Loads values in a thread: each key once, however many callers wait for it, and many keys with one switch.

    `load` runs in the thread, and yields each key with its value or error. Values are not kept. Tenants take turns, so
    that no key waits for all of those that another tenant requested before.
    """

    def __init__(
        self, load: Callable[[Sequence[K]], Iterator[tuple[K, V | Exception]]], thread: Executor, *, keys_at_once: int
    ) -> None:
        self._load = load
        self._thread = thread
        self._keys_at_once = keys_at_once
        self._futures: dict[K, asyncio.Future[V]] = {}
        # Keys that were not passed to the thread yet, by tenant.
        self._requested: dict[str, deque[K]] = {}
        self._calls = 0

    def get(self, key: K, *, tenant: str) -> "asyncio.Future[V]":
        """Return the future of a key's value. It may be shared, so the caller must not cancel it."""
        future = self._futures.get(key)
        if future is None:
            loop = asyncio.get_running_loop()
            future = self._futures[key] = loop.create_future()
            if not self._requested:
                loop.call_soon(self._submit, loop)
            self._requested.setdefault(tenant, deque()).append(key)
        return future

    def _submit(self, loop: asyncio.AbstractEventLoop) -> None:
        """Pass requested keys to the thread, unless it has as many as it needs to stay busy."""
        while self._requested and self._calls < _CALLS_IN_THREAD:
            self._calls += 1
            self._thread.submit(self._run, loop, self._next_keys())

    def _next_keys(self) -> list[K]:
        """Take one key of each tenant in turn."""
        keys: list[K] = []
        while self._requested and len(keys) < self._keys_at_once:
            tenant = next(iter(self._requested))
            requested = self._requested.pop(tenant)
            keys.append(requested.popleft())
            if requested:
                self._requested[tenant] = requested
        return keys

    def _run(self, loop: asyncio.AbstractEventLoop, keys: Sequence[K]) -> None:
        missing = dict.fromkeys(keys)
        failure: Exception = AssertionError("a key was neither loaded nor refused")
        results: list[tuple[K, V | Exception]] = []
        reported = time.monotonic()
        try:
            for key, result in self._load(keys):
                del missing[key]
                results.append((key, result))
                # Each report may start a batch, so values that load quickly are reported together.
                if time.monotonic() - reported > _REPORT_SECONDS:
                    loop.call_soon_threadsafe(self._set_results, results)
                    results, reported = [], time.monotonic()
        except Exception as error:
            failure = error
        loop.call_soon_threadsafe(self._end_run, loop, results + [(key, failure) for key in missing])

    def _end_run(self, loop: asyncio.AbstractEventLoop, results: Sequence[tuple[K, V | Exception]]) -> None:
        self._calls -= 1
        self._submit(loop)
        self._set_results(results)

    def _set_results(self, results: Sequence[tuple[K, V | Exception]]) -> None:
        for key, result in results:
            future = self._futures.pop(key)
            if isinstance(result, Exception):
                future.set_exception(result)
                future.exception()  # marks it as retrieved, even if no caller waits any more
            else:
                future.set_result(result)


class AdapterLoader:
    """Resolves references to versions, checks that they fit the base layer, and loads their adapters."""

    def __init__(self, base: BaseLayer, resolver: Resolver, cache: AdapterCache, *, feature_space: str | None) -> None:
        self._base = base
        self._resolver = resolver
        self._cache = cache
        self._feature_space = feature_space
        self.begin_read = resolver.watch.begin_read
        # Two pools: after a publish even the names of cached adapters are resolved again, which must not wait for slow
        # loads.
        self._resolve_threads = ThreadPoolExecutor(_THREADS, "resolve")
        self._load_threads = ThreadPoolExecutor(_THREADS, "load")
        # Keyed by the snapshot too: a query from before a commit must not answer a request from after it.
        self._versions: SingleFlight[_ReferenceKey, Version] = SingleFlight(
            _resolve, self._resolve_threads, keys_at_once=_NAMES_AT_ONCE
        )
        self._adapters: SingleFlight[Version, Adapter] = SingleFlight(
            cache.load, self._load_threads, keys_at_once=_LOADS_AT_ONCE
        )
        self._inline_until = 0.0
        self._hits = self._misses = 0

    def close(self) -> None:
        """Stop the threads."""
        self._resolve_threads.shutdown()
        self._load_threads.shutdown()

    def stats(self) -> CacheStats:
        """Return the counts of the cache, for telemetry."""
        cache = self._cache
        return CacheStats(self._hits, self._misses, cache.loads, cache.evictions, cache.bytes, len(cache))

    def current(self) -> Snapshot:
        """Return the catalogue's current snapshot, for one batch; raise `CatalogBusy`.

        If `begin_read` has returned a future, its result comes first.
        """
        self._inline_until = time.perf_counter() + _INLINE_SECONDS
        return self._resolver.current()

    def try_cached(self, snapshot: Snapshot, entry: QueueEntry) -> Resolution | None:
        """Return the resolution of an entry without waiting, or None if it needs `load`; raise the errors of `load`."""
        versions: list[Version | None] = []
        adapters: list[Adapter | None] = []
        hits = misses = rank = 0
        cached_versions = snapshot.cached(entry.tenant)
        for reference in entry.references:
            if reference is None:
                versions.append(None)
                adapters.append(None)
                continue
            version = cached_versions.get(reference)
            if version is None:
                return None
            try:
                version.check_servable(self._base, self._feature_space)
            except LoraplexError as error:
                raise _locate(error, reference, entry) from None
            adapter = self._cache.get(version.digest)
            if adapter is not None:
                hits += 1
            else:
                misses += 1
                if time.perf_counter() < self._inline_until:
                    adapter = self._cache.load_cached(version)
                if adapter is None:
                    return None  # `load` starts again, and counts the hits and misses
            versions.append(version)
            adapters.append(adapter)
            if adapter.rank > rank:
                rank = adapter.rank
        self._hits += hits
        if misses:
            self._misses += misses
        return Resolution(versions, adapters, rank)

    async def load(self, snapshot: Snapshot, entry: QueueEntry) -> Resolution:
        """Resolve an entry with queries to the catalogue, and load its adapters from their blobs.

        Raises `NotFound`, `BaseMismatch` or `FeatureSpaceMismatch` with the row, or `BlobCorrupt`.
        """
        tenant = entry.tenant
        previous: list[Version | None] | None = None
        while True:
            versions = await self._find_versions(snapshot, entry)
            cached = [None if version is None else self._cache.get(version.digest) for version in versions]
            # Start all loads before waiting for the first.
            loads = [
                None if version is None or adapter is not None else self._adapters.get(version, tenant=tenant)
                for version, adapter in zip(versions, cached, strict=True)
            ]
            self._hits += len(cached) - cached.count(None)
            self._misses += len(loads) - loads.count(None)
            try:
                pairs = zip(cached, loads, strict=True)
                adapters = [adapter if load is None else await load for adapter, load in pairs]
            except BlobCorrupt:
                # The version may have been deleted since it was resolved, and its blob with it: resolve it again, and
                # report the blob only if the versions are still the same.
                if versions == previous:
                    raise
                snapshot, previous = self._resolver.fresh(), versions
                continue
            for version, adapter in zip(versions, adapters, strict=True):
                if version is not None and adapter is not None:
                    self._cache.add(version.digest, adapter)
            return Resolution(versions, adapters, max(0 if adapter is None else adapter.rank for adapter in adapters))

    async def _find_versions(self, snapshot: Snapshot, entry: QueueEntry) -> list[Version | None]:
        tenant = entry.tenant
        cached = snapshot.cached(tenant)
        queries = {
            reference: self._versions.get((snapshot, tenant, reference), tenant=tenant)
            for reference in entry.references
            if reference is not None and reference not in cached
        }
        versions: list[Version | None] = []
        for reference in entry.references:
            if reference is None:
                versions.append(None)
                continue
            try:
                version = cached.get(reference) or await queries[reference]
            except LoraplexError as error:
                # Other entries may get the same error, and each adds a field and a row of its own.
                raise _locate(copy(error), reference, entry) from None
            self._check(version, reference, entry)
            versions.append(version)
        return versions

    def _check(self, version: Version, reference: Reference, entry: QueueEntry) -> None:
        try:
            version.check_servable(self._base, self._feature_space)
        except LoraplexError as error:
            raise _locate(error, reference, entry) from None


def _resolve(keys: Sequence[_ReferenceKey]) -> Iterator[tuple[_ReferenceKey, Version | Exception]]:
    references: dict[tuple[Snapshot, str], list[Reference]] = {}
    for snapshot, tenant, reference in keys:
        references.setdefault((snapshot, tenant), []).append(reference)
    for (snapshot, tenant), of_tenant in references.items():
        for reference, result in snapshot.versions(of_tenant, tenant=tenant):
            yield (snapshot, tenant, reference), result


def _locate(error: LoraplexError, reference: Reference, entry: QueueEntry) -> LoraplexError:
    """Set the field of the request, and the row if there is one, that an error is about."""
    if entry.request.by_row:
        return error.at(field="adapters", row=entry.request.references.index(reference))
    return error.at(field="adapter")
