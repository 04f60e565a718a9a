"""Job events: the state of a job as server-sent events (WHATWG HTML, section 9.2).

The id of each event says which events the client has received, so that any worker can continue from `Last-Event-ID`.
Nothing is stored for a client that is away. A slow client misses intermediate progress, but no line of the log.
"""

import asyncio
import logging
import re
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import orjson
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from adapters.errors import CatalogBusy, CatalogUnavailable, QueueFull
from adapters.jobs.job import TRANSITIONS, JobState, JobStatus
from adapters.jobs.queue import JobQueue

# Members of a job's report that come with its last status.
_REPORTED = ("evaluation", "decision", "auto", "summary")
_HEARTBEAT = format_sse_event(comment="heartbeat")
_EVENT_ID = re.compile(
    r"(?P<job>[0-9a-f]{8})\.(?P<fence>[0-9]{1,18})\.(?P<status>-|" + "|".join(JobStatus) + ")"
    r"\.(?P<progress>[0-9a-f]{8})\.(?P<lines>[0-9]{1,18})\.(?P<metrics>[01])"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """Events of a job that a client has received."""

    fence: int = 0
    status: JobStatus | None = None
    progress: str = "0" * 8
    """Checksum of the last progress."""
    lines: int = 0
    """Number of the last line of the log."""
    metrics: bool = False

    @property
    def is_end(self) -> bool:
        """Whether the client has received the job's last event."""
        return self.status is not None and not TRANSITIONS[self.status]


class Event(NamedTuple):
    """One event, and the position of a client that has received it."""

    name: str
    data: Mapping[str, Any]
    position: StreamPosition


def event_id(job_id: str, position: StreamPosition) -> str:
    """Return a position as the id of an event of this job."""
    status, metrics = position.status or "-", int(position.metrics)
    return f"{_checksum(job_id)}.{position.fence}.{status}.{position.progress}.{position.lines}.{metrics}"


def read_event_id(job_id: str, text: str | None) -> StreamPosition:
    """Return the position in an event id, or the beginning if the id is not one of this job's."""
    match = None if text is None else _EVENT_ID.fullmatch(text)
    if match is None or match["job"] != _checksum(job_id):
        return StreamPosition()
    return StreamPosition(
        fence=int(match["fence"]),
        status=None if match["status"] == "-" else JobStatus(match["status"]),
        progress=match["progress"],
        lines=int(match["lines"]),
        metrics=match["metrics"] == "1",
    )


def events_since(state: JobState, position: StreamPosition) -> Iterator[Event]:
    """Yield the events that lead from a position to a state. The status of a job that has ended comes last."""
    is_changed = (state.status, state.fence) != (position.status, position.fence)
    if is_changed and not state.ended:
        position = replace(position, status=state.status, fence=state.fence)
        yield Event("status", {"status": state.status, "attempt": state.attempt}, position)
    for line in state.log:
        if line.number > position.lines:
            position = replace(position, lines=line.number)
            yield Event("log", {"time": line.at, "text": line.text}, position)
    if state.progress is not None and (progress := _checksum(state.progress)) != position.progress:
        position = replace(position, progress=progress)
        yield Event("progress", state.progress, position)
    if is_changed and state.ended:
        if state.metrics is not None and not position.metrics:
            position = replace(position, metrics=True)
            yield Event("metrics", state.metrics, position)
        position = replace(position, status=state.status, fence=state.fence)
        end = {"status": state.status, "attempt": state.attempt, "result": state.result, "error": state.error}
        reported = {name: (state.report or {}).get(name) for name in _REPORTED}
        yield Event("status", end | reported, position)


@dataclass(eq=False, slots=True)
class Subscription:
    """One stream: the newest state of its job, and whether it has changed."""

    job_id: str
    state: JobState
    tenant: str
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class JobEvents:
    """Source of the events of all jobs that a worker's clients follow.

    One poll reads all these jobs, so that its cost does not grow with the subscriptions. It runs on a thread, and reads
    only if the catalogue has changed. Everything else runs on the event loop.
    """

    poll_seconds = 0.25
    heartbeat_seconds = 10.0
    max_subscribers = 256
    """Streams that one worker holds open."""

    def __init__(self, queue: JobQueue, *, draining: Callable[[], bool]) -> None:
        self._queue = queue
        self._changes = queue.watch()
        self._draining = draining
        self._subscriptions: set[Subscription] = set()
        # Number of subscriptions since the start, with those that have ended.
        self._subscription_count = 0
        # Change number of the catalogue and count of subscriptions at the last poll.
        self._polled = (0, 0)
        self._poller: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Close the connection to the catalogue."""
        self._changes.close()

    @contextmanager
    def subscribe(self, job_id: str, state: JobState, *, tenant: str) -> Iterator[Subscription]:
        """Hold a subscription to a job whose state has just been read; raise `QueueFull` if there are too many."""
        if not self._has_room(tenant):
            detail = f"this worker streams the events of jobs to {self.max_subscribers} clients already, its limit"
            raise QueueFull(detail, expected=f"fewer than {self.max_subscribers}")
        subscription = Subscription(job_id, state, tenant)
        self._subscriptions.add(subscription)
        # A poll since `state` was read may have taken a change without this subscription. The next poll reads again.
        self._subscription_count += 1
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll_forever())
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def _has_room(self, tenant: str) -> bool:
        """Return whether a tenant may open another stream: others cannot use up its equal share of them."""
        if len(self._subscriptions) < self.max_subscribers:
            return True
        streams = Counter(subscription.tenant for subscription in self._subscriptions)
        tenants = len(streams.keys() | {tenant})
        return tenants > 1 and (streams[tenant] + 1) * tenants <= self.max_subscribers

    async def stream(self, subscription: Subscription, position: StreamPosition) -> AsyncGenerator[bytes, None]:
        """Yield events as bytes until the job has ended or the service is draining, and heartbeats meanwhile."""
        while True:
            subscription.changed.clear()
            state = subscription.state
            for event in events_since(state, position):
                position = event.position
                data = orjson.dumps(event.data).decode()
                yield format_sse_event(event=event.name, data_str=data, id=event_id(subscription.job_id, position))
            if state.ended or self._draining() or self._poller is None:
                return
            try:
                async with asyncio.timeout(self.heartbeat_seconds):
                    await subscription.changed.wait()
            except TimeoutError:
                yield _HEARTBEAT

    async def _poll_forever(self) -> None:
        try:
            while self._subscriptions:
                job_ids = {subscription.job_id for subscription in self._subscriptions}
                states = await run_in_threadpool(self._poll, job_ids, self._subscription_count)
                for subscription in self._subscriptions:
                    state = states.get(subscription.job_id, subscription.state)
                    if state != subscription.state or self._draining():
                        subscription.state = state
                        subscription.changed.set()
                await asyncio.sleep(self.poll_seconds)
        except Exception:
            log.exception("the jobs that clients follow cannot be read")
        finally:
            # After an error nothing polls. Every stream ends, and its client connects again.
            self._poller = None
            for subscription in self._subscriptions:
                subscription.changed.set()

    def _poll(self, job_ids: set[str], subscription_count: int) -> dict[str, JobState]:
        """Return the states of the jobs, or nothing if neither catalogue nor subscriptions have changed."""
        try:
            current = self._changes.change_number(), subscription_count
            if current == self._polled:
                return {}
            states = self._queue.states(list(job_ids))
        except (CatalogBusy, CatalogUnavailable):
            return {}
        self._polled = current
        return states


def _checksum(value: object) -> str:
    return f"{zlib.crc32(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)):08x}"
