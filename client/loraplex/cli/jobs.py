"""Commands `jobs`, `job`, `cancel` and `revert`."""

from typing import Annotated, Any

import typer

from loraplex.cli.errors import WrongUsage
from loraplex.cli.output import Fitting
from loraplex.cli.plugins import complete_adapter, complete_job
from loraplex.cli.session import Session, command, follow, follow_in_lines
from loraplex.cli.summary import dash, fleet_summary, held_out, losses, number, outcome, pairs, when
from loraplex.cli.train import show_ended
from loraplex.results import JobFields, JobStatus, succeeded

Id = Annotated[
    str,
    typer.Argument(metavar="ID", help="Id of the job, or its first 4 or more characters.", autocompletion=complete_job),
]
_ID_LENGTH = 32
_SHORTEST_PREFIX = 4
_MOST_CANDIDATES = 5


def register(cli: typer.Typer, *, panel: str) -> None:
    """Register the commands."""

    @command(cli, "jobs", panel=panel)
    def jobs(
        session: Session,
        *,
        status: Annotated[JobStatus | None, typer.Option(help="Only jobs with this status.")] = None,
        adapter: Annotated[
            str | None, typer.Option(help="Only jobs that train this adapter.", autocompletion=complete_adapter)
        ] = None,
        limit: Annotated[int, typer.Option(help="Maximum number.", min=1)] = 20,
        follow_id: Annotated[
            str | None,
            typer.Option(
                "--follow",
                help="Follow this job until it ends: its id, or its first 4 or more characters.",
                metavar="ID",
                autocompletion=complete_job,
            ),
        ] = None,
    ) -> None:
        """List the training jobs, newest first, or follow one of them."""
        if follow_id is not None:
            _follow(session, follow_id)
            return
        found = list(session.client.jobs(status=status, adapter=adapter, limit=limit))
        shown = Fitting(
            *("id", "adapter", "status", "steps", "training loss", "made"),
            right=("steps", "training loss"),
            least=("made", "training loss", "steps"),
        )
        for each in found:
            shown.add_row(each.id, each.adapter, each.status.value, *_progress(each), when(each.created_at))
        session.give(found, shown if found else "There are none.")

    @command(cli, "job", panel=panel)
    def job(session: Session, id: Id) -> None:
        """Show one job: its status, its result and its log."""
        found: JobFields = session.client.job(find_id(session, id))
        steps, loss = _progress(found)
        about = {
            "job": found.id,
            "adapter": found.adapter,
            "status": found.status.value,
            "steps": steps,
            "training loss": loss,
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
        for part in ([metrics] if metrics is not None else [], fleet_summary(session, found), ended, log):
            shown += ["", *part] if part else []
        session.give(found, *shown)

    @command(cli, "cancel", panel=panel)
    def cancel(session: Session, id: Id) -> None:
        """Cancel a job that has not ended. It publishes nothing after that."""
        ended: JobFields = session.client.cancel(find_id(session, id))
        session.give(ended, f"{ended.id} is {ended.status.value}")

    @command(cli, "revert", panel=panel)
    def revert(session: Session, id: Id) -> None:
        """Undo what a job published: each live alias that it moved points to the version before."""
        done = session.client.revert(find_id(session, id))
        lines = [f"{back.name}: live is {_version(back.to)} again (it was {back.version})" for back in done.reverted]
        lines += [f"{skipped.name}: left as it is, {skipped.detail}" for skipped in done.skipped]
        session.give(done, *lines)


def find_id(session: Session, text: str) -> str:
    """Return the id of the job whose id begins with `text`; raise `WrongUsage` if several do.

    If no id begins with it, the text is returned unchanged, and the service answers that there is no such job.
    """
    if not _SHORTEST_PREFIX <= len(text) < _ID_LENGTH:
        return text
    found = list(session.client.jobs(prefix=text, limit=_MOST_CANDIDATES + 1))
    if len(found) > 1:
        named = ", ".join(f"{job.id} ({job.adapter}, {job.status.value})" for job in found[:_MOST_CANDIDATES])
        more = ", and more" if len(found) > _MOST_CANDIDATES else ""
        raise WrongUsage(f"The ids of several jobs begin with {text}: {named}{more}. Give more of the id.")
    return found[0].id if found else text


def _follow(session: Session, job_id: str) -> None:
    job_id = find_id(session, job_id)
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
