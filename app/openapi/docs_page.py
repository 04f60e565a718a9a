"""`/openapi.json`, and `/docs`, the page that shows it: Swagger UI from our own files, with nothing from elsewhere."""

import json

from fastapi import APIRouter, Request, Response
from starlette.responses import HTMLResponse

from app.openapi.document import document
from app.web.pages.rendering import POLICY, render

router = APIRouter(include_in_schema=False)
# Swagger UI sets styles as it goes along, and has its icons in the style sheet.
_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")


@router.get("/docs")
def show_page(request: Request) -> HTMLResponse:
    """Every operation, to read and to try."""
    page = render(request, "api.html")
    page.headers["Content-Security-Policy"] = _POLICY
    return page


@router.get("/openapi.json")
def show_document(request: Request) -> Response:
    """The OpenAPI document."""
    return Response(json.dumps(document(request.app), ensure_ascii=False), media_type="application/json")
