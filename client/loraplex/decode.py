"""From the JSON of an answer to the values of `loraplex.results`."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from loraplex import results
from loraplex.effects import Answer
from loraplex.errors import BadAnswer, BadRow
from loraplex.problems import error_of_job

T = TypeVar("T")


def reading(read: Callable[[Any], T]) -> Callable[[Answer], T]:
    """`read` for a whole answer; raises `BadAnswer` where the JSON is not what it takes."""

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
    """For an answer that says no more than its status."""


def base(value: Any) -> results.Base:
    """The frozen layer."""
    return _as(results.Base, value)


def version(value: Any) -> results.Version:
    """A version of an adapter."""
    return _as(results.Version, value)


def adapter(value: Any) -> results.Adapter:
    """An adapter."""
    live = value["live"]
    return _as(results.Adapter, value, live=None if live is None else version(live))


def reference(value: Any) -> results.AdapterRef:
    """Which version answered, or was made."""
    return results.AdapterRef(value["name"], value["version"], value.get("digest"))


def job(value: Any) -> results.JobFields:
    """A job, with or without history and log."""
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
    """Something that happened in a job."""
    return results.LogLine(value["time"], value["text"])


def progress(value: Any) -> results.Progress:
    """How far a job is."""
    return results.Progress(
        step=value["step"],
        steps=value["steps"],
        loss=value.get("loss"),
        seconds_left=value.get("seconds_left"),
        adapters=value.get("adapters"),
    )


def job_adapter(value: Any) -> results.JobAdapter:
    """An adapter that a job trains."""
    return _as(results.JobAdapter, value, error=error_of_job(value["error"]))


def estimate(value: Any) -> results.Estimate:
    """What a training would be."""
    guessed = value["estimate"]
    return results.Estimate(
        spec=value["spec"],
        memory_bytes=guessed["memory_bytes"],
        seconds=guessed["seconds"],
        adapters=value["adapters"],
    )


def reverted(value: Any) -> results.Reverted:
    """What a revert did."""
    return results.Reverted(
        [results.Back(back["name"], back["from"], back["to"]) for back in value["reverted"]],
        [results.Skipped(each["name"], each["version"], each["reason"], each["detail"]) for each in value["skipped"]],
    )


def dataset_version(value: Any) -> results.DatasetVersion:
    """A version of a data set, with or without its report."""
    columns = tuple(
        results.Column(*(column[name] for name in results.Column._fields)) for column in value.get("columns", ())
    )
    bad_rows = tuple(BadRow(bad["row"], bad["column"], bad["reason"]) for bad in value.get("bad_rows", ()))
    return _as(results.DatasetVersion, value, columns=columns, bad_rows=bad_rows)


def dataset(value: Any) -> results.Dataset:
    """A data set."""
    return _as(results.Dataset, value, newest=dataset_version(value["newest"]))


def preview(value: Any) -> results.Preview:
    """Rows of a data set."""
    return _as(results.Preview, value)


def _as(kind: type[T], value: Mapping[str, Any], **read: Any) -> T:
    """A result from the members that it has, those in `read` as they are there."""
    chosen = {
        each.name: value[each.name]
        for each in fields(kind)  # type: ignore[arg-type]  # all results are dataclasses
        if each.name not in read and (each.name in value or each.default is MISSING)
    }
    return kind(**chosen, **read)
