"""`/ui/datasets`: upload a file, look at its rows, and choose the columns of a training."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adapters.datasets.selectors import ColumnSelector
from adapters.datasets.store import DatasetVersion
from adapters.datasets.table import Table
from adapters.datasets.validation import Column
from adapters.names import Reference, check_name, check_prefix
from adapters.training.settings import Loss, Method
from app.http.dependencies import ServiceOf
from app.http.paging import page_of, read_cursor
from app.service import Service
from app.web.pages.rendering import page, page_router, render

_DATASETS_A_PAGE = 25
_VERSIONS_SHOWN = 20
_ROWS_SHOWN = 5
_COLUMNS_SHOWN = 100
_CELLS_SHOWN = 36
_LAST_SHOWN = 4
_NUMBERED = re.compile(r"(?P<prefix>.*?)\d+")
_NUMBERS = ("int64", "float32", "float64", "bool")
_NAMES = ("string", "int64", "bool")
_MOST_PREFIXES = 20
_MOST_TARGETS, _MOST_GROUPS = 500, 50
"""Columns that are offered as targets, and as what keeps rows together: lists that a person can look through."""
router = page_router()


@page(router, "/ui/datasets")
def list_datasets(request: Request, service: ServiceOf, prefix: str = "", cursor: str | None = None) -> Response:
    """Data sets, and the place to drop a file."""
    prefix = prefix.strip()
    of = f"datasets {check_prefix(prefix)}"
    after = read_cursor(of, cursor or None) or ""
    found = list(service.datasets.list(prefix=prefix, after=after, limit=_DATASETS_A_PAGE + 1))
    data, next_cursor = page_of(of, found, _DATASETS_A_PAGE, lambda dataset: dataset.name)
    return render(
        request,
        "datasets.html",
        part="fragments/dataset_rows.html",
        datasets=data,
        prefix=prefix,
        cursor=cursor,
        next_cursor=next_cursor,
        most_bytes=service.settings.max_dataset_bytes,
    )


@page(router, "/ui/datasets/{name}")
def show_dataset(request: Request, service: ServiceOf, name: str, offset: int = 0) -> Response:
    """The report of the newest version, some of its rows, and the form to train from it."""
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
        shown=_first_and_last(newest.columns),
        versions=service.datasets.versions(name, limit=_VERSIONS_SHOWN),
        form=_form(service, newest),
    )


def _first_and_last(columns: Sequence[Column]) -> Sequence[Column]:
    """Of many columns those at both ends: the target often stands last."""
    if len(columns) <= _CELLS_SHOWN:
        return columns
    return [*columns[: _CELLS_SHOWN - _LAST_SHOWN], *columns[-_LAST_SHOWN:]]


def _form(service: Service, version: DatasetVersion) -> dict[str, Any]:
    """What the form offers for these columns on this base layer."""
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
        "most_rank": service.settings.max_rank,
    }


@dataclass(frozen=True, slots=True)
class Choice:
    """Some columns that the form offers."""

    label: str
    selection: ColumnSelector
    width: int
    """Numbers in a row."""
    fits: bool
    loss: Loss | None = None
    """What a target like this is usually trained with."""

    @property
    def json(self) -> str:
        """As `POST /adapters` takes it."""
        return json.dumps(self.selection.to_json(), ensure_ascii=False)


def input_choices(columns: Sequence[Column], width: int) -> list[Choice]:
    """Columns that could be rows of `width` numbers: those that fit, else all that hold numbers in a row."""
    found = list(_wide(columns, width))
    numeric = [column.name for column in columns if column.type in _NUMBERS]
    floats = [column.name for column in columns if column.type in _NUMBERS and column.type.startswith("float")]
    for names in (numeric, floats):
        if len(names) == width > 1 and not any(choice.fits for choice in found):
            found.append(Choice(f"All {width} columns of numbers", ColumnSelector(columns=tuple(names)), width, True))
    if width == 1:
        found += [Choice(name, ColumnSelector(column=name), 1, True) for name in numeric[:_MOST_TARGETS]]
    return sorted(found, key=lambda choice: not choice.fits)


def target_choices(columns: Sequence[Column], inputs: ColumnSelector | None, width: int) -> list[Choice]:
    """Columns that could be targets of a layer with `width` outputs, the likeliest first."""
    taken = set(names_of(columns, inputs))
    free = [column for column in columns if column.name not in taken]
    found = [choice for choice in _wide(free, width) if choice.fits]
    for column in free:
        loss = _loss_of(column, width)
        if loss is not None:
            found.append(Choice(column.name, ColumnSelector(column=column.name), 1, True, loss))
        if len(found) == _MOST_TARGETS:
            break
    return found


def names_of(columns: Iterable[Column], selection: ColumnSelector | None) -> list[str]:
    """The columns that a selection means."""
    if selection is None:
        return []
    if selection.prefix is not None:
        return [column.name for column in columns if column.name.startswith(selection.prefix)]
    return [selection.column] if selection.column is not None else list(selection.columns or ())


def group_choices(columns: Sequence[Column], inputs: ColumnSelector | None) -> list[str]:
    """Columns whose values could keep rows together."""
    taken = set(names_of(columns, inputs))
    return [column.name for column in columns if column.type in _NAMES and column.name not in taken][:_MOST_GROUPS]


def _wide(columns: Sequence[Column], width: int) -> Iterable[Choice]:
    """Lists of numbers, and columns that are numbered: `pixel_0`, `pixel_1` …"""
    for column in columns:
        if column.width is not None:
            label = f"{column.name} (lists of {column.width})"
            yield Choice(label, ColumnSelector(column=column.name), column.width, column.width == width, Loss.MSE)
    numbered = (_NUMBERED.fullmatch(column.name) for column in columns)
    prefixes = Counter(found["prefix"] for found in numbered if found and found["prefix"])
    for prefix, _ in prefixes.most_common(_MOST_PREFIXES):
        members = [column for column in columns if column.name.startswith(prefix)]
        if len(members) > 1 and all(column.type in _NUMBERS for column in members):
            label = f"{prefix}… ({len(members)} columns)"
            yield Choice(label, ColumnSelector(prefix=prefix), len(members), len(members) == width, Loss.MSE)


def _loss_of(column: Column, width: int) -> Loss | None:
    """What one column is usually trained with; None for one that cannot be a target of this layer."""
    if column.type in ("list<string>", "list<int64>"):
        return Loss.BINARY_CROSS_ENTROPY if column.width != width else None
    if width == 1:
        return Loss.MSE if column.type in _NUMBERS else None
    return Loss.CROSS_ENTROPY if column.type in _NAMES else None
