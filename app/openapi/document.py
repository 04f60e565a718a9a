"""The document: FastAPI's, with what it cannot know put in."""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from app.http.endpoints import ENDPOINTS, SCHEMA_REFERENCE, Endpoint
from app.openapi import headers
from app.openapi.error_codes import error_codes
from app.openapi.problem_responses import Problem, ProtocolError, responses, table_of_codes

TAGS = {
    "predict": "Ask: any adapters, mixed in one batch.",
    "adapters": "Train, upload, download, roll back. Versions never change; `live` is the one that a bare name means.",
    "datasets": "Files of rows to train from, kept in versions.",
    "jobs": "Trainings, on their way and afterwards.",
    "base": "The frozen layer.",
    "health": "What a load balancer and Prometheus ask.",
    "Open Inference Protocol": "The same adapters for clients of KServe and Triton, with its own form of errors.",
}
_ABOUT = """An adapter is asked for by reference: `acme` (its live version), `acme@3` or `acme@live`. Lists come in
pages: `limit`, and `cursor` with the `next_cursor` of the page before. Every answer has an `X-Request-Id`.

Every error is `application/problem+json`; match on `code`. A path that there is not is `route_not_found`, and a method
that a path does not take `method_not_allowed`. A request to a host that is not the service's is `host_not_allowed`
on every path except health, and a web page of another host that does more than read is `cross_site`. What else an
operation can end in is listed there.
"""


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of `app`, always the same for the same code; made at the first call."""
    if app.openapi_schema is None:
        found = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=f"{_ABOUT}\n<details><summary>All codes</summary>\n\n{table_of_codes()}\n\n</details>",
            routes=app.routes,
            tags=[{"name": name, "description": text} for name, text in TAGS.items()],
        )
        components = found["components"]
        components |= {"parameters": dict(headers.PARAMETERS), "headers": dict(headers.HEADERS)}
        schemas = components["schemas"]
        for model in (Problem, ProtocolError):
            _hoist(TypeAdapter(model).json_schema(ref_template=SCHEMA_REFERENCE), schemas)
        examples = json.loads(files(__package__).joinpath("examples.json").read_text("utf-8"))
        for endpoint in ENDPOINTS:
            if endpoint.is_documented:
                operation = found["paths"][endpoint.path][endpoint.method.lower()]
                _complete(endpoint, operation, schemas, examples.get(endpoint.operation_id, {}))
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for schema in schemas.values():
            _tidy(schema)
        app.openapi_schema = found
    return app.openapi_schema


def written(found: Mapping[str, Any]) -> str:
    """The document as text in one form, for a file that is compared."""
    return json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _complete(
    endpoint: Endpoint, operation: dict[str, Any], schemas: dict[str, Any], examples: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put in headers, problems and examples, and the schemas of bodies among the components."""
    protocol = endpoint.path.startswith("/v2")
    # A model's version belongs to the longer path, and FastAPI takes it for a query of the shorter one. That the answer
    # may go by `Accept` is said by its content types, and nowhere else (OpenAPI 3.1, section 4.8.12.1).
    dropped = {("accept", "header"), *([("version", "query")] if protocol else [])}
    known = [one for one in operation.get("parameters", []) if (one["name"], one["in"]) not in dropped]
    operation["parameters"] = [*known, *headers.parameters(endpoint)]
    answers = {status: answer for status, answer in operation["responses"].items() if status.startswith("2")}
    bodies = [operation["requestBody"]] if "requestBody" in operation else []
    for holder in [*bodies, *answers.values()]:
        for content in holder.get("content", {}).values():
            content["schema"] = _hoist(content.get("schema", {}), schemas)
    operation["responses"] = answers | responses(error_codes(endpoint, operation), protocol=protocol)
    for status, answer in operation["responses"].items():
        if carried := answer.get("headers", {}) | headers.response_headers(endpoint, status):
            answer["headers"] = carried
    for kind, named in examples.get("request", {}).items():
        operation["requestBody"]["content"][kind]["examples"] = named
    for status, by_kind in examples.get("answers", {}).items():
        for kind, named in by_kind.items():
            answers[status]["content"][kind]["examples"] = named


def _hoist(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """`schema` with its definitions, and itself where it has a name, among the components."""
    schemas |= schema.pop("$defs", {})
    if schema.get("type") != "object" or "title" not in schema or "properties" not in schema:
        return schema
    schemas[schema["title"]] = schema
    return {"$ref": SCHEMA_REFERENCE.format(model=schema["title"])}


def _tidy(schema: Any) -> None:
    """Without what pydantic adds: a title that repeats the name of its property, and a default that says nothing."""
    if isinstance(schema, list):
        for one in schema:
            _tidy(one)
    elif isinstance(schema, dict):
        for one in schema.get("properties", {}).values():
            one.pop("title", None)
            if one.get("default", "") is None:
                del one["default"]
        for name, one in schema.items():
            if name not in ("example", "examples", "enum", "default"):
                _tidy(one)
