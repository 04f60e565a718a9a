"""Descriptions of fields whose own type is not precise. They change the document, never the validation."""

from typing import Any

from pydantic import BeforeValidator, GetJsonSchemaHandler, TypeAdapter, WrapValidator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class ShownAs:
    """Describes a field as another type, if other code checks or creates its value."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(TypeAdapter(self._kind).core_schema)


class NotNull(BeforeValidator):
    """Describes a field without null, which the validator refuses."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        described = handler(schema)
        kinds = [kind for kind in described.get("anyOf", []) if kind != {"type": "null"}]
        if not kinds:
            return described
        rest = {name: value for name, value in described.items() if name != "anyOf"}
        return rest | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


class OrWord(WrapValidator):
    """Describes a field that also takes a word, which the subclass names and its validator passes."""

    word = ""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"const": self.word}]}
