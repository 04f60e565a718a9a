"""Rendering of pages: templates, static files, and routes that answer errors as pages."""

import hashlib
import os
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from adapters.access.grants import OPEN_GRANT
from adapters.access.keys import Scope as Access
from adapters.errors import LoraplexError
from app.http.errors import STATUS, from_request_validation
from app.web.pages.formatting import FILTERS

STATIC_FOLDER = Path(__file__).parents[1] / "static"
STATIC_PREFIX = "/static"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# Those that pages have in addition to, or in place of, `app.http.middleware`.
_PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    # A part of a page has the page's own address.
    "Vary": "HX-Request",
}
_TEMPLATE_FOLDER = Path(__file__).parents[1] / "templates"
Handler = TypeVar("Handler", bound=Callable[..., Response | None])


def render(
    request: Request, template: str, *, part: str | None = None, status: int = 200, **context: Any
) -> HTMLResponse:
    """Return the page, or only its `part` if a script requests that."""
    only = part if _requests_part(request) else None
    grant = request.scope["state"].get("grant", OPEN_GRANT)  # open pages have none
    # Without a key, the caller has no tenant of its own.
    tenant = None if grant.caller.key_id is None else grant.caller.tenant
    context |= {"part_only": only is not None, "tenant": tenant, "is_signed_in": grant.credential.is_session}
    context["is_admin"] = "grant" in request.scope["state"] and grant.caller.may(Access.ADMIN)
    html = _environment().get_template(only or template).render(**context)
    return HTMLResponse(html, status, headers=_PAGE_HEADERS)


class PageRoute(APIRoute):
    """Route that answers the service's own errors as pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, wrapped."""
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await inner(request)
            except RequestValidationError as error:
                return _render_error(request, from_request_validation(error))
            except LoraplexError as error:
                return _render_error(request, error)

        return handler


class PageRouter(APIRouter):
    """Router for pages, which are not part of the API."""

    def __init__(self) -> None:
        super().__init__(route_class=PageRoute, include_in_schema=False)

    def page(self, path: str) -> Callable[[Handler], Handler]:
        """Decorate the handler of GET and HEAD of `path`."""
        return self.api_route(path, methods=["GET", "HEAD"], response_model=None)


@cache
def release() -> str:
    """Return a name for all static files together.

    The relative imports of a script stay within the release, so that scripts of two releases never mix.
    """
    digest = hashlib.sha256()
    for path in sorted(STATIC_FOLDER.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(STATIC_FOLDER).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return f"v-{digest.hexdigest()[:16]}"


def static_url(path: str) -> str:
    """Return the URL of a static file, which changes with the content of any of them."""
    return f"{STATIC_PREFIX}/{release()}/{path}"


class StaticAssets(StaticFiles):
    """Static files: cached for good under the name of the current release, and revalidated otherwise."""

    def __init__(self) -> None:
        super().__init__(directory=STATIC_FOLDER)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return one file."""
        first, _, rest = path.partition(os.sep)
        is_current = first == release()
        answer = await super().get_response(rest if is_current else path, scope)
        answer.headers["Cache-Control"] = "public, max-age=31536000, immutable" if is_current else "no-cache"
        return answer


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters.update(FILTERS)
    environment.globals["asset"] = static_url
    return environment


def _requests_part(request: Request) -> bool:
    """Return whether htmx requests a part of the page. To restore the history, it requests the whole page."""
    headers = request.headers
    return headers.get("hx-request") == "true" and headers.get("hx-history-restore-request") != "true"


def _render_error(request: Request, error: LoraplexError) -> Response:
    status = STATUS[error.code]
    return render(request, "problem.html", status=status, code=status, problem=error.members())
