"""Decoders of JSON answers into results and errors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from http import HTTPStatus
from typing import Any, TypeVar

from loraplex import errors, results
from loraplex.effects import Answer
from loraplex.errors import BadAnswer, BadRow, LoraplexError

T = TypeVar("T")


def reading(read: Callable[[Any], T]) -> Callable[[Answer], T]:
    """Return a decoder of whole answers, which raises `BadAnswer` if `read` does not accept the JSON."""

    def of(answer: Answer) -> T:
        value = answer.json()
        try:
            return read(value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadAnswer(
                f"{answer.url} answered {answer.status} with JSON that loraplex does not send: {error!r}",
                status=answer.status,
                request_id=answer.request_id,
                expected="the address of a loraplex service, of this version or a newer one",
            ) from error

    return of


def nothing(_answer: Answer) -> None:
    """Ignore the body of an answer."""


def base(value: Any) -> results.Base:
    """Decode a base layer."""
    return _as(results.Base, value)


def version(value: Any) -> results.Version:
    """Decode a version of an adapter."""
    return _as(results.Version, value)


def adapter(value: Any) -> results.Adapter:
    """Decode an adapter."""
    live = value["live"]
    return _as(results.Adapter, value, live=None if live is None else version(live))


def reference(value: Any) -> results.AdapterRef:
    """Decode a reference to a version."""
    return results.AdapterRef(value["name"], value["version"], value.get("digest"))


def job(value: Any) -> results.JobFields:
    """Decode a job, with or without history and log."""
    made, moved = value["result"], value["progress"]
    return _as(
        results.JobFields,
        value,
        status=results.JobStatus(value["status"]),
        progress=None if moved is None else progress(moved),
        result=None if made is None else reference(made),
        error=error_of_job(value["error"]),
        history=tuple(results.LossPoint(step, loss) for step, loss in value.get("history", ())),
        log=tuple(log_line(line) for line in value.get("log", ())),
    )


def log_line(value: Any) -> results.LogLine:
    """Decode a line of a job's log."""
    return results.LogLine(value["time"], value["text"])


def progress(value: Any) -> results.Progress:
    """Decode the progress of a job."""
    return results.Progress(
        step=value["step"],
        steps=value["steps"],
        loss=value.get("loss"),
        seconds_left=value.get("seconds_left"),
        adapters=value.get("adapters"),
    )


def job_adapter(value: Any) -> results.JobAdapter:
    """Decode an adapter that a job trains."""
    return _as(results.JobAdapter, value, error=error_of_job(value["error"]))


def estimate(value: Any) -> results.Estimate:
    """Decode an estimate."""
    guessed = value["estimate"]
    return results.Estimate(
        spec=value["spec"], memory_bytes=guessed["memory_bytes"], seconds=guessed["seconds"], adapters=value["adapters"]
    )


def reverted(value: Any) -> results.Reverted:
    """Decode the result of a revert."""
    return results.Reverted(
        [results.Back(back["name"], back["from"], back["to"]) for back in value["reverted"]],
        [results.Skipped(each["name"], each["version"], each["reason"], each["detail"]) for each in value["skipped"]],
    )


def dataset_version(value: Any) -> results.DatasetVersion:
    """Decode a version of a data set, with or without its report."""
    columns = tuple(
        results.Column(*(column[name] for name in results.Column._fields)) for column in value.get("columns", ())
    )
    bad_rows = tuple(BadRow(bad["row"], bad["column"], bad["reason"]) for bad in value.get("bad_rows", ()))
    return _as(results.DatasetVersion, value, columns=columns, bad_rows=bad_rows)


def dataset(value: Any) -> results.Dataset:
    """Decode a data set."""
    return _as(results.Dataset, value, newest=dataset_version(value["newest"]))


def preview(value: Any) -> results.Preview:
    """Decode rows of a data set."""
    return _as(results.Preview, value)


def _as(kind: type[T], value: Mapping[str, Any], **read: Any) -> T:
    """Return a result with the members that the answer has; those in `read` are already decoded."""
    chosen = {
        each.name: value[each.name]
        for each in fields(kind)  # type: ignore[arg-type]  # all results are dataclasses
        if each.name not in read and (each.name in value or each.default is MISSING)
    }
    return kind(**chosen, **read)


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


def _sent(kind: type[LoraplexError]) -> Iterator[type[LoraplexError]]:
    if not issubclass(kind, errors.CLIENT_ONLY):
        yield kind
        for below in kind.__subclasses__():
            yield from _sent(below)


_OF_CODE: Mapping[str, type[LoraplexError]] = {kind.code: kind for kind in _sent(LoraplexError)}


def error_of(answer: Answer) -> LoraplexError:
    """Return the error that an unsuccessful answer means."""
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
    # The form of the Open Inference Protocol; otherwise, a proxy answered.
    said = members.get("error")
    meaning = _MEANINGS.get(answer.status, "which has no meaning")
    detail = said if isinstance(said, str) else f"{answer.url} answered {answer.status}, {meaning}"
    return _by_status(answer.status)(detail, status=answer.status, request_id=answer.request_id, members=members)


def error_of_job(members: Mapping[str, Any] | None) -> LoraplexError | None:
    """Return the error of a job, or of one of its adapters."""
    return None if members is None else _error(members, status=None, request_id=None)


def is_problem(answer: Answer) -> bool:
    """Return whether the answer is a problem (RFC 9457) of the service itself."""
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
