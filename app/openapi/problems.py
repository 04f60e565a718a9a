"""Problems as the document describes them: their shape, and which ones an operation can end in."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from adapters.errors import LoraplexError
from app.http.errors import JOB_CODES, MEDIA_TYPE, RETRY_AFTER_SECONDS, STATUS
from app.http.schemas.datasets import BadRowBody

RETRIED = (429, 503)
"""Statuses that come with `Retry-After`."""
_EXAMPLE: dict[str, Any] = {
    "type": "urn:loraplex:not_finite",
    "title": "A number is not finite as float32",
    "status": 422,
    "detail": "inputs, row 3, column 1: not a finite float32 number",
    "code": "not_finite",
    "field": "inputs",
    "row": 3,
    "given": "NaN",
    "expected": "a number of at most 3.402823e+38 in magnitude",
}


class _Members(BaseModel):
    type: str = Field(description="`urn:loraplex:` and the code.")
    title: str = Field(description="What the code means, always in the same words.")
    detail: str = Field(description="What happened here.")
    field: str | None = Field(None, description="What in the request it is about, as a path: `training.epochs`.")
    row: int | None = Field(None, description="Which row, from 0.")
    given: str | None = Field(None, description="What was given there, at most 100 characters of it.")
    expected: str | None = Field(None, description="What would do.")
    outcome: Literal["unknown"] | None = Field(
        None, description="`unknown` if the change may have been stored all the same: look before you repeat it."
    )
    rows: list[BadRowBody] | None = Field(None, description="With `bad_rows`: up to 20 rows, each with its reason.")


class Problem(_Members):
    """An error (RFC 9457). Match on `code`: it does not change."""

    model_config = {"json_schema_extra": {"examples": [_EXAMPLE]}}

    status: int = Field(description="The answer's status.")
    code: Annotated[str, Field(json_schema_extra={"enum": [*STATUS]})]


class JobProblem(_Members):
    """The error that a job, or one of its adapters, ended in: a problem without a status."""

    code: Annotated[str, Field(json_schema_extra={"enum": sorted({*JOB_CODES, *STATUS})})]
    step: int | None = Field(None, description="With `diverged`: the step after which something was not finite.")


class ProtocolError(BaseModel):
    """An error in the form of the Open Inference Protocol: one text, with what was given."""

    error: str


def titles(kind: type[LoraplexError] = LoraplexError) -> Iterator[tuple[str, str]]:
    """Every error's code and title."""
    yield kind.code, kind.title()
    for child in kind.__subclasses__():
        yield from titles(child)


def table_of_codes() -> str:
    """All codes that an answer can have, in Markdown."""
    meant = dict(titles())
    rows = [f"| `{code}` | {status} | {meant[code]} |" for code, status in STATUS.items()]
    return "\n".join(["| code | status | what happened |", "|---|---|---|", *rows])


def responses(codes: Iterable[str], *, protocol: bool) -> dict[str, Any]:
    """What an operation that can end in these codes may answer, by status."""
    meant, found = dict(titles()), {}
    for status, group in groupby(sorted(codes, key=lambda code: (STATUS[code], code)), STATUS.__getitem__):
        here = list(group)
        content: Mapping[str, Any] = {
            MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem", "properties": {"code": {"enum": here}}},
                "example": _example(here[0], status, meant[here[0]]),
            }
        }
        if protocol:
            content = {"application/json": {"schema": {"$ref": "#/components/schemas/ProtocolError"}}}
        headers = {"Retry-After": {"$ref": "#/components/headers/RetryAfter"}} if status in RETRIED else {}
        text = "\n".join(f"- `{code}`: {meant[code]}" for code in here)
        found[str(status)] = {"description": text, "content": content} | ({"headers": headers} if headers else {})
    return found


def _example(code: str, status: int, title: str) -> dict[str, Any]:
    if code == _EXAMPLE["code"]:
        return _EXAMPLE
    return {"type": f"urn:loraplex:{code}", "title": title, "status": status, "detail": title, "code": code}


RETRY_AFTER = {
    "description": "Seconds to wait before the same request is sent again.",
    "schema": {"type": "integer", "minimum": 1, "examples": [RETRY_AFTER_SECONDS]},
}
