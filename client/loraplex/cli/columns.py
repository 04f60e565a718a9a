"""Inference of the input columns, the target columns and the loss, if the command line does not give them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.cli.errors import WrongUsage
from loraplex.cli.session import plural
from loraplex.results import Base, Column

_NAMED = 5
_WHOLE, _FRACTIONS, _TEXT, _TRUTH = ("int64",), ("float32", "float64"), ("string",), ("bool",)
SAY_WHICH = "say which by --inputs, --input-prefix or --input-column"
Selection = Mapping[str, Any]
"""Columns in the form of the API: `{"column": name}`, `{"columns": names}` or `{"prefix": text}`."""


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
