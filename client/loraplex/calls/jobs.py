"""Calls for jobs: list, show, watch, wait, cancel, revert; and their event stream."""

import codecs
import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from loraplex import decode as reading
from loraplex.calls.builders import get, pages, path
from loraplex.decode import reading as reading_json
from loraplex.effects import Call, Emit, OpenStream, Operation, ReadStream, Repeat, Sleep, ask, each
from loraplex.errors import BadAnswer, JobCancelled, JobFailed, QueueFull, TimedOut, Unreachable
from loraplex.progress import Display, display
from loraplex.results import Event, JobFields, JobStatus, Reverted
from loraplex.retry import RetryPolicy, seconds_to_wait, send_until_success

T = TypeVar("T")
# The longest silence of a stream; the service sends something every 10 s.
_SILENCE_SECONDS = 25.0
# Time for which a broken stream is opened again, because a restart of the service takes a while.
_AWAY_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


def show_job(job_id: str) -> Call[JobFields]:
    """Return the call that reads one job."""
    return get(path("jobs", job_id), reading.job)


def list_jobs(*, status: str | None, adapter: str | None, prefix: str | None, limit: int | None) -> Operation[None]:
    """Emit jobs, newest first."""
    query = {"status": status, "adapter": adapter, "prefix": prefix}
    return pages("/jobs", reading.job, query=query, limit=limit)


def list_job_adapters(job_id: str, *, status: str | None, limit: int | None) -> Operation[None]:
    """Emit the adapters that a job trains."""
    return pages(path("jobs", job_id, "adapters"), reading.job_adapter, query={"status": status}, limit=limit)


def cancel(job_id: str) -> Operation[JobFields]:
    """Return the call that cancels a job."""
    return ask(_post(job_id, "cancel", reading.job))


def revert(job_id: str) -> Operation[Reverted]:
    """Return the call that reverts a job."""
    return ask(_post(job_id, "revert", reading.reverted))


def watch(job_id: str, retry_policy: RetryPolicy, *, until: float = math.inf) -> Operation[None]:
    """Emit the events of a job until it ends, or until the clock reaches `until`.

    A broken stream is opened again, unless it had sent nothing, or broke more than `retries` times in a row without an
    event. A stream that ends too soon that often without an event raises `BadAnswer`.
    """
    last_id: str | None = None
    breaks = 0
    now = retry_policy
    while (left := until - retry_policy.clock()) > 0:
        call = get(path("jobs", job_id, "events"), lambda value: value)
        call = replace(call, headers={} if last_id is None else {"Last-Event-ID": last_id})
        answer = yield from send_until_success(call, replace(now, timeout=min(now.timeout, left)), _open)
        if answer.status == 204:
            return
        parser = EventParser()
        silent = True
        try:
            while received := (yield ReadStream()):
                silent = False
                for event in parser.feed(received):
                    ended = _ends(event)
                    last_id, breaks = event.id, 0
                    yield Emit(event)
                    if ended:
                        return
                if retry_policy.clock() >= until:
                    return
            if not silent:
                # The stream was alive, so it may end any number of times: some proxies limit the time of each.
                breaks = 0
            elif breaks >= retry_policy.retries:
                raise BadAnswer(
                    f"the events of job {job_id} ended {breaks + 1} times before anything was told",
                    expected="a stream of events, open until the job has ended",
                )
        except (Unreachable, TimedOut):
            # A proxy that holds back one stream holds back the next one too.
            if silent or breaks >= retry_policy.retries:
                raise
        yield Sleep(
            min(seconds_to_wait(breaks, 0.0, chance=retry_policy.chance()), max(until - retry_policy.clock(), 0.0))
        )
        breaks += 1
        now = replace(retry_policy, timeout=max(_AWAY_SECONDS, retry_policy.timeout), retries=1000)


def wait(
    job_id: str, retry_policy: RetryPolicy, *, timeout: float | None, progress: bool | Display
) -> Operation[JobFields]:
    """Wait for the end of a job, and return the job; raise `TimedOut` if it takes longer. The job continues."""
    end = math.inf if timeout is None else retry_policy.clock() + timeout
    job = yield from ask(_look(job_id, retry_policy, end=end))
    with _shown(progress) as shown:
        shown.job(job)
        if not job.status.ended:
            # Polling gives the same result later; but it works behind a proxy that holds back streams, and
            # it ends on time.
            with suppress(QueueFull, TimedOut, Unreachable, BadAnswer):
                yield from each(watch(job_id, retry_policy, until=end - _SILENCE_SECONDS), shown.event)
        return (yield from _poll(job_id, retry_policy, end=end, shown=shown))


def _poll(job_id: str, retry_policy: RetryPolicy, *, end: float, shown: Display) -> Operation[JobFields]:
    pause = _FIRST_PAUSE
    while True:
        job = yield from ask(_look(job_id, retry_policy, end=end))
        shown.job(job)
        if job.status.ended:
            return job
        left = end - retry_policy.clock()
        if left <= 0:
            raise TimedOut(
                f"job {job_id} is still {job.status}, and goes on: it was waited for as long as was asked",
                given=str(job.status),
                expected=f'more time; client.job("{job_id}") is the same job later',
            )
        yield Sleep(min(pause, left))
        pause = min(1.5 * pause, _LONGEST_PAUSE)


def _look(job_id: str, retry_policy: RetryPolicy, *, end: float) -> Call[JobFields]:
    return replace(show_job(job_id), timeout=min(retry_policy.timeout, max(end - retry_policy.clock(), 1.0)))


def _shown(progress: bool | Display) -> Display:
    if isinstance(progress, Display):
        return progress
    return display() if progress else Display()


def _ends(event: Event) -> bool:
    """Return whether this is the last event of a job; raise `BadAnswer` for data that `Display` cannot read."""
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


def _open(call: Call[Any], _left: float) -> OpenStream:
    return OpenStream(call, _SILENCE_SECONDS)


def _post(job_id: str, verb: str, read: Callable[[Any], T]) -> Call[T]:
    where = path("jobs", job_id, verb)
    return Call(method="POST", path=where, read=reading_json(read), repeats=Repeat.IF_REFUSED)


class EventParser:
    """Incremental parser of server-sent events (WHATWG HTML, section 9.2.6)."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._text = ""
        self._name = ""
        self._data: list[str] = []
        self._id: str | None = None

    def feed(self, received: bytes) -> Iterator[Event]:
        """Return the events that these bytes complete; raise `BadAnswer` for an event that loraplex does not send."""
        lines = (self._text + self._decode(received)).replace("\r\n", "\n").split("\n")
        self._text = lines.pop()
        for line in lines:
            if line:
                self._take(line)
            else:
                yield from self._end()

    def _take(self, line: str) -> None:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
        elif field == "id" and "\0" not in value:
            self._id = value

    def _end(self) -> Iterator[Event]:
        name, text, self._name, self._data = self._name, "\n".join(self._data), "", []
        if not text:
            return
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise BadAnswer(f"an event's data is no JSON object: {text[:100]}", expected="an event of a job")
        yield Event(name, data, self._id)


J = TypeVar("J", bound=JobFields)


def succeeded(job: J) -> J:
    """Return the job; raise `JobFailed` or `JobCancelled` if it did not succeed."""
    if job.status is JobStatus.CANCELLED:
        raise JobCancelled(f"job {job.id} ({job.adapter}) was cancelled", job=job)
    if job.status is JobStatus.FAILED:
        reason = "without a reason" if job.error is None else f"{job.error.code}: {job.error.detail}"
        raise JobFailed(f"job {job.id} ({job.adapter}) failed, {reason}", job=job) from job.error
    return job
