"""The endpoint table: every call of the API with its handler, the headers that it honours and its body limit.

The router, the OpenAPI document, the middleware and the fast path are built from this table. Pages for browsers are in
`app.web`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from fastapi import APIRouter, Depends, Response
from pydantic import TypeAdapter
from starlette.routing import compile_path

from adapters.datasets.ingest import CONTENT_TYPES
from adapters.names import LIVE
from app.http.bodies import BINARY, JSON, LEAST_LIMIT_BYTES
from app.http.dependencies import check_feature_space, check_query_fields
from app.http.routes import adapters, datasets, jobs, status
from app.http.schemas.adapters import FactorsUpload, LiveRequest, PeftFiles, PeftUpload, VersionBody
from app.http.schemas.datasets import DatasetVersionBody
from app.http.schemas.jobs import JobWithHistory
from app.http.schemas.predictions import InferAnswer, InferRequest, PredictAnswer, PredictRequest
from app.http.schemas.trainings import PlanBody, TrainRequest, UpdateRequest
from app.http.uploads import MULTIPART, ZIP
from app.serving import asgi
from app.serving.asgi import EndpointHandler
from app.serving.oip import routes as oip

REQUEST_ID, FEATURE_SPACE, REQUEST_TIMEOUT = "X-Request-Id", "X-Feature-Space", "X-Request-Timeout"
IF_MATCH, IF_NONE_MATCH = "If-Match", "If-None-Match"
INFERENCE_HEADER, SERVER_TIMING = "Inference-Header-Content-Length", "Server-Timing"
MAX_BODY_BYTES, MAX_DATASET_BYTES = "max_body_bytes", "max_dataset_bytes"
OIP = "Open Inference Protocol"
SCHEMA_REFERENCE = "#/components/schemas/{model}"

_OCTETS = "application/octet-stream"
_CONDITIONAL = (IF_MATCH, IF_NONE_MATCH, FEATURE_SPACE, REQUEST_ID)
_SERVER = (REQUEST_ID,)
_TEXT = {"schema": {"type": "string"}}
_BYTES = {"schema": {"type": "string", "format": "binary"}}

_REFERENCE = ("invalid_reference", "adapter_not_found", "version_not_found", "alias_not_found", "adapter_not_live")
_USED = (*_REFERENCE, "base_mismatch", "feature_space_mismatch")
_READS = ("catalog_busy", "storage_failed", "too_many_open_files")
_WRITES = (*_READS, "storage_full")
_ROWS = ("dataset_not_found", "version_not_found", "invalid_reference", "wrong_shape", "bad_rows")
_TRAINS = (
    *("ignored_field", "invalid_combination", "estimate_too_large", "queue_full", "request_timeout", "blob_corrupt"),
    *(*_ROWS, *_WRITES, *_USED),
)
_PREDICTS = (
    *("wrong_shape", "invalid_combination", "output_not_finite", "queue_full", "request_timeout", "not_ready"),
    *("blob_corrupt", *_READS, *_USED),
)
_PEFT = ("invalid_upload", "invalid_safetensors", "invalid_archive", "peft_unsupported", "rank_too_large")
_MODEL = ("adapter_not_found", "version_not_found", "adapter_not_live", "invalid_name", "base_mismatch", *_READS)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One call of the API."""

    method: str
    path: str
    handler: Callable[..., Any]
    tag: str
    summary: str
    _: KW_ONLY
    asgi: EndpointHandler | None = None
    """ASGI callable that answers in place of FastAPI, which then only documents the call."""
    name: str = ""
    """Operation id, if it is not the handler's name."""
    request_headers: tuple[str, ...] = (FEATURE_SPACE, REQUEST_ID)
    """Documented headers that can change the answer."""
    response_headers: tuple[str, ...] = ()
    """Headers of a successful answer, besides `X-Request-Id`."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """Content type → model of the request body."""
    body_is_required: bool = True
    body_limit: str | int = MAX_BODY_BYTES
    """Largest request body in bytes, or the name of the setting that holds it."""
    is_streamed: bool = False
    """Whether the body goes to a file, so that it does not count as memory."""
    errors: tuple[str, ...] = ()
    """Error codes, besides those that follow from the headers, the query and the body."""
    is_documented: bool = True
    answer: Mapping[str, Any] = field(default_factory=dict)
    """Description of the answer: further arguments of `APIRouter.add_api_route`."""

    @property
    def operation_id(self) -> str:
        """Name of the call in the OpenAPI document."""
        return self.name or self.handler.__name__


_CSV_AND_NDJSON = ("text/csv", "application/x-ndjson", "application/jsonl")
_INFER: dict[str, Any] = {
    "request_headers": (REQUEST_TIMEOUT, INFERENCE_HEADER, FEATURE_SPACE, REQUEST_ID),
    "response_headers": (SERVER_TIMING, INFERENCE_HEADER),
    "body": {JSON: InferRequest, _OCTETS: BINARY},
    "errors": (*_MODEL, *_PREDICTS),
    "answer": {
        "response_class": Response,
        "responses": {
            200: {
                "description": "The outputs as JSON, or as JSON followed by binary numbers",
                "content": {
                    JSON: {"schema": TypeAdapter(InferAnswer).json_schema(ref_template=SCHEMA_REFERENCE)},
                    _OCTETS: _BYTES,
                },
            }
        },
    },
}

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(
        *("POST", "/predict", asgi.post_predict, "predict", "Apply adapters to rows"),
        asgi=asgi.predict,
        name="predict",
        request_headers=(REQUEST_TIMEOUT, FEATURE_SPACE, REQUEST_ID),
        response_headers=(SERVER_TIMING,),
        body={JSON: PredictRequest},
        errors=("invalid_name", *_PREDICTS),
        answer={"responses": {200: {"model": PredictAnswer, "description": "One answer for each row"}}},
    ),
    Endpoint(
        *("POST", "/v2/models/{name}/infer", oip.post_infer, OIP, "Apply a model to rows"),
        **_INFER | {"name": "infer", "asgi": oip.infer},
    ),
    Endpoint(
        *("POST", "/v2/models/{name}/versions/{version}/infer", oip.post_infer, OIP, "Apply a version to rows"),
        **_INFER | {"name": "infer_version", "asgi": oip.infer},
    ),
    # --- adapters
    Endpoint(
        *("POST", "/adapters", adapters.train_adapter, "adapters", "Train an adapter or a fleet"),
        response_headers=("Location",),
        body={JSON: TrainRequest},
        errors=(*_TRAINS, "rank_too_large", "invalid_name"),
        answer={
            "status_code": 202,
            "response_model": JobWithHistory,
            "response_description": "The queued job",
            "responses": {200: {"model": PlanBody, "description": "The plan of a dry run"}},
        },
    ),
    Endpoint(
        *("PUT", "/adapters/{name}", adapters.upload_adapter, "adapters", "Upload an adapter"),
        request_headers=_CONDITIONAL,
        response_headers=("ETag",),
        body={JSON: FactorsUpload | PeftUpload, MULTIPART: PeftFiles, ZIP: BINARY},
        errors=(*_PEFT, "wrong_shape", "request_timeout", *_WRITES),
        answer={
            "responses": {
                200: {"model": VersionBody, "description": "The live version, which has the same bytes"},
                201: {"model": VersionBody, "description": "The new version, which is live"},
            }
        },
    ),
    Endpoint(
        *("GET", "/adapters", adapters.list_adapters, "adapters", "List adapters"), errors=("invalid_name", *_READS)
    ),
    Endpoint(
        *("GET", "/adapters/{name}", adapters.show_adapter, "adapters", "Show an adapter"),
        errors=("adapter_not_found", *_READS),
    ),
    Endpoint(
        *("GET", "/adapters/{name}/versions", adapters.list_versions, "adapters", "List an adapter's versions"),
        name="list_adapter_versions",
        errors=("adapter_not_found", *_READS),
    ),
    Endpoint(
        *("GET", "/adapters/{name}/versions/{version}", adapters.show_version, "adapters"),
        "Show a version of an adapter",
        name="show_adapter_version",
        errors=("adapter_not_found", "version_not_found", "wrong_type", *_READS),
    ),
    Endpoint(
        *("GET", "/adapters/{name}/download", adapters.download_adapter, "adapters", "Download an adapter for PEFT"),
        response_headers=("Content-Disposition",),
        errors=(
            *("adapter_not_found", "version_not_found", "adapter_not_live", "invalid_input", "blob_corrupt"),
            *_READS,
        ),
        answer={"response_class": Response, "responses": {200: {"description": "The zip", "content": {ZIP: _BYTES}}}},
    ),
    Endpoint(
        *("PUT", f"/adapters/{{name}}/aliases/{LIVE}", adapters.set_live, "adapters", "Roll back or forward"),
        request_headers=_CONDITIONAL,
        body={JSON: LiveRequest},
        body_limit=LEAST_LIMIT_BYTES,
        errors=("adapter_not_found", "version_not_found", "request_timeout", *_WRITES),
    ),
    Endpoint(
        *("POST", "/adapters/{name}/update", adapters.update_adapter, "adapters", "Add or forget rows of an adapter"),
        response_headers=("Location",),
        body={JSON: UpdateRequest},
        errors=(*_TRAINS, "no_statistics", "conflict"),
        answer={"status_code": 202, "response_description": "The queued job"},
    ),
    Endpoint(
        *("DELETE", "/adapters/{name}", adapters.delete_adapter, "adapters", "Delete an adapter"),
        request_headers=_CONDITIONAL,
        errors=("adapter_not_found", *_WRITES),
        answer={"status_code": 204},
    ),
    # --- data sets
    Endpoint(
        *("PUT", "/datasets/{name}", datasets.upload_dataset, "datasets", "Upload a data set"),
        request_headers=_CONDITIONAL,
        response_headers=("ETag",),
        body=dict.fromkeys(CONTENT_TYPES, BINARY) | dict.fromkeys(_CSV_AND_NDJSON, str),
        body_limit=MAX_DATASET_BYTES,
        is_streamed=True,
        errors=("invalid_dataset", "invalid_archive", "not_json", "duplicate_key", *_WRITES),
        answer={
            "responses": {
                200: {"model": DatasetVersionBody, "description": "The newest version, which has the same content"},
                201: {"model": DatasetVersionBody, "description": "The new version"},
            }
        },
    ),
    Endpoint(
        *("GET", "/datasets", datasets.list_datasets, "datasets", "List data sets"), errors=("invalid_name", *_READS)
    ),
    Endpoint(
        *("GET", "/datasets/{name}", datasets.show_dataset, "datasets", "Show a data set"),
        errors=("dataset_not_found", *_READS),
    ),
    Endpoint(
        *("GET", "/datasets/{name}/versions", datasets.list_versions, "datasets", "List a data set's versions"),
        name="list_dataset_versions",
        errors=("dataset_not_found", *_READS),
    ),
    Endpoint(
        *("GET", "/datasets/{name}/versions/{version}", datasets.show_version, "datasets"),
        "Show a version of a data set",
        name="show_dataset_version",
        errors=("dataset_not_found", "version_not_found", "wrong_type", *_READS),
    ),
    Endpoint(
        *("GET", "/datasets/{name}/preview", datasets.preview_dataset, "datasets", "Preview rows of a data set"),
        errors=("dataset_not_found", "version_not_found", "blob_corrupt", *_READS),
    ),
    Endpoint(
        *("DELETE", "/datasets/{name}", datasets.delete_dataset, "datasets", "Delete a data set"),
        request_headers=_CONDITIONAL,
        errors=("dataset_not_found", *_WRITES),
        answer={"status_code": 204},
    ),
    # --- jobs
    Endpoint(*("GET", "/jobs", jobs.list_jobs, "jobs", "List jobs"), errors=("invalid_name", *_READS)),
    Endpoint(*("GET", "/jobs/{job_id}", jobs.show_job, "jobs", "Show a job"), errors=("job_not_found", *_READS)),
    Endpoint(
        *("GET", "/jobs/{job_id}/adapters", jobs.list_job_adapters, "jobs", "List a job's adapters"),
        errors=("job_not_found", *_READS),
    ),
    Endpoint(
        *("GET", "/jobs/{job_id}/events", jobs.watch_job, "jobs", "Follow a job"),
        errors=("job_not_found", "queue_full", *_READS),
        answer={
            "response_class": Response,
            "responses": {
                200: {"description": "The events", "content": {jobs.EVENT_STREAM: _TEXT}},
                204: {"description": "The client has received the last event"},
            },
        },
    ),
    Endpoint(
        *("POST", "/jobs/{job_id}/cancel", jobs.cancel_job, "jobs", "Cancel a job"),
        errors=("job_not_found", "job_ended", *_WRITES),
    ),
    Endpoint(
        *("POST", "/jobs/{job_id}/revert", jobs.revert_job, "jobs", "Take back what a job made live"),
        errors=("job_not_found", "job_not_ended", *_WRITES),
    ),
    # --- the service itself
    Endpoint(*("GET", "/base", status.show_base, "base", "Show the base layer"), request_headers=_SERVER),
    Endpoint(
        *("GET", "/healthz", status.healthz, "health", "Check that the process answers"),
        name="check_alive",
        request_headers=_SERVER,
    ),
    Endpoint(
        *("GET", "/readyz", status.readyz, "health", "Check that the service can answer"),
        name="check_ready",
        request_headers=_SERVER,
        errors=("not_ready", *_READS),
    ),
    Endpoint(
        *("GET", "/metrics", status.metrics, "health", "Show the metrics"),
        name="show_metrics",
        request_headers=_SERVER,
        answer={
            "response_class": Response,
            "responses": {
                200: {
                    "description": "All metrics",
                    "content": dict.fromkeys(("text/plain", "application/openmetrics-text"), _TEXT),
                }
            },
        },
    ),
    # --- Open Inference Protocol
    Endpoint("GET", "/v2", oip.show_server, OIP, "Show the server", request_headers=_SERVER),
    # The protocol's own OpenAPI file has the path with a slash at its end.
    Endpoint("GET", "/v2/", oip.show_server, OIP, "Show the server", request_headers=_SERVER, is_documented=False),
    Endpoint(
        *("GET", "/v2/health/live", oip.live, OIP, "Check that the process answers"),
        name="server_live",
        request_headers=_SERVER,
    ),
    Endpoint(
        *("GET", "/v2/health/ready", oip.ready, OIP, "Check that the service can answer"),
        name="server_ready",
        request_headers=_SERVER,
        errors=("not_ready", *_READS),
    ),
    Endpoint("GET", "/v2/models/{name}", oip.show_model, OIP, "Show a model", errors=_MODEL),
    Endpoint(
        *("GET", "/v2/models/{name}/versions/{version}", oip.show_model, OIP, "Show a version of a model"),
        name="show_model_version",
        errors=_MODEL,
    ),
    Endpoint(
        *("GET", "/v2/models/{name}/config", oip.show_configuration, OIP, "Show a model's configuration"),
        name="show_model_configuration",
        errors=_MODEL,
    ),
    Endpoint(
        *("GET", "/v2/models/{name}/versions/{version}/config", oip.show_configuration, OIP),
        "Show a version's configuration",
        name="show_model_version_configuration",
        errors=_MODEL,
    ),
    Endpoint(*("GET", "/v2/models/{name}/ready", oip.model_ready, OIP, "Check that a model answers"), errors=_MODEL),
    Endpoint(
        *("GET", "/v2/models/{name}/versions/{version}/ready", oip.model_ready, OIP, "Check that a version answers"),
        name="model_version_ready",
        errors=_MODEL,
    ),
    Endpoint("GET", "/v2/repository/index", oip.list_models, OIP, "List models", errors=_READS),
    Endpoint(
        *("POST", "/v2/repository/index", oip.post_list_models, OIP, "List models that answer"),
        name="filter_models",
        body={JSON: oip.IndexRequest},
        body_is_required=False,
        body_limit=4096,
        errors=_READS,
    ),
)

_WITH_QUERY_CHECK = frozenset({"adapters", "datasets", "jobs"})
_FIXED_PATHS = {(endpoint.method, endpoint.path): endpoint for endpoint in ENDPOINTS if "{" not in endpoint.path}
_PATTERNS: defaultdict[str, list[tuple[re.Pattern[str], Endpoint]]] = defaultdict(list)
for _endpoint in ENDPOINTS:
    if "{" in _endpoint.path:
        _PATTERNS[_endpoint.method].append((compile_path(_endpoint.path)[0], _endpoint))


def find_endpoint(method: str, path: str) -> Endpoint | None:
    """Return the endpoint of a decoded path, or None if there is none."""
    fixed = _FIXED_PATHS.get((method, path))
    if fixed is not None:
        return fixed
    return next((endpoint for pattern, endpoint in _PATTERNS.get(method, ()) if pattern.fullmatch(path)), None)


def build_router() -> APIRouter:
    """Return FastAPI's router for all endpoints."""
    router = APIRouter()
    for endpoint in ENDPOINTS:
        router.add_api_route(
            endpoint.path,
            endpoint.handler,
            methods=[endpoint.method],
            tags=[endpoint.tag],
            summary=endpoint.summary,
            operation_id=endpoint.operation_id,
            include_in_schema=endpoint.is_documented,
            dependencies=_dependencies(endpoint),
            openapi_extra=_request_body(endpoint),
            **endpoint.answer,
        )
    return router


def _dependencies(endpoint: Endpoint) -> list[Any]:
    """Return the checks before the handler; ASGI callables do their own."""
    dependencies = []
    if endpoint.asgi is None and FEATURE_SPACE in endpoint.request_headers:
        dependencies.append(Depends(check_feature_space))
    if endpoint.tag in _WITH_QUERY_CHECK:
        dependencies.append(Depends(check_query_fields))
    return dependencies


def _request_body(endpoint: Endpoint) -> dict[str, Any] | None:
    """Return the description of a body, which the handler reads itself; `app.openapi` hoists its definitions."""
    if not endpoint.body:
        return None
    content = {kind: {"schema": _schema(model)} for kind, model in endpoint.body.items()}
    return {"requestBody": {"required": endpoint.body_is_required, "content": content}}


def _schema(model: Any) -> dict[str, Any]:
    if model is BINARY:
        return {"type": "string", "format": "binary"}
    return TypeAdapter(model).json_schema(ref_template=SCHEMA_REFERENCE)
