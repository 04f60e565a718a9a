"""LRU cache of adapters on the base layer's device, bounded in bytes."""

from collections import OrderedDict

from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Version
from adapters.errors import BlobCorrupt
from adapters.lora.adapter import Adapter, digest_of, from_canonical_bytes
from adapters.lora.base_layer import BaseLayer
from adapters.names import Reference
from adapters.storage.blobs import FolderBlobs

# Largest adapter that the event loop loads itself: reading and checking it takes about 0.2 ms.
_SMALL_BYTES = 2**17


class AdapterCache:
    """Least-recently-used cache of adapters on the base layer's device, bounded in bytes.

    The key is the digest: adapters never change, and two names with the same bytes share one. An evicted adapter stays
    valid for the request that holds it. All methods but `load` are for one thread.
    """

    def __init__(self, base: BaseLayer, blobs: FolderBlobs, *, budget_bytes: int) -> None:
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

    def load(self, version: Version) -> Adapter:
        """Read and check a version's adapter, and return it on the base's device; raise `BlobCorrupt`."""
        adapter = read_adapter(version, self._blobs).to(self._base)
        self._read_loads += 1
        return adapter

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


def find_adapter(catalog: Catalog, reference: Reference) -> tuple[Version, Adapter]:
    """Return the version that a reference means now, and its adapter, read from its blob.

    Raises a `NotFound` that lists what exists instead, or `BlobCorrupt`.
    """
    version = catalog.find(reference)
    while True:
        try:
            return version, read_adapter(version, catalog.blobs)
        except BlobCorrupt:
            # The version may have been deleted, and created again, between the query and the read.
            current = catalog.find(reference)
            if current == version:
                raise
            version = current


def read_adapter(version: Version, blobs: FolderBlobs) -> Adapter:
    """Return a version's adapter, read from its blob; raise `BlobCorrupt` if the bytes do not have its digest."""
    content = blobs.read(version.file, offset=version.offset, length=version.bytes)
    if digest_of(content) != version.digest:
        raise BlobCorrupt(f"the stored bytes of {version} are not those that were published")
    return from_canonical_bytes(content)
