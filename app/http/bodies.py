"""Request bodies: their type, their bytes, their JSON."""

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from adapters.errors import WrongType
from adapters.strict_json import parse
from app.http.errors import UnsupportedMediaType, from_validation, too_large
from app.http.known_fields import without_more_unknown

JSON = "application/json"
BINARY = bytes
"""What a body that is not JSON is documented as."""
NUMBER_BYTES = 64
"""Most bytes of a number in JSON, with the comma and the white space around it."""
LEAST_LIMIT_BYTES = 2**21
"""Most bytes of a JSON body besides its numbers and labels."""
Model = TypeVar("Model", bound=BaseModel)


def content_type(header: str, *accepted: str) -> str:
    """The type in a header, without parameters; raises `UnsupportedMediaType` where it is none of `accepted`."""
    given = header.partition(";")[0].strip().lower()
    if given not in accepted:
        raise UnsupportedMediaType(
            f"the content type is {given or 'missing'}; this call takes {', '.join(accepted)}",
            field="Content-Type",
            given=given,
            expected=", ".join(accepted),
        )
    return given


async def read_json(request: Request) -> bytearray:
    """Return the bytes of a JSON body; raise `UnsupportedMediaType`."""
    content_type(request.headers.get("content-type", ""), JSON)
    return await read_bytes(request)


async def read_bytes(request: Request, *, max_bytes: int | None = None, hint: str = "") -> bytearray:
    """Return a whole body, which the middleware bounds; raise `BodyTooLarge` with the hint past a smaller limit."""
    if max_bytes is not None and int(request.headers.get("content-length", "0")) > max_bytes:
        raise too_large(max_bytes, hint=hint)
    # It grows in place: parts that are joined are in memory twice.
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if max_bytes is not None and len(body) > max_bytes:
                raise too_large(max_bytes, hint=hint)
    except Exception:
        # The error holds this frame until it is answered.
        body.clear()
        raise
    return body


def parse_object(body: bytes | bytearray) -> dict[str, object]:
    """A small JSON object; raises `NotJson`, `DuplicateKey` or `WrongType`."""
    return object_of_body(parse(body))


def object_of_body(value: object) -> dict[str, object]:
    """`value` itself, which a body says, if it is an object; raises `WrongType`."""
    if not isinstance(value, dict):
        raise WrongType("the body must be a JSON object", field="body", given=value, expected="an object")
    return value


def read_as(model: type[Model], value: dict[str, object], *, within: str = "") -> Model:
    """`value` as `model` describes it, nothing coerced; raises `InvalidInput` for the first thing wrong.

    `within` is the field that `value` came from, where it is not the whole body.
    """
    try:
        return model.model_validate(without_more_unknown(value, model))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise from_validation(first, within=within, model=model) from None
