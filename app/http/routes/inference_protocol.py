"""`/v2`: the Open Inference Protocol. Every adapter is a model, and the bare base layer is `__base__`."""

from importlib.metadata import version as version_of
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from starlette.concurrency import run_in_threadpool

from app.http.bodies import BINARY, JSON, documented, parse_object, read_as, read_bytes
from app.http.dependencies import ServiceOf, same_feature_space
from app.http.routes.health import readyz
from app.http.routes.infer import infer
from app.openapi.responses import InferAnswer, InferRequest
from app.service import Service
from app.serving.asgi import Handed
from app.serving.oip import models as models
from app.serving.oip.models import Configuration, IndexEntry, Metadata, State

_PAGE = 1000
_LARGEST_INDEX_BODY = 4096
_BYTES = "application/octet-stream"
_INFER: Any = {
    "response_class": Response,
    "responses": {
        200: {
            "description": "The outputs, as JSON, or as JSON with the numbers as bytes after it",
            "content": {
                JSON: {"schema": TypeAdapter(InferAnswer).json_schema(ref_template="#/components/schemas/{model}")},
                _BYTES: {"schema": {"type": "string", "format": "binary"}},
            },
        },
    },
    "openapi_extra": documented({JSON: InferRequest, _BYTES: BINARY}),
}
_SHARED: Any = {"prefix": "/v2", "tags": ["Open Inference Protocol"]}
server = APIRouter(**_SHARED)
router = APIRouter(**_SHARED, dependencies=[Depends(same_feature_space)])


class ServerMetadata(BaseModel):
    """This service."""

    name: str
    version: str
    extensions: list[str]


class ModelReady(BaseModel):
    """Whether a model answers."""

    name: str
    ready: bool


class IndexRequest(BaseModel):
    """Which models to list."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ready: bool = Field(False, description="Only those that answer.")


@server.get("/", include_in_schema=False)  # where the protocol's own OpenAPI file has it
@server.get("", summary="Show the server")
async def show_server() -> ServerMetadata:
    """The service and the extensions of the protocol that it has."""
    return ServerMetadata(name="loraplex", version=version_of("loraplex-server"), extensions=models.EXTENSIONS)


@server.get("/health/live", operation_id="server_live", summary="Check that the process answers")
async def live() -> dict[str, bool]:
    """As `/healthz`."""
    return {"live": True}


@server.get("/health/ready", operation_id="server_ready", summary="Check that the service can answer")
async def ready(service: ServiceOf) -> dict[str, bool]:
    """As `/readyz`."""
    await readyz(service)
    return {"ready": True}


@router.get("/models/{name}", summary="Show a model")
@router.get("/models/{name}/versions/{version}", operation_id="show_model_version", summary="Show a version of a model")
def show_model(name: str, service: ServiceOf, version: str | None = None) -> Metadata:
    """What a model takes and gives, and its versions."""
    _require(service, name, version)
    versions = [models.BASE_VERSION] if name == models.BASE_MODEL else service.catalog.version_numbers(name)
    return models.metadata(name, versions, service.base)


@router.get("/models/{name}/config", operation_id="show_model_configuration", summary="Show a model's configuration")
@router.get(
    "/models/{name}/versions/{version}/config",
    operation_id="show_model_version_configuration",
    summary="Show a version's configuration",
)
def show_configuration(name: str, service: ServiceOf, version: str | None = None) -> Configuration:
    """A model's configuration, in the form of Triton's."""
    _require(service, name, version)
    return models.configuration(name, service.base, max_rows=service.settings.max_rows)


@router.get("/models/{name}/ready", summary="Check that a model answers")
@router.get(
    "/models/{name}/versions/{version}/ready",
    operation_id="model_version_ready",
    summary="Check that a version answers",
)
def model_ready(name: str, service: ServiceOf, version: str | None = None) -> ModelReady:
    """Whether a model answers; one that does not, because it is not there or was made for another base, is a 4xx."""
    _require(service, name, version)
    return ModelReady(name=name, ready=True)


@router.post("/models/{name}/infer", operation_id="infer", summary="Apply a model to rows", **_INFER)
@router.post(
    "/models/{name}/versions/{version}/infer",
    operation_id="infer_version",
    summary="Apply a version to rows",
    **_INFER,
)
async def post_infer(name: str, service: ServiceOf, version: str | None = None) -> Response:  # noqa: ARG001
    """The rows are the tensor `inputs`, as JSON, or as bytes after the JSON (the binary tensor data extension).

    `Inference-Header-Content-Length` says how many bytes the JSON has. With `classification` in the parameters of
    `outputs` the answer is Triton's classes.
    """
    return Handed(infer, service)


@router.get("/repository/index", summary="List models")
def list_models(service: ServiceOf) -> list[IndexEntry]:
    """The models, each with the version that its bare name means."""
    return _index(service, only_ready=False)


@router.post(
    "/repository/index",
    operation_id="filter_models",
    summary="List models that answer",
    openapi_extra=documented({JSON: IndexRequest}, required=False),
)
async def post_list_models(request: Request, service: ServiceOf) -> list[IndexEntry]:
    """The models, or only those that are ready; the body may be left out."""
    body = await read_bytes(request, most_bytes=_LARGEST_INDEX_BODY)
    asked = read_as(IndexRequest, parse_object(body) if body.strip() else {})
    return await run_in_threadpool(_index, service, only_ready=asked.ready)


def _require(service: Service, name: str, version: str | None) -> None:
    """Raises what a request to infer with this model would be answered with."""
    reference = models.reference_of(name, version)
    if reference is not None:
        service.catalog.find(reference).check_answers_on(service.base, service.settings.feature_space)


def _index(service: Service, *, only_ready: bool) -> list[IndexEntry]:
    entries = [models.base_entry()]
    after = ""
    while page := service.catalog.adapters(after=after, limit=_PAGE):
        entries += [models.index_entry(adapter, service.base, service.settings.feature_space) for adapter in page]
        after = page[-1].name
    return [entry for entry in entries if not only_ready or entry.state is State.READY]
