"""Pages `/ui/adapters`: the list with its search, and one adapter with its versions."""

from starlette.requests import Request
from starlette.responses import Response

from adapters.names import check_name, check_prefix
from app.http.authentication import CallerOf
from app.http.paging import page_of, read_cursor
from app.service import ServiceOf
from app.web.pages.rendering import PageRouter, render

_ADAPTERS_PER_PAGE = 25
_VERSIONS_PER_PAGE = 10
router = PageRouter()


@router.page("/ui/adapters")
def list_adapters(
    request: Request, service: ServiceOf, caller: CallerOf, prefix: str = "", cursor: str | None = None
) -> Response:
    """Show the adapters whose names begin with `prefix`."""
    prefix = prefix.strip()
    list_key = f"adapters {check_prefix(prefix)}"
    after = read_cursor(list_key, cursor or None, str) or ""
    limit = _ADAPTERS_PER_PAGE + 1
    listed = service.catalog.adapters(tenant=caller.tenant, prefix=prefix, after=after, limit=limit)
    data, next_cursor = page_of(list_key, listed, _ADAPTERS_PER_PAGE, lambda adapter: adapter.name)
    return render(
        request,
        "adapters.html",
        part="fragments/adapter_rows.html",
        adapters=data,
        base=service.base,
        feature_space=service.settings.feature_space,
        prefix=prefix,
        cursor=cursor,
        next_cursor=next_cursor,
    )


@router.page("/ui/adapters/{name}")
def show_adapter(
    request: Request, service: ServiceOf, caller: CallerOf, name: str, cursor: str | None = None
) -> Response:
    """Show one adapter with its versions, newest first."""
    list_key = f"versions {check_name(name)}"
    before = read_cursor(list_key, cursor or None, int)
    adapter = service.catalog.adapter(name, tenant=caller.tenant)
    limit = _VERSIONS_PER_PAGE + 1
    listed = service.catalog.versions(name, tenant=caller.tenant, before=before, limit=limit)
    data, next_cursor = page_of(list_key, listed, _VERSIONS_PER_PAGE, lambda version: version.version)
    return render(
        request,
        "adapter.html",
        adapter=adapter,
        versions=data,
        base=service.base,
        feature_space=service.settings.feature_space,
        trash_days=service.settings.trash_days,
        cursor=cursor,
        next_cursor=next_cursor,
    )
