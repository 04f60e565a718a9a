"""Command `train`."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from loraplex.cli.datasets import find_dataset, name_of, put_dataset
from loraplex.cli.errors import WrongUsage
from loraplex.cli.plugins import complete_adapter, complete_dataset
from loraplex.cli.request import AUTO, Loss, Method, Publish, SplitBy, Wanted, make_request, selected, split_names
from loraplex.cli.rows import can_read
from loraplex.cli.session import Session, command, follow
from loraplex.cli.summary import fleet_summary, held_out, is_live, losses, outcome, pairs, size
from loraplex.results import DatasetVersion, Estimate, JobFields, JobStatus, succeeded

DATA, HOW, WHAT_COUNTS, GO = "Data", "How to train", "Held-out rows and publishing", "This run"


def _rank(text: str) -> str:
    if text != AUTO and not text.isdecimal():
        raise typer.BadParameter(f"a whole number, or {AUTO}")
    return text


def register(cli: typer.Typer, *, panel: str) -> None:
    """Register the command."""
    example = "Example: loraplex train tickets.csv --name acme --target queue"

    @command(cli, "train", panel=panel, example=example)
    def train(
        session: Session,
        file: Annotated[
            Path | None,
            typer.Argument(
                metavar="FILE",
                help="CSV, Parquet, Arrow stream, JSON lines or NPZ; uploaded as a data set.",
                show_default=False,
            ),
        ] = None,
        *,
        name: Annotated[
            str,
            typer.Option(
                help="Name of the adapter; if it exists, it gets a new version.", autocompletion=complete_adapter
            ),
        ],
        target: Annotated[
            str, typer.Option(help="Target column; several numeric columns as a,b,c.", rich_help_panel=DATA)
        ],
        dataset: Annotated[
            str | None,
            typer.Option(
                help="An existing data set, instead of FILE.", autocompletion=complete_dataset, rich_help_panel=DATA
            ),
        ] = None,
        dataset_name: Annotated[
            str | None, typer.Option(help="Name of the data set.", show_default="the file's name", rich_help_panel=DATA)
        ] = None,
        inputs: Annotated[str | None, typer.Option(help="Input columns, as a,b,c.", rich_help_panel=DATA)] = None,
        input_prefix: Annotated[
            str | None, typer.Option(help="Prefix of the names of the input columns.", rich_help_panel=DATA)
        ] = None,
        input_column: Annotated[
            str | None, typer.Option(help="Input column that contains lists, such as embeddings.", rich_help_panel=DATA)
        ] = None,
        weight: Annotated[
            str | None, typer.Option(help="Column with the weights of the rows.", rich_help_panel=DATA)
        ] = None,
        labels: Annotated[
            str | None, typer.Option(help="Names of the outputs, in order, as a,b,c.", rich_help_panel=DATA)
        ] = None,
        group: Annotated[
            str | None,
            typer.Option(help="Column whose values a split keeps together, such as customer.", rich_help_panel=DATA),
        ] = None,
        group_by: Annotated[
            str | None, typer.Option(help="Column with one adapter for each value: a fleet.", rich_help_panel=DATA)
        ] = None,
        rank: Annotated[
            str, typer.Option(help="Rank of the adapter.", metavar="N|auto", callback=_rank, rich_help_panel=HOW)
        ] = AUTO,
        alpha: Annotated[
            float | None,
            typer.Option(
                help="Alpha: the layer adds alpha/rank times A·B.", show_default="the rank", rich_help_panel=HOW
            ),
        ] = None,
        loss: Annotated[
            Loss | None,
            typer.Option(help="Loss to minimise.", show_default="by the type of the target", rich_help_panel=HOW),
        ] = None,
        method: Annotated[Method, typer.Option(help="Training method.", rich_help_panel=HOW)] = Method.AUTO,
        epochs: Annotated[
            int | None, typer.Option(help="Passes over the training rows.", show_default="auto", rich_help_panel=HOW)
        ] = None,
        learning_rate: Annotated[
            float | None, typer.Option(help="Size of a step.", show_default="auto", rich_help_panel=HOW)
        ] = None,
        batch_size: Annotated[
            int | None, typer.Option(help="Rows of a step.", show_default="auto", rich_help_panel=HOW)
        ] = None,
        ridge: Annotated[
            float | None,
            typer.Option(help="Ridge penalty of the closed form.", show_default="auto", rich_help_panel=HOW),
        ] = None,
        seed: Annotated[
            int | None, typer.Option(help="Seed of the random generator.", show_default="0", rich_help_panel=HOW)
        ] = None,
        split: Annotated[
            SplitBy | None,
            typer.Option(
                help="How the held-out rows are chosen. Without it, fewer than 100 rows are all trained on.",
                show_default="group with --group, else rows",
                rich_help_panel=WHAT_COUNTS,
            ),
        ] = None,
        split_column: Annotated[
            str | None, typer.Option(help="The column of --split time and --split column.", rich_help_panel=WHAT_COUNTS)
        ] = None,
        held_out_share: Annotated[
            float | None,
            typer.Option(
                "--held-out",
                help="Fraction of the rows that is held out.",
                show_default="0.2",
                rich_help_panel=WHAT_COUNTS,
            ),
        ] = None,
        publish: Annotated[
            Publish, typer.Option(help="When the new version becomes live.", rich_help_panel=WHAT_COUNTS)
        ] = Publish.ALWAYS,
        metric: Annotated[
            str | None,
            typer.Option(
                help="Metric that --publish if-better compares, such as accuracy.",
                show_default="loss",
                rich_help_panel=WHAT_COUNTS,
            ),
        ] = None,
        margin: Annotated[
            float | None,
            typer.Option(help="Minimum improvement of the metric.", show_default="0", rich_help_panel=WHAT_COUNTS),
        ] = None,
        no_wait: Annotated[
            bool, typer.Option("--no-wait", help="Do not wait for the job.", rich_help_panel=GO)
        ] = False,
        dry_run: Annotated[
            bool,
            typer.Option(
                "--dry-run", help="Print what would be trained. FILE is uploaded in any case.", rich_help_panel=GO
            ),
        ] = False,
    ) -> None:
        """Train an adapter from a file, and wait for its version and its metrics on held-out rows."""
        wanted = Wanted(
            name=name,
            targets=split_names(target),
            inputs=selected(inputs, input_prefix, input_column),
            group=group,
            group_by=group_by,
            weight=weight,
            labels=None if labels is None else split_names(labels),
            rank=None if rank == AUTO else int(rank),
            alpha=alpha,
            loss=loss,
            method=method,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            ridge=ridge,
            seed=seed,
            split=split,
            split_column=split_column,
            fraction=held_out_share,
            publish=publish,
            metric=metric,
            margin=margin,
        )
        stored = _dataset(session, file, dataset, dataset_name)
        request = make_request(wanted, stored, session.client.base(), session.say)
        if dry_run:
            show_estimate(session, session.client.estimate(**request))
            return
        job: JobFields = session.client.train(**request)
        if no_wait:
            session.give(job, f"{job.id} is {job.status}. To follow it: loraplex jobs --follow {job.id}")
            return
        job = follow(session, job.id)
        show_ended(session, job, rows_of=file if file and can_read(file) else None)
        succeeded(job)


def _dataset(session: Session, file: Path | None, dataset: str | None, name: str | None) -> DatasetVersion:
    if (file is None) == (dataset is None):
        raise WrongUsage("Give the rows: FILE to upload, or --dataset NAME for one that is there. One of the two.")
    if dataset is not None:
        return find_dataset(session, dataset)
    assert file is not None
    return put_dataset(session, name or name_of(file), file)


def show_estimate(session: Session, estimate: Estimate) -> None:
    """Show the settings and the estimate of a training."""
    spec = estimate.spec
    # No option of `train` sets validation_fraction, because a split holds the rows out.
    training = {name: value for name, value in spec.get("training", {}).items() if name != "validation_fraction"}
    shown = {name: value for name, value in training.items() if value is not None}
    sides = spec.get("split") or {}
    rows = {side: sides[side]["rows"] for side in ("train", "held_out") if side in sides}
    session.give(
        estimate,
        pairs(
            {
                "adapters": estimate.adapters,
                "rank": spec.get("rank"),
                **shown,
                "rows": spec["data"]["rows"],
                "held out": f"{rows['held_out']} of them, by {sides.get('by', 'data set')}" if rows else None,
                "memory": f"about {size(estimate.memory_bytes)}",
                "time": f"about {estimate.seconds:.3g} s",
            }
        ),
    )
    _warn(session, spec)


def show_ended(session: Session, job: JobFields, *, rows_of: Path | None = None) -> None:
    """Show the result of a job; `rows_of` is a file to suggest for the next step."""
    _warn(session, job.spec)
    metrics = held_out(job.metrics)
    shown: list[Any] = []
    if job.status is JobStatus.SUCCEEDED:
        shown += [metrics, ""] if metrics is not None else []
        summary = fleet_summary(session, job)
        shown += [*summary, ""] if summary else []
        shown += [line for line in (losses(job.metrics), *outcome(job)) if line]
    session.give(job, *shown)
    if job.status is JobStatus.SUCCEEDED and job.result is not None:
        name = job.result.name if is_live(job) else str(job.result)
        session.say(f"next: loraplex predict {name} {f'{shlex.quote(str(rows_of))} --limit 5' if rows_of else 'FILE'}")


def _warn(session: Session, spec: Mapping[str, Any]) -> None:
    for warning in spec.get("warnings", ()):
        session.say(f"note: {warning}")
