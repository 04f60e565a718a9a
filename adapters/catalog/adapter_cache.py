"""LRU cache of adapters on the base layer's device, bounded in bytes."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Version
from adapters.errors import BlobCorrupt
from adapters.lora.adapter import Adapter, digest_of, from_canonical_bytes
from adapters.lora.base_layer import BaseLayer
from adapters.names import Reference
from adapters.storage.blobs import BlobPart, Blobs

# Largest adapter that the event loop loads itself: reading and checking it takes about 0.2 ms.
_SMALL_BYTES = 2**17


class AdapterCache:
    """Least-recently-used cache of adapters on the base layer's device, bounded in bytes.

    The key is the digest: adapters never change, and two names with the same bytes share one. An evicted adapter stays
    valid for the request that holds it. All methods but `load` are for one thread.
    """

    def __init__(self, base: BaseLayer, blobs: Blobs, *, budget_bytes: int) -> None:
        self._base = base
        self._blobs = blobs
        self._budget = budget_bytes
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        # Memory of the cached adapters.
        self.bytes = 0
        self.evictions = 0
        # Two counters, because two threads count.
        self._read_loads = self._cached_loads = 0

    @property
    def loads(self) -> int:
        """Number of adapters read from disk, cached afterwards or not."""
        return self._read_loads + self._cached_loads

    def __len__(self) -> int:
        return len(self._adapters)

    def get(self, digest: str) -> Adapter | None:
        """Return the cached adapter with this digest; None if there is none."""
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    def load(self, versions: Sequence[Version]) -> Iterator[tuple[Version, Adapter | Exception]]:
        """Read and check adapters; yield each version with its adapter on the base's device, or with its error."""
        contents = self._blobs.read_parts([_part(version) for version in versions])
        for version, content in zip(versions, contents, strict=True):
            if isinstance(content, Exception):
                yield version, content
                continue
            try:
                adapter = from_canonical_bytes(content).to(self._base)
            except Exception as error:
                yield version, error
                continue
            self._read_loads += 1
            yield version, adapter

    def load_cached(self, version: Version) -> Adapter | None:
        """Load and cache a small adapter whose bytes the kernel has in memory; return None for others."""
        if version.bytes > min(_SMALL_BYTES, self._budget) or self._base.device.type != "cpu":
            return None
        content = self._blobs.read_cached(version.file, offset=version.offset, length=version.bytes)
        # A digest that does not match is left to `load`, which reports it.
        if content is None or digest_of(content) != version.digest:
            return None
        adapter = from_canonical_bytes(content).to(self._base)
        self._cached_loads += 1
        self.add(version.digest, adapter)
        return adapter

    def add(self, digest: str, adapter: Adapter) -> None:
        """Cache a loaded adapter, and evict others; one that is larger than the whole budget is not cached."""
        if digest in self._adapters or adapter.memory_bytes > self._budget:
            return
        self._adapters[digest] = adapter
        self.bytes += adapter.memory_bytes
        while self.bytes > self._budget:
            _, evicted = self._adapters.popitem(last=False)
            self.bytes -= evicted.memory_bytes
            self.evictions += 1


def find_adapter(catalog: Catalog, reference: Reference, *, tenant: str) -> tuple[Version, Adapter]:
    """Return the version that a reference of a tenant means now, and its adapter, read from its blob.

    Raises a `NotFound` that lists what exists instead, or `BlobCorrupt`.
    """
    version = catalog.find(reference, tenant=tenant)
    while True:
        try:
            return version, read_adapter(version, catalog.blobs)
        except BlobCorrupt:
            # The version may have been deleted, and created again, between the query and the read.
            current = catalog.find(reference, tenant=tenant)
            if current == version:
                raise
            version = current


def read_adapter(version: Version, blobs: Blobs) -> Adapter:
    """Return a version's adapter, read from its blob; raise `BlobCorrupt` if the bytes do not have its digest."""
    content = blobs.read(version.file, offset=version.offset, length=version.bytes, digest=version.digest)
    return from_canonical_bytes(content)


def _part(version: Version) -> BlobPart:
    return BlobPart(version.file, version.offset, version.bytes, version.digest)
