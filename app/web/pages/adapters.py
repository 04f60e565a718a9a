"""Pages `/ui/adapters`: the list with its search, and one adapter with its versions."""

from starlette.requests import Request
from starlette.responses import Response

from adapters.names import check_name, check_prefix
from app.http.paging import page_of, read_cursor
from app.service import ServiceOf
from app.web.pages import metric_tables
from app.web.pages.rendering import page, page_router, render

_ADAPTERS_PER_PAGE = 25
_VERSIONS_PER_PAGE = 10
router = page_router()


@page(router, "/ui/adapters")
def list_adapters(request: Request, service: ServiceOf, prefix: str = "", cursor: str | None = None) -> Response:
    """Show the adapters whose names begin with `prefix`."""
    prefix = prefix.strip()
    list_key = f"adapters {check_prefix(prefix)}"
    after = read_cursor(list_key, cursor or None) or ""
    listed = service.catalog.adapters(prefix=prefix, after=after, limit=_ADAPTERS_PER_PAGE + 1)
    data, next_cursor = page_of(list_key, listed, _ADAPTERS_PER_PAGE, lambda adapter: adapter.name)
    rows = [
        (
            adapter,
            metric_tables.headline(adapter.live.metrics if adapter.live else None),
            adapter.serving_problem(service.base, service.settings.feature_space),
        )
        for adapter in data
    ]
    return render(
        request,
        "adapters.html",
        part="fragments/adapter_rows.html",
        rows=rows,
        prefix=prefix,
        cursor=cursor,
        next_cursor=next_cursor,
    )


@page(router, "/ui/adapters/{name}")
def show_adapter(request: Request, service: ServiceOf, name: str, cursor: str | None = None) -> Response:
    """Show one adapter with its versions, newest first."""
    list_key = f"versions {check_name(name)}"
    before = read_cursor(list_key, cursor or None)
    adapter = service.catalog.adapter(name)
    listed = service.catalog.versions(name, before=before, limit=_VERSIONS_PER_PAGE + 1)
    data, next_cursor = page_of(list_key, listed, _VERSIONS_PER_PAGE, lambda version: version.version)
    feature_space = service.settings.feature_space
    versions = [
        (
            version,
            metric_tables.held_out(version.metrics),
            metric_tables.losses(version.metrics),
            version.serving_problem(service.base, feature_space),
        )
        for version in data
    ]
    return render(
        request,
        "adapter.html",
        adapter=adapter,
        live=None if adapter.live is None else adapter.live.version,
        problem=adapter.serving_problem(service.base, feature_space),
        versions=versions,
        cursor=cursor,
        next_cursor=next_cursor,
    )
