"""Commands `jobs`, `job`, `cancel` and `revert`, and the display of a job until its end."""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from loraplex.cli.errors import Interrupted, WrongUsage
from loraplex.cli.evaluation_result import evaluation_tables
from loraplex.cli.job_summary import (
    adapter_table,
    comparison,
    evaluation,
    fleet_summary,
    headline_of,
    held_out,
    is_live,
    outcome_lines,
)
from loraplex.cli.output import Table, alert, console, pairs, when
from loraplex.cli.session import Session, argument, command, complete_adapter, complete_job, option
from loraplex.errors import BadAnswer, JobCancelled, JobFailed, QueueFull, TimedOut, Unreachable
from loraplex.progress import Display, display
from loraplex.results import AdapterRef, EvaluationResult, JobFields, JobStatus, Outcome, succeeded

PANEL = "Jobs and data sets"
Id = Annotated[str, argument("ID", "Id of the job, or its first 4 or more characters.", autocompletion=complete_job)]
_FOLLOW = "Follow this job until it ends: its id, or its first 4 or more characters."
_ID_LENGTH = 32
_SHORTEST_PREFIX = 4
_MAX_CANDIDATES = 5
_MAX_RENAMED = 3
# Errors after which `wait` polls the job, because it has no event stream.
_NO_EVENTS = (QueueFull, TimedOut, Unreachable, BadAnswer)
app = typer.Typer()


@command(app, "jobs", panel=PANEL)
def jobs(
    session: Session,
    *,
    status: Annotated[JobStatus | None, option("Only jobs with this status.")] = None,
    adapter: Annotated[
        str | None, option("Only jobs that train this adapter.", autocompletion=complete_adapter)
    ] = None,
    limit: Annotated[int, option("Maximum number.", min=1)] = 20,
    follow_id: Annotated[str | None, option(_FOLLOW, "--follow", metavar="ID", autocompletion=complete_job)] = None,
) -> None:
    """List the training jobs, newest first, or follow one of them."""
    if follow_id is not None:
        job_id = find_id(session, follow_id)
        succeeded(_follow_in_lines(session, job_id) if session.as_json else follow(session, job_id))
        return
    found = list(session.client.jobs(status=status, adapter=adapter, limit=limit))
    table = Table(
        ("id", "adapter", "status", "steps", "how good", "made"),
        [
            (job.id, job.adapter, job.status.value, _progress(job)[0], headline_of(job), when(job.created_at))
            for job in found
        ],
        right=("steps",),
        least=("made", "steps", "how good"),
    )
    session.give(found, table if found else "There are none.")


@command(app, "job", panel=PANEL)
def show_job(
    session: Session,
    id: Id,
    *,
    outcome: Annotated[Outcome | None, option("List the adapters of a fleet with this outcome.")] = None,
    sort: Annotated[Literal["gain", "name"] | None, option("List the adapters of a fleet in this order.")] = None,
    limit: Annotated[int | None, option("Maximum number of adapters to list.", min=1)] = None,
) -> None:
    """Show one job: its status, its evaluation, its result and its log; or list the adapters that it trained."""
    job_id = find_id(session, id)
    if outcome is not None or sort is not None or limit is not None:
        adapters = list(session.client.job_adapters(job_id, outcome=outcome, sort=sort, limit=limit))
        session.give(adapters, adapter_table(adapters) if adapters else "There are none.")
        return
    job = session.client.job(job_id)
    steps, loss = _progress(job)
    about = {
        "job": job.id,
        "adapter": job.adapter,
        "status": job.status.value,
        "steps": steps,
        "training loss": loss,
        "attempt": job.attempt,
        "queued": when(job.created_at),
        "began": when(job.started_at),
        "ended": when(job.finished_at),
        "error": None if job.error is None else f"{job.error.detail} ({job.error.code})",
    }
    log = [f"{when(line.time)}  {line.text}" for line in job.log]
    session.give(job, *_separated([pairs(about)], *_result(session, job), log))
    note_warnings(session, job.spec)


@command(app, "cancel", panel=PANEL)
def cancel(session: Session, id: Id) -> None:
    """Cancel a job that has not ended. It publishes nothing after that."""
    job = session.client.cancel(find_id(session, id))
    session.give(job, f"{job.id} is {job.status.value}")


@command(app, "revert", panel=PANEL)
def revert(session: Session, id: Id) -> None:
    """Undo what a job published: each live alias that it moved points to the version before."""
    done = session.client.revert(find_id(session, id))
    lines = [f"{back.name}: live is {back.to or 'none'} again (it was {back.version})" for back in done.reverted]
    lines += [f"{skipped.name}: left as it is, {skipped.detail}" for skipped in done.skipped]
    session.give(done, *lines)


def find_id(session: Session, text: str) -> str:
    """Return the id of the job whose id begins with `text`; raise `WrongUsage` if several do.

    If no id begins with it, the text is returned unchanged, and the service answers that there is no such job.
    """
    if not _SHORTEST_PREFIX <= len(text) < _ID_LENGTH:
        return text
    candidates = list(session.client.jobs(prefix=text, limit=_MAX_CANDIDATES + 1))
    if len(candidates) > 1:
        named = [f"{job.id} ({job.adapter}, {job.status.value})" for job in candidates[:_MAX_CANDIDATES]]
        named += ["and more"] if len(candidates) > _MAX_CANDIDATES else []
        raise WrongUsage(f"The ids of several jobs begin with {text}: {', '.join(named)}. Give more of the id.")
    return candidates[0].id if candidates else text


def follow(session: Session, job_id: str, *, rows: Path | None = None) -> JobFields:
    """Follow a job until it ends, and return it; show its progress and its result.

    `rows` is a file to suggest for the next step. Raises `Interrupted` on Ctrl-C; the job continues.
    """
    with _still_running(job_id), _unwinding_on_sigterm():
        job = _wait(session, job_id, Display() if session.as_json else display(console(stderr=True)))
    note_warnings(session, job.spec)
    is_done = job.status is JobStatus.SUCCEEDED
    session.give(job, *_separated(*(_result(session, job) if is_done else ())))
    if is_done and isinstance(job.result, AdapterRef):
        name = job.result.name if is_live(job) else str(job.result)
        session.note(f"next: loraplex predict {name} {f'{shlex.quote(str(rows))} --limit 5' if rows else 'FILE'}")
    return job


def _result(session: Session, job: JobFields) -> list[list[Any]]:
    """Return the parts of the result of a job: what was compared, how good it is, and what is live."""
    if isinstance(job.result, EvaluationResult):
        return [evaluation_tables(job.result)]
    # Without `held_out`, the metrics on held-out rows are those of the evaluation. After a choice, it is enough.
    has_more = job.evaluation is None or (job.auto is None and "held_out" in (job.metrics or {}))
    metrics = held_out(job.metrics) if has_more else []
    parts = [comparison(job.auto), evaluation(job.evaluation), metrics, fleet_summary(session, job)]
    return [*parts, [alert(f"WARNING: {warning}") for warning in job.warnings], outcome_lines(job)]


def note_warnings(session: Session, spec: Any) -> None:
    """Print the warnings about the settings of a training, and the groups of a fleet that have other names."""
    for warning in spec.get("warnings", ()):
        session.note(f"note: {warning}")
    renamed = spec.get("renamed", ())
    for group in renamed[:_MAX_RENAMED]:
        session.note(f"note: the group '{group['group']}' is no valid name: its adapter is {group['name']}")
    if len(renamed) > _MAX_RENAMED:
        session.note(f"note: {spec['renamed_count'] - _MAX_RENAMED:,} more groups have other names")


def _follow_in_lines(session: Session, job_id: str) -> JobFields:
    """Follow a job until it ends, and print each event as a line of JSON, or only the end if there are no events."""
    with _still_running(job_id):
        try:
            for event in session.client.events(job_id):
                session.give_json({"event": event.name, "data": event.data, "id": event.id})
        except _NO_EVENTS:
            job = _wait(session, job_id, Display())
            end = {"status": job.status, "attempt": job.attempt, "result": job.result, "error": job.error}
            session.give_json({"event": "status", "data": end, "id": None})
            return job
        return session.client.job(job_id)


def _wait(session: Session, job_id: str, progress: Display) -> JobFields:
    try:
        return session.client.wait(job_id, progress=progress)
    except (JobFailed, JobCancelled) as error:
        return cast(JobFields, error.job)


@contextmanager
def _still_running(job_id: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"The job continues. To follow it: loraplex jobs --follow {job_id}\nTo end it: loraplex cancel {job_id}"
        ) from None


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """Raise an exception on SIGTERM, so that a progress bar shows the cursor again."""
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _separated(*parts: list[Any]) -> list[Any]:
    """Return the items of all parts, with an empty line between the parts."""
    lines = [item for part in parts if part for item in ("", *part)]
    return lines[1:]


def _progress(job: JobFields) -> tuple[str | None, float | None]:
    return (None, None) if job.progress is None else (f"{job.progress.step}/{job.progress.steps}", job.progress.loss)
