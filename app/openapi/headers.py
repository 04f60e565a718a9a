"""What requests and answers carry in their headers, and which operations have which."""

from collections.abc import Mapping
from typing import Any

from app.http.endpoints import Endpoint
from app.openapi.problem_responses import RETRY_AFTER


def _asked(name: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"} | schema}


PARAMETERS: Mapping[str, Any] = {
    "RequestId": _asked(
        "X-Request-Id", "Name for this request in the answer and in the log; else the service makes one.",
        pattern="^[A-Za-z0-9._-]{1,64}$",
    ),
    "FeatureSpace": _asked(
        "X-Feature-Space", "Name of the encoder that the inputs come from: 409 where this service's is another one."
    ),
    "RequestTimeout": _asked(
        "X-Request-Timeout", "Seconds that the client waits: past them 503, and no work for nothing.",
        type="number", exclusiveMinimum=0,
    ),
    "IfMatch": _asked("If-Match", "Only where the live (or newest) version has one of these entity tags."),
    "IfNoneMatch": _asked("If-None-Match", "Only where it has none of these; `*`: only where the name is new."),
    "InferenceHeader": _asked(
        "Inference-Header-Content-Length", "How many bytes of the body are JSON; the rest is the tensor's data.",
        type="integer", minimum=0,
    ),
}  # fmt: skip
HEADERS: Mapping[str, Any] = {
    "RequestId": {"description": "The request's name in the service's log.", "schema": {"type": "string"}},
    "RetryAfter": RETRY_AFTER,
    "Location": {"description": "Where the job is: `/jobs/{id}`.", "schema": {"type": "string"}},
    "ETag": {"description": "The version's digest in quotes, for `If-Match`.", "schema": {"type": "string"}},
    "ServerTiming": {
        "description": "Milliseconds that the request waited and that its batch was computed.",
        "schema": {"type": "string", "examples": ["queue;dur=0.214, forward;dur=0.087"]},
    },
    "ContentDisposition": {"description": "A file name.", "schema": {"type": "string"}},
    "InferenceHeader": {
        "description": "How many bytes of the body are JSON, where the rest is binary.",
        "schema": {"type": "integer"},
    },
}  # fmt: skip
_REQUEST_COMPONENTS = {parameter["name"]: name for name, parameter in PARAMETERS.items()}
_RESPONSE_COMPONENTS = {
    "X-Request-Id": "RequestId",
    "Location": "Location",
    "ETag": "ETag",
    "Server-Timing": "ServerTiming",
    "Content-Disposition": "ContentDisposition",
    "Inference-Header-Content-Length": "InferenceHeader",
}


def parameters(endpoint: Endpoint) -> list[dict[str, str]]:
    """Return references to the headers that an endpoint honours."""
    return [{"$ref": f"#/components/parameters/{_REQUEST_COMPONENTS[header]}"} for header in endpoint.request_headers]


def response_headers(endpoint: Endpoint, status: str) -> dict[str, dict[str, str]]:
    """Return references to the headers of an endpoint's answer."""
    if not status.startswith("2"):
        return {}
    # A dry run (200) makes nothing that could have a location.
    own = [header for header in endpoint.response_headers if (header, status) != ("Location", "200")]
    return {
        header: {"$ref": f"#/components/headers/{_RESPONSE_COMPONENTS[header]}"} for header in (*own, "X-Request-Id")
    }
