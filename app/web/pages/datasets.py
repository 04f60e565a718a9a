"""`/ui/datasets`: upload a file, look at its rows, and choose the columns of a training."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adapters.datasets.columns import ColumnSelector
from adapters.datasets.store import DatasetVersion
from adapters.datasets.table import Table
from adapters.datasets.validation import Column
from adapters.names import Reference, check_name, check_prefix
from adapters.training.settings import Loss, Method
from app.http.dependencies import ServiceOf
from app.http.paging import page_of, read_cursor
from app.service import Service
from app.web.pages.rendering import page, page_router, render

_DATASETS_PER_PAGE = 25
_VERSIONS_SHOWN = 20
_ROWS_SHOWN = 5
_COLUMNS_SHOWN = 100
_CELLS_SHOWN = 36
_LAST_SHOWN = 4
_NUMBERED = re.compile(r"(?P<prefix>.*?)\d+")
_NUMBERS = ("int64", "float32", "float64", "bool")
_NAMES = ("string", "int64", "bool")
_MAX_PREFIXES = 20
# Most columns that the form offers, so that a person can look through the list.
_MAX_TARGETS, _MAX_GROUPS = 500, 50
router = page_router()


@page(router, "/ui/datasets")
def list_datasets(request: Request, service: ServiceOf, prefix: str = "", cursor: str | None = None) -> Response:
    """Show the data sets and the upload form."""
    prefix = prefix.strip()
    list_key = f"datasets {check_prefix(prefix)}"
    after = read_cursor(list_key, cursor or None) or ""
    listed = list(service.datasets.list(prefix=prefix, after=after, limit=_DATASETS_PER_PAGE + 1))
    data, next_cursor = page_of(list_key, listed, _DATASETS_PER_PAGE, lambda dataset: dataset.name)
    return render(
        request,
        "datasets.html",
        part="fragments/dataset_rows.html",
        datasets=data,
        prefix=prefix,
        cursor=cursor,
        next_cursor=next_cursor,
        max_bytes=service.settings.max_dataset_bytes,
    )


@page(router, "/ui/datasets/{name}")
def show_dataset(request: Request, service: ServiceOf, name: str, offset: int = 0) -> Response:
    """Show the report of the newest version, some of its rows, and the form that trains from it."""
    dataset = service.datasets.get(check_name(name))
    newest = service.datasets.find(Reference(name, version=dataset.newest.version), field="name")
    offset = min(max(0, offset), max(0, newest.rows - 1))
    rows = Table.open(service.datasets.local(newest)).preview(offset, _ROWS_SHOWN)
    return render(
        request,
        "dataset.html",
        part="fragments/preview.html",
        dataset=dataset,
        newest=newest,
        offset=offset,
        end=offset + len(rows),
        step=_ROWS_SHOWN,
        rows=rows,
        columns=newest.columns[:_COLUMNS_SHOWN],
        sample_columns=_first_and_last(newest.columns),
        versions=service.datasets.versions(name, limit=_VERSIONS_SHOWN),
        form=_form(service, newest),
    )


def _first_and_last(columns: Sequence[Column]) -> Sequence[Column]:
    """Return the first and last of many columns, because the target is often the last."""
    if len(columns) <= _CELLS_SHOWN:
        return columns
    return [*columns[: _CELLS_SHOWN - _LAST_SHOWN], *columns[-_LAST_SHOWN:]]


def _form(service: Service, version: DatasetVersion) -> dict[str, Any]:
    """Return the choices of the training form for these columns and this base layer."""
    base = service.base
    inputs = input_choices(version.columns, base.in_features)
    first: ColumnSelector | None = inputs[0].selection if inputs and inputs[0].fits else None
    return {
        "base": base,
        "inputs": inputs,
        "targets": target_choices(version.columns, first, base.out_features),
        "groups": group_choices(version.columns, first),
        "losses": list(Loss),
        "methods": list(Method),
        "max_rank": service.settings.max_rank,
    }


@dataclass(frozen=True, slots=True)
class Choice:
    """Columns that the form offers as one choice."""

    label: str
    selection: ColumnSelector
    width: int
    """Numbers in each row."""
    fits: bool
    loss: Loss | None = None
    """Usual loss for such a target."""

    @property
    def json(self) -> str:
        """Selection in the form of `POST /adapters`."""
        return json.dumps(self.selection.to_json(), ensure_ascii=False)


def input_choices(columns: Sequence[Column], width: int) -> list[Choice]:
    """Return the choices of inputs: those of `width` numbers, or all lists of numbers if none fits."""
    choices = list(_wide(columns, width))
    numeric = [column.name for column in columns if column.type in _NUMBERS]
    floats = [column.name for column in columns if column.type in _NUMBERS and column.type.startswith("float")]
    for names in (numeric, floats):
        if len(names) == width > 1 and not any(choice.fits for choice in choices):
            choices.append(Choice(f"All {width} columns of numbers", ColumnSelector(columns=tuple(names)), width, True))
    if width == 1:
        choices += [Choice(name, ColumnSelector(column=name), 1, True) for name in numeric[:_MAX_TARGETS]]
    return sorted(choices, key=lambda choice: not choice.fits)


def target_choices(columns: Sequence[Column], inputs: ColumnSelector | None, width: int) -> list[Choice]:
    """Return the choices of targets for a layer with `width` outputs, the likeliest first."""
    taken = set(names_of(columns, inputs))
    free = [column for column in columns if column.name not in taken]
    choices = [choice for choice in _wide(free, width) if choice.fits]
    for column in free:
        loss = _loss_of(column, width)
        if loss is not None:
            choices.append(Choice(column.name, ColumnSelector(column=column.name), 1, True, loss))
        if len(choices) == _MAX_TARGETS:
            break
    return choices


def names_of(columns: Iterable[Column], selection: ColumnSelector | None) -> list[str]:
    """Return the names of the selected columns."""
    if selection is None:
        return []
    if selection.prefix is not None:
        return [column.name for column in columns if column.name.startswith(selection.prefix)]
    return [selection.column] if selection.column is not None else list(selection.columns or ())


def group_choices(columns: Sequence[Column], inputs: ColumnSelector | None) -> list[str]:
    """Return the columns by which rows could be grouped."""
    taken = set(names_of(columns, inputs))
    return [column.name for column in columns if column.type in _NAMES and column.name not in taken][:_MAX_GROUPS]


def _wide(columns: Sequence[Column], width: int) -> Iterable[Choice]:
    """Yield columns of lists, and groups of numbered columns such as `pixel_0`, `pixel_1`."""
    for column in columns:
        if column.width is not None:
            label = f"{column.name} (lists of {column.width})"
            yield Choice(label, ColumnSelector(column=column.name), column.width, column.width == width, Loss.MSE)
    numbered = (_NUMBERED.fullmatch(column.name) for column in columns)
    prefixes = Counter(match["prefix"] for match in numbered if match and match["prefix"])
    for prefix, _ in prefixes.most_common(_MAX_PREFIXES):
        members = [column for column in columns if column.name.startswith(prefix)]
        if len(members) > 1 and all(column.type in _NUMBERS for column in members):
            label = f"{prefix}… ({len(members)} columns)"
            yield Choice(label, ColumnSelector(prefix=prefix), len(members), len(members) == width, Loss.MSE)


def _loss_of(column: Column, width: int) -> Loss | None:
    """Return the usual loss for a target column, or None if it cannot be a target of this layer."""
    if column.type in ("list<string>", "list<int64>"):
        return Loss.BINARY_CROSS_ENTROPY if column.width != width else None
    if width == 1:
        return Loss.MSE if column.type in _NUMBERS else None
    return Loss.CROSS_ENTROPY if column.type in _NAMES else None
