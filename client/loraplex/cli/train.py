"""Command `train`: its options, and the request that they and the columns of the data set make."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from loraplex.cli.columns import Selection, infer_inputs, infer_loss, listed, selected, selection_of, split_names
from loraplex.cli.datasets import FORMATS, find_dataset, name_of, put_dataset
from loraplex.cli.errors import WrongUsage
from loraplex.cli.jobs import follow, note_warnings
from loraplex.cli.output import pairs, size
from loraplex.cli.session import Session, argument, command, complete_adapter, complete_dataset, option
from loraplex.results import Base, DatasetVersion, Estimate, succeeded

AUTO = "auto"
Method = Literal["auto", "adamw", "sgd", "closed_form"]
Loss = Literal["mse", "huber", "cross_entropy", "binary_cross_entropy", "cosine", "multiple_negatives"]
SplitBy = Literal["rows", "group", "time", "column", "none"]
Publish = Literal["always", "never", "if-better"]
# With fewer rows, the service trains on all of them, because few held-out rows give no reliable metrics.
_FEW_ROWS = 100
_FLEET_RANK, _FLEET_RATE, _FLEET_RIDGE = 8, 0.01, 1.0
_GRADIENT_SETTINGS = ("epochs", "learning_rate", "batch_size")

app = typer.Typer()
_data = partial(option, panel="Data")
_fit = partial(option, panel="How to train")
_evaluation = partial(option, panel="Held-out rows and publishing")
_run = partial(option, panel="This run")


def _rank(text: str) -> str:
    if text != AUTO and not text.isdecimal():
        raise typer.BadParameter(f"a whole number, or {AUTO}")
    return text


@dataclass(kw_only=True)
class Options:
    """Arguments and options of `train`; None if an option is not given."""

    file: Annotated[Path | None, argument("FILE", f"{FORMATS}; uploaded as a data set.")] = None
    name: Annotated[
        str, option("Name of the adapter; if it exists, it gets a new version.", autocompletion=complete_adapter)
    ]
    target: Annotated[str, _data("Target column; several numeric columns as a,b,c.")]
    dataset: Annotated[str | None, _data("Existing data set, instead of FILE.", autocompletion=complete_dataset)] = None
    dataset_name: Annotated[str | None, _data("Name of the data set.", show_default="the file's name")] = None
    inputs: Annotated[str | None, _data("Input columns, as a,b,c.")] = None
    input_prefix: Annotated[str | None, _data("Prefix of the names of the input columns.")] = None
    input_column: Annotated[str | None, _data("Input column that contains lists, such as embeddings.")] = None
    weight: Annotated[str | None, _data("Column with the weights of the rows.")] = None
    labels: Annotated[str | None, _data("Names of the outputs, in order, as a,b,c.")] = None
    group: Annotated[str | None, _data("Column whose values a split keeps together, such as customer.")] = None
    group_by: Annotated[str | None, _data("Column with one adapter for each value: a fleet.")] = None
    rank: Annotated[str, _fit("Rank of the adapter.", metavar="N|auto", callback=_rank)] = AUTO
    alpha: Annotated[float | None, _fit("Alpha: the layer adds alpha/rank times A·B.", show_default="the rank")] = None
    loss: Annotated[Loss | None, _fit("Loss to minimise.", show_default="by the type of the target")] = None
    method: Annotated[Method, _fit("Training method.")] = "auto"
    epochs: Annotated[int | None, _fit("Passes over the training rows.", show_default="auto")] = None
    learning_rate: Annotated[float | None, _fit("Size of a step.", show_default="auto")] = None
    batch_size: Annotated[int | None, _fit("Rows of a step.", show_default="auto")] = None
    ridge: Annotated[float | None, _fit("Ridge penalty of the closed form.", show_default="auto")] = None
    seed: Annotated[int | None, _fit("Seed of the random generator.", show_default="0")] = None
    split: Annotated[
        SplitBy | None,
        _evaluation(
            "How the held-out rows are chosen. Without it, fewer than 100 rows are all trained on.",
            show_default="group with --group, else rows",
        ),
    ] = None
    split_column: Annotated[str | None, _evaluation("The column of --split time and --split column.")] = None
    held_out: Annotated[float | None, _evaluation("Fraction of the rows that is held out.", show_default="0.2")] = None
    publish: Annotated[Publish, _evaluation("When the new version becomes live.")] = "always"
    metric: Annotated[
        str | None, _evaluation("Metric that --publish if-better compares, such as accuracy.", show_default="loss")
    ] = None
    margin: Annotated[float | None, _evaluation("Minimum improvement of the metric.", show_default="0")] = None
    no_wait: Annotated[bool, _run("Do not wait for the job.", "--no-wait")] = False
    dry_run: Annotated[bool, _run("Print what would be trained. FILE is uploaded in any case.", "--dry-run")] = False

    def __post_init__(self) -> None:
        # Contradictions are reported before a file is uploaded.
        if (self.file is None) == (self.dataset is None):
            raise WrongUsage("Give the rows: FILE to upload, or --dataset NAME for one that is there. One of the two.")
        self.targets = split_names(self.target)
        self.selection = selected(self.inputs, self.input_prefix, self.input_column)
        self.is_fleet = self.group_by is not None or "{" in self.name
        if self.publish != "if-better" and self.given("metric", "margin"):
            raise WrongUsage("--metric and --margin say what better means: they go with --publish if-better.")

    def given(self, *names: str) -> dict[str, Any]:
        """Return those of these options that are given."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@command(app, "train", panel="Train and ask", example="Example: loraplex train tickets.csv --name acme --target queue")
def train(session: Session, options: Options) -> None:
    """Train an adapter from a file, and wait for its version and its metrics on held-out rows."""
    if options.file is None:
        dataset = find_dataset(session, options.dataset or "")
    else:
        dataset = put_dataset(session, options.dataset_name or name_of(options.file), options.file)
    request = _request(session, options, dataset)
    if options.dry_run:
        _show_estimate(session, session.client.estimate(**request))
        return
    job = session.client.train(**request)
    if options.no_wait:
        session.give(job, f"{job.id} is {job.status}. To follow it: loraplex jobs --follow {job.id}")
    else:
        succeeded(follow(session, job.id, rows=options.file))


def _request(session: Session, options: Options, dataset: DatasetVersion) -> dict[str, Any]:
    """Return the arguments of `Client.train`, and print each inferred value; raise `WrongUsage`."""
    base = session.client.base()
    names = [column.name for column in dataset.columns]
    missing = [name for name in options.targets if name not in names]
    if missing:
        raise WrongUsage(f"There is no column {listed(missing)}; the columns are {listed(names)}.")
    loss, why = (options.loss, "") if options.loss else infer_loss(dataset.columns, options.targets, base)
    if why:
        session.note(f"loss: {loss}, as {why} (another one: --loss)")
    data = {
        "dataset": f"{dataset.dataset}@{dataset.version}",
        "inputs": _inputs(session, options, dataset, base),
        "targets": selection_of(options.targets),
        **options.given("weight", "group", "group_by"),
        **({} if options.labels is None else {"labels": split_names(options.labels)}),
    }
    gate = options.given("metric", "margin")
    return {
        **_name_and_rank(session, options, base),
        "data": data,
        "training": _training(session, options, loss),
        "publish": {"when": "if_better", **gate} if options.publish == "if-better" else options.publish,
        **options.given("alpha"),
        **_split(options, loss, dataset.rows),
    }


def _inputs(session: Session, options: Options, dataset: DatasetVersion, base: Base) -> Selection:
    if options.selection is not None:
        return options.selection
    other_roles = options.given("group", "group_by", "weight", "split_column").values()
    selection, why = infer_inputs(dataset.columns, base, taken={*options.targets, *other_roles})
    session.note(f"inputs: {why}")
    return selection


def _name_and_rank(session: Session, options: Options, base: Base) -> dict[str, Any]:
    name, rank = options.name, AUTO if options.rank == AUTO else int(options.rank)
    if options.group_by is not None and "{" not in name:
        name = f"{name}-{{{options.group_by}}}"
        session.note(f"names: {name}, one adapter for each {options.group_by}")
    if options.is_fleet and rank == AUTO:
        rank = min(_FLEET_RANK, base.in_features, base.out_features)
        session.note(f"rank: {rank}, as each group would need another one to be chosen (another one: --rank)")
    return {"name": name, "rank": rank}


def _training(session: Session, options: Options, loss: str) -> dict[str, Any]:
    given = options.given(*_GRADIENT_SETTINGS)
    is_exact = loss == "mse" and (options.method == "closed_form" or (options.method == AUTO and not given))
    training: dict[str, Any] = {"method": options.method, "loss": loss}
    if options.method != "closed_form":
        training |= dict.fromkeys(_GRADIENT_SETTINGS, AUTO)
        if options.is_fleet and not is_exact and options.learning_rate is None:
            session.note(f"learning rate: {_FLEET_RATE} (another one: --learning-rate)")
            training["learning_rate"] = _FLEET_RATE
    if is_exact:
        training["ridge"] = _FLEET_RIDGE if options.is_fleet else AUTO
    return training | given | options.given("ridge", "seed")


def _split(options: Options, loss: str, rows: int) -> dict[str, Any]:
    given = options.given("split", "held_out", "split_column")
    if options.split == "none" or (not given and rows < _FEW_ROWS and options.publish != "if-better"):
        return {}
    by = options.split or ("rows" if options.group is None else "group")
    stratify = {"stratify": True} if by == "rows" and loss == "cross_entropy" else {}
    members = {"held_out": "fraction", "split_column": "column"}
    return {"split": {"by": by, **stratify, **{members[name]: given[name] for name in members if name in given}}}


def _show_estimate(session: Session, estimate: Estimate) -> None:
    """Show the settings and the estimate of a training."""
    spec = estimate.spec
    # No option of `train` sets validation_fraction, because a split holds the rows out.
    training = spec.get("training", {}).items()
    split = spec.get("split") or {}
    held_out = f"{split['held_out']['rows']} of them, by {split.get('by', 'data set')}" if "held_out" in split else None
    about = {
        "adapters": estimate.adapters,
        "rank": spec.get("rank"),
        **{name: value for name, value in training if value is not None and name != "validation_fraction"},
        "rows": spec["data"]["rows"],
        "held out": held_out,
        "memory": f"about {size(estimate.memory_bytes)}",
        "time": f"about {estimate.seconds:.3g} s",
    }
    session.give(estimate, pairs(about))
    note_warnings(session, spec)
