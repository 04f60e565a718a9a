"""Page `/ui/sign-in`: a form for a key, which also answers a browser that opens another page without a session."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from adapters.errors import LoraplexError, Unauthenticated
from app.http.errors import STATUS, answer_at
from app.http.host_policy import SAFE_METHODS
from app.service import ServiceOf
from app.web.pages.rendering import STATIC_PREFIX, PageRouter, render

PATH = "/ui/sign-in"
router = PageRouter()


@router.page(PATH)
def show_sign_in(request: Request, service: ServiceOf) -> Response:
    """Show the form."""
    return render(request, "sign_in.html", has_keys=service.grants.has_keys, ended=None)


def is_open_page(path: str) -> bool:
    """Return whether a path outside the endpoint table needs no key: this page, and the static files."""
    return path == PATH or path.startswith(f"{STATIC_PREFIX}/")


def answer_error(scope: Scope, error: LoraplexError) -> Response:
    """Return the answer to a request that failed: this page if a browser shows it, else the error itself."""
    if not isinstance(error, Unauthenticated) or scope["method"] not in SAFE_METHODS:
        return answer_at(scope["path"], error)
    request = Request(scope)
    if "text/html" not in request.headers.get("accept", ""):
        return answer_at(scope["path"], error)
    scope["state"]["code"] = error.code
    has_ended = "cookie" in request.headers
    page = render(request, "sign_in.html", status=STATUS[error.code], has_keys=True, ended=has_ended and error.detail)
    page.headers["WWW-Authenticate"] = "Bearer"
    if "hx-request" in request.headers:
        # A part of a page cannot show the form: htmx loads the whole page again.
        page.headers["HX-Refresh"] = "true"
    return page
