"""`/v2`: the Open Inference Protocol. Every adapter is a model, and the bare base layer is `__base__`."""

from importlib.metadata import version as version_of

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from app.http.bodies import parse_object, read_as, read_bytes
from app.http.dependencies import ServiceOf
from app.http.routes.infer import infer
from app.http.routes.status import readyz
from app.service import Service
from app.serving.asgi import Handed
from app.serving.oip import models as models
from app.serving.oip.models import Configuration, IndexEntry, Metadata, State

_PAGE = 1000


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


async def show_server() -> ServerMetadata:
    """The service and the extensions of the protocol that it has."""
    return ServerMetadata(name="loraplex", version=version_of("loraplex-server"), extensions=models.EXTENSIONS)


async def live() -> dict[str, bool]:
    """As `/healthz`."""
    return {"live": True}


async def ready(service: ServiceOf) -> dict[str, bool]:
    """As `/readyz`."""
    await readyz(service)
    return {"ready": True}


def show_model(name: str, service: ServiceOf, version: str | None = None) -> Metadata:
    """What a model takes and gives, and its versions."""
    _require(service, name, version)
    versions = [models.BASE_VERSION] if name == models.BASE_MODEL else service.catalog.version_numbers(name)
    return models.metadata(name, versions, service.base)


def show_configuration(name: str, service: ServiceOf, version: str | None = None) -> Configuration:
    """A model's configuration, in the form of Triton's."""
    _require(service, name, version)
    return models.configuration(name, service.base, max_rows=service.settings.max_rows)


def model_ready(name: str, service: ServiceOf, version: str | None = None) -> ModelReady:
    """Whether a model answers; one that does not, because it is not there or was made for another base, is a 4xx."""
    _require(service, name, version)
    return ModelReady(name=name, ready=True)


async def post_infer(name: str, service: ServiceOf, version: str | None = None) -> Response:  # noqa: ARG001
    """The rows are the tensor `inputs`, as JSON, or as bytes after the JSON (the binary tensor data extension).

    `Inference-Header-Content-Length` says how many bytes the JSON has. With `classification` in the parameters of
    `outputs` the answer is Triton's classes.
    """
    return Handed(infer, service)


def list_models(service: ServiceOf) -> list[IndexEntry]:
    """The models, each with the version that its bare name means."""
    return _index(service, only_ready=False)


async def post_list_models(request: Request, service: ServiceOf) -> list[IndexEntry]:
    """The models, or only those that are ready; the body may be left out."""
    body = await read_bytes(request)
    asked = read_as(IndexRequest, parse_object(body) if body.strip() else {})
    return await run_in_threadpool(_index, service, only_ready=asked.ready)


def _require(service: Service, name: str, version: str | None) -> None:
    """Raises what a request to infer with this model would be answered with."""
    reference = models.reference_of(name, version)
    if reference is not None:
        service.catalog.find(reference).check_servable(service.base, service.settings.feature_space)


def _index(service: Service, *, only_ready: bool) -> list[IndexEntry]:
    entries = [models.base_entry()]
    after = ""
    while page := service.catalog.adapters(after=after, limit=_PAGE):
        entries += [models.index_entry(adapter, service.base, service.settings.feature_space) for adapter in page]
        after = page[-1].name
    return [entry for entry in entries if not only_ready or entry.state is State.READY]
