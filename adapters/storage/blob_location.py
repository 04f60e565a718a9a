"""Location of the blobs of a data folder: the folder itself, or a bucket."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.storage.blobs import Blobs, FolderBlobs
from adapters.storage.quarantine import DEFAULT_DAYS, Quarantine

# Folder, in the data folder, of the copies of blobs in a bucket.
BLOB_CACHE = "blob-cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobLocation:
    """Place of the blobs of one store, which opens them in any process."""

    folder: Path
    """The data folder."""
    url: str | None = None
    """`s3://bucket/prefix`; None for a folder in the data folder."""
    cache_bytes: int = 10 * 2**30
    """Maximum size of the local copies of blobs in a bucket."""
    quarantine_days: float = DEFAULT_DAYS

    def open(self, *, now: Callable[[], float] = time.time) -> Blobs:
        """Return the blobs, without connecting to a bucket yet."""
        if self.url is None:
            return FolderBlobs(self.folder, quarantine=Quarantine(self.folder, now=now, days=self.quarantine_days))
        # The extra `s3` installs what these need.
        from adapters.storage.blob_cache import BlobCache
        from adapters.storage.object_blobs import ObjectBlobs

        cache = BlobCache(self.folder / BLOB_CACHE, budget_bytes=self.cache_bytes)
        return ObjectBlobs(self.url, cache, now=now, quarantine_days=self.quarantine_days)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, for another process on this machine."""
        return asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "BlobLocation":
        """Read what `to_json` returned."""
        return cls(**{**values, "folder": Path(values["folder"])})
