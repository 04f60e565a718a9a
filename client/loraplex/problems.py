"""From an answer that is no success, or a job's `error`, to the error that it means."""

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from loraplex import errors
from loraplex.effects import Answer
from loraplex.errors import LoraplexError

PROBLEM = "application/problem+json"
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
"""For answers that give no code, or one that this client does not know."""
_MEANINGS: Mapping[int, str] = {status.value: status.phrase for status in HTTPStatus}


def _sent(kind: type[LoraplexError]) -> Iterator[type[LoraplexError]]:
    if not issubclass(kind, errors.OF_THE_CLIENT):
        yield kind
        for below in kind.__subclasses__():
            yield from _sent(below)


_OF_CODE: Mapping[str, type[LoraplexError]] = {kind.code: kind for kind in _sent(LoraplexError)}


def error_of(answer: Answer) -> LoraplexError:
    """The error that an answer means which is no success."""
    if answer.status < 400:
        where = answer.headers.get("location")
        return errors.BadAnswer(
            f"{answer.url} answered {answer.status}" + (f" and sends on to {where}" if where else ""),
            given=where,
            expected="the address where the service itself answers: nobody is followed to another",
            status=answer.status,
            request_id=answer.request_id,
        )
    members = answer.members()
    if is_problem(answer) and isinstance(members.get("code"), str):
        return _error(members, status=answer.status, request_id=answer.request_id)
    # The Open Inference Protocol's shape; else something on the way answered, such as a proxy.
    said = members.get("error")
    meaning = _MEANINGS.get(answer.status, "which has no meaning")
    detail = said if isinstance(said, str) else f"{answer.url} answered {answer.status}, {meaning}"
    return _by_status(answer.status)(detail, status=answer.status, request_id=answer.request_id, members=members)


def error_of_job(members: Mapping[str, Any] | None) -> LoraplexError | None:
    """The error in a job, or in what became of one of its adapters."""
    return None if members is None else _error(members, status=None, request_id=None)


def is_problem(answer: Answer) -> bool:
    """Whether the service itself says what was wrong, in its own shape."""
    return answer.headers.get("content-type", "").partition(";")[0].strip() == PROBLEM


def _error(members: Mapping[str, Any], *, status: int | None, request_id: str | None) -> LoraplexError:
    code = str(members.get("code"))
    kind = _OF_CODE.get(code)
    general = errors.TrainingFailed if status is None else _by_status(status)
    error = (kind or general)(
        str(members.get("detail") or members.get("title") or code),
        field=members.get("field"),
        row=members.get("row"),
        given=members.get("given"),
        expected=members.get("expected"),
        status=status,
        request_id=request_id,
        members=members,
    )
    if kind is None:
        error.code = code
    return error


def _by_status(status: int) -> type[LoraplexError]:
    general = errors.InternalError if status >= 500 else LoraplexError
    return _OF_STATUS.get(status, general)
