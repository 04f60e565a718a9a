"""Service: the parts of one API worker that its handlers share, and how they are opened."""

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import simdjson

from adapters.catalog.adapter_cache import AdapterCache
from adapters.catalog.catalog import Catalog, Resolver
from adapters.datasets.store import Datasets
from adapters.errors import FeatureSpaceMismatch
from adapters.jobs.queue import JobQueue
from adapters.lora.base_layer import BaseLayer
from adapters.lora.forward import load_kernel
from adapters.training.planning.planner import Planner, PlanningLimits
from app.bootstrap import load_base, open_queue, open_tracing
from app.http.bodies import BodyMemory, JsonBodies
from app.http.host_policy import HostPolicy
from app.http.job_events import JobEvents
from app.http.write_threads import WriteThreads
from app.observability.logs import line_of
from app.observability.metrics.catalog_metrics import CatalogMetrics
from app.observability.metrics.exposition import MetricsExposition
from app.observability.metrics.process_slot import METRICS
from app.observability.metrics.recorder import Metrics
from app.observability.observer import Observer
from app.observability.request_log import LineWriter, RequestLog
from app.serving.adapter_loader import AdapterLoader
from app.serving.batcher import Batcher
from app.settings import Settings

_PLANNINGS_AT_ONCE = 2
_READINGS_AT_ONCE = 2
_UPLOADS_AT_ONCE = 2


@dataclass(slots=True)
class Service:
    """One worker's base layer, catalogue, queue and resident adapters."""

    settings: Settings
    base: BaseLayer
    catalog: Catalog
    queue: JobQueue
    datasets: Datasets
    resolver: Resolver
    batcher: Batcher
    metrics: Metrics
    observer: Observer
    new_id: Callable[[], str] = field(default=lambda: uuid.uuid4().hex)
    draining: bool = False
    parser: simdjson.Parser = field(default_factory=simdjson.Parser)
    """Of the event loop: it keeps its memory from body to body."""
    plannings: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_PLANNINGS_AT_ONCE))
    """How many requests to train are looked at together: each may take memory for all rows of a data set."""
    readings: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_READINGS_AT_ONCE))
    """Held while an uploaded data set is read: each reading may take up to 1 GiB of memory."""
    writes: WriteThreads = field(default_factory=WriteThreads)
    host_policy: HostPolicy = field(init=False)
    planner: Planner = field(init=False)
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_UPLOADS_AT_ONCE))
    """Held while an uploaded adapter is unpacked and checked: each may take a few times the largest body."""
    bodies: BodyMemory = field(init=False)
    json: JsonBodies = field(init=False)
    job_events: JobEvents = field(init=False)
    catalog_figures: CatalogMetrics = field(init=False)
    scrape: MetricsExposition = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        self.planner = Planner(
            catalog=self.catalog,
            datasets=self.datasets,
            base=self.base,
            feature_space=settings.feature_space,
            limits=PlanningLimits(
                max_rank=settings.max_rank,
                max_groups=settings.max_groups,
                trainer_memory_bytes=settings.trainer_memory_bytes,
            ),
        )
        self.host_policy = HostPolicy(self.settings.host, self.settings.allowed_hosts)
        self.bodies = BodyMemory(self.settings.max_inflight_body_bytes)
        self.json = JsonBodies(self.base)
        figures = self.catalog_figures = CatalogMetrics(self.catalog, base=self.base.fingerprint, now=self.queue.now)
        self.scrape = MetricsExposition(self.metrics, figures, self.base, max_queued_jobs=self.settings.max_queued_jobs)
        self.job_events = JobEvents(self.queue, draining=lambda: self.draining)

    def close(self) -> None:
        """Pass on what was observed; end the threads; give back the connections and this process's place."""
        self.observer.close()
        self.batcher.close()
        self.job_events.close()
        self.resolver.close()
        self.catalog.close()
        self.catalog_figures.close()
        self.metrics.close()

    def check_feature_space(self, given: list[str]) -> None:
        """Raise `FeatureSpaceMismatch` if a request names another encoder than that of the base layer."""
        ours = self.settings.feature_space
        for theirs in given:
            if theirs != ours:
                raise FeatureSpaceMismatch(
                    f"the request is for the feature space {theirs!r}, this service has {ours!r}",
                    field="X-Feature-Space",
                    given=theirs,
                    expected=ours,
                )


def open_service(settings: Settings, *, now: Callable[[], float] = time.time) -> Service:
    """Load the base and the kernel, and open the data folder; raises `BaseNotLoadable`."""
    base = load_base(settings)
    load_kernel()
    catalog = Catalog(settings.data_dir, now=now, quarantine_days=settings.quarantine_days)
    catalog.sweep()
    resolver = Resolver(catalog)
    cache = AdapterCache(base, catalog.blobs, budget_bytes=settings.cache_bytes)
    loader = AdapterLoader(base, resolver, cache, feature_space=settings.feature_space)
    metrics = Metrics.open(settings.data_dir / METRICS, "worker")
    observer = _open_observer(settings, metrics)
    batcher = Batcher(
        base, loader, queue_rows=settings.queue_rows, batch_rows=settings.max_batch_rows, on_batch=observer.finish_batch
    )
    observer.watch_queue(batcher.state)
    return Service(
        settings=settings,
        base=base,
        catalog=catalog,
        queue=open_queue(catalog, settings, now=now),
        datasets=Datasets(catalog.database, catalog.writer, now=now),
        resolver=resolver,
        batcher=batcher,
        metrics=metrics,
        observer=observer,
    )


def _open_observer(settings: Settings, metrics: Metrics) -> Observer:
    request_log = RequestLog(
        line_of(settings.log_format), LineWriter(), process=metrics.process, wanted=settings.log_requests
    )
    return Observer(metrics, request_log, open_tracing(settings, process=metrics.process))
