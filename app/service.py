"""Service: the parts of one API worker that its handlers share, and how they are opened."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Annotated, ParamSpec, TypeVar

import anyio
import anyio.to_thread
import simdjson
from fastapi import Depends, Request

from adapters.access.audit import AuditLog
from adapters.access.cluster_rates import ClusterBuckets
from adapters.access.grants import Grants
from adapters.access.idempotency import IdempotencyKeys
from adapters.access.keys import Keys
from adapters.access.rates import RATES, Buckets, RateLimiter, SharedBuckets
from adapters.access.sessions import Sessions
from adapters.access.tenants import Tenants
from adapters.access.usage import Usage
from adapters.catalog.adapter_cache import AdapterCache
from adapters.catalog.resolver import Resolver
from adapters.datasets.store import Datasets
from adapters.errors import CatalogBusy, LoraplexError
from adapters.lora.forward import load_kernel
from adapters.storage.database import Database
from adapters.training.planning.planner import Planner, PlanningLimits
from app.bootstrap import load_base, open_catalog, open_queue, open_tracing
from app.http.authentication import Authenticator
from app.http.bodies import BodyMemory, JsonBodies
from app.http.host_policy import HostPolicy
from app.http.job_events import JobEvents
from app.observability.logs import line_of
from app.observability.metrics.exposition import CatalogMetrics, MetricsExposition
from app.observability.metrics.process_slot import METRICS
from app.observability.metrics.recorder import Metrics
from app.observability.observer import Observer
from app.observability.request_log import LineWriter, RequestLog
from app.observability.usage_counter import UsageCounter
from app.serving.adapter_loader import AdapterLoader
from app.serving.batcher import Batcher
from app.settings import Auth, Settings

_WRITE_THREADS = 16
_MAX_WAITING_WRITES = 200
# Longest wait of a call for a thread that writes, equal to that of a thread for the lock.
_WRITE_TIMEOUT_SECONDS = 15.0
_DURABILITY_SECONDS = 10.0
P = ParamSpec("P")
T = TypeVar("T")


class WriteThreads:
    """Bounded pool for calls that write to the catalogue: a bounded number of other calls wait for a bounded time.

    Only such calls wait while it is locked. Calls that read use the web server's threads, because SQLite serves them
    while another process holds the write lock.
    """

    def __init__(
        self,
        *,
        threads: int = _WRITE_THREADS,
        max_waiting: int = _MAX_WAITING_WRITES,
        timeout_seconds: float = _WRITE_TIMEOUT_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._free = asyncio.Semaphore(threads)
        self._limiter = anyio.CapacityLimiter(threads)
        self._max_waiting = max_waiting
        self._timeout_seconds = timeout_seconds
        self._monotonic = monotonic
        self._waiting = 0
        # Monotonic time at which a call last found the catalogue locked.
        self._locked_at = -float("inf")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in a thread; raise `CatalogBusy` if too many calls wait, or if this one waits too long."""
        with self._waiting_call():
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    await self._free.acquire()
            except TimeoutError:
                raise CatalogBusy("the catalogue is written to by many at once; try again") from None
        try:
            return await anyio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=self._limiter)
        except CatalogBusy:
            self._locked_at = self._monotonic()
            raise
        finally:
            self._free.release()

    @asynccontextmanager
    async def turn(self, semaphore: asyncio.Semaphore) -> AsyncIterator[None]:
        """Hold a semaphore that bounds the work before a write.

        Its holders may compute for long, so the wait has no time limit. If the catalogue was locked meanwhile, raise
        `CatalogBusy` after the time limit of a write.
        """
        started_at = self._monotonic()
        with self._waiting_call():
            await semaphore.acquire()
        try:
            waited = self._monotonic() - started_at
            if waited >= self._timeout_seconds and self._locked_at >= started_at:
                raise CatalogBusy("the catalogue is locked by another process; try again")
            yield
        finally:
            semaphore.release()

    @contextmanager
    def _waiting_call(self) -> Iterator[None]:
        if self._waiting >= self._max_waiting:
            raise CatalogBusy(f"{self._waiting} calls wait to change the catalogue already; try again")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1


class Durability:
    """Reasons why the database may lose acknowledged changes, read at most once in ten seconds."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._warnings: list[str] = []
        self._read_at = -float("inf")

    def warnings(self) -> list[str]:
        """Return the warnings, in sentences; those of before if the database cannot be reached."""
        now = time.monotonic()
        if now - self._read_at >= _DURABILITY_SECONDS:
            self._read_at = now
            with suppress(LoraplexError):
                self._warnings = list(self._database.durability_warnings())
        return self._warnings


class Service:
    """One worker's base layer, catalogue, queue and resident adapters.

    Opening it loads the base and the kernel, and opens the data folder; raises `BaseNotLoadable`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.draining = False
        self.new_id: Callable[[], str] = lambda: uuid.uuid4().hex
        self.base = base = load_base(settings)
        load_kernel()
        self.catalog = open_catalog(settings)
        self.queue = open_queue(self.catalog, settings)
        self.idempotency = IdempotencyKeys(self.catalog.database, self.catalog.writer, now=time.time)
        self.datasets = Datasets(self.catalog.database, self.catalog.writer, now=time.time)
        self.resolver = Resolver(self.catalog)
        database, watch = self.catalog.database, self.resolver.watch
        self.durability = Durability(database)
        self.keys = Keys(database, now=time.time)
        self.sessions = Sessions(database, now=time.time)
        self.tenants = Tenants(database, now=time.time)
        self.audit = AuditLog(database)
        self.usage = Usage(database, now=time.time)
        self.grants = Grants(database, watch, has_keys=settings.auth is Auth.KEYS)
        self.authenticator = Authenticator(self.grants, database, watch)
        self.rates = RateLimiter(watch, _open_buckets(settings, database))
        self.metrics = Metrics(settings.data_dir / METRICS, "worker")
        self.observer = _open_observer(settings, self.metrics, self.usage)
        cache = AdapterCache(base, self.catalog.blobs, budget_bytes=settings.cache_bytes)
        self.batcher = Batcher(
            base,
            AdapterLoader(base, self.resolver, cache, feature_space=settings.feature_space),
            self.grants,
            queue_rows=settings.queue_rows,
            batch_rows=settings.max_batch_rows,
            on_batch=self.observer.finish_batch,
        )
        self.observer.watch_queue(self.batcher.state)
        self.host_policy = HostPolicy(settings.host, settings.allowed_hosts)
        self.bodies = BodyMemory(settings.max_inflight_body_bytes)
        self.json = JsonBodies(base)
        # Only for the event loop, because it keeps its memory from body to body.
        self.parser = simdjson.Parser()
        self.writes = WriteThreads()
        # Held while a request to train is checked and planned: it may take memory for all rows of a data set.
        self.plannings = asyncio.Semaphore(2)
        # Held while an uploaded data set is read: each reading may take up to 1 GiB of memory.
        self.readings = asyncio.Semaphore(2)
        # Held while an uploaded adapter is unpacked and checked: each may take a few times the largest body.
        self.uploads = asyncio.Semaphore(2)
        self.catalog_figures = CatalogMetrics(self.catalog, base=base.fingerprint, now=self.queue.now)
        self.scrape = MetricsExposition(
            self.metrics, self.catalog_figures, base, max_queued_jobs=settings.max_queued_jobs
        )
        self.job_events = JobEvents(self.queue, draining=lambda: self.draining)

    def planner(self, tenant: str) -> Planner:
        """Return the planner of one tenant's trainings."""
        settings = self.settings
        return Planner(
            tenant=tenant,
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

    def close(self) -> None:
        """Send the remaining telemetry, stop the threads, and close the database connections and the metrics."""
        for part in (
            *(self.observer, self.batcher, self.job_events, self.rates, self.resolver),
            *(self.catalog, self.catalog_figures, self.metrics),
        ):
            part.close()


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


# The service as a parameter of a handler.
ServiceOf = Annotated[Service, Depends(_service)]


def _open_buckets(settings: Settings, database: Database) -> Buckets:
    """Return the token buckets of this machine, or of all machines on the database."""
    if settings.database_url is None:
        return SharedBuckets(settings.data_dir / RATES)
    return ClusterBuckets(database)


def _open_observer(settings: Settings, metrics: Metrics, usage: Usage) -> Observer:
    request_log = RequestLog(
        line_of(settings.log_format), LineWriter(), process=metrics.process, log_requests=settings.log_requests
    )
    tracing = open_tracing(settings, process=metrics.process)
    return Observer(metrics, request_log, tracing, usage=UsageCounter(usage))
