"""Exposition of all metrics for `/metrics`, in Prometheus' text format or OpenMetrics, with counts of the catalogue."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TakesTooLong
from importlib.metadata import version
from itertools import accumulate

import numpy as np
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.catalog.catalog import Catalog
from adapters.catalog.counts import CatalogCounts, count_catalog
from adapters.lora.base_layer import BaseLayer
from adapters.maintenance.scrub import read_state
from app.observability.metrics import definitions as d
from app.observability.metrics.definitions import DEFINITIONS, Kind
from app.observability.metrics.metric_values import MetricValues, sum_values
from app.observability.metrics.recorder import Metrics

_OPENMETRICS = "application/openmetrics-text"
_FAMILIES = {Kind.COUNTER: CounterMetricFamily, Kind.GAUGE: GaugeMetricFamily, Kind.HISTOGRAM: HistogramMetricFamily}
_ROLES = ("worker", "trainer")
_SHORTEST_SECONDS = 1.0
# Largest share of time spent counting: a count is used for twenty times as long as it took.
_SHARE = 0.05
_PATIENCE_SECONDS = 1.0
_MAX_TENANTS = 1000

log = logging.getLogger(__name__)


class CatalogMetrics:
    """Counts of the catalogue, taken rarely on a thread of its own.

    Callers do not wait for it if the catalogue is locked for long.
    """

    def __init__(
        self, catalog: Catalog, *, base: str, now: Callable[[], float], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._catalog, self._base = catalog, base
        self._now, self._monotonic = now, monotonic
        self._thread = ThreadPoolExecutor(1, "census")
        self._lock = threading.Lock()
        self._counting: dict[str | None, Future[CatalogCounts | None]] = {}
        self._good_until: dict[str | None, float] = {}
        self._has_failed = False

    def census(self, tenant: str | None = None) -> CatalogCounts | None:
        """Return a recent count of one tenant's rows, or of all tenants'; call it in a thread.

        It is None if the catalogue cannot be read within a second.
        """
        with self._lock:
            counting = self._counting.get(tenant)
            if counting is None or (counting.done() and self._monotonic() >= self._good_until.get(tenant, 0.0)):
                if len(self._counting) >= _MAX_TENANTS:
                    self._counting.clear()
                    self._good_until.clear()
                counting = self._counting[tenant] = self._thread.submit(self._count, tenant)
        try:
            return counting.result(_PATIENCE_SECONDS)
        except TakesTooLong:
            return None  # the next call gets it, or waits for it too

    def record(self, values: MetricValues) -> None:
        """Set the metrics of the catalogue and of its disk. Call it in a thread."""
        census = self.census()
        values.put(d.CATALOG_UP, census is not None)
        if census is not None:
            values.put(d.ADAPTERS, census.adapters)
            values.put(d.VERSIONS, census.versions)
            values.put(d.VERSION_BYTES, census.version_bytes)
            values.put(d.TRASHED_BYTES, census.trashed_bytes)
            values.put(d.DATASETS, census.datasets)
            values.put(d.DATASET_BYTES, census.dataset_bytes)
            values.put(d.OLDEST_QUEUED, census.oldest_queued_seconds)
            for status, jobs in census.jobs.items():
                values.put(d.JOBS, jobs, status)
        try:
            usage = shutil.disk_usage(self._catalog.folder)
        except OSError as error:
            log.warning("the size of the disk of the data folder cannot be read: %s", error)
        else:
            values.put(d.DISK_FREE, usage.free)
            values.put(d.DISK_SIZE, usage.total)
        state = read_state(self._catalog.folder)
        values.put(d.SCRUB_DAMAGED, len(state.damaged))
        values.put(d.SCRUB_FINISHED, state.finished_at or 0)

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _count(self, tenant: str | None) -> CatalogCounts | None:
        begin, self._good_until[tenant] = self._monotonic(), 0.0
        try:
            census = count_catalog(self._catalog.database, base=self._base, now=self._now(), tenant=tenant)
        except Exception as error:
            if not self._has_failed:
                log.warning("the catalogue cannot be counted: %s", error)
            self._has_failed = True
            return None
        self._has_failed = False
        end = self._monotonic()
        self._good_until[tenant] = end + max(_SHORTEST_SECONDS, (end - begin) / _SHARE)
        return census


class MetricsExposition:
    """Answers of one worker to scrapes. Every worker gives the same answer."""

    def __init__(self, metrics: Metrics, catalog: CatalogMetrics, base: BaseLayer, *, max_queued_jobs: int) -> None:
        self._metrics, self._catalog = metrics, catalog
        self._constants = MetricValues()
        self._constants.put(d.QUEUED_JOBS_LIMIT, max_queued_jobs)
        self._constants.put(d.BUILD_INFO, 1, version("loraplex-server"))
        shape = str(base.in_features), str(base.out_features)
        self._constants.put(d.BASE_INFO, 1, *shape, base.dtype, str(base.device))

    def answer(self, accept: str) -> tuple[bytes, str]:
        """Return the body and the content type of an answer. Reads files and the database: call it in a thread."""
        processes = self._metrics.all_processes()
        shared = MetricValues()
        alive = [process.name.rpartition("-")[0] for process in processes if process.is_alive]
        for role in _ROLES:
            shared.put(d.PROCESSES, alive.count(role), role)
        self._catalog.record(shared)
        return exposition(sum_values([*(process.values for process in processes), shared, self._constants]), accept)


def exposition(values: MetricValues, accept: str) -> tuple[bytes, str]:
    """Return the body and the content type of an answer, by the request's `Accept`."""
    # The encoder raises an error for an unknown version, and echoes it, so the header itself is not passed on.
    encode, content_type = choose_encoder(f"{_OPENMETRICS}; version=1.0.0" if _OPENMETRICS in accept else "")
    return encode(_Families(values)), content_type


class _Families(Collector):
    """Metrics that have a value, in the order of the definitions."""

    def __init__(self, values: MetricValues) -> None:
        self._values = sorted(values.items(), key=lambda item: item[0][1])

    def collect(self) -> Iterable[Metric]:
        families = {
            definition: _FAMILIES[definition.kind](definition.name, definition.meaning, labels=definition.labels)
            for definition in DEFINITIONS.values()
        }
        for (definition, labels), value in self._values:
            family = families[definition]
            if isinstance(family, HistogramMetricFamily):
                *counts, total = np.asarray(value).tolist()
                bounds = (*map(str, definition.bounds), "+Inf")
                family.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), total)
            else:
                family.add_metric(labels, float(value))
        return [family for family in families.values() if family.samples]
