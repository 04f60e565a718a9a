"""Answers of the service, decoded into results and errors."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from http import HTTPStatus
from inspect import Parameter, signature
from typing import Any, TypeVar

from loraplex import errors, results, tenants
from loraplex.errors import BadAnswer, BadRow, LoraplexError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A complete answer."""

    url: str
    status: int
    headers: Mapping[str, str]
    """Names are in lower case."""
    content: bytes

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raise `BadAnswer` if the block finds something that loraplex does not send."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise BadAnswer(
                f"{self.url} answered {self.status} with something that loraplex does not send: {error!r}",
                expected="the address of a loraplex service, of this version or a newer one",
                **self.origin(),
            ) from error

    def decode(self, read: Callable[[Any], T]) -> T:
        """Return the result that `read` makes from the JSON value of the body; raise `BadAnswer`."""
        with self.reading():
            return read(json.loads(self.content))

    def origin(self) -> dict[str, Any]:
        """Return the arguments of an error that say which answer it comes from."""
        return {"status": self.status, "request_id": self.headers.get("x-request-id"), "headers": self.headers}


@cache
def _members(kind: Callable[..., Any]) -> Mapping[str, bool]:
    """Return the names of a result's members, and whether each is required."""
    return {name: member.default is Parameter.empty for name, member in signature(kind).parameters.items()}


def build(kind: Callable[..., T], value: Mapping[str, Any], **members: Any) -> T:
    """Return a result with `members` and those of a JSON object; `_NESTED` decodes results among them."""
    names = [name for name, required in _members(kind).items() if required or name in value]
    decoded = {name: _NESTED.get(name, _unchanged)(value[name]) for name in names if name not in members}
    return kind(**decoded, **members)


def _unchanged(value: Any) -> Any:
    return value


def _optional(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def _each(read: Callable[[Any], T], values: Any) -> tuple[T, ...]:
    return tuple(read(value) for value in values)


log_line = partial(build, results.LogLine)
progress = partial(build, results.Progress)
adapter = partial(build, results.Adapter)
version = partial(build, results.Version)
reference = partial(build, results.AdapterRef)
base = partial(build, results.Base)
dataset = partial(build, results.Dataset)
dataset_version = partial(build, results.DatasetVersion)
job_adapter = partial(build, results.JobAdapter)
preview = partial(build, results.Preview)
suspect = partial(build, results.Suspect)
hourly_usage = partial(build, tenants.HourlyUsage)
audit_entry = partial(build, tenants.AuditEntry)
tenant = partial(build, tenants.Tenant)
_class_figures = partial(_each, partial(build, results.ClassFigures))


def result(value: Any) -> results.AdapterRef | results.EvaluationResult:
    """Decode the result of a job: a version, or the entries of an evaluation."""
    if "adapters" not in value:
        return reference(value)
    return build(results.EvaluationResult, value, adapters=_each(_evaluated_adapter, value["adapters"]))


def _evaluated_adapter(value: Any) -> results.EvaluatedAdapter:
    return build(results.EvaluatedAdapter, value, classes=_optional(_class_figures, value["classes"]))


def evaluation(value: Any) -> results.Evaluation:
    """Decode an evaluation, whose `live` is a figure and not a version."""
    return build(results.Evaluation, value, live=value["live"])


def error_of_job(members: Mapping[str, Any] | None) -> LoraplexError | None:
    """Return the error of a job, or of one of its adapters."""
    return None if members is None else _error(members, errors.TrainingFailed)


# By the name of the member, which means the same in every result.
_NESTED: Mapping[str, Callable[[Any], Any]] = {
    "live": partial(_optional, version),
    "newest": dataset_version,
    "columns": partial(_each, partial(build, results.Column)),
    "bad_rows": partial(_each, partial(build, BadRow)),
    "status": results.JobStatus,
    "progress": partial(_optional, progress),
    "result": partial(_optional, result),
    "error": error_of_job,
    "history": partial(_each, results.LossPoint._make),
    "log": partial(_each, log_line),
    "evaluation": partial(_optional, evaluation),
    "decision": partial(_optional, partial(build, results.Decision)),
    "outcome": partial(_optional, results.Outcome),
    "auto": partial(_optional, partial(build, results.Comparison)),
    "candidates": partial(_each, partial(build, results.Candidate)),
    "limits": partial(build, tenants.Limits),
    "summary": partial(_optional, partial(build, results.FleetOutcomes)),
}


def estimate(value: Any) -> results.Estimate:
    """Decode an estimate."""
    return build(results.Estimate, {**value, **value["estimate"]})


def reverted(value: Any) -> results.Reverted:
    """Decode the result of a revert."""
    return results.Reverted(
        [results.Back(back["name"], back["from"], back["to"]) for back in value["reverted"]],
        [build(results.Skipped, skipped) for skipped in value["skipped"]],
    )


PROBLEM = "application/problem+json"
# Errors for answers without a code, or with one that this client has no class for.
_OF_STATUS: Mapping[int, type[LoraplexError]] = {
    400: errors.InvalidInput,
    404: errors.NotFound,
    405: errors.MethodNotAllowed,
    409: errors.Conflict,
    412: errors.PreconditionFailed,
    413: errors.BodyTooLarge,
    415: errors.UnsupportedMediaType,
    422: errors.InvalidInput,
    429: errors.QueueFull,
    503: errors.NotReady,
    507: errors.StorageFull,
}
_MEANINGS: Mapping[int, str] = {status.value: status.phrase for status in HTTPStatus}
_OF_CODE: Mapping[str, type[LoraplexError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, LoraplexError) and not issubclass(kind, errors.CLIENT_ONLY)
}


def error_of(answer: Answer) -> LoraplexError:
    """Return the error that an unsuccessful answer means."""
    status, origin = answer.status, answer.origin()
    if status < 400:
        target = answer.headers.get("location")
        return BadAnswer(
            f"{answer.url} answered {status}" + (f" and redirects to {target}" if target else ""),
            given=target,
            expected="the address of the service itself: redirects are not followed",
            **origin,
        )
    try:
        body = json.loads(answer.content)
    except (ValueError, RecursionError):
        body = None
    members = body if isinstance(body, dict) else {}
    general = _OF_STATUS.get(status, errors.InternalError if status >= 500 else LoraplexError)
    if is_problem(answer.headers) and isinstance(members.get("code"), str):
        return _error(members, general, **origin)
    # The form of the Open Inference Protocol; otherwise, a proxy answered.
    reason = members.get("error")
    if not isinstance(reason, str):
        reason = f"{answer.url} answered {status}, {_MEANINGS.get(status, 'which has no meaning')}"
    return general(reason, members=members, **origin)


def is_problem(headers: Mapping[str, str]) -> bool:
    """Return whether the answer is a problem (RFC 9457) of the service itself."""
    return headers.get("content-type", "").partition(";")[0].strip() == PROBLEM


def _error(members: Mapping[str, Any], general: type[LoraplexError], **origin: Any) -> LoraplexError:
    code = str(members.get("code"))
    kind = _OF_CODE.get(code)
    error = (kind or general)(
        str(members.get("detail") or members.get("title") or code),
        members=members,
        **{name: members.get(name) for name in ("field", "row", "given", "expected")},
        **origin,
    )
    if kind is None:
        error.code = code
    return error
