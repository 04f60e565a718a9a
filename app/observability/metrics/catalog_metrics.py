"""Counts of the catalogue for `/metrics` and the overview page, taken rarely and with a short wait."""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TakesTooLong

from adapters.catalog.catalog import Catalog
from adapters.catalog.counts import CatalogCounts, count_catalog
from app.observability.metrics import definitions as d
from app.observability.metrics.values import MetricValues

_SHORTEST_SECONDS = 1.0
# Largest share of time spent counting: a count is used for twenty times as long as it took.
_SHARE = 0.05
_PATIENCE_SECONDS = 1.0

log = logging.getLogger(__name__)


class CatalogMetrics:
    """Counts on a thread of its own. Callers do not wait for it if the catalogue is locked for long."""

    def __init__(
        self, catalog: Catalog, *, base: str, now: Callable[[], float], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._catalog, self._base = catalog, base
        self._now, self._monotonic = now, monotonic
        self._thread = ThreadPoolExecutor(1, "census")
        self._lock = threading.Lock()
        self._counting: Future[CatalogCounts | None] | None = None
        self._good_until = 0.0
        self._complained = False

    def census(self) -> CatalogCounts | None:
        """Return a recent count; None if the catalogue cannot be read within a second. Call it in a thread."""
        with self._lock:
            if self._counting is None or (self._counting.done() and self._monotonic() >= self._good_until):
                self._counting = self._thread.submit(self._count)
            counting = self._counting
        try:
            return counting.result(_PATIENCE_SECONDS)
        except TakesTooLong:
            return None  # the next call gets it, or waits for it too

    def note(self, figures: MetricValues) -> None:
        """Set the metrics of the catalogue and of its disk. Call it in a thread."""
        census = self.census()
        figures.put(d.CATALOG_UP, census is not None)
        if census is not None:
            figures.put(d.ADAPTERS, census.adapters)
            figures.put(d.VERSIONS, census.versions)
            figures.put(d.VERSION_BYTES, census.version_bytes)
            figures.put(d.DATASETS, census.datasets)
            figures.put(d.DATASET_BYTES, census.dataset_bytes)
            figures.put(d.OLDEST_QUEUED, census.oldest_queued_seconds)
            for status, jobs in census.jobs.items():
                figures.put(d.JOBS, jobs, status)
        try:
            usage = shutil.disk_usage(self._catalog.folder)
        except OSError as error:
            log.warning("the disk of the data folder cannot be looked at: %s", error)
        else:
            figures.put(d.DISK_FREE, usage.free)
            figures.put(d.DISK_SIZE, usage.total)

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _count(self) -> CatalogCounts | None:
        begin = self._monotonic()
        try:
            census = count_catalog(self._catalog.database, base=self._base, now=self._now())
        except Exception as error:
            if not self._complained:
                log.warning("the catalogue cannot be counted: %s", error)
            self._complained = True
            return None
        self._complained = False
        end = self._monotonic()
        self._good_until = end + max(_SHORTEST_SECONDS, (end - begin) / _SHARE)
        return census
