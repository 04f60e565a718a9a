"""Templates → answers, under a policy that lets a page load and call nothing but this service."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from app.web.pages import assets
from app.web.pages.wording import FILTERS

_FOLDER = Path(__file__).parents[1] / "templates"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # What is shown may be gone by the next look. A part of a page has the page's own address.
    "Cache-Control": "no-store",
    "Vary": "HX-Request",
}


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters.update(FILTERS)
    environment.globals["asset"] = assets.address
    return environment


def wants_part(request: Request) -> bool:
    """Whether a script asks for the part of a page that changes; it asks for the whole where it goes back."""
    headers = request.headers
    return headers.get("hx-request") == "true" and headers.get("hx-history-restore-request") != "true"


def render(
    request: Request, template: str, *, part: str | None = None, status: int = 200, **shown: Any
) -> HTMLResponse:
    """The page, or its `part` where that alone is asked for."""
    only = part if wants_part(request) else None
    html = _environment().get_template(only or template).render(**shown, part_only=only is not None)
    return HTMLResponse(html, status, headers=_HEADERS)
