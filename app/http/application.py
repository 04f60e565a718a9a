"""The application: wiring only."""

from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from starlette.types import ASGIApp, Scope

from app.http import errors as problems
from app.http.middleware import Edge
from app.http.routes import adapters, base, datasets, health, infer, inference_protocol, jobs, metrics, predict
from app.openapi import docs_page as api_docs
from app.service import Service
from app.web.pages.mounting import add_pages


def create_app(service: Service) -> ASGIApp:
    """The ASGI application that answers for `service`."""
    app = routed()
    app.state.service = service
    hot_predict, hot_infer = partial(predict.predict, service), partial(infer.infer, service)

    def hot(scope: Scope) -> tuple[str, ASGIApp] | None:
        if scope["method"] != "POST":
            return None
        path = scope["path"]
        if path == predict.ROUTE:
            return predict.ROUTE, hot_predict
        named = infer.INFER_PATH.fullmatch(path)
        if named is None:
            return None
        return infer.ROUTE if named[2] is None else infer.VERSION_ROUTE, hot_infer

    def is_dataset(scope: Scope) -> bool:
        return scope["method"] == "PUT" and bool(scope["path"].startswith(f"{datasets.router.prefix}/"))

    def most_bytes(scope: Scope) -> int:
        return service.settings.max_dataset_bytes if is_dataset(scope) else service.settings.max_body_bytes

    return Edge(
        app,
        hot,
        most_bytes=most_bytes,
        is_streamed=is_dataset,
        bodies=service.bodies,
        observer=service.observer,
        host_policy=service.host_policy,
    )


def routed() -> FastAPI:
    """Every call and page in its place; of a service they ask for nothing before the first request."""
    app = FastAPI(
        title="loraplex",
        summary="One frozen base layer, thousands of named LoRA adapters.",
        version=version("loraplex-server"),
        redirect_slashes=False,
        openapi_url=None,  # `app.openapi.docs_page` has it, and the page that shows it
        # Its own would bring spans and figures of what `Edge` observes already, wherever a variable asks for them.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        generate_unique_id_function=lambda route: route.name,
    )
    routers = [
        resource.router for resource in (predict, adapters, datasets, jobs, base, health, metrics, inference_protocol)
    ]
    routers.append(inference_protocol.server)
    problems.install(app, [route for router in routers for route in router.routes])
    for router in routers:
        app.include_router(router)
    app.include_router(api_docs.router)
    add_pages(app)
    return app
