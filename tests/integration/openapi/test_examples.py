"""Every example of the document works on a real service, which answers as the document says."""

from typing import Any

import httpx
import pytest

from tests.integration.openapi.document_schemas import DOCUMENT, OPERATIONS, Operation, holds
from tests.integration.openapi.example_calls import World, send

REQUESTS = [
    pytest.param(operation, kind, value, id=f"{operation.id}-{kind}-{name}")
    for operation in OPERATIONS
    for kind, name, value in operation.request_examples
]
WITHOUT_BODY = [
    pytest.param(one, id=one.id) for one in OPERATIONS if not one.said.get("requestBody", {}).get("required", False)
]
ANSWERS = [
    pytest.param(content["schema"], example["value"], id=f"{operation.id}-{status}-{name}")
    for operation in OPERATIONS
    for status, answer in operation.said["responses"].items()
    for kind, content in answer.get("content", {}).items()
    for name, example in content.get("examples", {}).items()
    if kind == "application/json"
]


def _is_as_documented(operation: Operation, answer: httpx.Response) -> None:
    assert answer.is_success, answer.text
    documented = operation.said["responses"][str(answer.status_code)]
    missing = {name for name in documented.get("headers", {}) if name not in answer.headers}
    assert missing <= {"Inference-Header-Content-Length", "Idempotent-Replayed"}, missing
    if answer.status_code == 204:
        assert "content" not in documented
        return
    kind = answer.headers["Content-Type"].partition(";")[0]
    schema = documented["content"][kind]["schema"]
    holds(answer.json() if kind == "application/json" else answer.text, schema)
    if "$ref" in schema:
        described = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        assert set(answer.json()) <= set(described["properties"])


@pytest.mark.parametrize(("operation", "kind", "value"), REQUESTS)
def test_an_example_of_a_request_works_and_is_answered_as_documented(
    world: World, operation: Operation, kind: str, value: Any
) -> None:
    holds(value, operation.said["requestBody"]["content"][kind]["schema"])
    _is_as_documented(operation, send(world, operation.path, operation.method, operation.said, kind=kind, body=value))


@pytest.mark.parametrize("operation", WITHOUT_BODY)
def test_a_call_without_a_body_is_answered_as_documented(world: World, operation: Operation) -> None:
    _is_as_documented(operation, send(world, operation.path, operation.method, operation.said))


@pytest.mark.parametrize(("schema", "value"), ANSWERS)
def test_an_example_of_an_answer_is_what_its_schema_says(schema: Any, value: Any) -> None:
    holds(value, schema)


@pytest.mark.parametrize("operation", [pytest.param(one, id=one.id) for one in OPERATIONS])
def test_every_json_answer_and_every_json_body_has_an_example(operation: Operation) -> None:
    for status, answer in operation.said["responses"].items():
        for kind, content in answer.get("content", {}).items():
            if kind == "application/json" and status.startswith("2"):
                assert content.get("examples"), f"{operation.id} {status}"
    for kind, content in operation.said.get("requestBody", {}).get("content", {}).items():
        assert content.get("examples") or content["schema"].get("format") == "binary" or kind.startswith("multipart/")
