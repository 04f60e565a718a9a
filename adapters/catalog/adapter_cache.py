"""Which adapters are in memory."""

from collections import OrderedDict

from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Version
from adapters.errors import BlobCorrupt
from adapters.lora.adapter import Adapter, digest_of, from_canonical_bytes
from adapters.lora.base_layer import BaseLayer
from adapters.names import Reference
from adapters.storage.blobs import FolderBlobs

_AT_ONCE_BYTES = 2**17
"""About 0.2 ms of reading and checking."""


class AdapterCache:
    """Adapters on the base's device under a budget of bytes, the least recently used leaving first.

    They are kept by digest: they never change, and two names with the same bytes share one. An adapter that
    leaves stays whole for the request that holds it. Everything but `load` is for one thread only.
    """

    def __init__(self, base: BaseLayer, blobs: FolderBlobs, *, budget_bytes: int) -> None:
        self._base = base
        self._blobs = blobs
        self._budget = budget_bytes
        self._resident: OrderedDict[str, Adapter] = OrderedDict()
        self.bytes = 0
        """Of the adapters that are resident."""
        self.evictions = 0
        # Apart, because they are counted by two threads.
        self._read_loads = self._cached_loads = 0

    @property
    def loads(self) -> int:
        """Adapters read from disk, whether they then were kept or not."""
        return self._read_loads + self._cached_loads

    def __len__(self) -> int:
        return len(self._resident)

    def get(self, digest: str) -> Adapter | None:
        """The adapter with this digest where it is resident."""
        adapter = self._resident.get(digest)
        if adapter is not None:
            self._resident.move_to_end(digest)
        return adapter

    def load(self, version: Version) -> Adapter:
        """A version's adapter on the base's device, read and checked; raises `BlobCorrupt`."""
        adapter = read_adapter(version, self._blobs).to(self._base)
        self._read_loads += 1
        return adapter

    def load_cached(self, version: Version) -> Adapter | None:
        """The same for a small one whose bytes the kernel has in memory, and it is resident; else None."""
        if version.bytes > min(_AT_ONCE_BYTES, self._budget) or self._base.device.type != "cpu":
            return None
        content = self._blobs.read_cached(version.file, offset=version.offset, length=version.bytes)
        if content is None or digest_of(content) != version.digest:
            return None
        adapter = from_canonical_bytes(content).to(self._base)
        self._cached_loads += 1
        self.add(version.digest, adapter)
        return adapter

    def add(self, digest: str, adapter: Adapter) -> None:
        """Make a loaded adapter resident; one that is larger than the whole budget does not drive the others out."""
        if digest in self._resident or adapter.memory_bytes > self._budget:
            return
        self._resident[digest] = adapter
        self.bytes += adapter.memory_bytes
        while self.bytes > self._budget:
            _, evicted = self._resident.popitem(last=False)
            self.bytes -= evicted.memory_bytes
            self.evictions += 1


def find_adapter(catalog: Catalog, reference: Reference) -> tuple[Version, Adapter]:
    """What a reference means now, and its adapter read from its blob.

    Raises a `NotFound` that says what there is instead, or `BlobCorrupt`.
    """
    version = catalog.find(reference)
    while True:
        try:
            return version, read_adapter(version, catalog.blobs)
        except BlobCorrupt:
            # Deleted between the look and the read, and perhaps made again: only what still stands is corrupt.
            again = catalog.find(reference)
            if again == version:
                raise
            version = again


def read_adapter(version: Version, blobs: FolderBlobs) -> Adapter:
    """A version's adapter from its blob; raises `BlobCorrupt` where the bytes are not those of its digest."""
    content = blobs.read(version.file, offset=version.offset, length=version.bytes)
    if digest_of(content) != version.digest:
        raise BlobCorrupt(f"the stored bytes of {version.adapter}@{version.version} are not those that were published")
    return from_canonical_bytes(content)
