"""Bases of bodies and pages, and the field types that schemas share.

Arrays are `Any` here, and `adapters.arrays` checks them: it is as strict as pydantic and much faster. `ShownAs`,
`NotNull` and `OrAuto` describe a field whose own type is not precise.
"""

from typing import Annotated, Any, Generic, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from adapters.training.settings import AUTO

Item = TypeVar("Item")


class RequestBody(BaseModel):
    """Base of request bodies: strict types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def gave(self, name: str) -> bool:
        """Return whether the client sent this field."""
        return name in self.model_fields_set


class AnswerBody(BaseModel):
    """Base of answers, which are read from the attributes of the domain's values."""

    model_config = ConfigDict(from_attributes=True)

    @classmethod
    def of(cls, value: object) -> Self:
        """Return a value of the domain as clients see it."""
        return cls.model_validate(value)


class PageBody(AnswerBody, Generic[Item]):
    """Base of the pages of lists."""

    data: list[Item]
    next_cursor: str | None


class ShownAs:
    """Describes a field as another type, if other code checks or creates its value."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(TypeAdapter(self._kind).core_schema)


class NotNull(BeforeValidator):
    """Refuses null for a field that may be left out, and describes the field without null."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        described = handler(schema)
        kinds = [kind for kind in described.pop("anyOf", []) if kind != {"type": "null"}]
        return described | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})


class OrAuto(WrapValidator):
    """Lets a field be `auto` too.

    It is not a union, because pydantic names the branch of a union, and not the field alone, if neither fits.
    """

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"const": AUTO}]}


def not_null(value: object) -> object:
    """Return the value of a field that may be omitted, but not be null."""
    if value is None:
        raise ValueError("it may be left out, but not be null")
    return value


def _or_auto(value: object, check: ValidatorFunctionWrapHandler) -> Any:
    return value if value == AUTO else check(value)


NOT_NULL, OR_AUTO = NotNull(not_null), OrAuto(_or_auto)
_LABEL = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
Labels = Annotated[Any, NOT_NULL, Field(json_schema_extra={"type": "array", "items": _LABEL})]
Matrix = Annotated[
    Any, Field(json_schema_extra={"type": "array", "items": {"type": "array", "items": {"type": "number"}}})
]
