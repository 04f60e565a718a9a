"""What requests and answers carry in their headers, and which operations have which."""

from collections.abc import Mapping, Sequence
from typing import Any

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
_CONDITIONS = ("IfMatch", "IfNoneMatch")
_ASKED: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("upload_adapter", "set_live", "delete_adapter", "upload_dataset", "delete_dataset"), _CONDITIONS),
    "predict": ("RequestTimeout",),
    **dict.fromkeys(("infer", "infer_version"), ("RequestTimeout", "InferenceHeader")),
}
_WITHOUT_SPACE = frozenset(
    {"show_base", "check_alive", "check_ready", "show_metrics", "show_server", "server_live", "server_ready"}
)
_INFERRED = {"Server-Timing": "ServerTiming", "Inference-Header-Content-Length": "InferenceHeader"}
_ANSWERED: Mapping[str, Mapping[str, str]] = {
    "train_adapter": {"Location": "Location"},
    "update_adapter": {"Location": "Location"},
    "upload_adapter": {"ETag": "ETag"},
    "upload_dataset": {"ETag": "ETag"},
    "predict": {"Server-Timing": "ServerTiming"},
    "infer": _INFERRED,
    "infer_version": _INFERRED,
    "download_adapter": {"Content-Disposition": "ContentDisposition"},
}


def parameters(operation: str) -> list[dict[str, str]]:
    """References to the headers that an operation looks at."""
    names = [*_ASKED.get(operation, ()), *(() if operation in _WITHOUT_SPACE else ("FeatureSpace",)), "RequestId"]
    return [{"$ref": f"#/components/parameters/{name}"} for name in names]


def answered(operation: str, status: str) -> dict[str, dict[str, str]]:
    """References to the headers of an operation's answer."""
    if not status.startswith("2"):
        return {}
    own = {} if operation == "train_adapter" and status == "200" else _ANSWERED.get(operation, {})
    return {
        header: {"$ref": f"#/components/headers/{name}"}
        for header, name in {**own, "X-Request-Id": "RequestId"}.items()
    }
