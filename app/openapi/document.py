"""The OpenAPI document: FastAPI's, completed from the endpoint table, and the page that shows it."""

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from itertools import groupby
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from starlette.responses import HTMLResponse

from adapters.access.idempotency import MAX_KEY_CHARACTERS
from adapters.access.keys import PREFIX as KEY_PREFIX
from adapters.access.keys import Scope
from app.http.authentication import SESSION_COOKIE, TENANT_HEADER
from app.http.endpoints import ENDPOINTS, OIP, READ_ERRORS, SCHEMA_REFERENCE, SERVED_BY, Endpoint
from app.http.errors import (
    EXAMPLE,
    MEDIA_TYPE,
    RATE_HEADERS,
    RETRIED,
    RETRY_AFTER_SECONDS,
    STATUS,
    TITLES,
    Problem,
    ProtocolError,
)
from app.web.pages.rendering import CONTENT_SECURITY_POLICY, render

_STRING = {"type": "string"}
TAGS = {
    "predict": "Apply adapters to rows.",
    "adapters": "Train, upload, download and roll back. Versions never change; a bare name means the `live` version.",
    "datasets": "Versioned files of rows for training.",
    "jobs": "Queued, running and finished trainings.",
    "keys": "Keys of the service, if it is started with `LORAPLEX_AUTH=keys`, and sessions of its page.",
    "audit": "Who changed what.",
    "tenants": "Owners of adapters, data sets, jobs and keys, and their limits.",
    "usage": "Predictions that were answered, by hour.",
    "base": "The frozen base layer.",
    "health": "Endpoints for load balancers and Prometheus.",
    "Open Inference Protocol": "The same adapters for clients of KServe and Triton. Errors have its own form.",
}
_ABOUT = """A request names an adapter by reference: `acme` (its live version), `acme@3` or `acme@live`. Lists have
pages: pass `limit`, and `cursor` with the `next_cursor` of the previous page. Every answer has an `X-Request-Id`,
and an `X-Served-By` if the service is one of several replicas.

Every error is `application/problem+json`; match on `code`. An unknown path is `route_not_found`, and a method that a
path does not have is `method_not_allowed`. A request to a host that is not the service's is `host_not_allowed` on every
path except health, and a web page of another host that does more than read is `cross_site`. Each operation lists its
other codes.

A service that is started with `LORAPLEX_AUTH=keys` needs `Authorization: Bearer <key>` for every path except health,
including those that do not exist; each operation names the scope that it needs. Without keys, every caller is the
operator.
"""


def _component(header: str) -> str:
    """Return the name of a header among the components of the document."""
    return header.removeprefix("X-").removesuffix("-Content-Length").replace("-", "")


# Header of requests → description and schema.
PARAMETERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "X-Request-Id": (
        "Id of this request in the answer and in the log; the service creates one if it is missing, or is not 1 to 64 "
        "characters of `A-Z a-z 0-9 . _ -`.",
        _STRING,
    ),
    "X-Feature-Space": ("Name of the encoder of the inputs; 409 if this service has another one.", _STRING),
    TENANT_HEADER: ("Tenant that the request is for; only an operator may name another than its own.", _STRING),
    "X-Request-Timeout": ("Seconds that the client waits; after that, 503.", {"type": "number", "exclusiveMinimum": 0}),
    "If-Match": ("Only if the live (or newest) version has one of these entity tags.", _STRING),
    "Idempotency-Key": (
        "Unique text for this request. Repeating the request with it within 24 hours returns the same job.",
        {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARACTERS, "pattern": "^[ -~]+$"},
    ),
    "If-None-Match": ("Only if it has none of these; `*`: only if the name is new.", _STRING),
    "Inference-Header-Content-Length": (
        "Number of bytes of JSON; the rest of the body is the tensor's data.",
        {"type": "integer", "minimum": 0},
    ),
}
# Header of answers → description and schema.
HEADERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "X-Request-Id": ("Id of the request in the service's log.", _STRING),
    SERVED_BY: ("Name of the replica that answered, if the service is one of several.", _STRING),
    "Retry-After": (
        "Seconds to wait before the request is repeated.",
        {"type": "integer", "minimum": 1, "examples": [RETRY_AFTER_SECONDS]},
    ),
    "RateLimit-Policy": (
        "With `rate_limited`: the limit, as requests or rows (`q`) in a number of seconds (`w`).",
        _STRING | {"examples": ['"requests";q=200;w=1']},
    ),
    "RateLimit": (
        "With `rate_limited`: what is left of the limit (`r`), and the seconds until there is more (`t`).",
        _STRING | {"examples": ['"requests";r=0;t=1']},
    ),
    "Idempotent-Replayed": (
        "`true` if an earlier request with the same idempotency key queued the job.",
        {"type": "string", "enum": ["true"]},
    ),
    "Location": ("URL of the job: `/jobs/{id}`.", _STRING),
    "ETag": ("The version's digest in quotes, for `If-Match`.", _STRING),
    "Server-Timing": (
        "Milliseconds of waiting, and of computing the batch.",
        {"type": "string", "examples": ["queue;dur=0.214, forward;dur=0.087"]},
    ),
    "WWW-Authenticate": ("`Bearer`: send a key.", _STRING),
    "Set-Cookie": (f"The cookie `{SESSION_COOKIE}`.", _STRING),
    "Content-Disposition": ("File name of the download.", _STRING),
    "Inference-Header-Content-Length": (
        "Number of bytes of JSON, if the rest of the body is binary.",
        {"type": "integer"},
    ),
}
# Ways to prove a caller, and the operations that need one name its scope.
SECURITY_SCHEMES = {
    "key": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": f"{KEY_PREFIX}<id>_<secret>",
        "description": "A key. A service that is started without keys ignores it.",
    },
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": SESSION_COOKIE,
        "description": "A session of the page, which counts as the key it was opened with.",
    },
}
_UNREADABLE = ("catalog_busy", "catalog_unavailable")
_JSON = ("not_json", "duplicate_key", "missing_field", "unknown_field", "wrong_type", "out_of_range", "not_finite")
_QUERY = ("unknown_field", "wrong_type", "out_of_range", "invalid_combination")
_EVERY_CALL = ("internal_error", "head_too_large", "not_http", "too_many_open_files")
# Tags whose calls write to the catalogue, unless they are GET.
_STORED = frozenset({"adapters", "datasets", "jobs"})
_BY_PATH = {
    "/adapters/{name}": ("adapter_not_found",),
    "/datasets/{name}": ("dataset_not_found",),
    "/jobs/{job_id}": ("job_not_found",),
    "/readyz": ("not_ready", *READ_ERRORS),
    "/v2/health/ready": ("not_ready", *READ_ERRORS),
    "/v2/models/{name}": ("adapter_not_found", "version_not_found", "adapter_not_live", "base_mismatch"),
}
_BY_PARAMETER = {"cursor": ("invalid_cursor",)} | dict.fromkeys(("name", "prefix", "adapter"), ("invalid_name",))
_BY_HEADER = {
    # Calls with this header read the catalogue.
    "X-Feature-Space": ("feature_space_mismatch", *READ_ERRORS),
    "If-Match": ("precondition_failed",),
    "Idempotency-Key": ("idempotency_key_reused", "idempotency_in_progress", "out_of_range", "invalid_combination"),
    "X-Request-Timeout": ("wrong_type", "out_of_range"),
}
router = APIRouter(include_in_schema=False)
# Swagger UI sets inline styles, and has its icons in the style sheet.
_POLICY = CONTENT_SECURITY_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")


def document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of `app`, which is made at the first call and always the same for the same code."""
    if app.openapi_schema is None:
        app.openapi_schema = _build(app)
    return app.openapi_schema


def to_text(openapi: Mapping[str, Any]) -> str:
    """Return the document as text with sorted keys, for a file that is compared."""
    return json.dumps(openapi, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _build(app: FastAPI) -> dict[str, Any]:
    openapi = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=f"{_ABOUT}\n<details><summary>All codes</summary>\n\n{table_of_codes()}\n\n</details>",
        routes=app.routes,
        tags=[{"name": name, "description": text} for name, text in TAGS.items()],
    )
    components = openapi["components"]
    components["parameters"] = {
        _component(name): {"name": name, "in": "header", "description": text, "schema": schema}
        for name, (text, schema) in PARAMETERS.items()
    }
    components["headers"] = {
        _component(name): {"description": text, "schema": schema} for name, (text, schema) in HEADERS.items()
    }
    components["securitySchemes"] = SECURITY_SCHEMES
    schemas = components["schemas"]
    for model in (Problem, ProtocolError):
        _hoist(TypeAdapter(model).json_schema(ref_template=SCHEMA_REFERENCE), schemas)
    examples = json.loads(files(__package__).joinpath("examples.json").read_text("utf-8"))
    for endpoint in ENDPOINTS:
        if endpoint.is_documented:
            operation = openapi["paths"][endpoint.path][endpoint.method.lower()]
            _complete(endpoint, operation, schemas)
            _add_examples(operation, examples.get(endpoint.operation_id, {}))
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for schema in schemas.values():
        _tidy(schema)
    return openapi


def _complete(endpoint: Endpoint, operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Add headers and problems to an operation, and move the schemas of its bodies to the components."""
    is_oip = endpoint.path.startswith("/v2")
    # A model's version belongs to the longer path, and FastAPI takes it for a query of the shorter one. The content
    # types of an answer say that it may depend on `Accept`, which must not be a parameter (OpenAPI 3.1, 4.8.12.1).
    dropped = {("accept", "header"), *([("version", "query")] if is_oip else [])}
    parameters = operation.get("parameters", [])
    kept = [parameter for parameter in parameters if (parameter["name"], parameter["in"]) not in dropped]
    honoured = [{"$ref": f"#/components/parameters/{_component(header)}"} for header in endpoint.request_headers]
    operation["parameters"] = kept + honoured
    answers = {status: answer for status, answer in operation["responses"].items() if status.startswith("2")}
    bodies = [operation["requestBody"]] if "requestBody" in operation else []
    for holder in [*bodies, *answers.values()]:
        for content in holder.get("content", {}).values():
            content["schema"] = _hoist(content.get("schema", {}), schemas)
    for status, answer in answers.items():
        own = (*endpoint.response_headers, *(("Location",) if status == "202" else ()), "X-Request-Id", SERVED_BY)
        answer["headers"] = {header: {"$ref": f"#/components/headers/{_component(header)}"} for header in own}
    # For schemes other than OAuth's, the list names roles (OpenAPI 3.1, 4.8.30).
    operation["security"] = [] if endpoint.scope is None else [{name: [endpoint.scope]} for name in SECURITY_SCHEMES]
    operation["responses"] = answers | responses(_error_codes(endpoint, operation), protocol=is_oip)


def _add_examples(operation: dict[str, Any], examples: Mapping[str, Mapping[str, Any]]) -> None:
    for content_type, named in examples.get("request", {}).items():
        operation["requestBody"]["content"][content_type]["examples"] = named
    for status, by_type in examples.get("answers", {}).items():
        for content_type, named in by_type.items():
            operation["responses"][status]["content"][content_type]["examples"] = named


def _hoist(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Move a schema's definitions, and itself if it has a name, to the components; return it or its reference."""
    schemas |= schema.pop("$defs", {})
    if schema.get("type") != "object" or "title" not in schema or "properties" not in schema:
        return schema
    schemas[schema["title"]] = schema
    return {"$ref": SCHEMA_REFERENCE.format(model=schema["title"])}


def _tidy(schema: Any) -> None:
    """Remove what pydantic adds: titles that repeat the name of a property, and defaults of null."""
    if isinstance(schema, list):
        for entry in schema:
            _tidy(entry)
    elif isinstance(schema, dict):
        for member in schema.get("properties", {}).values():
            member.pop("title", None)
            if member.get("default", "") is None:
                del member["default"]
        for name, member in schema.items():
            if name not in ("example", "examples", "enum", "default"):
                _tidy(member)


def _error_codes(endpoint: Endpoint, operation: Mapping[str, Any]) -> set[str]:
    """Return all codes of an operation of the document, whose parameters and body are complete."""
    parameters, body = operation["parameters"], endpoint.body
    rules: list[tuple[object, Iterable[str]]] = [
        (True, (*_EVERY_CALL, *endpoint.errors)),
        (endpoint.scope is not None, ("unauthenticated", "forbidden", "tenant_not_found", *_UNREADABLE)),
        (endpoint.scope not in (None, Scope.OPERATOR), ("rate_limited",)),
        (endpoint.tag in _STORED and endpoint.method != "GET", ("storage_full",)),
        ("{version}" in endpoint.path and endpoint.tag != OIP, ("version_not_found", "wrong_type")),
        (any(parameter.get("in") == "query" for parameter in parameters), _QUERY),
        (body, ("body_too_large",)),
        (body and not endpoint.is_streamed, ("too_many_bytes",)),
        (body and endpoint.body_is_required, ("unsupported_media_type",)),
        ("application/json" in body, _JSON),
        *((True, _BY_HEADER.get(header, ())) for header in endpoint.request_headers),
        *((True, _BY_PARAMETER.get(parameter.get("name"), ())) for parameter in parameters),
    ]
    for prefix, codes in _BY_PATH.items():
        # An upload to a path creates what is not found there.
        is_upload = (endpoint.method, endpoint.path) == ("PUT", prefix)
        rules.append((endpoint.path.startswith(prefix) and not is_upload, codes))
    return {code for applies, codes in rules if applies for code in codes}


def table_of_codes() -> str:
    """Return all codes of answers as a Markdown table."""
    rows = [f"| `{code}` | {status} | {TITLES[code]} |" for code, status in STATUS.items()]
    return "\n".join(["| code | status | meaning |", "|---|---|---|", *rows])


def responses(codes: Iterable[str], *, protocol: bool) -> dict[str, Any]:
    """Return the error responses of an operation with these codes, by status."""
    responses_by_status = {}
    for status, group in groupby(sorted(codes, key=lambda code: (STATUS[code], code)), STATUS.__getitem__):
        codes_here = list(group)
        content: Mapping[str, Any] = {
            MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem", "properties": {"code": {"enum": codes_here}}},
                "example": dict(EXAMPLE) if codes_here[0] == EXAMPLE["code"] else _example(codes_here[0], status),
            }
        }
        if protocol:
            content = {"application/json": {"schema": {"$ref": "#/components/schemas/ProtocolError"}}}
        text = "\n".join(f"- `{code}`: {TITLES[code]}" for code in codes_here)
        response: dict[str, Any] = {"description": text, "content": content}
        headers = ("WWW-Authenticate",) if status == 401 else ("Retry-After",) if status in RETRIED else ()
        if "rate_limited" in codes_here:
            headers = (*headers, *RATE_HEADERS)
        if headers:
            response["headers"] = {name: {"$ref": f"#/components/headers/{_component(name)}"} for name in headers}
        responses_by_status[str(status)] = response
    return responses_by_status


def _example(code: str, status: int) -> dict[str, Any]:
    title = TITLES[code]
    return {"type": f"urn:loraplex:{code}", "title": title, "status": status, "detail": title, "code": code}


@router.get("/docs")
def show_page(request: Request) -> HTMLResponse:
    """Show Swagger UI, from the service's own files."""
    page = render(request, "api.html")
    page.headers["Content-Security-Policy"] = _POLICY
    return page


@router.get("/openapi.json")
def show_document(request: Request) -> Response:
    """Return the OpenAPI document."""
    return Response(json.dumps(document(request.app), ensure_ascii=False), media_type="application/json")
