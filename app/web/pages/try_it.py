"""Page `/ui/try`: the answers of several adapters to one row."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.datasets.store import DatasetVersion
from adapters.datasets.table import Table
from adapters.errors import InvalidCombination, LoraplexError, OutOfRange
from adapters.names import Reference, check_name, check_prefix, parse_reference
from app.http.authentication import CallerOf
from app.http.errors import problem
from app.service import ServiceOf
from app.web.pages.datasets import input_choices
from app.web.pages.rendering import PageRouter, render

_ADAPTERS_OFFERED = 8
_DATASETS_OFFERED = 200
MAX_ADAPTERS = 8
# Inputs of the bundled classifier of digits, for which the page has a drawing area.
_DIGIT_PIXELS = 64
router = PageRouter()


@router.page("/ui/try")
def show_try(request: Request, service: ServiceOf, caller: CallerOf, prefix: str = "") -> Response:
    """Show the page; a search renders only the adapters that it offers."""
    prefix = prefix.strip()
    chosen = request.query_params.getlist("adapter")[:MAX_ADAPTERS]
    limit = _ADAPTERS_OFFERED + 1
    offered = service.catalog.adapters(tenant=caller.tenant, prefix=check_prefix(prefix), limit=limit)
    if offered and not chosen and not prefix:
        first = offered[0]
        is_served = first.live and not first.serving_problem(service.base, service.settings.feature_space)
        chosen = [first.name] if is_served else []
    return render(
        request,
        "try.html",
        part="fragments/offered.html",
        offered=offered[:_ADAPTERS_OFFERED],
        more=len(offered) > _ADAPTERS_OFFERED,
        prefix=prefix,
        chosen=[str(parse_reference(text)) for text in chosen],
        max_adapters=MAX_ADAPTERS,
        base=service.base,
        can_draw=service.base.in_features == _DIGIT_PIXELS,
        datasets=service.datasets.list(tenant=caller.tenant, limit=_DATASETS_OFFERED),
    )


@router.page("/ui/try/row")
def read_row(service: ServiceOf, caller: CallerOf, dataset: str = "", row: str = "0") -> Response:
    """Return one row of a data set as the layer's inputs (`values`), and up to five other columns."""
    try:
        reference = Reference(check_name(dataset, field="dataset"))
        version = service.datasets.find(reference, tenant=caller.tenant)
        return JSONResponse(_row(version, Table.open(service.datasets.local(version)), row, service.base.in_features))
    except LoraplexError as error:
        return problem(error)


def _row(version: DatasetVersion, table: Table, row: str, width: int) -> dict[str, Any]:
    number = int(row) if row.isascii() and row.isdigit() and len(row) < 12 else -1
    if not 0 <= number < version.rows:
        rows = f"0 to {version.rows - 1}"
        detail = f"the data set {version.dataset} has rows {rows}"
        raise OutOfRange(detail, field="row", given=row, expected=f"a row from {rows}")
    inputs = next((choice for choice in input_choices(version.columns, width) if choice.fits), None)
    if inputs is None:
        name, expected = version.dataset, f"a list column of width {width}, or {width} numbered columns"
        detail = f"the data set {name} has no columns that give {width} numbers per row; paste them instead"
        raise InvalidCombination(detail, field="dataset", given=name, expected=expected)
    (values,) = table.numbers(inputs.selection, field="dataset", begin=number, end=number + 1).tolist()
    excluded = set(inputs.names)
    others = [(name, value) for name, value in table.preview(number, 1)[0].items() if name not in excluded]
    return {"row": number, "rows": version.rows, "values": values, "other_columns": dict(others[:5])}
