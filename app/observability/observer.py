"""Observer: receives one record of every finished request and batch, for metrics, the request log, traces and usage."""

# A record costs an append or two while requests are answered; the rest is done for many records at once.
import asyncio
import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.types import Scope

from app.observability.metrics import definitions as d
from app.observability.metrics.recorder import Metrics
from app.observability.records import FAILED, LIMIT_CODES, LONGEST_PATH, LogRecord, RequestRecord, Timespan
from app.observability.request_log import RequestLog
from app.observability.usage_counter import UsageCounter
from app.serving.batcher import QueueState
from app.serving.queue_entry import BatchRecord

if TYPE_CHECKING:
    from app.observability.tracing import Tracing

_SECONDS_BETWEEN_LOG_FLUSHES = 0.1
_SECONDS_BETWEEN_METRIC_FLUSHES = 1.0
_SECONDS_TO_CLOSE = 1.0

log = logging.getLogger(__name__)


class Observer:
    """Telemetry of one worker. Every method but `close` must be called on its event loop."""

    def __init__(
        self,
        metrics: Metrics,
        request_log: RequestLog,
        tracing: "Tracing | None" = None,
        *,
        usage: UsageCounter | None = None,
    ) -> None:
        self._metrics = metrics
        self._usage = usage
        self._request_log = request_log
        self._tracing = tracing
        # Arrays, because thousands of float objects would displace from the processor's cache what a batch needs.
        # Seconds of requests by route, method and status.
        self._durations: dict[tuple[str, str, int], array[float]] = {}
        self._queue_seconds = array("d")
        self._batches: list[BatchRecord] = []
        self._fallbacks: Counter[str] = Counter()
        # Refused requests by code.
        self._limited: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._flushed_at = time.perf_counter()
        self._queue_state: Callable[[], QueueState] | None = None
        # Hits, misses, loads and evictions of the adapter cache at the last flush.
        self._cache_counts = (0, 0, 0, 0)
        metrics.set_collector(self.flush)

    def watch_queue(self, queue_state: Callable[[], QueueState]) -> None:
        """Record the queue's state at each flush."""
        self._queue_state = queue_state
        self._record_queue_state()

    def close(self) -> None:
        """Flush everything after the last request. May be called again."""
        self.flush()
        self._request_log.close()
        if self._usage is not None:
            self._usage.close()
        if self._tracing is not None:
            self._tracing.close(_SECONDS_TO_CLOSE)

    def finish_request(self, record: RequestRecord) -> None:
        """Record a request that ends now."""
        ended = time.perf_counter()
        status, code, entry = record.status, record.code, record.entry
        key = record.route, record.method, status
        durations = self._durations.get(key)
        if durations is None:
            durations = self._durations[key] = array("d")
        durations.append(ended - record.began)
        if entry is not None and (batch_began_at := entry.batch_began_at) is not None:
            self._queue_seconds.append(batch_began_at - entry.submitted_at)
            if status < FAILED and self._usage is not None:
                self._usage.count(entry)
        if code is not None and code in LIMIT_CODES:
            self._limited[code] += 1
        if self._timer is None:
            self._schedule_flush()
        has_line = self._request_log.reserve_line(status >= FAILED)
        if has_line or self._tracing is not None:
            self._describe(record, ended, has_line=has_line)

    def finish_batch(self, batch: BatchRecord) -> None:
        """Record a computed batch."""
        self._batches.append(batch)

    def finish_publish(self, scope: Scope, began: float, *, is_new: bool) -> None:
        """Record that the request's upload is durable now; `is_new` if it made a new version."""
        ended = time.perf_counter()
        scope["state"]["publish"] = Timespan(began, ended)
        if is_new:
            self._metrics.record_publish(ended - began, 1)

    def count_fallback(self, reason: str) -> None:
        """Count a request that the fast path left to ASGI."""
        self._fallbacks[reason] += 1

    def flush(self) -> None:
        """Pass the records since the last call to the metrics."""
        self._flushed_at = time.perf_counter()
        for key, durations in self._durations.items():
            self._metrics.record_requests(*key, durations)
        self._metrics.observe(d.QUEUE_SECONDS, self._queue_seconds)
        for reason, requests in self._fallbacks.items():
            self._metrics.add(d.FAST_PATH_FALLBACKS, requests, str(reason))
        for code, requests in self._limited.items():
            self._metrics.add(d.LIMITED, requests, code)
        self._durations.clear()
        self._queue_seconds = array("d")
        self._fallbacks.clear()
        self._limited.clear()
        batches, self._batches = self._batches, []
        self._metrics.observe(d.BATCH_ROWS, [batch.rows for batch in batches])
        self._metrics.observe(d.BATCH_ADAPTERS, [batch.adapters for batch in batches])
        self._metrics.observe(d.FORWARD_SECONDS, [batch.ended - batch.began for batch in batches])
        self._record_queue_state()

    def _schedule_flush(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_SECONDS_BETWEEN_LOG_FLUSHES, self._flush_on_timer)

    def _flush_on_timer(self) -> None:
        self._timer = None
        try:
            self._request_log.flush()
            if time.perf_counter() - self._flushed_at >= _SECONDS_BETWEEN_METRIC_FLUSHES:
                self.flush()
        except Exception:
            log.exception("the telemetry of some requests could not be recorded")
        if self._durations or self._request_log.has_unreported:
            self._schedule_flush()

    def _describe(self, record: RequestRecord, ended: float, *, has_line: bool) -> None:
        """Trace a request and log it, as far as both are wanted."""
        line = LogRecord(
            record.route,
            record.method,
            record.status,
            record.began,
            ended,
            record.request_id,
            record.path[:LONGEST_PATH],
            record.code,
            None if record.entry is None else record.entry.summarize(),
        )
        if self._tracing is not None:
            line = line._replace(trace_id=self._trace(self._tracing, line, record))
        if has_line:
            self._request_log.add(line)

    def _trace(self, tracing: "Tracing", line: LogRecord, record: RequestRecord) -> str | None:
        try:
            return tracing.trace_request(line, record)
        except Exception:  # a defect of the telemetry must not fail the request
            log.exception("a request could not be traced", extra={"request_id": line.request_id.decode("latin-1")})
            return None

    def _record_queue_state(self) -> None:
        if self._queue_state is None:
            return
        state = self._queue_state()
        self._metrics.put(d.QUEUE_ROWS, state.rows)
        self._metrics.put(d.QUEUE_ROWS_LIMIT, state.rows_limit)
        self._metrics.put(d.RESIDENT_BYTES, state.cache.resident_bytes)
        self._metrics.put(d.RESIDENT_ADAPTERS, state.cache.resident_adapters)
        counts = state.cache.hits, state.cache.misses, state.cache.loads, state.cache.evictions
        for metric, before, now in zip(d.RESIDENCY_COUNTERS, self._cache_counts, counts, strict=True):
            self._metrics.add(metric, now - before)
        self._cache_counts = counts
