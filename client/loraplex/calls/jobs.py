"""Jobs: list, show, watch, wait for, cancel, revert."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from loraplex import decode as reading
from loraplex.calls.builders import get, pages, path
from loraplex.decode import reading as reading_json
from loraplex.effects import Call, Open, Pause, Read, Repeat, Steps, Tell, ask, each
from loraplex.errors import BadAnswer, QueueFull, TimedOut, Unreachable
from loraplex.events import EventParser
from loraplex.progress import Display, display
from loraplex.results import Event, JobFields, JobStatus, Reverted
from loraplex.retry import Patience, insist, seconds_to_wait

T = TypeVar("T")
_SILENCE_SECONDS = 25.0
"""So long a stream may say nothing; the service says something every 10."""
_AWAY_SECONDS = 60.0
"""So long a stream that broke is taken up again: a service that restarts is away for a while."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


def show_job(job_id: str) -> Call[JobFields]:
    """One job."""
    return get(path("jobs", job_id), reading.job)


def list_jobs(*, status: str | None, adapter: str | None, prefix: str | None, limit: int | None) -> Steps[None]:
    """Tell jobs, newest first."""
    query = {"status": status, "adapter": adapter, "prefix": prefix}
    return pages("/jobs", reading.job, query=query, limit=limit)


def list_job_adapters(job_id: str, *, status: str | None, limit: int | None) -> Steps[None]:
    """Tell what a job trains."""
    return pages(path("jobs", job_id, "adapters"), reading.job_adapter, query={"status": status}, limit=limit)


def cancel(job_id: str) -> Steps[JobFields]:
    """End a job."""
    return ask(_post(job_id, "cancel", reading.job))


def revert(job_id: str) -> Steps[Reverted]:
    """Take back what a job published."""
    return ask(_post(job_id, "revert", reading.reverted))


def watch(job_id: str, patience: Patience, *, until: float = math.inf) -> Steps[None]:
    """Tell a job's events until it has ended, or, once the clock says `until`, at the next word or its lack.

    A stream that breaks is taken up again, unless it had not said a word, or broke more than `patience.retries` times
    in a row without an event. One that ends too soon is, unless it did so as often without a word: a `BadAnswer`.
    """
    last_id: str | None = None
    breaks = 0
    now = patience
    while (left := until - patience.clock()) > 0:
        call = get(path("jobs", job_id, "events"), lambda value: value)
        call = replace(call, headers={} if last_id is None else {"Last-Event-ID": last_id})
        answer = yield from insist(call, replace(now, timeout=min(now.timeout, left)), _open)
        if answer.status == 204:
            return
        parser = EventParser()
        silent = True
        try:
            while received := (yield Read()):
                silent = False
                for event in parser.feed(received):
                    ended = _ends(event)
                    last_id, breaks = event.id, 0
                    yield Tell(event)
                    if ended:
                        return
                if patience.clock() >= until:
                    return
            if not silent:
                # It was alive, and may end as often as it likes: some proxies give each only so long.
                breaks = 0
            elif breaks >= patience.retries:
                raise BadAnswer(
                    f"the events of job {job_id} ended {breaks + 1} times before anything was told",
                    expected="a stream of events, open until the job has ended",
                )
        except (Unreachable, TimedOut):
            # What holds a stream back on the way holds back the next one too.
            if silent or breaks >= patience.retries:
                raise
        yield Pause(min(seconds_to_wait(breaks, 0.0, chance=patience.chance()), max(until - patience.clock(), 0.0)))
        breaks += 1
        now = replace(patience, timeout=max(_AWAY_SECONDS, patience.timeout), retries=1000)


def wait(job_id: str, patience: Patience, *, timeout: float | None, progress: bool | Display) -> Steps[JobFields]:
    """The job once it has ended; raises `TimedOut` where that takes longer, and the job goes on."""
    end = math.inf if timeout is None else patience.clock() + timeout
    job = yield from ask(_look(job_id, patience, end=end))
    with _shown(progress) as shown:
        shown.job(job)
        if not job.status.ended:
            # Looking at the job again and again says the same, only later; but it is done when it is meant to be, which
            # a stream that falls silent is not.
            with suppress(QueueFull, TimedOut, Unreachable, BadAnswer):
                yield from each(watch(job_id, patience, until=end - _SILENCE_SECONDS), shown.event)
        return (yield from _poll(job_id, patience, end=end, shown=shown))


def _poll(job_id: str, patience: Patience, *, end: float, shown: Display) -> Steps[JobFields]:
    pause = _FIRST_PAUSE
    while True:
        job = yield from ask(_look(job_id, patience, end=end))
        shown.job(job)
        if job.status.ended:
            return job
        left = end - patience.clock()
        if left <= 0:
            raise TimedOut(
                f"job {job_id} is still {job.status}, and goes on: it was waited for as long as was asked",
                given=str(job.status),
                expected=f'more time; client.job("{job_id}") is the same job later',
            )
        yield Pause(min(pause, left))
        pause = min(1.5 * pause, _LONGEST_PAUSE)


def _look(job_id: str, patience: Patience, *, end: float) -> Call[JobFields]:
    return replace(show_job(job_id), timeout=min(patience.timeout, max(end - patience.clock(), 1.0)))


def _shown(progress: bool | Display) -> Display:
    if isinstance(progress, Display):
        return progress
    return display() if progress else Display()


def _ends(event: Event) -> bool:
    """Whether it is a job's last one; raises `BadAnswer` where its data is not what `Display` reads in it."""
    try:
        if event.name == "progress":
            reading.progress(event.data)
        elif event.name == "log":
            reading.log_line(event.data)
        return event.name == "status" and JobStatus(event.data["status"]).ended
    except (KeyError, ValueError) as error:
        raise BadAnswer(
            f"an event {event.name!r} is not one of loraplex: {error!r}", expected="an event of a job"
        ) from error


def _open(call: Call[Any], _left: float) -> Open:
    return Open(call, _SILENCE_SECONDS)


def _post(job_id: str, verb: str, read: Callable[[Any], T]) -> Call[T]:
    where = path("jobs", job_id, verb)
    return Call(method="POST", path=where, read=reading_json(read), repeats=Repeat.IF_REFUSED)
