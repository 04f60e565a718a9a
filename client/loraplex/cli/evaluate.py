"""Commands `evaluate` and `suspects`: adapters side by side on labelled rows, and rows with doubtful labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli import jobs
from loraplex.cli.errors import WrongUsage
from loraplex.cli.jobs import Id, find_id, follow
from loraplex.cli.output import Table
from loraplex.cli.session import Session, argument, command, complete_adapter, option
from loraplex.cli.train import ONE_SOURCE, PANEL, IdempotencyKey, NoWait, TableOptions, how_to_follow
from loraplex.results import succeeded

_BASE = ("base", "-")
_ENTRIES = "Adapters (acme, acme@3; base or - is the base layer), and last the file of labelled rows, unless --dataset."
_EXAMPLE = "Example: loraplex evaluate acme@2 acme@3 base fresh.csv --target queue"

app = typer.Typer()


@command(app, "evaluate", panel=PANEL, example=_EXAMPLE)
def evaluate(
    session: Session,
    entries: Annotated[list[str], argument("REF… FILE", _ENTRIES, autocompletion=complete_adapter)],
    *,
    table: TableOptions,
    no_wait: NoWait = False,
    idempotency_key: IdempotencyKey = None,
) -> None:
    """Compare adapters on labelled rows that none was trained on; gains are over the first. Nothing is published."""
    references, file = _parse(entries, has_dataset=table.dataset is not None)
    dataset = table.put_table(session, file)
    adapters = [None if reference in _BASE else reference for reference in references]
    job = session.client.evaluate(adapters, data=table.data(session, dataset), idempotency_key=idempotency_key)
    if no_wait:
        session.give(job, how_to_follow(job))
    else:
        succeeded(follow(session, job.id))


@command(app, "suspects", panel=jobs.PANEL)
def suspects(
    session: Session, id: Id, *, limit: Annotated[int | None, option("Maximum number.", min=1)] = None
) -> None:
    """List the rows of a training whose label the other rows contradict, worst first."""
    rows = list(session.client.suspects(find_id(session, id), limit=limit))
    table = Table(("row", "label", "suggested", "score"), rows, right=("row", "score"))
    session.give(rows, table if rows else "There are none.")


def _parse(entries: Sequence[str], *, has_dataset: bool) -> tuple[Sequence[str], Path | None]:
    """Return the references, and the file, which is the last argument; raise `WrongUsage` if one is missing."""
    if has_dataset and Path(entries[-1]).is_file():
        raise WrongUsage(ONE_SOURCE)
    references, file = (entries, None) if has_dataset else (entries[:-1], Path(entries[-1]))
    if not references:
        raise WrongUsage("Say which adapters, and last the file: loraplex evaluate acme base rows.csv --target COLUMN")
    return references, file
