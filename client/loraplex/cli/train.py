"""Commands `train` and `retry`: their options, and the request that the options and the columns of a data set make."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from loraplex.cli.columns import infer_inputs, listed, selected, selection_of, split_names
from loraplex.cli.datasets import FORMATS, find_dataset, name_of, put_dataset
from loraplex.cli.errors import WrongUsage
from loraplex.cli.jobs import Id, find_id, follow, note_warnings
from loraplex.cli.output import pairs, size
from loraplex.cli.session import Session, argument, command, complete_adapter, complete_dataset, option
from loraplex.defaults import DEFAULTS, Loss, Method, Publish, SplitBy
from loraplex.errors import InvalidInput
from loraplex.results import DatasetVersion, Estimate, JobFields, Json, Outcome, succeeded

PANEL = "Train and ask"
_TRAINING = ("method", "loss", "bias", "epochs", "learning_rate", "batch_size", "ridge", "seed")

app = typer.Typer()
_data = partial(option, panel="Data")
_run = partial(option, panel="This run")
ONE_SOURCE = "Give the rows: FILE to upload, or --dataset NAME for one that is there. One of the two."
NoWait = Annotated[bool, _run("Do not wait for the job.", "--no-wait")]
IdempotencyKey = Annotated[
    str | None,
    _run("Text that names this run: repeated with it within a day, the command shows the same job.", metavar="KEY"),
]


def _setting(text: str, name: str, *names: str, panel: str = "How to train", **settings: Any) -> Any:
    """Return the declaration of an option that is sent only if it is given, with the default of the service."""
    return option(text, *names, panel=panel, **{"show_default": _default(name) or False} | settings)


def _default(name: str) -> str:
    """Return the default of a setting as text; empty if it is null."""
    default = DEFAULTS.get(name, "")
    return f"{default:g}" if isinstance(default, float) else str(default)


def _method_setting(text: str, name: str) -> Any:
    """Return the declaration of an option whose default is chosen, unless --method names one."""
    return _setting(text, name, show_default=f"auto; {_default(name)} with --method")


_evaluation = partial(_setting, panel="Evaluation and publishing")


def _rank(text: str | None) -> str | None:
    if text not in (None, "auto") and not text.isdecimal():
        raise typer.BadParameter("a whole number, or auto")
    return text


class _Given:
    """Base of groups of options, of which only those that are given are sent."""

    def given(self, *names: str) -> dict[str, Any]:
        """Return those of these options that are given."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(kw_only=True)
class TableOptions(_Given):
    """Options that name the columns of a table with targets; None if an option is not given."""

    target: Annotated[str, _data("Target column; several numeric columns as a,b,c.")]
    dataset: Annotated[str | None, _data("Existing data set, instead of FILE.", autocompletion=complete_dataset)] = None
    dataset_name: Annotated[str | None, _data("Name of the data set.", show_default="the file's name")] = None
    inputs: Annotated[str | None, _data("Input columns, as a,b,c.")] = None
    input_prefix: Annotated[str | None, _data("Prefix of the names of the input columns.")] = None
    input_column: Annotated[str | None, _data("Input column that contains lists, such as embeddings.")] = None
    weight: Annotated[str | None, _data("Column with the weights of the rows.")] = None
    labels: Annotated[str | None, _data("Names of the outputs, in order, as a,b,c.")] = None

    def __post_init__(self) -> None:
        # Contradictions are reported before a file is uploaded.
        self.targets = split_names(self.target)
        self.selection = selected(self.inputs, self.input_prefix, self.input_column)

    def roles(self) -> dict[str, Any]:
        """Return the given columns that are neither inputs nor targets, by their members of `data`."""
        return self.given("weight")

    def put_table(self, session: Session, file: Path | None) -> DatasetVersion:
        """Upload the file, or find the data set; raise `WrongUsage` if neither or both are given."""
        if (file is None) == (self.dataset is None):
            raise WrongUsage(ONE_SOURCE)
        if file is None:
            return find_dataset(session, self.dataset or "")
        return put_dataset(session, self.dataset_name or name_of(file), file)

    def data(self, session: Session, dataset: DatasetVersion, *, split_column: str | None = None) -> Json:
        """Return the `data` of a request, and print the inputs if they are inferred; raise `WrongUsage`."""
        names = [column.name for column in dataset.columns]
        missing = [name for name in self.targets if name not in names]
        if missing:
            raise WrongUsage(f"There is no column {listed(missing)}; the columns are {listed(names)}.")
        inputs, roles = self.selection, self.roles()
        if inputs is None:
            taken = {*self.targets, *roles.values(), *([] if split_column is None else [split_column])}
            inputs, why = infer_inputs(dataset.columns, session.client.base(), taken=taken)
            session.note(f"inputs: {why}")
        labels = {} if self.labels is None else {"labels": split_names(self.labels)}
        reference = f"{dataset.dataset}@{dataset.version}"
        return {"dataset": reference, "inputs": inputs, "targets": selection_of(self.targets), **roles, **labels}


@dataclass(kw_only=True)
class RowOptions(TableOptions):
    """Arguments and options of `train` that name the adapter and its rows; None if an option is not given."""

    file: Annotated[Path | None, argument("FILE", f"{FORMATS}; uploaded as a data set.")] = None
    name: Annotated[
        str, option("Name of the adapter; if it exists, it gets a new version.", autocompletion=complete_adapter)
    ]
    group: Annotated[str | None, _data("Column whose values a split keeps together, such as customer.")] = None
    group_by: Annotated[str | None, _data("Column with one adapter for each value: a fleet.")] = None

    def roles(self) -> dict[str, Any]:
        """Return the given columns that are neither inputs nor targets, by their members of `data`."""
        return self.given("weight", "group", "group_by")


@dataclass(kw_only=True)
class TrainingOptions(_Given):
    """Options of `train` and `retry` that say how to train; None if an option is not given."""

    method: Annotated[Method | None, _setting("Training method; auto compares several.", "method")] = None
    loss: Annotated[Loss | None, _setting("Loss to minimise; auto goes by the type of the target.", "loss")] = None
    bias: Annotated[bool | None, _setting("Train a bias too, or none.", "bias", "--bias/--no-bias")] = None
    epochs: Annotated[int | None, _method_setting("Passes over the training rows.", "epochs")] = None
    learning_rate: Annotated[float | None, _method_setting("Size of a step.", "learning_rate")] = None
    batch_size: Annotated[int | None, _method_setting("Rows of a step.", "batch_size")] = None
    ridge: Annotated[float | None, _method_setting("Ridge penalty of the closed form.", "ridge")] = None
    seed: Annotated[int | None, _setting("Seed of the random generator.", "seed")] = None
    prior: Annotated[
        str | None, _setting("Adapter that a closed form shrinks towards.", "prior", autocompletion=complete_adapter)
    ] = None

    def training(self) -> dict[str, Any]:
        """Return the `training` of a request."""
        prior = {} if self.prior is None else {"prior": {"adapter": self.prior}}
        return self.given(*_TRAINING) | prior


@dataclass(kw_only=True)
class AdapterOptions(_Given):
    """Options of `train` about the adapter, its evaluation and this run; None if an option is not given."""

    rank: Annotated[
        str | None, _setting("Rank of the adapter; of auto, the largest.", "rank", metavar="N|auto", callback=_rank)
    ] = None
    alpha: Annotated[
        float | None, _setting("Alpha: the layer adds alpha/rank times A·B.", "alpha", show_default="the rank")
    ] = None
    fleet_prior: Annotated[
        str | None, _setting("Name of an adapter that gets what the groups of a fleet have in common.", "fleet_prior")
    ] = None
    split: Annotated[
        SplitBy | None,
        _evaluation("How held-out rows are chosen; auto cross-validates few rows, none evaluates nothing.", "split"),
    ] = None
    split_column: Annotated[
        str | None, _evaluation("The column of --split time and --split column.", "split.column")
    ] = None
    held_out: Annotated[float | None, _evaluation("Fraction of the rows that is held out.", "split.fraction")] = None
    publish: Annotated[
        Publish | None,
        _evaluation(
            "When the new version becomes live.", "publish", show_default=_default("publish").replace("_", "-")
        ),
    ] = None
    metric: Annotated[
        str | None, _evaluation("Metric that --publish if-better compares, such as accuracy.", "publish.metric")
    ] = None
    margin: Annotated[float | None, _evaluation("Minimum improvement of the metric.", "publish.margin")] = None
    no_wait: NoWait = False
    idempotency_key: IdempotencyKey = None
    dry_run: Annotated[bool, _run("Print what would be trained. FILE is uploaded in any case.", "--dry-run")] = False

    def __post_init__(self) -> None:
        if self.publish != "if-better" and self.given("metric", "margin"):
            raise WrongUsage("--metric and --margin say what better means: they go with --publish if-better.")
        if self.split in ("auto", "none") and self.given("held_out", "split_column"):
            raise WrongUsage("--held-out and --split-column go with --split rows, group, time or column.")

    def request(self, *, by: str) -> dict[str, Any]:
        """Return the arguments of `Client.train` for these options; `by` is the split of --held-out alone."""
        members = self.given("alpha", "fleet_prior")
        if self.rank is not None:
            members["rank"] = "auto" if self.rank == "auto" else int(self.rank)
        if self.split in ("auto", "none"):
            members["split"] = None if self.split == "none" else self.split
        elif shape := self.given("split", "held_out", "split_column"):
            names = {"split": "by", "held_out": "fraction", "split_column": "column"}
            members["split"] = {"by": by} | {names[name]: value for name, value in shape.items()}
        if self.publish == "if-better":
            members["publish"] = {"when": "if_better", **self.given("metric", "margin")}
        elif self.publish is not None:
            members["publish"] = self.publish.replace("-", "_")
        return members


@command(app, "train", panel=PANEL, example="Example: loraplex train tickets.csv --name acme --target queue")
def train(session: Session, rows: RowOptions, options: AdapterOptions, how: TrainingOptions) -> None:
    """Train an adapter from a file, and wait for its version and its evaluation."""
    dataset = rows.put_table(session, rows.file)
    training = how.training()
    request = {
        "name": _name(session, rows),
        "data": rows.data(session, dataset, split_column=options.split_column),
        **({"training": training} if training else {}),
        **options.request(by="rows" if rows.group is None else "group"),
    }
    with _hint_at_loss(session, rows.targets, dataset, given=how.loss):
        if options.dry_run:
            _show_estimate(session, session.client.estimate(**request))
            return
        job = session.client.train(**request, idempotency_key=options.idempotency_key)
    _note_loss(session, job.spec, given=how.loss)
    if options.no_wait:
        session.give(job, how_to_follow(job))
    else:
        succeeded(follow(session, job.id, rows=rows.file))


@command(
    app, "retry", panel=PANEL, example="Example: loraplex retry 5f0c2a91 --outcome failed --outcome worse --no-bias"
)
def retry(
    session: Session,
    id: Id,
    how: TrainingOptions,
    *,
    outcome: Annotated[
        list[Outcome] | None, option("Only adapters with this outcome; may be given several times.")
    ] = None,
    no_wait: NoWait = False,
) -> None:
    """Train adapters of a job again, on the same rows, with these settings in place of the job's."""
    training = how.training()
    job = session.client.retry(find_id(session, id), outcomes=outcome or None, training=training or None)
    if no_wait:
        session.give(job, how_to_follow(job))
    else:
        succeeded(follow(session, job.id))


@contextmanager
def _hint_at_loss(
    session: Session, targets: Sequence[str], dataset: DatasetVersion, *, given: str | None
) -> Iterator[None]:
    """Name the option for classes or labels if the service refuses targets that it took for numbers."""
    try:
        yield
    except InvalidInput as error:
        if given is None and (error.field or "").startswith("data.targets"):
            is_list = any(column.type.startswith("list") for column in dataset.columns if column.name in targets)
            kind, loss = ("labels", "binary_cross_entropy") if is_list else ("classes", "cross_entropy")
            session.note(f"note: if {listed(targets)} has {kind}, add --loss {loss}")
        raise


def _note_loss(session: Session, spec: Json, *, given: str | None) -> None:
    if given is None:
        reason = spec.get("auto", {}).get("loss")
        session.note(f"loss: {spec['training']['loss']}{f', as {reason}' if reason else ''} (another one: --loss)")


def how_to_follow(job: JobFields) -> str:
    """Return what to say about a job that is not waited for."""
    return f"{job.id} is {job.status}. To follow it: loraplex jobs --follow {job.id}"


def _name(session: Session, rows: RowOptions) -> str:
    if rows.group_by is None or "{" in rows.name:
        return rows.name
    name = f"{rows.name}-{{{rows.group_by}}}"
    session.note(f"names: {name}, one adapter for each {rows.group_by}")
    return name


def _plain(value: object) -> object:
    """Return a list of words as text, and any other value as it is."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


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
        **{name: _plain(value) for name, value in training if value is not None and name != "validation_fraction"},
        "rows": spec["data"]["rows"],
        "held out": held_out,
        "evaluation": f"{split['folds']}-fold cross-validation" if "folds" in split else None,
        "memory": f"about {size(estimate.memory_bytes)}",
        "scratch space": f"about {size(estimate.scratch_bytes)}" if estimate.scratch_bytes else None,
        "time": f"about {estimate.seconds:.3g} s",
    }
    session.give(estimate, pairs(about))
    note_warnings(session, spec)
