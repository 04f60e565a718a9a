"""How a field is described, where its own type does not say it. Nothing here looks at a value."""

from typing import Any

from pydantic import BeforeValidator, GetJsonSchemaHandler, TypeAdapter, WrapValidator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class ShownAs:
    """Described as another type: that of a field which is checked, or made, elsewhere."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(TypeAdapter(self._kind).core_schema)


class NotNull(BeforeValidator):
    """Described without null, which the validator refuses."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler(schema)
        kinds = [kind for kind in found.get("anyOf", []) if kind != {"type": "null"}]
        if not kinds:
            return found
        rest = {name: value for name, value in found.items() if name != "anyOf"}
        return rest | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


class OrWord(WrapValidator):
    """Described as also taking the word that `class Auto(OrWord): word = ...` names, which the validator lets by."""

    word = ""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"const": self.word}]}
