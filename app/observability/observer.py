"""The one place that hears of each request and each batch, and passes it on: to metrics, the request log and traces."""

# What is answered while thousands come in costs an append or two; the rest is done for many at once, off that moment.
import asyncio
import logging
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from starlette.types import Scope

from app.observability.metrics.recorder import Metrics
from app.observability.records import FAILED, LONGEST_PATH, RequestRecord, Timespan
from app.observability.request_log import RequestLog
from app.serving.batcher import QueueState
from app.serving.queue_entry import BatchRecord, QueueEntry

if TYPE_CHECKING:
    from app.observability.tracing import Tracing

_SECONDS_BETWEEN_LINES = 0.1
_SECONDS_BETWEEN_FIGURES = 1.0
_SECONDS_TO_CLOSE = 1.0

log = logging.getLogger(__name__)


class Brief(NamedTuple):
    """Where to put what is worth knowing of a request that succeeded, where nobody wants its line or its trace."""

    seconds: "array[float]"
    """From its beginning to its answer."""
    queued: "array[float]"
    """What it waited for its batch."""


class Observer:
    """Of one worker; everything but `close` is for its event loop."""

    def __init__(self, metrics: Metrics, request_log: RequestLog, tracing: "Tracing | None" = None) -> None:
        self._metrics = metrics
        self._request_log = request_log
        self._tracing = tracing
        # Arrays: thousands of float objects would push out of the cache what answering needs there.
        self._seconds: defaultdict[tuple[str, str, int], array[float]] = defaultdict(lambda: array("d"))
        """By route, method and status."""
        self._queued = array("d")
        self._briefs: dict[tuple[str, str, int], Brief] = {}
        self.is_brief = False
        """Whether a request that succeeded may be put into its route's `Brief`, instead of calling `answered`."""
        self._ran: list[BatchRecord] = []
        self._timer: asyncio.TimerHandle | None = None
        self._handed_on = time.perf_counter()
        self._standing: Callable[[], QueueState] | None = None
        self._stood: QueueState | None = None
        metrics.gather_from(self.hand_on)

    def watch(self, standing: Callable[[], QueueState]) -> None:
        """Look at this whenever what was heard is passed on."""
        self._standing = standing
        self._note_standing()

    def close(self) -> None:
        """Pass everything on; for when nothing is answered any more. May be called again."""
        self.hand_on()
        self._request_log.close()
        if self._tracing is not None:
            self._tracing.close(_SECONDS_TO_CLOSE)

    def brief(self, route: str, method: str, status: int) -> Brief:
        """The one of this route, for good."""
        return self._briefs.setdefault((route, method, status), Brief(array("d"), array("d")))

    def answered(
        self,
        route: str,
        method: str,
        status: int,
        began: float,
        request_id: bytes,
        path: str,
        code: str | None = None,
        ticket: QueueEntry | None = None,
        headers: Mapping[bytes, bytes] | None = None,
        publish: Timespan | None = None,
    ) -> None:
        """Record an answered request. `headers` and `publish` are used for its trace alone."""
        ended = time.perf_counter()
        self._seconds[route, method, status].append(ended - began)
        if ticket is not None and ticket.taken is not None:
            self._queued.append(ticket.taken - ticket.submitted)
        if self._timer is None:
            self._wait()
        has_line = self._request_log.makes_room(status >= FAILED)
        self.is_brief = self._tracing is None and not self._request_log.has_room
        if not has_line and self._tracing is None:
            return
        prediction = None if ticket is None else ticket.told()
        answered = RequestRecord(route, method, status, began, ended, request_id, path[:LONGEST_PATH], code, prediction)
        if self._tracing is not None:
            answered = answered._replace(trace_id=self._traced(self._tracing, answered, headers or {}, ticket, publish))
        if has_line:
            self._request_log.note(answered)

    def ran(self, ran: BatchRecord) -> None:
        """A batch was computed."""
        self._ran.append(ran)

    def published(self, scope: Scope, began: float, *, is_new: bool) -> None:
        """What this request uploaded is durable now; `is_new` where it became a version."""
        ended = time.perf_counter()
        scope["state"]["publish"] = Timespan(began, ended)
        if is_new:
            self._metrics.published(ended - began, 1)

    def hand_on(self) -> None:
        """Let the metrics have what was heard since the last time."""
        self._handed_on = time.perf_counter()
        self._take_briefs()
        for key, seconds in self._seconds.items():
            self._metrics.answered(*key, seconds)
        self._metrics.queued(self._queued)
        self._seconds.clear()
        self._queued = array("d")
        ran, self._ran = self._ran, []
        if ran:
            self._metrics.batches(
                [each.rows for each in ran],
                [each.adapters for each in ran],
                [each.ended - each.began for each in ran],
            )
        self._note_standing()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_SECONDS_BETWEEN_LINES, self._pass_on)

    def _pass_on(self) -> None:
        self._timer = None
        self.is_brief = False
        try:
            self._take_briefs()
            self._request_log.flush()
            if time.perf_counter() - self._handed_on >= _SECONDS_BETWEEN_FIGURES:
                self.hand_on()
        except Exception:
            log.exception("what was observed cannot be passed on")
        if self._seconds or self._request_log.owes:
            self._wait()

    def _take_briefs(self) -> None:
        for key, (seconds, queued) in self._briefs.items():
            if seconds:
                self._request_log.leave_out(len(seconds))
                self._seconds[key].extend(seconds)
                self._queued.extend(queued)
                # Emptied and not replaced: others hold them.
                del seconds[:], queued[:]

    def _note_standing(self) -> None:
        if self._standing is None:
            return
        before, now = self._stood, self._standing()
        self._stood = now
        self._metrics.waiting(now.rows, now.rows_limit)
        new, old = now.residency, None if before is None else before.residency
        self._metrics.residency(
            hits=new.hits - (old.hits if old else 0),
            misses=new.misses - (old.misses if old else 0),
            loads=new.loads - (old.loads if old else 0),
            evictions=new.evictions - (old.evictions if old else 0),
            resident_bytes=new.resident_bytes,
            resident_adapters=new.resident_adapters,
        )

    def _traced(
        self,
        tracing: "Tracing",
        answered: RequestRecord,
        headers: Mapping[bytes, bytes],
        ticket: QueueEntry | None,
        publish: Timespan | None,
    ) -> str | None:
        try:
            return tracing.request(answered, headers, ticket, publish)
        except Exception:  # whoever waits for an answer gets it
            log.exception("a request has no trace", extra={"request_id": answered.request_id.decode("latin-1")})
            return None
