"""Request bodies: their type, their bytes, their JSON."""

from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, TypeAdapter, ValidationError

from adapters.errors import WrongType
from adapters.strict_json import parse
from app.problems import UnsupportedMediaType, from_validation

JSON = "application/json"
BINARY = bytes
"""What a body that is not JSON is documented as."""
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


async def read_json(request: Request) -> bytes:
    """The bytes of a JSON body; raises `UnsupportedMediaType`."""
    content_type(request.headers.get("content-type", ""), JSON)
    return await request.body()


def parse_object(body: bytes) -> dict[str, object]:
    """A JSON object; raises `NotJson`, `DuplicateKey` or `WrongType`."""
    value = parse(body)
    if not isinstance(value, dict):
        raise WrongType("the body must be a JSON object", field="body", given=value, expected="an object")
    return value


def read_as(model: type[Model], value: dict[str, object], *, within: str = "") -> Model:
    """`value` as `model` describes it, nothing coerced; raises `InvalidInput` for the first thing wrong.

    `within` is the field that `value` came from, where it is not the whole body.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise from_validation(first, within=within, model=model) from None


def documented(bodies: Mapping[str, Any], *, required: bool = True) -> dict[str, Any]:
    """For the OpenAPI document: the bodies that a call takes, by content type. The call reads them itself.

    `app.openapi.document` puts the schemas' definitions among its components.
    """

    def described(model: Any) -> Any:
        if model is BINARY:
            return {"type": "string", "format": "binary"}
        return TypeAdapter(model).json_schema(ref_template="#/components/schemas/{model}")

    content = {kind: {"schema": described(model)} for kind, model in bodies.items()}
    return {"requestBody": {"required": required, "content": content}}
