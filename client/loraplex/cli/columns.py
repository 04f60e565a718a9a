"""Columns of a table: which ones are inputs, from options or from their names and types."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from loraplex.cli.errors import WrongUsage
from loraplex.cli.output import plural
from loraplex.results import Base, Column

# Columns in the form of the API: `{"column": name}`, `{"columns": names}` or `{"prefix": text}`.
Selection = Mapping[str, Any]
_MAX_LISTED = 5
_NUMBERS = ("int64", "float32", "float64")


def selected(names: str | None, prefix: str | None, column: str | None) -> Selection | None:
    """Return the inputs that the options name, None if they name none; raise `WrongUsage` for more than one option."""
    if [names, prefix, column].count(None) < 2:
        raise WrongUsage("--inputs, --input-prefix and --input-column all name the inputs: give one of them.")
    if names is not None:
        return selection_of(split_names(names))
    if prefix is not None:
        return {"prefix": prefix}
    return None if column is None else {"column": column}


def selection_of(names: Sequence[str]) -> Selection:
    """Return columns in the form of the API."""
    return {"columns": list(names)} if len(names) > 1 else {"column": names[0]}


def has_columns(names: Collection[str], selection: Selection) -> bool:
    """Return whether all selected columns are among these."""
    columns = columns_of(selection, names)
    return bool(columns) and set(columns) <= set(names)


def columns_of(selection: Selection, names: Iterable[str]) -> list[str]:
    """Return the names that a selection gives, or those of `names` that have its prefix."""
    if "prefix" in selection:
        return [name for name in names if name.startswith(selection["prefix"])]
    return [selection["column"]] if "column" in selection else list(selection.get("columns", ()))


def split_names(text: str) -> list[str]:
    """Return the names in `a,b,c`."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise WrongUsage(f"Not a list of column names: '{text}'. Write them as a,b,c.")
    return names


def listed(names: Sequence[str], what: str = "columns") -> str:
    """Return names as text, without the middle of a long list of `what`."""
    if len(names) <= _MAX_LISTED:
        return ", ".join(names)
    return f"{names[0]}, {names[1]} … {names[-1]} ({len(names)} {what})"


def infer_inputs(columns: Sequence[Column], base: Base, *, taken: Collection[str]) -> tuple[Selection, str]:
    """Return the inputs, and the reason: all other numeric columns, those with a common stem, or one list column.

    The first selection that is as wide as the layer is used. Raises `WrongUsage` if none is.
    """
    width = base.in_features
    free = [column for column in columns if column.name not in taken]
    numbers = [column.name for column in free if column.type in _NUMBERS]
    besides = f" besides {listed(sorted(taken))}" if taken else ""
    if len(numbers) == width:
        return selection_of(numbers), f"{listed(numbers)}: all columns of numbers{besides}"
    by_stem = defaultdict(list)
    for name in numbers:
        by_stem[name.rstrip("0123456789")].append(name)
    alike = [names for names in by_stem.values() if len(names) == width]
    if len(alike) == 1:
        return selection_of(alike[0]), f"{listed(alike[0])}, by the names of the columns"
    lists = [column.name for column in free if _is_list(column) and column.width == width]
    if len(lists) == 1:
        return selection_of(lists), f"{lists[0]}: the column of {width} numbers"
    candidates = f"{plural(len(numbers), 'column')} of numbers{besides}"
    candidates += f" and {len(lists)} of lists of that width ({listed(lists)})" if lists else ""
    raise WrongUsage(
        f"The base layer takes {plural(width, 'number')} a row, and there are {candidates}: say which by --inputs, "
        "--input-prefix or --input-column."
    )


def _is_list(column: Column) -> bool:
    return column.type.startswith("list")
