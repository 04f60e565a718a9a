"""Conversion of the options of `train` to a request, with a description of what was inferred."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from loraplex.cli.columns import Selection, check_targets, infer_inputs, infer_loss
from loraplex.cli.errors import WrongUsage
from loraplex.results import Base, DatasetVersion

AUTO = "auto"
_FEW_ROWS = 100
"""With fewer rows, the service trains on all of them, because few held-out rows give no reliable metrics."""
_FLEET_RANK, _FLEET_RATE, _FLEET_RIDGE = 8, 0.01, 1.0
Say = Callable[[str], None]


class Method(StrEnum):
    """Method of the fit."""

    AUTO = "auto"
    ADAMW = "adamw"
    SGD = "sgd"
    CLOSED_FORM = "closed_form"


class Loss(StrEnum):
    """Loss to minimise."""

    MSE = "mse"
    HUBER = "huber"
    CROSS_ENTROPY = "cross_entropy"
    BINARY_CROSS_ENTROPY = "binary_cross_entropy"
    COSINE = "cosine"
    MULTIPLE_NEGATIVES = "multiple_negatives"


class SplitBy(StrEnum):
    """Rule that decides which rows are held out."""

    ROWS = "rows"
    GROUP = "group"
    TIME = "time"
    COLUMN = "column"
    NONE = "none"


class Publish(StrEnum):
    """Rule that decides when the new version becomes live."""

    ALWAYS = "always"
    NEVER = "never"
    IF_BETTER = "if-better"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Options of `train`; None if an option is not given."""

    name: str
    targets: Sequence[str]
    inputs: Selection | None
    group: str | None
    group_by: str | None
    weight: str | None
    labels: Sequence[str] | None
    rank: int | None
    alpha: float | None
    loss: Loss | None
    method: Method
    epochs: int | None
    learning_rate: float | None
    batch_size: int | None
    ridge: float | None
    seed: int | None
    split: SplitBy | None
    split_column: str | None
    fraction: float | None
    publish: Publish
    metric: str | None
    margin: float | None

    @property
    def is_fleet(self) -> bool:
        """Return whether one adapter is trained for each group."""
        return self.group_by is not None or "{" in self.name


def make_request(wanted: Wanted, dataset: DatasetVersion, base: Base, say: Say) -> dict[str, Any]:
    """Return the arguments of `Client.train`, and pass each inferred value to `say`; raise `WrongUsage`."""
    loss = _loss(wanted, dataset, base, say)
    inputs = _inputs(wanted, dataset, base, say)
    data = {
        "dataset": f"{dataset.dataset}@{dataset.version}",
        "inputs": inputs,
        "targets": {"column": wanted.targets[0]} if len(wanted.targets) == 1 else {"columns": list(wanted.targets)},
        "weight": wanted.weight,
        "group": wanted.group,
        "group_by": wanted.group_by,
        "labels": None if wanted.labels is None else list(wanted.labels),
    }
    training = _training(wanted, loss, say)
    request: dict[str, Any] = {
        "name": _name(wanted, say),
        "rank": _rank(wanted, base, say),
        "data": {name: value for name, value in data.items() if value is not None},
        "training": training,
        "publish": _publish(wanted),
    }
    split = _split(wanted, loss, dataset.rows)
    return (
        request
        | ({} if split is None else {"split": split})
        | ({} if wanted.alpha is None else {"alpha": wanted.alpha})
    )


def _loss(wanted: Wanted, dataset: DatasetVersion, base: Base, say: Say) -> Loss:
    check_targets(dataset.columns, wanted.targets)
    if wanted.loss is not None:
        return wanted.loss
    inferred = infer_loss(dataset.columns, wanted.targets, base)
    say(f"loss: {inferred.value}, as {inferred.why} (another one: --loss)")
    return Loss(inferred.value)


def _inputs(wanted: Wanted, dataset: DatasetVersion, base: Base, say: Say) -> Selection:
    if wanted.inputs is not None:
        return wanted.inputs
    taken = {wanted.group, wanted.group_by, wanted.weight, wanted.split_column, *wanted.targets} - {None}
    inferred = infer_inputs(dataset.columns, base, taken={str(name) for name in taken})
    say(f"inputs: {inferred.why}")
    selection: Selection = inferred.value
    return selection


def _name(wanted: Wanted, say: Say) -> str:
    if wanted.group_by is None or "{" in wanted.name:
        return wanted.name
    name = f"{wanted.name}-{{{wanted.group_by}}}"
    say(f"names: {name}, one adapter for each {wanted.group_by}")
    return name


def _rank(wanted: Wanted, base: Base, say: Say) -> int | str:
    if wanted.rank is not None or not wanted.is_fleet:
        return AUTO if wanted.rank is None else wanted.rank
    rank = min(_FLEET_RANK, base.in_features, base.out_features)
    say(f"rank: {rank}, as each group would need another one to be chosen (another one: --rank)")
    return rank


def _training(wanted: Wanted, loss: Loss, say: Say) -> dict[str, Any]:
    rate = wanted.learning_rate
    of_gradients = {"epochs": wanted.epochs, "learning_rate": rate, "batch_size": wanted.batch_size}
    given = {name: value for name, value in of_gradients.items() if value is not None}
    exact = loss is Loss.MSE and (wanted.method is Method.CLOSED_FORM or (wanted.method is Method.AUTO and not given))
    training: dict[str, Any] = {"method": wanted.method.value, "loss": loss.value}
    if wanted.method is not Method.CLOSED_FORM:
        training |= dict.fromkeys(of_gradients, AUTO)
        if wanted.is_fleet and not exact and rate is None:
            say(f"learning rate: {_FLEET_RATE} (another one: --learning-rate)")
            training["learning_rate"] = _FLEET_RATE
    training |= given
    if wanted.ridge is not None:
        training["ridge"] = wanted.ridge
    elif exact:
        training["ridge"] = _FLEET_RIDGE if wanted.is_fleet else AUTO
    return training | ({} if wanted.seed is None else {"seed": wanted.seed})


def _split(wanted: Wanted, loss: Loss, rows: int) -> dict[str, Any] | None:
    by = wanted.split
    given = by is not None or wanted.fraction is not None or wanted.split_column is not None
    if by is SplitBy.NONE or (not given and rows < _FEW_ROWS and wanted.publish is not Publish.IF_BETTER):
        return None
    if by is None:
        by = SplitBy.GROUP if wanted.group is not None else SplitBy.ROWS
    split: dict[str, Any] = {"by": by.value}
    if wanted.split_column is not None:
        split["column"] = wanted.split_column
    if wanted.fraction is not None or by is not SplitBy.COLUMN:
        split["fraction"] = 0.2 if wanted.fraction is None else wanted.fraction
    if by is SplitBy.ROWS and loss is Loss.CROSS_ENTROPY:
        split["stratify"] = True
    return split


def _publish(wanted: Wanted) -> str | dict[str, Any]:
    if wanted.publish is not Publish.IF_BETTER:
        if wanted.metric is not None or wanted.margin is not None:
            raise WrongUsage("--metric and --margin say what better means: they go with --publish if-better.")
        return wanted.publish.value
    given = {"metric": wanted.metric, "margin": wanted.margin}
    return {"when": "if_better"} | {name: value for name, value in given.items() if value is not None}
