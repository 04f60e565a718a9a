"""Jobs of the asynchronous client: what can be done with one, its events, and waiting for its end."""

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraplex._async.connection import SILENCE_SECONDS, AsyncConnection
from loraplex.calls import Call, path
from loraplex.errors import BadAnswer, QueueFull, TimedOut, Unreachable
from loraplex.events import EventParser, is_last
from loraplex.frames import AsyncListing
from loraplex.progress import Display, display
from loraplex.results import Event, JobAdapter, JobFields, Reverted, Suspect
from loraplex.transport import seconds_to_wait

if TYPE_CHECKING:
    from loraplex._async.client import AsyncClient

# Time for which a broken stream is opened again, because a restart of the service takes a while.
_AWAY_SECONDS = 60.0
_AWAY_RETRIES = 1000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncJob(JobFields):
    """Training job, in the state in which it was fetched."""

    client: "AsyncClient" = field(repr=False, compare=False)

    async def wait(self, *, progress: bool | Display = False, timeout: float | None = None) -> "AsyncJob":
        """Wait for the end of the job, and return it; `progress` shows its progress on standard error or a `Display`.

        Raises `JobFailed` and `JobCancelled`, which carry the job, and `TimedOut` after `timeout` seconds. The job
        continues if the wait is interrupted.
        """
        return await self.client.wait(self.id, progress=progress, timeout=timeout)

    def events(self) -> AsyncIterator[Event]:
        """Iterate over the events of the job until it ends."""
        return self.client.events(self.id)

    async def refresh(self) -> "AsyncJob":
        """Return the current state of the job."""
        return await self.client.job(self.id)

    async def cancel(self) -> "AsyncJob":
        """Cancel the job; raise `JobEnded` if it has already ended."""
        return await self.client.cancel(self.id)

    def adapters(
        self,
        *,
        status: str | None = None,
        outcome: str | None = None,
        sort: str | None = None,
        limit: int | None = None,
    ) -> AsyncListing[JobAdapter]:
        """Iterate over the adapters that the job trains.

        `status` is `waiting`, `published` or `failed`, `outcome` is `better`, `same`, `worse` or `failed`, and `sort`
        is `gain` or `name`.
        """
        return self.client.job_adapters(self.id, status=status, outcome=outcome, sort=sort, limit=limit)

    async def retry(
        self,
        *,
        outcomes: Sequence[str] | None = None,
        training: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> "AsyncJob":
        """Queue the training of the adapters with these outcomes again, with `training` in place of some settings.

        Raises `DataGone` if the service no longer has the rows: they were in the request, or were deleted.
        """
        return await self.client.retry(self.id, outcomes=outcomes, training=training, timeout=timeout)

    def suspects(self, *, limit: int | None = None) -> AsyncListing[Suspect]:
        """Iterate over the rows whose label the other rows contradict, worst first.

        Raises `NoSuspects` if none were looked for: they are those of one adapter with one class per row.
        """
        return self.client.suspects(self.id, limit=limit)

    async def revert(self) -> Reverted:
        """Point the live aliases that the job moved back; raise `JobNotEnded` if it is running."""
        return await self.client.revert(self.id)


async def watch(connection: AsyncConnection, job_id: str, *, until: float = math.inf) -> AsyncGenerator[Event]:
    """Yield the events of a job until it ends, or until the clock reaches `until`.

    A broken stream is opened again, unless it had sent nothing, or broke more than `retries` times in a row without an
    event. A stream that ends too soon that often without an event raises `BadAnswer`.
    """
    settings = connection.settings
    headers: dict[str, str] = {}
    timeout, retries = settings.timeout, settings.retries
    breaks = 0
    while (left := until - time.monotonic()) > 0:
        where = path("jobs", job_id, "events")
        call = Call("GET", where, safe=True, headers=headers, timeout=min(timeout, left), retries=retries)
        parser = EventParser()
        silent = True
        try:
            async with connection.stream(call) as response:
                if response.status_code == 204:
                    return
                async for received in response.aiter_bytes():
                    silent = False
                    for event in parser.feed(received):
                        ended = is_last(event)
                        headers, breaks = {} if event.id is None else {"Last-Event-ID": event.id}, 0
                        yield event
                        if ended:
                            return
                    if time.monotonic() >= until:
                        return
            if not silent:
                # The stream was alive, so it may end any number of times: some proxies limit the time of each.
                breaks = 0
            elif breaks >= settings.retries:
                detail = f"the event stream of job {job_id} ended {breaks + 1} times without an event"
                raise BadAnswer(detail, expected="a stream of events, open until the job has ended")
        except (Unreachable, TimedOut):
            # A proxy that holds back one stream holds back the next one too.
            if silent or breaks >= settings.retries:
                raise
        pause = seconds_to_wait(breaks, 0.0, chance=random.random())
        await asyncio.sleep(min(pause, max(until - time.monotonic(), 0.0)))
        breaks += 1
        timeout, retries = max(_AWAY_SECONDS, settings.timeout), _AWAY_RETRIES


async def wait_for(
    connection: AsyncConnection,
    job_id: str,
    read: Callable[[Any], AsyncJob],
    *,
    progress: bool | Display,
    timeout: float | None,
) -> AsyncJob:
    """Wait for the end of a job, and return the job; raise `TimedOut` if it takes longer. The job continues."""
    end = math.inf if timeout is None else time.monotonic() + timeout
    job = await _look(connection, job_id, read, end=end)
    with _display(progress) as shown:
        shown.job(job)
        if not job.status.ended:
            # Polling gives the same result later; but it works behind a proxy that holds back streams, and
            # it ends on time.
            with suppress(QueueFull, TimedOut, Unreachable, BadAnswer):
                async with aclosing(watch(connection, job_id, until=end - SILENCE_SECONDS)) as events:
                    async for event in events:
                        shown.event(event)
        pause = _FIRST_PAUSE
        while True:
            job = await _look(connection, job_id, read, end=end)
            shown.job(job)
            if job.status.ended:
                return job
            left = end - time.monotonic()
            if left <= 0:
                detail = f"job {job_id} is still {job.status} after the timeout of the wait, and continues"
                expected = f'more time; client.job("{job_id}") is the same job later'
                raise TimedOut(detail, given=str(job.status), expected=expected)
            await asyncio.sleep(min(pause, left))
            pause = min(1.5 * pause, _LONGEST_PAUSE)


async def _look(connection: AsyncConnection, job_id: str, read: Callable[[Any], AsyncJob], *, end: float) -> AsyncJob:
    timeout = min(connection.settings.timeout, max(end - time.monotonic(), 1.0))
    return await connection.get(path("jobs", job_id), read, timeout=timeout)


def _display(progress: bool | Display) -> Display:
    if isinstance(progress, Display):
        return progress
    return display() if progress else Display()
