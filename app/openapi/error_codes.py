"""The error codes of an endpoint: its own, and those that follow from its parameters and its body."""

from collections.abc import Mapping
from typing import Any

from app.http.endpoints import Endpoint

_JSON = ("not_json", "duplicate_key", "missing_field", "unknown_field", "wrong_type", "out_of_range", "not_finite")
_EVERY_CALL = ("internal_error", "head_too_large", "not_http", "too_many_open_files")
_BY_HEADER = {
    "X-Feature-Space": ("feature_space_mismatch",),
    "If-Match": ("precondition_failed",),
    "X-Request-Timeout": ("wrong_type", "out_of_range"),
}


def error_codes(endpoint: Endpoint, operation: Mapping[str, Any]) -> set[str]:
    """Return all codes of an operation of the document, whose parameters and body are complete."""
    codes = {*_EVERY_CALL, *endpoint.errors}
    for header in endpoint.request_headers:
        codes |= set(_BY_HEADER.get(header, ()))
    names = {parameter.get("name") for parameter in operation["parameters"]}
    codes |= {"invalid_cursor"} if "cursor" in names else set()
    codes |= {"invalid_name"} if "name" in names else set()
    if any(parameter.get("in") == "query" for parameter in operation["parameters"]):
        codes |= {"unknown_field", "wrong_type", "out_of_range", "invalid_combination"}
    if endpoint.body:
        codes |= {"body_too_large"}
        codes |= set() if endpoint.is_streamed else {"too_many_bytes"}
        codes |= {"unsupported_media_type"} if endpoint.body_is_required else set()
        codes |= set(_JSON) if "application/json" in endpoint.body else set()
    return codes
