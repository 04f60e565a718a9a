"""`/ui/datasets`: upload a file, look at its rows, and choose the columns of a training."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adapters.datasets.columns import ColumnSelector
from adapters.datasets.store import DatasetVersion
from adapters.datasets.table import Table
from adapters.datasets.validation import Column
from adapters.names import Reference, check_name, check_prefix
from adapters.training.evaluation.gate import When
from adapters.training.planning.request import PublishRequest, SplitRequest
from adapters.training.settings import AUTO, SETTINGS, Loss, Method, field_of
from app.http.authentication import CallerOf
from app.http.paging import page_of, read_cursor
from app.service import Service, ServiceOf
from app.web.pages.rendering import PageRouter, render

_DATASETS_PER_PAGE = 25
_MAX_VERSIONS = 20
_PREVIEW_ROWS = 5
_MAX_COLUMNS = 100
# Most columns of the preview, and how many of them are the last ones.
_PREVIEW_COLUMNS, _LAST_COLUMNS = 36, 4
_NUMBERED = re.compile(r"(?P<prefix>.*?)\d+")
_FLOATS = ("float32", "float64")
_NUMBERS = ("int64", "bool", *_FLOATS)
_NAMES = ("string", "int64", "bool")
_MAX_PREFIXES = 20
# Most columns that the form offers, so that a person can look through the list.
_MAX_TARGETS, _MAX_GROUPS = 500, 50
router = PageRouter()


@router.page("/ui/datasets")
def list_datasets(
    request: Request, service: ServiceOf, caller: CallerOf, prefix: str = "", cursor: str | None = None
) -> Response:
    """Show the data sets and the upload form."""
    prefix = prefix.strip()
    list_key = f"datasets {check_prefix(prefix)}"
    after = read_cursor(list_key, cursor or None, str) or ""
    limit = _DATASETS_PER_PAGE + 1
    listed = list(service.datasets.list(tenant=caller.tenant, prefix=prefix, after=after, limit=limit))
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


@router.page("/ui/datasets/{name}")
def show_dataset(request: Request, service: ServiceOf, caller: CallerOf, name: str, offset: int = 0) -> Response:
    """Show the report of the newest version, some of its rows, and the form that trains from it."""
    dataset = service.datasets.get(check_name(name), tenant=caller.tenant)
    reference = Reference(name, version=dataset.newest.version)
    newest = service.datasets.find(reference, tenant=caller.tenant, field="name")
    offset = min(max(0, offset), max(0, newest.rows - 1))
    rows = Table.open(service.datasets.local(newest)).preview(offset, _PREVIEW_ROWS)
    return render(
        request,
        "dataset.html",
        part="fragments/preview.html",
        dataset=dataset,
        newest=newest,
        offset=offset,
        end=offset + len(rows),
        step=_PREVIEW_ROWS,
        rows=rows,
        columns=newest.columns[:_MAX_COLUMNS],
        sample_columns=_first_and_last(newest.columns),
        versions=service.datasets.versions(name, tenant=caller.tenant, limit=_MAX_VERSIONS),
        form=_form(service, newest),
    )


def _first_and_last(columns: Sequence[Column]) -> Sequence[Column]:
    """Return the first and last of many columns, because the target is often the last."""
    if len(columns) <= _PREVIEW_COLUMNS:
        return columns
    return [*columns[: _PREVIEW_COLUMNS - _LAST_COLUMNS], *columns[-_LAST_COLUMNS:]]


def _form(service: Service, version: DatasetVersion) -> dict[str, Any]:
    """Return the choices of the training form for these columns and this base layer."""
    base = service.base
    inputs = input_choices(version.columns, base.in_features)
    input_names = inputs[0].names if inputs and inputs[0].fits else ()
    return {
        "base": base,
        "inputs": inputs,
        "targets": target_choices(version.columns, input_names, base.out_features),
        "groups": group_choices(version.columns, input_names),
        "losses": list(Loss),
        "methods": list(Method),
        "publish": list(When),
        "defaults": _defaults(),
        "max_rank": service.settings.max_rank,
    }


def _defaults() -> dict[str, str]:
    """Return the default of each field of the form as text, by its path in a request."""
    defaults = {field_of(name): str(setting.default) for name, setting in SETTINGS.items()}
    for name, setting in SETTINGS.items():
        if setting.takes_auto and setting.methods != tuple(Method):
            defaults[field_of(name)] = f"{AUTO}; {setting.default} with a method"
    return defaults | {
        "split": AUTO,
        "split.fraction": f"{SplitRequest().fraction:g}",
        "publish": PublishRequest().when,
    }


@dataclass(frozen=True, slots=True)
class Choice:
    """Columns that the form offers as one choice."""

    label: str
    selection: ColumnSelector
    names: Sequence[str]
    """Names of the columns that are selected."""
    fits: bool = True
    """Whether a row of them is as wide as the layer."""

    @property
    def json(self) -> str:
        """Selection in the form of `POST /adapters`."""
        return json.dumps(self.selection.to_json(), ensure_ascii=False)


def input_choices(columns: Sequence[Column], width: int) -> list[Choice]:
    """Return the choices of inputs: those of `width` numbers, or all lists of numbers if none fits."""
    choices = list(_wide_choices(columns, width))
    numeric = [column.name for column in columns if column.type in _NUMBERS]
    floats = [column.name for column in columns if column.type in _FLOATS]
    for names in (numeric, floats):
        if len(names) == width > 1 and not any(choice.fits for choice in choices):
            choices.append(Choice(f"All {width} columns of numbers", ColumnSelector(columns=tuple(names)), names))
    if width == 1:
        choices += [_column_choice(name) for name in numeric[:_MAX_TARGETS]]
    return sorted(choices, key=lambda choice: not choice.fits)


def target_choices(columns: Sequence[Column], input_names: Collection[str], width: int) -> list[Choice]:
    """Return the choices of targets for a layer with `width` outputs, the likeliest first."""
    others = _without(columns, input_names)
    choices = [choice for choice in _wide_choices(others, width) if choice.fits]
    choices += [_column_choice(column.name) for column in others if _can_be_target(column, width)]
    return choices[:_MAX_TARGETS]


def group_choices(columns: Sequence[Column], input_names: Collection[str]) -> list[str]:
    """Return the columns by which rows could be grouped."""
    return [column.name for column in _without(columns, input_names) if column.type in _NAMES][:_MAX_GROUPS]


def _without(columns: Sequence[Column], names: Collection[str]) -> list[Column]:
    excluded = set(names)
    return [column for column in columns if column.name not in excluded]


def _column_choice(name: str) -> Choice:
    return Choice(name, ColumnSelector(column=name), [name])


def _wide_choices(columns: Sequence[Column], width: int) -> Iterable[Choice]:
    """Yield columns of lists, and groups of numbered columns such as `pixel_0`, `pixel_1`."""
    for column in columns:
        if column.width is not None:
            label, selection = f"{column.name} (lists of {column.width})", ColumnSelector(column=column.name)
            yield Choice(label, selection, [column.name], column.width == width)
    numbered = (_NUMBERED.fullmatch(column.name) for column in columns)
    prefixes = Counter(match["prefix"] for match in numbered if match and match["prefix"])
    for prefix, _ in prefixes.most_common(_MAX_PREFIXES):
        group = [column for column in columns if column.name.startswith(prefix)]
        if len(group) > 1 and all(column.type in _NUMBERS for column in group):
            label, names = f"{prefix}… ({len(group)} columns)", [column.name for column in group]
            yield Choice(label, ColumnSelector(prefix=prefix), names, len(group) == width)


def _can_be_target(column: Column, width: int) -> bool:
    """Return whether one column can be the target of a layer with `width` outputs: classes, labels or numbers."""
    if column.type in ("list<string>", "list<int64>"):
        return column.width != width
    return column.type in (_NUMBERS if width == 1 else _NAMES)
