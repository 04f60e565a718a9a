"""Errors as answers: one table from an error's code to its status, and one shape for every body."""

import errno
import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic_core import ErrorDetails
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
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
from app.http.known_fields import known_fields
from app.observability.records import NOT_ANSWERED

_OBJECTS = ("model_type", "model_attributes_type", "dict_type")
_NUMBERS = ("int_type", "float_type")
MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1


class BodyTooLarge(LoraplexError):
    """The body has more bytes than are accepted"""

    code = "body_too_large"


class HeadTooLarge(LoraplexError):
    """The head of the request has more bytes than are accepted"""

    code = "head_too_large"


class NotHttp(LoraplexError):
    """The bytes cannot be read as one HTTP/1.1 request"""

    code = "not_http"


class UnsupportedMediaType(LoraplexError):
    """The body's content type is missing or not one that this call takes"""

    code = "unsupported_media_type"


class HostNotAllowed(LoraplexError):
    """The request is addressed to a host that is not this service's"""

    code = "host_not_allowed"


class CrossSite(LoraplexError):
    """A web page of another host may not change or compute anything here"""

    code = "cross_site"


class RouteNotFound(LoraplexError):
    """There is nothing at this path"""

    code = "route_not_found"


class MethodNotAllowed(LoraplexError):
    """This path does not take that method"""

    code = "method_not_allowed"


class TooManyBytes(LoraplexError):
    """The request bodies in memory have more bytes than are accepted"""

    code = "too_many_bytes"


class NotReady(LoraplexError):
    """The service is starting or stopping"""

    code = "not_ready"


class InternalError(LoraplexError):
    """Something went wrong in the service"""

    code = "internal_error"


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
"""Every code that an answer can have. The others are in `JOB_CODES`."""

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
"""Codes of what goes wrong outside a request: in a job's `error`, or at start."""


class Problem(Response):
    """An error as an answer. Whoever observes its request learns its code."""

    def __init__(self, code: str, *given: Any) -> None:
        super().__init__(*given)
        self._code = code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["code"] = self._code
        await super().__call__(scope, receive, send)


def problem(error: LoraplexError) -> Response:
    """The answer to a request that ended in `error`."""
    status = STATUS[error.code]
    headers = {}
    # A request whose outcome is unknown is not to be repeated blindly.
    if status in (429, 503) and not error.outcome_unknown:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if status == 413 or error.code == TooManyBytes.code:
        # The rest of the body is not read: the connection cannot be used again.
        headers["Connection"] = "close"
    # ASCII, so that a lone surrogate in what the client sent cannot break the answer.
    body = json.dumps(error.members() | {"status": status}, ensure_ascii=True, allow_nan=False)
    return Problem(error.code, body, status, headers, MEDIA_TYPE)


def answer_at(path: str, error: LoraplexError) -> Response:
    """The answer to a request to `path` that ended in `error`, in the shape that clients of that path expect."""
    return protocol_error(error) if path == "/v2" or path.startswith("/v2/") else problem(error)


def protocol_error(error: LoraplexError) -> Response:
    """`problem` in the shape of the Open Inference Protocol: one text, which says what was given."""
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
    """Return what to answer if `error` is this service's own or one of the system's limits; None if it is a defect."""
    if isinstance(error, LoraplexError):
        return error
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull("the disk is full: a temporary file could not be written")
    if code in (errno.EMFILE, errno.ENFILE):
        return TooManyOpenFiles("too many files are open: nothing was stored; try again in a moment")
    return None


def too_large(limit: int, *, hint: str = "") -> BodyTooLarge:
    """The error for a body of more than `limit` bytes."""
    return BodyTooLarge(f"the body has more than {limit} bytes{hint}", field="body", expected=f"at most {limit} bytes")


def from_validation(error: ErrorDetails, *, within: str = "", model: type[BaseModel] | None = None) -> LoraplexError:
    """What pydantic found, in this service's terms; `model` is what it was held against."""
    field = ".".join([within, *map(str, error["loc"])] if within else map(str, error["loc"])) or "body"
    kind, given = error["type"], error.get("input")
    if kind == "missing":
        return MissingField(f"{field} is missing", field=field, expected=f"a field {field}")
    if kind == "extra_forbidden":
        known, meant = ([], None) if model is None else known_fields(model, error["loc"])
        return UnknownField(
            f"{field} is not a field of this call" + (f"; did you mean {meant}?" if meant else ""),
            field=field,
            given=field,
            expected=f"one of {', '.join(known)}" if known else "no other fields",
        )
    message = "input should be an object" if kind in _OBJECTS else error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if isinstance(given, str) and kind in _NUMBERS:
        message += ", and this is text: leave the quotes out"
    detail = f"{field}: {message}"
    if type(given) in (int, float) and not is_finite(given):
        return NotFinite(f"{field} is not finite as float32", field=field, given=given, expected="a finite number")
    bounded = ("greater_than", "less_than", "too_long", "too_short")
    out_of_range = any(word in kind for word in bounded) or (kind == "literal_error" and isinstance(given, str))
    chosen: type[InvalidInput] = OutOfRange if out_of_range else WrongType
    return chosen(detail, field=field, given=given, expected=message)


def first_of(error: RequestValidationError) -> LoraplexError:
    """The first of what the framework found in a request's path, query or headers."""
    first: ErrorDetails = error.errors()[0]
    first["loc"] = first["loc"][1:]  # ("query", "limit") → limit: a field's name alone
    return from_validation(first)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error that a route or the framework raises as a problem."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, LoraplexError)
        return answer_at(request.scope["path"], error)

    async def frameworks(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = answer_at(request.scope["path"], _from_framework(error, request))
        answer.headers.update(error.headers or {})
        if error.status_code == 405:
            # The framework names the methods of the first route at this path, and there may be several.
            here = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
            allowed = {method for route in here for method in getattr(route, "methods", ())}
            answer.headers["Allow"] = ", ".join(sorted(allowed)) or answer.headers["Allow"]
        return answer

    async def validation(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problem(first_of(error))

    async def system(request: Request, error: Exception) -> Response:
        known = known_failure(error)
        if known is None:
            raise error
        if isinstance(known, StorageFull):
            await run_in_threadpool(request.app.state.service.catalog.quarantine.empty)
        return answer_at(request.scope["path"], known)

    async def gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=NOT_ANSWERED)  # nobody is left to read it

    async def unexpected(request: Request, _error: Exception) -> Response:
        request_id = request.scope.get("state", {}).get("request_id")
        failed = InternalError(f"the service failed on request {request_id}; its log says why")
        return answer_at(request.scope["path"], failed)

    app.add_exception_handler(LoraplexError, ours)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(OSError, system)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, unexpected)
    app.add_exception_handler(HTTPException, frameworks)


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
