"""Errors of the HTTP layer, the status of every error code, and errors as problem details (RFC 9457)."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from typing import Annotated, Any, Literal, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import ErrorDetails
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from adapters import errors as domain
from adapters.arrays import is_finite
from adapters.errors import InvalidInput, LoraplexError, MissingField, NotFinite, StorageFull, UnknownField, shorten
from adapters.storage.blobs import DISK_FAILED, DISK_FULL, NO_DESCRIPTORS
from app.http.host_policy import CrossSite, HostNotAllowed

_OBJECTS = ("model_type", "model_attributes_type", "dict_type")
_NUMBERS = ("int_type", "float_type")
_BOUNDS = ("greater_than", "less_than", "too_long", "too_short")
# Longest name that is compared with the known fields, because the comparison of a long one takes long.
_MAX_COMPARED_CHARACTERS = 100
MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1
# Headers of `rate_limited`, of draft-ietf-httpapi-ratelimit-headers-11.
RATE_HEADERS = ("RateLimit-Policy", "RateLimit")
_LONGEST_WINDOW_SECONDS = 3600
# Statuses with a `Retry-After` header.
RETRIED = (429, 503)


class BodyTooLarge(LoraplexError):
    """The body has more bytes than are accepted."""


class HeadTooLarge(LoraplexError):
    """The head of the request has more bytes than are accepted."""


class NotHttp(LoraplexError):
    """The bytes cannot be read as one HTTP/1.1 request."""


class UnsupportedMediaType(LoraplexError):
    """The body's content type is missing or not one that this call takes."""


class RouteNotFound(LoraplexError):
    """There is nothing at this path."""


class MethodNotAllowed(LoraplexError):
    """This path does not take that method."""


class TooManyBytes(LoraplexError):
    """The request bodies in memory have more bytes than are accepted."""


class NotReady(LoraplexError):
    """The service is starting or stopping."""


class InternalError(LoraplexError):
    """Something went wrong in the service."""


# Errors by status; an error that is not listed has the status of its parent. Errors with None occur outside requests:
# in a job's `error`, or at the start of a process.
_ERRORS: Mapping[int | None, Sequence[type[LoraplexError]]] = {
    400: (NotHttp, domain.NotJson),
    401: (domain.Unauthenticated,),
    403: (CrossSite, HostNotAllowed, domain.Forbidden, domain.QuotaExceeded),
    404: (domain.NotFound, RouteNotFound),
    405: (MethodNotAllowed,),
    409: (domain.Conflict,),
    412: (domain.PreconditionFailed,),
    413: (BodyTooLarge,),
    415: (UnsupportedMediaType,),
    422: (InvalidInput,),
    429: (domain.QueueFull, domain.RateLimited),
    431: (HeadTooLarge,),
    500: (LoraplexError,),
    503: (
        *(NotReady, TooManyBytes, domain.BlobCorrupt, domain.CatalogBusy, domain.CatalogUnavailable),
        *(domain.RequestTimeout, domain.StorageFailed, domain.TooManyOpenFiles),
    ),
    507: (StorageFull,),
    None: (
        domain.TrainingFailed,
        domain.ClaimLost,
        domain.BaseNotLoadable,
        domain.CatalogNotLoadable,
        domain.BackupFailed,
        domain.MigrationFailed,
    ),
}
_STATUS_OF_CLASS = {kind: status for status, kinds in _ERRORS.items() for kind in kinds}


def errors(kind: type[LoraplexError] = LoraplexError) -> Iterator[type[LoraplexError]]:
    """Yield the class of every error."""
    yield kind
    for child in kind.__subclasses__():
        yield from errors(child)


_STATUSES = {
    kind.code: next(_STATUS_OF_CLASS[base] for base in kind.__mro__ if base in _STATUS_OF_CLASS) for kind in errors()
}
# Status of every code that an answer can have, in the order of both. The other codes are in `JOB_CODES`.
STATUS: Mapping[str, int] = {
    code: status for status, code in sorted((status, code) for code, status in _STATUSES.items() if status is not None)
}
JOB_CODES = frozenset(_STATUSES) - frozenset(STATUS)
TITLES: Mapping[str, str] = {kind.code: kind.title() for kind in errors()}
EXAMPLE: Mapping[str, Any] = {
    "type": "urn:loraplex:not_finite",
    "title": TITLES["not_finite"],
    "status": 422,
    "detail": "inputs, row 3, column 1: not a finite float32 number",
    "code": "not_finite",
    "field": "inputs",
    "row": 3,
    "given": "NaN",
    "expected": "a number of at most 3.402823e+38 in magnitude",
}


class BadRowBody(BaseModel):
    """Row that cannot be used for training with its column."""

    model_config = ConfigDict(from_attributes=True)

    row: int
    column: str | None
    reason: str


class QuotaBody(BaseModel):
    """Limit of a tenant that a change would exceed."""

    limit: str
    value: int
    used: int


class _Members(BaseModel):
    type: str = Field(description="`urn:loraplex:` followed by the code.")
    title: str = Field(description="Meaning of the code, always the same text.")
    detail: str = Field(description="What happened in this request.")
    field: str | None = Field(None, description="Field of the request, as a path: `training.epochs`.")
    row: int | None = Field(None, description="Row, from 0.")
    given: str | None = Field(None, description="Given value, cut to 100 characters.")
    expected: str | None = Field(None, description="What is valid instead.")
    outcome: Literal["unknown"] | None = Field(
        None, description="`unknown`: the change may have been stored. Check this before you repeat the request."
    )
    rows: list[BadRowBody] | None = Field(None, description="With `bad_rows`: up to 20 rows with reasons.")
    quota: QuotaBody | None = Field(None, description="With `quota_exceeded`: the limit, its value and its use.")


class Problem(_Members):
    """Error (RFC 9457). Match on `code`, which does not change."""

    model_config = {"json_schema_extra": {"examples": [dict(EXAMPLE)]}}

    status: int = Field(description="Status of the answer.")
    code: Annotated[str, Field(json_schema_extra={"enum": [*STATUS]})]


class JobProblem(_Members):
    """Error of a failed job or of one of its adapters: a problem without a status."""

    code: Annotated[str, Field(json_schema_extra={"enum": sorted(_STATUSES)})]
    step: int | None = Field(None, description="With `diverged`: the step after which a number was not finite.")


class ProtocolError(BaseModel):
    """Error in the form of the Open Inference Protocol: one text that includes the given value."""

    error: str


class ProblemResponse(Response):
    """An error as an answer. It notes its code in the scope's state, for the request log and traces."""

    def __init__(self, code: str, *args: Any) -> None:
        super().__init__(*args)
        self._code = code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        scope.setdefault("state", {})["code"] = self._code
        await super().__call__(scope, receive, send)


def problem(error: LoraplexError, *, as_text: bool = False) -> Response:
    """Return the answer to a request that failed with `error`.

    `as_text` is the form of the Open Inference Protocol: one text, which includes the given value.
    """
    status, members = STATUS[error.code], error.members()
    headers = {}
    # A client must not repeat a request whose outcome is unknown without checking first.
    is_retried = status in RETRIED or error.code == domain.IdempotencyInProgress.code
    if is_retried and not error.outcome_unknown:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if isinstance(error, domain.RateLimited):
        headers |= _rate_headers(error)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status == 413 or error.code == TooManyBytes.code:
        # The rest of the body is not read, so the connection cannot be used again.
        headers["Connection"] = "close"
    content, media_type = members | {"status": status}, MEDIA_TYPE
    if as_text:
        text, given = str(members["detail"]), str(members.get("given", ""))
        content, media_type = {"error": text if given in text else f"{text}; given: {given}"}, "application/json"
    # ASCII, because a lone surrogate in the client's text cannot be encoded as UTF-8.
    body = json.dumps(content, ensure_ascii=True, allow_nan=False)
    return ProblemResponse(error.code, body, status, headers, media_type)


def _rate_headers(error: domain.RateLimited) -> dict[str, str]:
    """Return `RATE_HEADERS`, whose numbers are integers, and `Retry-After`."""
    # The quota of a window: 0.5 per second is 1 in 2 seconds.
    rate = Fraction(error.per_second).limit_denominator(_LONGEST_WINDOW_SECONDS)
    if not rate:
        rate = Fraction(1, math.ceil(1 / error.per_second))
    wait_seconds = max(1, math.ceil(error.wait_seconds))
    return {
        "Retry-After": str(wait_seconds),
        RATE_HEADERS[0]: f'"{error.policy}";q={rate.numerator};w={rate.denominator}',
        RATE_HEADERS[1]: f'"{error.policy}";r=0;t={wait_seconds}',
    }


def answer_at(path: str, error: LoraplexError) -> Response:
    """Return the answer to a request that failed, in the form of the path's protocol."""
    return problem(error, as_text=path == "/v2" or path.startswith("/v2/"))


def known_failure(error: Exception) -> LoraplexError | None:
    """Return the error to answer with, or None if `error` is a defect of the service.

    A full disk, a disk that fails and too many open files are known failures.
    """
    if isinstance(error, LoraplexError):
        return error
    if isinstance(error, RequestValidationError):
        return from_request_validation(error)
    code = error.errno if isinstance(error, OSError) else None
    if code in DISK_FULL:
        return StorageFull("the disk is full: a temporary file could not be written")
    if code in DISK_FAILED:
        return domain.StorageFailed("the disk failed while a temporary file was written or read")
    if code in NO_DESCRIPTORS:
        return domain.TooManyOpenFiles("too many files are open: nothing was stored; try again in a moment")
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
    error_type: type[InvalidInput] = domain.OutOfRange if is_bound else domain.WrongType
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
        path = shorten(request.url.path)
        known: dict[int, LoraplexError] = {
            404: RouteNotFound(f"there is nothing at {path}"),
            405: MethodNotAllowed(f"{path} does not take the method {request.method}"),
        }
        answer = answer_at(request.scope["path"], known.get(error.status_code, InvalidInput(str(error.detail))))
        answer.headers.update(error.headers or {})
        if error.status_code == 405:
            # The framework names the methods of the first route at this path, and there may be several.
            matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
            methods = {method for route in matching for method in getattr(route, "methods", ())}
            answer.headers["Allow"] = ", ".join(sorted(methods)) or answer.headers["Allow"]
        return answer

    for kind in (LoraplexError, RequestValidationError, OSError, Exception):
        app.add_exception_handler(kind, _answer_known_failure)
    app.add_exception_handler(HTTPException, answer_framework_error)


async def _answer_known_failure(request: Request, error: Exception) -> Response:
    known = known_failure(error)
    if known is None:
        raise error  # for the middleware, which logs a defect and answers it
    if isinstance(error, OSError) and isinstance(known, StorageFull):
        await run_in_threadpool(request.app.state.service.catalog.quarantine.empty)
    return answer_at(request.scope["path"], known)


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
