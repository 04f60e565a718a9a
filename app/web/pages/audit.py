"""Page `/ui/audit`: the audit log."""

from starlette.requests import Request
from starlette.responses import Response

from adapters.access.keys import Scope
from app.http.authentication import CallerOf
from app.http.paging import page_of, read_cursor
from app.service import ServiceOf
from app.web.pages.rendering import PageRouter, render

_ENTRIES_PER_PAGE = 50
router = PageRouter()


@router.page("/ui/audit")
def show_audit(
    request: Request,
    service: ServiceOf,
    caller: CallerOf,
    actor: str = "",
    resource: str = "",
    cursor: str | None = None,
) -> Response:
    """Show the changes of the tenant's data, newest first."""
    caller.require(Scope.ADMIN)
    actor, resource = actor.strip(), resource.strip()
    list_key = f"audit page {caller.tenant} {actor} {resource}"
    entries = service.audit.list(
        tenant=caller.tenant,
        actor=actor or None,
        resource=resource or None,
        before=read_cursor(list_key, cursor or None, int),
        limit=_ENTRIES_PER_PAGE + 1,
    )
    data, next_cursor = page_of(list_key, entries, _ENTRIES_PER_PAGE, lambda entry: entry.sequence)
    return render(
        request,
        "audit.html",
        part="fragments/audit_rows.html",
        entries=data,
        actor=actor,
        resource=resource,
        cursor=cursor,
        next_cursor=next_cursor,
    )
