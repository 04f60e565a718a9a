"""Errors of the HTTP layer, the status of every error code, and errors as problem details (RFC 9457)."""

import errno
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic_core import ErrorDetails
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from adapters.arrays import is_finite
from adapters.errors import (
    InvalidInput,
    LoraplexError,
    MissingField,
    NotFinite,
    OutOfRange,
    StorageFull,
    TooManyOpenFiles,
    UnknownField,
    WrongType,
    shorten,
)
from app.observability.records import NOT_ANSWERED

_OBJECTS = ("model_type", "model_attributes_type", "dict_type")
_NUMBERS = ("int_type", "float_type")
_BOUNDS = ("greater_than", "less_than", "too_long", "too_short")
# Longest name that is compared with the known fields, because the comparison of a long one takes long.
_MAX_COMPARED_CHARACTERS = 100
MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1


class BodyTooLarge(LoraplexError):
    """The body has more bytes than are accepted."""

    code = "body_too_large"


class HeadTooLarge(LoraplexError):
    """The head of the request has more bytes than are accepted."""

    code = "head_too_large"


class NotHttp(LoraplexError):
    """The bytes cannot be read as one HTTP/1.1 request."""

    code = "not_http"


class UnsupportedMediaType(LoraplexError):
    """The body's content type is missing or not one that this call takes."""

    code = "unsupported_media_type"


class RouteNotFound(LoraplexError):
    """There is nothing at this path."""

    code = "route_not_found"


class MethodNotAllowed(LoraplexError):
    """This path does not take that method."""

    code = "method_not_allowed"


class TooManyBytes(LoraplexError):
    """The request bodies in memory have more bytes than are accepted."""

    code = "too_many_bytes"


class NotReady(LoraplexError):
    """The service is starting or stopping."""

    code = "not_ready"


class InternalError(LoraplexError):
    """Something went wrong in the service."""

    code = "internal_error"


# Status of every code that an answer can have. The other codes are in `JOB_CODES`.
STATUS: Mapping[str, int] = {
    "not_http": 400,
    "not_json": 400,
    "cross_site": 403,
    "host_not_allowed": 403,
    "adapter_not_found": 404,
    "adapter_not_live": 404,
    "alias_not_found": 404,
    "dataset_not_found": 404,
    "job_not_found": 404,
    "not_found": 404,
    "route_not_found": 404,
    "version_not_found": 404,
    "method_not_allowed": 405,
    "base_mismatch": 409,
    "conflict": 409,
    "feature_space_mismatch": 409,
    "job_ended": 409,
    "job_not_ended": 409,
    "no_statistics": 409,
    "precondition_failed": 412,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "bad_rows": 422,
    "duplicate_key": 422,
    "estimate_too_large": 422,
    "ignored_field": 422,
    "invalid_archive": 422,
    "invalid_combination": 422,
    "invalid_cursor": 422,
    "invalid_dataset": 422,
    "invalid_input": 422,
    "invalid_name": 422,
    "invalid_reference": 422,
    "invalid_safetensors": 422,
    "invalid_upload": 422,
    "missing_field": 422,
    "not_finite": 422,
    "out_of_range": 422,
    "output_not_finite": 422,
    "peft_unsupported": 422,
    "rank_too_large": 422,
    "unknown_field": 422,
    "wrong_shape": 422,
    "wrong_type": 422,
    "queue_full": 429,
    "head_too_large": 431,
    "error": 500,
    "internal_error": 500,
    "blob_corrupt": 503,
    "catalog_busy": 503,
    "not_ready": 503,
    "request_timeout": 503,
    "storage_failed": 503,
    "too_many_bytes": 503,
    "too_many_open_files": 503,
    "storage_full": 507,
}

# Codes of errors outside a request: in a job's `error`, or at the start of a process.
JOB_CODES = frozenset(
    {
        "adapter_deleted",
        "base_changed",
        "base_not_loadable",
        "catalog_not_loadable",
        "claim_lost",
        "diverged",
        "fit_failed",
        "fleet_failed",
        "ill_conditioned",
        "out_of_memory",
        "training_failed",
        "worker_died",
    }
)


class ProblemResponse(Response):
    """An error as an answer. It notes its code in the scope's state, for the request log and traces."""

    def __init__(self, code: str, *args: Any) -> None:
        super().__init__(*args)
        self._code = code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        scope.setdefault("state", {})["code"] = self._code
        await super().__call__(scope, receive, send)


def problem(error: LoraplexError) -> Response:
    """Return the answer to a request that failed with `error`."""
    status = STATUS[error.code]
    headers = {}
    # A client must not repeat a request whose outcome is unknown without checking first.
    if status in (429, 503) and not error.outcome_unknown:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if status == 413 or error.code == TooManyBytes.code:
        # The rest of the body is not read, so the connection cannot be used again.
        headers["Connection"] = "close"
    # ASCII, because a lone surrogate in the client's text cannot be encoded as UTF-8.
    body = json.dumps(error.members() | {"status": status}, ensure_ascii=True, allow_nan=False)
    return ProblemResponse(error.code, body, status, headers, MEDIA_TYPE)


def answer_at(path: str, error: LoraplexError) -> Response:
    """Return the answer to a request that failed, in the form of the path's protocol."""
    return protocol_error(error) if path == "/v2" or path.startswith("/v2/") else problem(error)


def protocol_error(error: LoraplexError) -> Response:
    """Return the answer in the form of the Open Inference Protocol: one text, which includes the given value."""
    members = error.members()
    given = str(members.get("given", ""))
    text = str(members["detail"])
    if given not in text:
        text = f"{text}; given: {given}"
    answer = problem(error)
    answer.body = json.dumps({"error": text}).encode()
    answer.headers["Content-Length"] = str(len(answer.body))
    answer.headers["Content-Type"] = "application/json"
    return answer


def known_failure(error: Exception) -> LoraplexError | None:
    """Return the error to answer with, or None if `error` is a defect of the service.

    A full disk and too many open files are known failures.
    """
    if isinstance(error, LoraplexError):
        return error
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull("the disk is full: a temporary file could not be written")
    if code in (errno.EMFILE, errno.ENFILE):
        return TooManyOpenFiles("too many files are open: nothing was stored; try again in a moment")
    return None


def too_large(limit: int, *, hint: str = "") -> BodyTooLarge:
    """Return the error for a body of more than `limit` bytes."""
    return BodyTooLarge(f"the body has more than {limit} bytes{hint}", field="body", expected=f"at most {limit} bytes")


def from_validation(error: ErrorDetails, *, within: str = "", model: type[BaseModel] | None = None) -> LoraplexError:
    """Convert a pydantic error, found in the field `within` of a body that should be a `model`."""
    field = ".".join([within, *map(str, error["loc"])] if within else map(str, error["loc"])) or "body"
    kind, value = error["type"], error.get("input")
    if kind == "missing":
        return MissingField(f"{field} is missing", field=field, expected=f"a field {field}")
    if kind == "extra_forbidden":
        return _unknown_field(field, error["loc"], model)
    if type(value) in (int, float) and not is_finite(value):
        return NotFinite(f"{field} is not finite as float32", field=field, given=value, expected="a finite number")
    message = "input should be an object" if kind in _OBJECTS else error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if isinstance(value, str) and kind in _NUMBERS:
        message += ", and this is text: leave the quotes out"
    is_bound = any(word in kind for word in _BOUNDS) or (kind == "literal_error" and isinstance(value, str))
    error_type: type[InvalidInput] = OutOfRange if is_bound else WrongType
    return error_type(f"{field}: {message}", field=field, given=value, expected=message)


def _unknown_field(field: str, location: Sequence[int | str], model: type[BaseModel] | None) -> UnknownField:
    names, suggestion = ([], None) if model is None else known_fields(model, location)
    return UnknownField(
        f"{field} is not a field of this call" + (f"; did you mean {suggestion}?" if suggestion else ""),
        field=field,
        given=field,
        expected=f"one of {', '.join(names)}" if names else "no other fields",
    )


def from_request_validation(error: RequestValidationError) -> LoraplexError:
    """Convert the first error that FastAPI found in a request's path, query or headers."""
    first: ErrorDetails = error.errors()[0]
    first["loc"] = first["loc"][1:]  # ("query", "limit") → ("limit",)
    return from_validation(first)


def add_error_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Answer every error that one of `routes` or the framework raises as a problem."""

    async def answer_framework_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = answer_at(request.scope["path"], _from_framework(error, request))
        answer.headers.update(error.headers or {})
        if error.status_code == 405:
            # The framework names the methods of the first route at this path, and there may be several.
            matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
            methods = {method for route in matching for method in getattr(route, "methods", ())}
            answer.headers["Allow"] = ", ".join(sorted(methods)) or answer.headers["Allow"]
        return answer

    app.add_exception_handler(LoraplexError, _answer_own_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(OSError, _answer_system_error)
    app.add_exception_handler(ClientDisconnect, _answer_disconnect)
    app.add_exception_handler(Exception, _answer_defect)
    app.add_exception_handler(HTTPException, answer_framework_error)


async def _answer_own_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LoraplexError)
    return answer_at(request.scope["path"], error)


async def _answer_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem(from_request_validation(error))


async def _answer_system_error(request: Request, error: Exception) -> Response:
    known = known_failure(error)
    if known is None:
        raise error
    if isinstance(known, StorageFull):
        await run_in_threadpool(request.app.state.service.catalog.quarantine.empty)
    return answer_at(request.scope["path"], known)


async def _answer_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=NOT_ANSWERED)  # the client has closed the connection


async def _answer_defect(request: Request, _error: Exception) -> Response:
    request_id = request.scope.get("state", {}).get("request_id")
    defect = InternalError(f"the service failed on request {request_id}; its log says why")
    return answer_at(request.scope["path"], defect)


def _from_framework(error: HTTPException, request: Request) -> LoraplexError:
    path = shorten(request.url.path)
    known: dict[int, tuple[type[LoraplexError], str]] = {
        404: (RouteNotFound, f"there is nothing at {path}"),
        405: (MethodNotAllowed, f"{path} does not take the method {request.method}"),
        413: (BodyTooLarge, "the body is too large"),
        415: (UnsupportedMediaType, "the content type is not one that this call takes"),
    }
    kind, detail = known.get(error.status_code, (InvalidInput, str(error.detail)))
    return kind(detail)


def known_fields(model: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], str | None]:
    """Return the fields that an object may have, and the path of the one that an unknown name resembles.

    `location` is the path of the unknown field, whose last part is its name.
    """
    *parents, name = map(str, location)
    for parent in parents:
        model = _model_in(model.model_fields[parent].annotation) or model
    annotations = {field.alias or known: field.annotation for known, field in model.model_fields.items()}
    paths = {known: known for known in annotations}
    for known, annotation in annotations.items():
        nested = _model_in(annotation)
        if nested is not None:
            paths |= {inner: f"{known}.{inner}" for inner in nested.model_fields if inner not in paths}
    close = get_close_matches(name[:_MAX_COMPARED_CHARACTERS], paths, n=1, cutoff=0.75)
    return list(annotations), ".".join([*parents, paths[close[0]]]) if close else None


def drop_unknown_fields(value: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return an object without its unknown fields, except for the first: pydantic makes an error of each."""
    nested = {field.alias or name: _model_in(field.annotation) for name, field in model.model_fields.items()}
    unknown = next((key for key in value if key not in nested), None)
    kept = {key: entry for key, entry in value.items() if key in nested or key == unknown}
    for key, inner in nested.items():
        if inner is not None and isinstance(kept.get(key), dict):
            kept[key] = drop_unknown_fields(kept[key], inner)
    return kept


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model that a field's type is, or that is among its alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
