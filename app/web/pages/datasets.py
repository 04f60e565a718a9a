"""`/ui/datasets`: drop a file, look at what was read, train from it."""

from collections.abc import Sequence
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
from app.web.pages import selections
from app.web.pages.page_route import page, pages
from app.web.pages.rendering import render

_DATASETS_A_PAGE = 25
_VERSIONS_SHOWN = 20
_ROWS_SHOWN = 5
_COLUMNS_SHOWN = 100
_CELLS_SHOWN = 36
_LAST_SHOWN = 4
router = pages()


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
    rows = Table.open(service.datasets.path(newest)).preview(offset, _ROWS_SHOWN)
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
    inputs = selections.input_choices(version.columns, base.in_features)
    first: ColumnSelector | None = inputs[0].selection if inputs and inputs[0].fits else None
    return {
        "base": base,
        "inputs": inputs,
        "targets": selections.target_choices(version.columns, first, base.out_features),
        "groups": selections.group_choices(version.columns, first),
        "losses": list(Loss),
        "methods": list(Method),
        "most_rank": service.settings.max_rank,
    }
