"""Conversion of the options of `train` to a request, with a description of what was inferred."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from loraplex.cli.errors import WrongUsage
from loraplex.cli.session import plural
from loraplex.results import Base, Column, DatasetVersion

AUTO = "auto"
# Columns in the form of the API: `{"column": name}`, `{"columns": names}` or `{"prefix": text}`.
Selection = Mapping[str, Any]
# With fewer rows, the service trains on all of them, because few held-out rows give no reliable metrics.
_FEW_ROWS = 100
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


_NAMED = 5
_WHOLE, _FRACTIONS, _TEXT, _TRUTH = ("int64",), ("float32", "float64"), ("string",), ("bool",)
SAY_WHICH = "say which by --inputs, --input-prefix or --input-column"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Inferred choice, with its description and reason in words."""

    value: Any
    why: str


def is_list(column: Column) -> bool:
    """Return whether the cells of the column are lists."""
    return column.type.startswith("list")


def is_number(column: Column) -> bool:
    """Return whether the cells of the column are numbers."""
    return column.type in _WHOLE + _FRACTIONS


def selected(names: str | None, prefix: str | None, column: str | None) -> Selection | None:
    """Return the inputs that the options name, None if they name none; raise `WrongUsage` for more than one option."""
    given: list[Selection] = []
    if names is not None:
        given.append(_columns(split_names(names)))
    if prefix is not None:
        given.append({"prefix": prefix})
    if column is not None:
        given.append({"column": column})
    if len(given) > 1:
        raise WrongUsage("--inputs, --input-prefix and --input-column all name the inputs: give one of them.")
    return given[0] if given else None


def has_columns(names: Collection[str], selection: Selection) -> bool:
    """Return whether all selected columns are among these."""
    if "prefix" in selection:
        return any(name.startswith(selection["prefix"]) for name in names)
    return set(selection.get("columns") or [selection["column"]]) <= set(names)


def split_names(text: str) -> list[str]:
    """Return the names in `a,b,c`."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise WrongUsage(f"Not a list of column names: '{text}'. Write them as a,b,c.")
    return names


def infer_inputs(columns: Sequence[Column], base: Base, *, taken: Collection[str]) -> Chosen:
    """Return the inputs: all other numeric columns, those with a common stem (`pixel_0`, …), or one list column.

    The first selection that is as wide as the layer is used. Raises `WrongUsage` if none is.
    """
    free = [column for column in columns if column.name not in taken]
    numbers = [column.name for column in free if is_number(column)]
    besides = f" besides {listed(sorted(taken))}" if taken else ""
    if len(numbers) == base.in_features:
        return Chosen(value=_columns(numbers), why=f"{listed(numbers)}: all columns of numbers{besides}")
    alike = [names for names in _called_alike(numbers) if len(names) == base.in_features]
    if len(alike) == 1:
        return Chosen(value=_columns(alike[0]), why=f"{listed(alike[0])}: the columns that are called so")
    lists = [column.name for column in free if is_list(column) and column.width == base.in_features]
    if len(lists) == 1:
        return Chosen(value={"column": lists[0]}, why=f"{lists[0]}: the column of {base.in_features} numbers")
    found = f"{plural(len(numbers), 'column')} of numbers{besides}"
    found += f" and {len(lists)} of lists of that width ({listed(lists)})" if lists else ""
    raise WrongUsage(
        f"The base layer takes {plural(base.in_features, 'number')} a row, and there are {found}: {SAY_WHICH}."
    )


def _called_alike(names: Sequence[str]) -> list[list[str]]:
    """Return names that differ only in the number at their end."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rstrip("0123456789"), []).append(name)
    return list(found.values())


def _columns(names: list[str]) -> Selection:
    return {"columns": names} if len(names) > 1 else {"column": names[0]}


def check_targets(columns: Sequence[Column], targets: Sequence[str]) -> None:
    """Raise `WrongUsage` for a column that does not exist."""
    names = [column.name for column in columns]
    missing = [name for name in targets if name not in names]
    if missing:
        raise WrongUsage(f"There is no column {listed(missing)}; the columns are {listed(names)}.")


def infer_loss(columns: Sequence[Column], targets: Sequence[str], base: Base) -> Chosen:
    """Return the loss for the type of the targets; raise `WrongUsage` if there is none."""
    by_name = {column.name: column for column in columns}
    if len(targets) > 1:
        return Chosen(value="mse", why=f"{len(targets)} columns of numbers")
    column = by_name[targets[0]]
    if is_list(column):
        if column.width is None:
            return Chosen(value="binary_cross_entropy", why=f"{column.name} has several labels a row")
        return Chosen(value="mse", why=f"{column.name} has {plural(column.width, 'number')} a row")
    if column.type in _TEXT:
        return Chosen(value="cross_entropy", why=f"{column.name} is text: one class a row")
    if base.out_features > 1 and column.type in _WHOLE + _TRUTH:
        return Chosen(value="cross_entropy", why=f"{column.name} is whole numbers: one class a row")
    if base.out_features > 1:
        raise WrongUsage(
            f"{column.name} is one number with a fraction a row, and the base layer gives {base.out_features}: name "
            f"{base.out_features} columns or one of lists by --target, or say --loss cross_entropy if they are classes."
        )
    return Chosen(value="mse", why=f"{column.name} is a number")


def listed(names: Sequence[str]) -> str:
    """Return names as text, without the middle of a long list."""
    if len(names) <= _NAMED:
        return ", ".join(names)
    return f"{names[0]}, {names[1]} … {names[-1]} ({len(names)} columns)"
