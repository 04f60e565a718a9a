"""The endpoint table: every call of the API with its handler, its headers, its bodies and its errors.

The router, the OpenAPI document, the middleware and the fast path are built from this table. Pages for browsers are in
`app.web`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import TypeAdapter
from starlette.routing import compile_path

from adapters.access.keys import Scope
from adapters.datasets.ingest import CONTENT_TYPES
from adapters.names import LIVE
from app.http.authentication import TENANT_HEADER
from app.http.bodies import BINARY, JSON, LEAST_LIMIT_BYTES
from app.http.job_submission import IDEMPOTENCY_KEY, REPLAYED
from app.http.paging import check_query_fields
from app.http.preconditions import check_feature_space
from app.http.routes import adapters, audit, datasets, jobs, keys, sessions, status, tenants, usage
from app.http.routes.adapters import MULTIPART, ZIP
from app.http.schemas.adapters import FactorsUpload, LiveRequest, PeftFiles, PeftUpload, VersionBody
from app.http.schemas.audit import AuditPage
from app.http.schemas.datasets import DatasetVersionBody
from app.http.schemas.jobs import JobWithHistory, RetryRequest
from app.http.schemas.keys import IssuedKeyBody, KeyRequest, SessionRequest
from app.http.schemas.predictions import InferAnswer, InferRequest, PredictAnswer, PredictRequest
from app.http.schemas.tenants import TenantBody, TenantRequest
from app.http.schemas.trainings import EvaluateRequest, PlanBody, TrainRequest, UpdateRequest
from app.service import ServiceOf
from app.serving import asgi
from app.serving.asgi import EndpointHandler
from app.serving.oip import routes as oip

SERVED_BY = "X-Served-By"
REQUEST_ID, FEATURE_SPACE, REQUEST_TIMEOUT = "X-Request-Id", "X-Feature-Space", "X-Request-Timeout"
IF_MATCH, IF_NONE_MATCH = "If-Match", "If-None-Match"
INFERENCE_HEADER, SERVER_TIMING = "Inference-Header-Content-Length", "Server-Timing"
OIP = "Open Inference Protocol"
SCHEMA_REFERENCE = "#/components/schemas/{model}"

# First part of a path → tag, if they differ.
_TAGS = {"evaluations": "jobs", "session": "keys", "v2": OIP} | dict.fromkeys(
    ("healthz", "readyz", "metrics"), "health"
)
_OCTETS = "application/octet-stream"
_SERVER = (REQUEST_ID,)
_QUEUED: dict[str, Any] = {"status": 202, "answers": {202: ("The queued job", JobWithHistory)}}
_ONCE = {"headers": (IDEMPOTENCY_KEY, FEATURE_SPACE, REQUEST_ID), "response_headers": (REPLAYED,)} | _QUEUED
_TEXT_FORMATS = frozenset({"text/csv", "application/x-ndjson", "application/jsonl"})

# Of every call that reads the catalogue.
READ_ERRORS = ("catalog_busy", "catalog_unavailable", "storage_failed", "too_many_open_files")
_WRITE_ERRORS = ("storage_full", *READ_ERRORS)
_REFERENCE = ("invalid_reference", "adapter_not_found", "version_not_found", "alias_not_found", "adapter_not_live")
_USED = (*_REFERENCE, "base_mismatch", "feature_space_mismatch")
_TRAINS = (
    *("ignored_field", "invalid_combination", "estimate_too_large", "queue_full", "request_timeout", "blob_corrupt"),
    *("dataset_not_found", "wrong_shape", "bad_rows", "quota_exceeded", *_USED),
)
_PREDICTS = (
    *("wrong_shape", "invalid_combination", "output_not_finite", "queue_full", "request_timeout", "not_ready"),
    *("blob_corrupt", *_USED),
)
_PEFT = ("invalid_upload", "invalid_safetensors", "invalid_archive", "peft_unsupported", "rank_too_large")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One call of the API."""

    method: str
    path: str
    handler: Callable[..., Any]
    summary: str
    _: KW_ONLY
    scope: Scope | None
    """Scope that the caller needs; None if the call is open to everyone."""
    asgi: EndpointHandler | None = None
    """ASGI callable that answers in place of FastAPI, which then only documents the call."""
    name: str = ""
    """Operation id, if it is not the handler's name."""
    headers: tuple[str, ...] | None = None
    """Documented headers that can change the answer, if they are not those of its method."""
    response_headers: tuple[str, ...] = ()
    """Headers of a successful answer, besides `X-Request-Id` and, for 202, `Location`."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """Content type → model of the request body."""
    body_is_required: bool = True
    body_limit: int | None = None
    """Largest request body in bytes, if it is smaller than the setting `MAX_BODY_BYTES`."""
    is_streamed: bool = False
    """Whether the body is a data set that goes to a file, so that it does not count as memory."""
    errors: tuple[str, ...] = ()
    """Error codes, besides those that follow from the method, the path, the headers, the query and the body."""
    is_documented: bool = True
    status: int = 200
    """Status of the usual answer."""
    answers: Mapping[int, tuple[str, Any]] = field(default_factory=dict)
    """Status → description, and model or content types with their models, where the handler's type does not say it."""

    @property
    def operation_id(self) -> str:
        """Name of the call in the OpenAPI document."""
        return self.name or self.handler.__name__

    @property
    def request_headers(self) -> tuple[str, ...]:
        """Documented headers that can change the answer."""
        conditions = (IF_MATCH, IF_NONE_MATCH) if self.method in ("PUT", "DELETE") else ()
        own = (*conditions, FEATURE_SPACE, REQUEST_ID) if self.headers is None else self.headers
        return own if self.scope is None else (*own, TENANT_HEADER)

    @property
    def tag(self) -> str:
        """Group of the call in the OpenAPI document."""
        first = self.path.split("/")[1]
        return _TAGS.get(first, first)


_INFER: dict[str, Any] = {
    "asgi": oip.infer,
    "headers": (REQUEST_TIMEOUT, INFERENCE_HEADER, FEATURE_SPACE, REQUEST_ID),
    "response_headers": (SERVER_TIMING, INFERENCE_HEADER),
    "body": {JSON: InferRequest, _OCTETS: BINARY},
    "errors": _PREDICTS,
    "answers": {
        200: ("The outputs as JSON, or as JSON followed by binary numbers", {JSON: InferAnswer, _OCTETS: BINARY})
    },
}

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(
        *("POST", "/predict", asgi.post_predict, "Apply adapters to rows"),
        scope=Scope.PREDICT,
        asgi=asgi.predict,
        name="predict",
        headers=(REQUEST_TIMEOUT, FEATURE_SPACE, REQUEST_ID),
        response_headers=(SERVER_TIMING,),
        body={JSON: PredictRequest},
        errors=("invalid_name", *_PREDICTS),
        answers={200: ("One answer for each row", PredictAnswer)},
    ),
    Endpoint(
        "POST",
        "/v2/models/{name}/infer",
        oip.post_infer,
        "Apply a model to rows",
        name="infer",
        scope=Scope.PREDICT,
        **_INFER,
    ),
    Endpoint(
        *("POST", "/v2/models/{name}/versions/{version}/infer", oip.post_infer, "Apply a version to rows"),
        scope=Scope.PREDICT,
        name="infer_version",
        **_INFER,
    ),
    # --- adapters
    Endpoint(
        *("POST", "/adapters", adapters.train_adapter, "Train an adapter or a fleet"),
        scope=Scope.TRAIN,
        body={JSON: TrainRequest},
        errors=(*_TRAINS, "rank_too_large", "invalid_name"),
        **_ONCE | {"answers": {**_QUEUED["answers"], 200: ("The plan of a dry run", PlanBody)}},
    ),
    Endpoint(
        *("PUT", "/adapters/{name}", adapters.upload_adapter, "Upload an adapter"),
        scope=Scope.WRITE,
        response_headers=("ETag",),
        body={JSON: FactorsUpload | PeftUpload, MULTIPART: PeftFiles, ZIP: BINARY},
        errors=(*_PEFT, "wrong_shape", "request_timeout", "quota_exceeded"),
        answers={
            200: ("The live version, which has the same bytes", VersionBody),
            201: ("The new version, which is live", VersionBody),
        },
    ),
    Endpoint("GET", "/adapters", adapters.list_adapters, "List adapters", scope=Scope.READ),
    Endpoint("GET", "/adapters/{name}", adapters.show_adapter, "Show an adapter", scope=Scope.READ),
    Endpoint(
        *("GET", "/adapters/{name}/versions", adapters.list_adapter_versions, "List an adapter's versions"),
        scope=Scope.READ,
    ),
    Endpoint(
        *("GET", "/adapters/{name}/versions/{version}", adapters.show_adapter_version, "Show a version of an adapter"),
        scope=Scope.READ,
    ),
    Endpoint(
        *("GET", "/adapters/{name}/download", adapters.download_adapter, "Download an adapter for PEFT"),
        scope=Scope.READ,
        response_headers=("Content-Disposition",),
        errors=("version_not_found", "adapter_not_live", "invalid_input", "blob_corrupt"),
        answers={200: ("The zip", {ZIP: BINARY})},
    ),
    Endpoint(
        *("PUT", f"/adapters/{{name}}/aliases/{LIVE}", adapters.set_live, "Roll back or forward"),
        scope=Scope.WRITE,
        body={JSON: LiveRequest},
        body_limit=LEAST_LIMIT_BYTES,
        errors=("version_not_found", "request_timeout"),
    ),
    Endpoint(
        *("POST", "/adapters/{name}/update", adapters.update_adapter, "Add or forget rows of an adapter"),
        scope=Scope.TRAIN,
        body={JSON: UpdateRequest},
        errors=(*_TRAINS, "no_statistics", "conflict"),
        **_ONCE,
    ),
    Endpoint("DELETE", "/adapters/{name}", adapters.delete_adapter, "Delete an adapter", scope=Scope.WRITE, status=204),
    Endpoint(
        *("POST", "/adapters/{name}/restore", adapters.restore_adapter, "Restore a deleted adapter"),
        scope=Scope.WRITE,
        errors=("name_taken", "quota_exceeded"),
    ),
    Endpoint(
        *("POST", "/evaluations", adapters.evaluate_adapters, "Compare adapters on labelled rows"),
        scope=Scope.TRAIN,
        body={JSON: EvaluateRequest},
        errors=(*_TRAINS, "invalid_name"),
        **_ONCE,
    ),
    # --- data sets
    Endpoint(
        *("PUT", "/datasets/{name}", datasets.upload_dataset, "Upload a data set"),
        scope=Scope.WRITE,
        response_headers=("ETag",),
        body={kind: str if kind in _TEXT_FORMATS else BINARY for kind in CONTENT_TYPES},
        is_streamed=True,
        errors=("invalid_dataset", "invalid_archive", "not_json", "duplicate_key", "quota_exceeded"),
        answers={
            200: ("The newest version, which has the same content", DatasetVersionBody),
            201: ("The new version", DatasetVersionBody),
        },
    ),
    Endpoint("GET", "/datasets", datasets.list_datasets, "List data sets", scope=Scope.READ),
    Endpoint("GET", "/datasets/{name}", datasets.show_dataset, "Show a data set", scope=Scope.READ),
    Endpoint(
        *("GET", "/datasets/{name}/versions", datasets.list_dataset_versions, "List a data set's versions"),
        scope=Scope.READ,
    ),
    Endpoint(
        *("GET", "/datasets/{name}/versions/{version}", datasets.show_dataset_version, "Show a version of a data set"),
        scope=Scope.READ,
    ),
    Endpoint(
        *("GET", "/datasets/{name}/preview", datasets.preview_dataset, "Preview rows of a data set"),
        scope=Scope.READ,
        errors=("version_not_found", "blob_corrupt"),
    ),
    Endpoint("DELETE", "/datasets/{name}", datasets.delete_dataset, "Delete a data set", scope=Scope.WRITE, status=204),
    # --- jobs
    Endpoint("GET", "/jobs", jobs.list_jobs, "List jobs", scope=Scope.READ),
    Endpoint("GET", "/jobs/{job_id}", jobs.show_job, "Show a job", scope=Scope.READ),
    Endpoint("GET", "/jobs/{job_id}/adapters", jobs.list_job_adapters, "List a job's adapters", scope=Scope.READ),
    Endpoint(
        *("GET", "/jobs/{job_id}/events", jobs.watch_job, "Follow a job"),
        scope=Scope.READ,
        errors=("queue_full",),
        answers={200: ("The events", {jobs.EVENT_STREAM: str}), 204: ("The client has received the last event", None)},
    ),
    Endpoint(
        "GET",
        "/jobs/{job_id}/suspects",
        jobs.list_suspects,
        "List a job's suspects",
        scope=Scope.READ,
        errors=("no_suspects",),
    ),
    Endpoint(
        *("POST", "/jobs/{job_id}/cancel", jobs.cancel_job, "Cancel a job"), scope=Scope.TRAIN, errors=("job_ended",)
    ),
    Endpoint(
        *("POST", "/jobs/{job_id}/retry", jobs.retry_job, "Train adapters of a job again"),
        scope=Scope.TRAIN,
        body={JSON: RetryRequest},
        errors=(*_TRAINS, "job_not_ended", "data_gone", "conflict", "rank_too_large"),
        **_QUEUED,
    ),
    Endpoint(
        *("POST", "/jobs/{job_id}/revert", jobs.revert_job, "Take back what a job made live"),
        errors=("job_not_ended",),
        scope=Scope.WRITE,
    ),
    # --- the service itself
    Endpoint("GET", "/base", status.show_base, "Show the base layer", scope=Scope.READ, headers=_SERVER),
    Endpoint("GET", "/healthz", status.check_alive, "Check that the process answers", scope=None, headers=_SERVER),
    Endpoint("GET", "/readyz", status.check_ready, "Check that the service can answer", scope=None, headers=_SERVER),
    Endpoint(
        *("GET", "/metrics", status.show_metrics, "Show the metrics"),
        scope=Scope.METRICS,
        headers=_SERVER,
        answers={200: ("All metrics", {"text/plain": str, "application/openmetrics-text": str})},
    ),
    # --- keys
    Endpoint(
        *("POST", "/keys", keys.create_key, "Create a key"),
        scope=Scope.ADMIN,
        headers=_SERVER,
        body={JSON: KeyRequest},
        body_limit=LEAST_LIMIT_BYTES,
        errors=("keys_disabled", "tenant_not_found", "invalid_name", "invalid_combination", *_WRITE_ERRORS),
        status=201,
        answers={201: ("The key, whose text is shown only here", IssuedKeyBody)},
    ),
    Endpoint("GET", "/keys", keys.list_keys, "List keys", scope=Scope.ADMIN, headers=_SERVER, errors=READ_ERRORS),
    Endpoint(
        *("DELETE", "/keys/{key_id}", keys.revoke_key, "Revoke a key"),
        scope=Scope.ADMIN,
        headers=_SERVER,
        errors=("key_not_found", *_WRITE_ERRORS),
        status=204,
    ),
    Endpoint(
        *("POST", "/session", sessions.sign_in, "Sign in to the page"),
        scope=None,
        headers=_SERVER,
        response_headers=("Set-Cookie",),
        body={JSON: SessionRequest},
        # Anyone may send one, and bodies under way take memory.
        body_limit=1024,
        errors=("keys_disabled", "unauthenticated", "rate_limited", *_WRITE_ERRORS),
        status=204,
    ),
    Endpoint(
        *("DELETE", "/session", sessions.sign_out, "Sign out of the page"),
        scope=None,
        headers=_SERVER,
        response_headers=("Set-Cookie",),
        errors=_WRITE_ERRORS,
        status=204,
    ),
    # --- audit log
    Endpoint(
        *("GET", "/audit", audit.list_audit_entries, "Read the audit log"),
        scope=Scope.ADMIN,
        headers=_SERVER,
        errors=("invalid_combination", *READ_ERRORS),
        answers={200: ("A page of entries, or all entries as lines", {JSON: AuditPage, audit.JSON_LINES: str})},
    ),
    # --- tenants
    Endpoint(
        *("GET", "/tenants/{name}", tenants.show_tenant, "Show a tenant"),
        scope=Scope.OPERATOR,
        headers=_SERVER,
        errors=("tenant_not_found", *READ_ERRORS),
    ),
    Endpoint(
        *("PUT", "/tenants/{name}", tenants.put_tenant, "Create a tenant, or set its limits"),
        scope=Scope.OPERATOR,
        headers=_SERVER,
        body={JSON: TenantRequest},
        body_limit=LEAST_LIMIT_BYTES,
        errors=("invalid_name", *_WRITE_ERRORS),
        answers={200: ("The tenant with its new limits", TenantBody), 201: ("The new tenant", TenantBody)},
    ),
    # --- usage
    Endpoint(
        "GET",
        "/usage",
        usage.list_usage,
        "List the usage by hour",
        scope=Scope.ADMIN,
        headers=_SERVER,
        errors=READ_ERRORS,
    ),
    # --- Open Inference Protocol
    Endpoint("GET", "/v2", oip.show_server, "Show the server", scope=Scope.READ, headers=_SERVER),
    # The protocol's own OpenAPI file has the path with a slash at its end.
    Endpoint("GET", "/v2/", oip.show_server, "Show the server", scope=Scope.READ, headers=_SERVER, is_documented=False),
    Endpoint("GET", "/v2/health/live", oip.server_live, "Check that the process answers", scope=None, headers=_SERVER),
    Endpoint(
        "GET", "/v2/health/ready", oip.server_ready, "Check that the service can answer", scope=None, headers=_SERVER
    ),
    Endpoint("GET", "/v2/models/{name}", oip.show_model, "Show a model", scope=Scope.READ),
    Endpoint(
        *("GET", "/v2/models/{name}/versions/{version}", oip.show_model, "Show a version of a model"),
        scope=Scope.READ,
        name="show_model_version",
    ),
    Endpoint(
        *("GET", "/v2/models/{name}/config", oip.show_configuration, "Show a model's configuration"),
        scope=Scope.READ,
        name="show_model_configuration",
    ),
    Endpoint(
        *("GET", "/v2/models/{name}/versions/{version}/config", oip.show_configuration),
        "Show a version's configuration",
        scope=Scope.READ,
        name="show_model_version_configuration",
    ),
    Endpoint("GET", "/v2/models/{name}/ready", oip.model_ready, "Check that a model answers", scope=Scope.READ),
    Endpoint(
        *("GET", "/v2/models/{name}/versions/{version}/ready", oip.model_ready, "Check that a version answers"),
        scope=Scope.READ,
        name="model_version_ready",
    ),
    Endpoint("GET", "/v2/repository/index", oip.list_models, "List models", scope=Scope.READ),
    Endpoint(
        *("POST", "/v2/repository/index", oip.post_list_models, "List models that answer"),
        scope=Scope.READ,
        name="filter_models",
        body={JSON: oip.IndexRequest},
        body_is_required=False,
        body_limit=4096,
    ),
)

# Paths whose calls need no key, whatever the method.
OPEN_PATHS = frozenset(endpoint.path for endpoint in ENDPOINTS if endpoint.scope is None)
_WITH_QUERY_CHECK = frozenset({"adapters", "audit", "datasets", "jobs", "keys", "usage"})
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


@cache
def build_router() -> APIRouter:
    """Return FastAPI's router for all endpoints. It keeps nothing of an application that includes it."""
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
            status_code=endpoint.status,
            **_answers(endpoint),
        )
    return router


async def _check_feature_space(request: Request, service: ServiceOf) -> None:
    check_feature_space(request.scope["headers"], service.settings.feature_space)


def _dependencies(endpoint: Endpoint) -> list[Any]:
    """Return the checks before the handler; ASGI callables do their own."""
    dependencies = []
    if endpoint.asgi is None and FEATURE_SPACE in endpoint.request_headers:
        dependencies.append(Depends(_check_feature_space))
    if endpoint.tag in _WITH_QUERY_CHECK:
        dependencies.append(Depends(check_query_fields))
    return dependencies


def _request_body(endpoint: Endpoint) -> dict[str, Any] | None:
    """Return the description of a body, which the handler reads itself; `app.openapi` hoists its definitions."""
    if not endpoint.body:
        return None
    return {"requestBody": {"required": endpoint.body_is_required, "content": _content(endpoint.body)}}


def _answers(endpoint: Endpoint) -> dict[str, Any]:
    """Return the arguments of `add_api_route` that describe the successful answers."""
    arguments: dict[str, Any] = {"responses": {}}
    for code, (description, model) in endpoint.answers.items():
        has_content = isinstance(model, dict)
        response = {"content": _content(model)} if has_content else {"model": model} if model else {}
        arguments["responses"][code] = {"description": description} | response
        if code == endpoint.status:
            arguments |= {"response_class": Response} if has_content else {"response_model": model}
    return arguments


def _content(models: Mapping[str, Any]) -> dict[str, Any]:
    return {
        kind: {
            "schema": {"type": "string", "format": "binary"}
            if model is BINARY
            else TypeAdapter(model).json_schema(ref_template=SCHEMA_REFERENCE)
        }
        for kind, model in models.items()
    }
