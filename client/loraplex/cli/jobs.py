"""`jobs`, `job`, `cancel`, `revert`."""

from typing import Annotated, Any

import typer

from loraplex.cli.completing import complete_adapter, complete_job
from loraplex.cli.following import follow, follow_in_lines
from loraplex.cli.reporting import dash, held_out, losses, number, outcome, pairs, when
from loraplex.cli.session import Session, command
from loraplex.cli.tables import Fitting
from loraplex.cli.training import show_ended
from loraplex.jobs import succeeded
from loraplex.results import JobFields, JobStatus

Id = Annotated[str, typer.Argument(metavar="ID", help="Id of the job.", autocompletion=complete_job)]


def register(cli: typer.Typer, *, panel: str) -> None:
    """Add the commands."""

    @command(cli, "jobs", panel=panel)
    def jobs(
        session: Session,
        *,
        status: Annotated[JobStatus | None, typer.Option(help="Only these.")] = None,
        adapter: Annotated[
            str | None, typer.Option(help="Only those that train this one.", autocompletion=complete_adapter)
        ] = None,
        limit: Annotated[int, typer.Option(help="How many at most.", min=1)] = 20,
        follow_id: Annotated[
            str | None,
            typer.Option(
                "--follow", help="Watch this job until it has ended.", metavar="ID", autocompletion=complete_job
            ),
        ] = None,
    ) -> None:
        """Training jobs, newest first; or one of them as it goes on."""
        if follow_id is not None:
            _follow(session, follow_id)
            return
        found = list(session.client.jobs(status=status, adapter=adapter, limit=limit))
        shown = Fitting(
            *("id", "adapter", "status", "steps", "loss", "made"),
            right=("steps", "loss"),
            least=("made", "loss", "steps"),
        )
        for each in found:
            shown.add_row(each.id, each.adapter, each.status.value, *_progress(each), when(each.created_at))
        session.give(found, shown if found else "There are none.")

    @command(cli, "job", panel=panel)
    def job(session: Session, id: Id) -> None:
        """One job: how it stands, what it came to, and its log."""
        found: JobFields = session.client.job(id)
        steps, loss = _progress(found)
        about = {
            "job": found.id,
            "adapter": found.adapter,
            "status": found.status.value,
            "steps": steps,
            "loss": loss,
            "attempt": found.attempt,
            "queued": when(found.created_at),
            "began": when(found.started_at),
            "ended": when(found.finished_at),
            "error": None if found.error is None else f"{found.error.detail} ({found.error.code})",
        }
        metrics = held_out(found.metrics)
        ended = [line for line in (losses(found.metrics), *outcome(found)) if line]
        log = [f"{when(line.time)}  {line.text}" for line in found.log]
        shown: list[Any] = [pairs(about)]
        for part in ([metrics] if metrics is not None else [], ended, log):
            shown += ["", *part] if part else []
        session.give(found, *shown)

    @command(cli, "cancel", panel=panel)
    def cancel(session: Session, id: Id) -> None:
        """End a job that has not ended: it publishes nothing from now on."""
        ended: JobFields = session.client.cancel(id)
        session.give(ended, f"{ended.id} is {ended.status.value}")

    @command(cli, "revert", panel=panel)
    def revert(session: Session, id: Id) -> None:
        """Take back what a job published: each live alias that it moved points again where it pointed before."""
        done = session.client.revert(id)
        lines = [f"{back.name}: live is {_version(back.to)} again (it was {back.version})" for back in done.reverted]
        lines += [f"{skipped.name}: left as it is, {skipped.detail}" for skipped in done.skipped]
        session.give(done, *lines)


def _follow(session: Session, job_id: str) -> None:
    if session.as_json:
        job = follow_in_lines(session, job_id)
    else:
        job = follow(session, job_id)
        show_ended(session, job)
    succeeded(job)


def _progress(job: JobFields) -> tuple[str, str]:
    if job.progress is None:
        return "–", "–"
    return f"{job.progress.step}/{job.progress.steps}", number(job.progress.loss)


def _version(number: int | None) -> str:
    return "none" if number is None else dash(number)
