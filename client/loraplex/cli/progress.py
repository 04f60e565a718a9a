"""Progress of a job: a display for people, one event per line for machines."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loraplex.cli.errors import Interrupted
from loraplex.cli.session import Session
from loraplex.errors import BadAnswer, JobCancelled, JobFailed, QueueFull, TimedOut, Unreachable
from loraplex.progress import Display, display
from loraplex.results import JobFields

_NO_EVENTS = (QueueFull, TimedOut, Unreachable, BadAnswer)
"""Errors after which `wait` polls the job, because it has no event stream."""


def follow(session: Session, job_id: str) -> JobFields:
    """Follow a job until it ends, and return it; its progress is displayed.

    Raises `Interrupted` on Ctrl-C; the job continues.
    """
    with _going_on(job_id), _unwinding_on_sigterm():
        return _ended(session, job_id, Display() if session.as_json else display(session.err))


def follow_in_lines(session: Session, job_id: str) -> JobFields:
    """Follow a job until it ends, and print each event as a line of JSON, or only the end if there are no events."""
    with _going_on(job_id):
        try:
            for event in session.client.events(job_id):
                session.give_line({"event": event.name, "data": event.data, "id": event.id})
        except _NO_EVENTS:
            job = _ended(session, job_id, Display())
            end = {"status": job.status, "attempt": job.attempt, "result": job.result, "error": job.error}
            session.give_line({"event": "status", "data": end, "id": None})
            return job
        ended: JobFields = session.client.job(job_id)
        return ended


def _ended(session: Session, job_id: str, shown: Display) -> JobFields:
    try:
        return session.client.wait(job_id, progress=shown)
    except (JobFailed, JobCancelled) as error:
        ended: JobFields = error.job
        return ended


@contextmanager
def _going_on(job_id: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"The job goes on. To follow it: loraplex jobs --follow {job_id}\nTo end it: loraplex cancel {job_id}"
        ) from None


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """Raise an exception on SIGTERM, so that a progress bar shows the cursor again."""
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
