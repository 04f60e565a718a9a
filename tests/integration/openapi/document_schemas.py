"""The document as the tests read it: by operations, and by schemas that jsonschema holds values against."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from app.http.application import build_routes
from app.openapi.document import document

DOCUMENT: dict[str, Any] = document(build_routes())
_URI = "urn:openapi"
_REGISTRY: Registry[Any] = Registry().with_resource(_URI, DRAFT202012.create_resource(DOCUMENT))


class Operation(NamedTuple):
    """One operation and where it is."""

    path: str
    method: str
    said: dict[str, Any]

    @property
    def id(self) -> str:
        """Its name."""
        name: str = self.said["operationId"]
        return name

    @property
    def request_examples(self) -> Iterator[tuple[str, str, Any]]:
        """Content type, name and value of each."""
        for kind, content in self.said.get("requestBody", {}).get("content", {}).items():
            for name, example in content.get("examples", {}).items():
                yield kind, name, example["value"]


OPERATIONS = [
    Operation(path, method, said) for path, item in DOCUMENT["paths"].items() for method, said in item.items()
]


def holds(value: Any, schema: Mapping[str, Any]) -> None:
    """Fails where a value is not what a schema of the document says."""
    # A reference without a base is one into the document.
    based = {"$id": _URI + ":in-place", "allOf": [_absolute(schema)]}
    errors = [
        f"{error.json_path}: {error.message[:300]}"
        for error in Draft202012Validator(based, registry=_REGISTRY).iter_errors(value)
    ]
    assert not errors, "\n".join(errors)


def _absolute(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_absolute(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: f"{_URI}{one}" if name == "$ref" and one.startswith("#") else _absolute(one)
        for name, one in schema.items()
    }
