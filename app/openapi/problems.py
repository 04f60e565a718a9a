"""Problem details (RFC 9457) in the OpenAPI document: their schemas, and the error responses of an operation."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from adapters.errors import LoraplexError
from app.http.errors import JOB_CODES, MEDIA_TYPE, RETRY_AFTER_SECONDS, STATUS
from app.http.schemas.datasets import BadRowBody

# Statuses with a `Retry-After` header.
RETRIED = (429, 503)
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
    type: str = Field(description="`urn:loraplex:` followed by the code.")
    title: str = Field(description="Meaning of the code, always the same text.")
    detail: str = Field(description="What happened in this request.")
    field: str | None = Field(None, description="Field of the request, as a path: `training.epochs`.")
    row: int | None = Field(None, description="Row, from 0.")
    given: str | None = Field(None, description="Given value, cut to 100 characters.")
    expected: str | None = Field(None, description="What is valid instead.")
    outcome: Literal["unknown"] | None = Field(
        None, description="`unknown` if the change may have been stored: check before you repeat the request."
    )
    rows: list[BadRowBody] | None = Field(None, description="With `bad_rows`: up to 20 rows with reasons.")


class Problem(_Members):
    """Error (RFC 9457). Match on `code`, which does not change."""

    model_config = {"json_schema_extra": {"examples": [_EXAMPLE]}}

    status: int = Field(description="Status of the answer.")
    code: Annotated[str, Field(json_schema_extra={"enum": [*STATUS]})]


class JobProblem(_Members):
    """Error of a failed job or of one of its adapters: a problem without a status."""

    code: Annotated[str, Field(json_schema_extra={"enum": sorted({*JOB_CODES, *STATUS})})]
    step: int | None = Field(None, description="With `diverged`: the step after which a number was not finite.")


class ProtocolError(BaseModel):
    """Error in the form of the Open Inference Protocol: one text that includes the given value."""

    error: str


def titles(kind: type[LoraplexError] = LoraplexError) -> Iterator[tuple[str, str]]:
    """Yield the code and the title of every error."""
    yield kind.code, kind.title()
    for child in kind.__subclasses__():
        yield from titles(child)


def table_of_codes() -> str:
    """Return all codes of answers as a Markdown table."""
    title_of = dict(titles())
    rows = [f"| `{code}` | {status} | {title_of[code]} |" for code, status in STATUS.items()]
    return "\n".join(["| code | status | meaning |", "|---|---|---|", *rows])


def responses(codes: Iterable[str], *, protocol: bool) -> dict[str, Any]:
    """Return the error responses of an operation with these codes, by status."""
    title_of, responses_by_status = dict(titles()), {}
    for status, group in groupby(sorted(codes, key=lambda code: (STATUS[code], code)), STATUS.__getitem__):
        codes_here = list(group)
        content: Mapping[str, Any] = {
            MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem", "properties": {"code": {"enum": codes_here}}},
                "example": _example(codes_here[0], status, title_of[codes_here[0]]),
            }
        }
        if protocol:
            content = {"application/json": {"schema": {"$ref": "#/components/schemas/ProtocolError"}}}
        text = "\n".join(f"- `{code}`: {title_of[code]}" for code in codes_here)
        response: dict[str, Any] = {"description": text, "content": content}
        if status in RETRIED:
            response["headers"] = {"Retry-After": {"$ref": "#/components/headers/RetryAfter"}}
        responses_by_status[str(status)] = response
    return responses_by_status


def _example(code: str, status: int, title: str) -> dict[str, Any]:
    if code == _EXAMPLE["code"]:
        return _EXAMPLE
    return {"type": f"urn:loraplex:{code}", "title": title, "status": status, "detail": title, "code": code}


RETRY_AFTER = {
    "description": "Seconds to wait before the request is repeated.",
    "schema": {"type": "integer", "minimum": 1, "examples": [RETRY_AFTER_SECONDS]},
}
