"""The application: every call and page, and the middleware around them."""

from importlib.metadata import version

from fastapi import FastAPI
from starlette.types import ASGIApp

from app.http.endpoints import build_router
from app.http.errors import add_error_handlers
from app.http.middleware import Middleware
from app.openapi.document import router as document_router
from app.service import Service
from app.web.pages import adapters, datasets, jobs, overview, try_it
from app.web.pages.rendering import STATIC_PREFIX, StaticAssets


def create_app(service: Service) -> ASGIApp:
    """Return the ASGI application that answers for `service`."""
    app = build_routes()
    app.state.service = service
    return Middleware(app, service)


def build_routes() -> FastAPI:
    """Return FastAPI's application with every call and page. It needs a service only when a request arrives."""
    app = FastAPI(
        title="loraplex",
        summary="One frozen base layer, thousands of named LoRA adapters.",
        version=version("loraplex-server"),
        redirect_slashes=False,
        openapi_url=None,  # `app.openapi` serves the document and the page that shows it
        # FastAPI's own telemetry would repeat what the middleware records, if an environment variable turns it on.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    router = build_router()
    add_error_handlers(app, router.routes)
    app.include_router(router)
    app.include_router(document_router)
    # The overview comes last: it also answers every path under /ui that has no page.
    for page in (adapters, datasets, jobs, try_it, overview):
        app.include_router(page.router)
    app.mount(STATIC_PREFIX, StaticAssets())
    return app
