"""Commands `base` and `status`."""

from collections.abc import Iterable

import typer

from loraplex.cli.errors import REFUSED
from loraplex.cli.session import Session, command
from loraplex.cli.summary import pairs
from loraplex.results import Base, JobStatus


def register(cli: typer.Typer, *, panel: str) -> None:
    """Register the commands."""

    @command(cli, "base", panel=panel)
    def base(session: Session) -> None:
        """Show the base layer."""
        found: Base = session.client.base()
        about = {
            "source": found.source,
            "numbers in": found.in_features,
            "numbers out": found.out_features,
            "bias": "yes" if found.bias else "no",
            "held in": f"{found.dtype} on {found.device}",
            "encoder": found.feature_space,
            "fingerprint": found.fingerprint,
        }
        session.give(found, pairs(about))

    @command(cli, "status", panel=panel)
    def status(session: Session) -> None:
        """Show whether the service answers, with the number of its adapters and jobs."""
        client = session.client
        found = client.base()
        ready = client.ready()
        counts = {
            "adapters": _count(client.adapters()),
            "jobs_running": _count(client.jobs(status=JobStatus.RUNNING)),
            "jobs_queued": _count(client.jobs(status=JobStatus.QUEUED)),
        }
        about = {
            "service": session.url,
            "ready": "yes" if ready else "no: it is starting or stopping",
            "base layer": f"{found.source}, {found.in_features} numbers in, {found.out_features} out",
            **{name.replace("_", " "): f"{count:,}" for name, count in counts.items()},
        }
        session.give({"url": session.url, "ready": ready, "base": found, **counts}, pairs(about))
        if not ready:
            raise typer.Exit(REFUSED)


def _count(found: Iterable[object]) -> int:
    return sum(1 for _ in found)
