"""The application: every call and page, and the middleware around them."""

from importlib.metadata import version

from fastapi import Depends, FastAPI
from starlette.types import ASGIApp

from adapters.access.keys import Scope
from app.http.authentication import CallerOf
from app.http.endpoints import build_router
from app.http.errors import add_error_handlers
from app.http.middleware import Middleware
from app.openapi.document import router as document_router
from app.service import Service
from app.web.pages import adapters, audit, datasets, jobs, overview, sign_in, try_it, usage
from app.web.pages.rendering import STATIC_PREFIX, StaticAssets


def create_app(service: Service) -> ASGIApp:
    """Return the ASGI application that answers for `service`."""
    app = build_routes()
    app.state.service = service
    return Middleware(app, service, is_open_page=sign_in.is_open_page, answer=sign_in.answer_error)


async def _require_read(caller: CallerOf) -> None:
    """Raise `Forbidden` if the caller may not see a page; the endpoint table has the scopes of all calls."""
    caller.require(Scope.READ)


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
    app.include_router(sign_in.router)
    # The overview comes last: it also answers every path under /ui that has no page.
    for pages in (
        document_router,
        *(page.router for page in (adapters, datasets, jobs, try_it, usage, audit, overview)),
    ):
        app.include_router(pages, dependencies=[Depends(_require_read)])
    app.mount(STATIC_PREFIX, StaticAssets())
    return app
