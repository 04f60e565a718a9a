"""The application: wiring only."""

from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from starlette.types import ASGIApp, Scope

from app import problems
from app.edge import Edge
from app.routes import adapters, base, datasets, health, infer, inference_protocol, jobs, predict
from app.service import Service


def create_app(service: Service) -> ASGIApp:
    """The ASGI application that answers for `service`."""
    app = FastAPI(
        title="loraplex",
        summary="One frozen base layer, thousands of named LoRA adapters.",
        version=version("loraplex-server"),
        redirect_slashes=False,
        responses={
            "4XX": {"description": "A problem; docs/errors.md lists them", "content": {problems.MEDIA_TYPE: {}}}
        },
    )
    app.state.service = service
    routers = [resource.router for resource in (predict, adapters, datasets, jobs, base, health, inference_protocol)]
    routers.append(inference_protocol.server)
    problems.install(app, [route for router in routers for route in router.routes])
    for router in routers:
        app.include_router(router)
    hot_predict, hot_infer = partial(predict.predict, service), partial(infer.infer, service)

    def hot(scope: Scope) -> ASGIApp | None:
        if scope["method"] != "POST":
            return None
        path = scope["path"]
        return hot_predict if path == "/predict" else hot_infer if infer.INFER_PATH.fullmatch(path) else None

    def most_bytes(scope: Scope) -> int:
        is_dataset = scope["method"] == "PUT" and scope["path"].startswith(f"{datasets.router.prefix}/")
        return service.settings.max_dataset_bytes if is_dataset else service.settings.max_body_bytes

    return Edge(app, hot, most_bytes=most_bytes)
