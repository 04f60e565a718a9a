"""What an operation is answered with when something is wrong is among what the document says of it."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.integration.openapi.document_schemas import OPERATIONS, Operation, holds
from tests.integration.openapi.example_calls import World, places

JSON = {"Content-Type": "application/json"}
BY_ID = {operation.id: operation for operation in OPERATIONS}
EACH = pytest.mark.parametrize("operation", [pytest.param(one, id=one.id) for one in OPERATIONS])
HEADERS = [{"X-Feature-Space": "another"}, {"If-Match": '"sha256:0"'}, {"X-Request-Timeout": "soon"}]
QUERIES = [
    "?limit=1&limit=2",
    "?limit=0",
    "?cursor=nonsense",
    "?nonsense=1",
    "?version=x",
    "?dry_run=maybe",
    "?status=x",
]
BODIES = [
    b"",
    b"{",
    b"[]",
    b"{}",
    b'{"a": 1, "a": 2}',
    b'{"name": "x", "rank": 1, "data": {"inputs": [[NaN]], "targets": [0]}}',
]
ROW = [0.0] * 64
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("predict", {"adapter": "no such", "inputs": [ROW]}),
    ("predict", {"adapter": "absent", "inputs": [ROW]}),
    ("predict", {"adapter": "acme@99", "inputs": [ROW]}),
    ("predict", {"adapter": "acme@canary", "inputs": [ROW]}),
    ("predict", {"adapter": None, "inputs": [[0.0]]}),
    ("predict", {"adapter": None, "adapters": [None], "inputs": [ROW]}),
    ("predict", {"adapter": "loud", "inputs": [[3e38] * 64]}),
    ("train_adapter", {"name": "a b", "rank": 1, "data": {"inputs": [ROW], "targets": [0]}}),
    ("train_adapter", {"name": "x", "rank": 999, "data": {"inputs": [ROW], "targets": [0]}}),
    ("train_adapter", {"name": "x", "rank": 1, "data": {"inputs": [ROW], "targets": [[0.0]]}}),
    ("train_adapter", {"name": "x", "rank": 1, "data": {"inputs": [ROW], "targets": [[0.0] * 10]}, "publish": "often"}),
    (
        "train_adapter",
        {"name": "x", "rank": 1, "data": {"dataset": "none", "inputs": {"prefix": "p"}, "targets": {"column": "c"}}},
    ),
    ("upload_adapter", {"A": [[0.0]], "B": [[0.0]]}),
    ("upload_adapter", {"A": [[0.0] * 999] * 10, "B": [ROW] * 999}),
    ("upload_adapter", {"lora_A": [ROW], "A": [[0.0]] * 10}),
    ("set_live", {"version": 99}),
    ("update_adapter", {"add": {"inputs": [ROW], "targets": [[0.0]]}}),
    ("infer", {"inputs": [{"name": "inputs", "shape": [1, 1], "datatype": "FP32", "data": [0]}]}),
]


def _is_documented(operation: Operation, answer: httpx.Response) -> None:
    """Its status, its code and its body; an answer without a fault is none of this test's business."""
    if answer.is_success:
        return
    documented = operation.said["responses"].get(str(answer.status_code))
    assert documented is not None, f"{operation.id}: {answer.status_code} {answer.text}"
    ((kind, content),) = documented["content"].items()
    assert answer.headers["Content-Type"] == kind
    holds(answer.json(), content["schema"])
    if "code" in answer.json():
        assert answer.json()["code"] in re.findall(r"^- `(\w+)`", documented["description"], re.MULTILINE)


def _path(operation: Operation, world: World, **other: str) -> str:
    """Of what is there already: nothing is made for a request that is refused."""
    name = "list_jobs" if operation.id in ("cancel_job", "revert_job") else operation.id.replace("delete_", "show_")
    return operation.path.format(**{**places(name, world), **other})


def _tries(operation: Operation) -> Iterator[tuple[str, dict[str, str], bytes]]:
    """Queries, headers and bodies with something wrong in them; whatever is done without a body gets no others."""
    if operation.method == "delete" or operation.id in ("cancel_job", "revert_job"):
        yield "", HEADERS[0], b""
        return
    yield from ((query, {}, b"") for query in QUERIES)
    yield from (("", headers, b"") for headers in HEADERS)
    if "requestBody" in operation.said:
        yield from (("", JSON, body) for body in BODIES)
        yield "", {"Content-Type": "image/png"}, b"x"


@EACH
def test_a_refused_request_is_answered_as_documented(world: World, operation: Operation) -> None:
    for query, headers, body in _tries(operation):
        url = _path(operation, world) + query
        _is_documented(operation, world.client.request(operation.method, url, headers=headers, content=body))


@EACH
def test_what_is_not_there_is_answered_as_documented(world: World, operation: Operation) -> None:
    for other in ({"name": "absent", "job_id": "absent"}, {"name": "a b"}, {"version": "99"}, {"version": "x"}):
        if set(other) & set(re.findall(r"{(\w+)}", operation.path)) and "requestBody" not in operation.said:
            answer = world.client.request(operation.method, _path(operation, world, **other))
            assert answer.is_client_error, answer.text
            _is_documented(operation, answer)


@pytest.mark.parametrize(("name", "body"), ASKED)
def test_a_body_that_is_wrong_is_answered_as_documented(world: World, name: str, body: dict[str, Any]) -> None:
    operation = BY_ID[name]
    answer = world.client.request(operation.method, _path(operation, world), json=body)
    assert answer.is_client_error, answer.text
    _is_documented(operation, answer)


def test_a_query_that_has_a_field_twice_is_refused(world: World) -> None:
    for path in (
        "/jobs?limit=1&limit=2",
        "/adapters?prefix=a&prefix=a",
        "/datasets/turned-digits/preview?limit=1&limit=1",
    ):
        answer = world.client.get(path)
        found = answer.json()
        assert (answer.status_code, found["code"]) == (422, "invalid_combination")
        assert found["field"] in path
