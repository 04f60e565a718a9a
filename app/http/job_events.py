"""A job as it goes on, told as server-sent events (WHATWG HTML, section 9.2).

What a client has been told is in the id of each event, so that any worker can go on from `Last-Event-ID`: nothing is
kept for a client that is away, and one that reads slowly misses progress in between, never a line of the log.
"""

import asyncio
import logging
import re
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import orjson
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from adapters.errors import CatalogBusy, QueueFull
from adapters.jobs.job import TRANSITIONS, JobState, JobStatus
from adapters.jobs.queue import JobQueue

MOST_WATCHERS = 256
"""Streams that one worker holds open."""
_SECONDS_BETWEEN_LOOKS = 0.25
_HEARTBEAT_SECONDS = 10.0
_HEARTBEAT = format_sse_event(comment="heartbeat")
_ID = re.compile(
    r"(?P<job>[0-9a-f]{8})\.(?P<fence>[0-9]{1,18})\.(?P<status>-|" + "|".join(JobStatus) + ")"
    r"\.(?P<progress>[0-9a-f]{8})\.(?P<lines>[0-9]{1,18})\.(?P<metrics>[01])"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client has been told of a job."""

    fence: int = 0
    status: JobStatus | None = None
    progress: str = "0" * 8
    """Checksum of the newest progress."""
    lines: int = 0
    """Number of the newest line of the log."""
    metrics: bool = False

    @property
    def all(self) -> bool:
        """Whether that was the end of the job."""
        return self.status is not None and not TRANSITIONS[self.status]


class Event(NamedTuple):
    """One event, and what its reader has been told by then."""

    name: str
    data: Mapping[str, Any]
    seen: Seen


def event_id(job_id: str, seen: Seen) -> str:
    """`seen` as the id of an event of that job."""
    return f"{_checksum(job_id)}.{seen.fence}.{seen.status or '-'}.{seen.progress}.{seen.lines}.{seen.metrics:d}"


def read_event_id(job_id: str, given: str | None) -> Seen:
    """What `event_id` was made from; nothing seen where the id is not one of this job's."""
    found = None if given is None else _ID.fullmatch(given)
    if found is None or found["job"] != _checksum(job_id):
        return Seen()
    return Seen(
        fence=int(found["fence"]),
        status=None if found["status"] == "-" else JobStatus(found["status"]),
        progress=found["progress"],
        lines=int(found["lines"]),
        metrics=found["metrics"] == "1",
    )


def news(state: JobState, seen: Seen) -> Iterator[Event]:
    """What a client that has seen so much is to be told now; of a job that has ended, its status comes last."""
    changed = (state.status, state.fence) != (seen.status, seen.fence)
    if changed and not state.ended:
        seen = replace(seen, status=state.status, fence=state.fence)
        yield Event("status", {"status": state.status, "attempt": state.attempt}, seen)
    for line in state.log:
        if line.number > seen.lines:
            seen = replace(seen, lines=line.number)
            yield Event("log", {"time": line.at, "text": line.text}, seen)
    if state.progress is not None and (progress := _checksum(state.progress)) != seen.progress:
        seen = replace(seen, progress=progress)
        yield Event("progress", state.progress, seen)
    if changed and state.ended:
        if state.metrics is not None and not seen.metrics:
            seen = replace(seen, metrics=True)
            yield Event("metrics", state.metrics, seen)
        seen = replace(seen, status=state.status, fence=state.fence)
        end = {"status": state.status, "attempt": state.attempt, "result": state.result, "error": state.error}
        yield Event("status", end, seen)


@dataclass(eq=False, slots=True)
class Watcher:
    """One stream: the job as it was last seen, and whether that is news."""

    job_id: str
    state: JobState
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class JobWatch:
    """The jobs that clients of one worker watch, looked at together: one look costs the same for one and for many.

    Used on the event loop alone; the catalogue is read by a thread, and only where somebody has committed.
    """

    def __init__(self, queue: JobQueue, *, draining: Callable[[], bool]) -> None:
        self.seconds_between_looks = _SECONDS_BETWEEN_LOOKS
        self.heartbeat_seconds = _HEARTBEAT_SECONDS
        self.most = MOST_WATCHERS
        self._queue = queue
        self._changes = queue.watch()
        self._draining = draining
        self._watchers: set[Watcher] = set()
        self._arrivals = 0
        self._looked = (0, 0)
        self._looking: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Close the connection to the catalogue."""
        self._changes.close()

    @contextmanager
    def watching(self, job_id: str, state: JobState) -> Iterator[Watcher]:
        """Hold a place among the watchers; raises `QueueFull` where there is none."""
        if len(self._watchers) >= self.most:
            raise QueueFull(
                f"{self.most} clients watch jobs already, as many as may", expected=f"fewer than {self.most}"
            )
        watcher = Watcher(job_id, state)
        self._watchers.add(watcher)
        # What was committed since `state` was read may have been looked at already, without this watcher.
        self._arrivals += 1
        if self._looking is None:
            self._looking = asyncio.create_task(self._look_on())
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    async def stream(self, watcher: Watcher, seen: Seen) -> AsyncIterator[bytes]:
        """Events as bytes, until the job has ended or the service is about to; a comment where nothing happens."""
        while True:
            watcher.changed.clear()
            state = watcher.state
            for event in news(state, seen):
                seen = event.seen
                data, told = orjson.dumps(event.data).decode(), event_id(watcher.job_id, seen)
                yield format_sse_event(event=event.name, data_str=data, id=told)
            if state.ended or self._draining() or self._looking is None:
                return
            try:
                async with asyncio.timeout(self.heartbeat_seconds):
                    await watcher.changed.wait()
            except TimeoutError:
                yield _HEARTBEAT

    async def _look_on(self) -> None:
        try:
            while self._watchers:
                job_ids = {watcher.job_id for watcher in self._watchers}
                states = await run_in_threadpool(self._look, job_ids, self._arrivals)
                for watcher in self._watchers:
                    state = states.get(watcher.job_id, watcher.state)
                    if state != watcher.state or self._draining():
                        watcher.state = state
                        watcher.changed.set()
                await asyncio.sleep(self.seconds_between_looks)
        except Exception:
            log.exception("the jobs that are watched cannot be looked at")
        finally:
            # After an error nobody would hear anything more: let every stream end, and its client ask again.
            self._looking = None
            for watcher in self._watchers:
                watcher.changed.set()

    def _look(self, job_ids: set[str], arrivals: int) -> dict[str, JobState]:
        """The jobs as they are; nothing where nobody has committed and no watcher has come since the last look."""
        try:
            now = self._changes.change_number(), arrivals
            if now == self._looked:
                return {}
            states = self._queue.states(list(job_ids))
        except CatalogBusy:
            return {}
        self._looked = now
        return states


def _checksum(value: object) -> str:
    return f"{zlib.crc32(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)):08x}"
