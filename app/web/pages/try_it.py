"""Page `/ui/try`: the answers of several adapters to one row."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.datasets.store import DatasetVersion
from adapters.datasets.table import Table
from adapters.errors import InvalidCombination, LoraplexError, OutOfRange
from adapters.names import Reference, check_name, check_prefix, parse_reference
from app.http.errors import problem
from app.service import ServiceOf
from app.web.pages.datasets import input_choices, names_of
from app.web.pages.rendering import page, page_router, render

_ADAPTERS_OFFERED = 8
_DATASETS_OFFERED = 200
MAX_ADAPTERS = 8
# Inputs of the bundled classifier of digits, for which the page has a drawing area.
_DIGIT_PIXELS = 64
router = page_router()


@page(router, "/ui/try")
def show_try(request: Request, service: ServiceOf, prefix: str = "") -> Response:
    """Show the page; a search renders only the adapters that it offers."""
    prefix = prefix.strip()
    chosen = request.query_params.getlist("adapter")[:MAX_ADAPTERS]
    offered = service.catalog.adapters(prefix=check_prefix(prefix), limit=_ADAPTERS_OFFERED + 1)
    answers = bool(offered) and offered[0].live is not None
    if (
        not chosen
        and not prefix
        and answers
        and not offered[0].serving_problem(service.base, service.settings.feature_space)
    ):
        chosen = [offered[0].name]
    return render(
        request,
        "try.html",
        part="fragments/offered.html",
        offered=offered[:_ADAPTERS_OFFERED],
        more=len(offered) > _ADAPTERS_OFFERED,
        prefix=prefix,
        chosen=[str(parse_reference(text)) for text in chosen],
        most=MAX_ADAPTERS,
        base=service.base,
        drawn=service.base.in_features == _DIGIT_PIXELS,
        datasets=service.datasets.list(limit=_DATASETS_OFFERED),
    )


@page(router, "/ui/try/row")
def read_row(service: ServiceOf, dataset: str = "", row: str = "0") -> Response:
    """Return one row of a data set as the layer's inputs (`values`), and some other columns (`beside`)."""
    try:
        version = service.datasets.find(Reference(check_name(dataset, field="dataset")))
        return JSONResponse(_row(version, Table.open(service.datasets.local(version)), row, service.base.in_features))
    except LoraplexError as error:
        return problem(error)


def _row(version: DatasetVersion, table: Table, row: str, width: int) -> dict[str, Any]:
    number = int(row) if row.isascii() and row.isdigit() and len(row) < 12 else -1
    if not 0 <= number < version.rows:
        raise OutOfRange(
            f"the data set {version.dataset} has the rows 0 to {version.rows - 1}",
            field="row",
            given=row,
            expected=f"a row from 0 to {version.rows - 1}",
        )
    fitting = [choice for choice in input_choices(version.columns, width) if choice.fits]
    if not fitting:
        raise InvalidCombination(
            f"the data set {version.dataset} has no columns that make {width} numbers a row: paste them instead",
            field="dataset",
            given=version.dataset,
            expected=f"a list column of width {width}, or {width} numbered columns",
        )
    chosen = fitting[0].selection
    (values,) = table.numbers(chosen, field="dataset", begin=number, end=number + 1).tolist()
    taken = set(names_of(version.columns, chosen))
    shown = table.preview(number, 1)[0]
    beside = {name: value for name, value in shown.items() if name not in taken}
    return {"row": number, "rows": version.rows, "values": values, "beside": dict(list(beside.items())[:5])}
