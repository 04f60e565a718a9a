"""The document is whole, and is the one that was committed."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from app.http.endpoints import ENDPOINTS
from app.http.errors import MEDIA_TYPE, RETRIED, STATUS
from app.openapi.document import TAGS, to_text
from scripts.write_openapi import FILE
from tests.conftest import Serve
from tests.integration.openapi.document_schemas import DOCUMENT, OPERATIONS, Operation, holds

EACH = pytest.mark.parametrize("operation", [pytest.param(one, id=one.id) for one in OPERATIONS])
OF_THE_SERVICE = {"cross_site", "error", "host_not_allowed", "method_not_allowed", "not_found", "route_not_found"}
"""Codes that are no operation's: of paths and methods that there are not, of hosts and origins that are refused for all
operations alike, and of errors that always have a kind."""


def test_the_committed_document_is_the_one_of_the_code() -> None:
    assert FILE.read_text("utf-8") == to_text(DOCUMENT), (
        "docs/openapi.json is not what the code says. If clients are meant to see the change, write it with "
        "`make openapi` and commit it with the code."
    )


def test_the_service_answers_with_the_document(serve: Serve) -> None:
    client, _ = serve()
    assert client.get("/openapi.json").json() == DOCUMENT
    assert [client.get(path).status_code for path in ("/docs", "/redoc", "/docs/oauth2-redirect")] == [200, 404, 404]


def test_every_reference_leads_somewhere() -> None:
    for reference in _found(DOCUMENT, "$ref"):
        place: Any = DOCUMENT
        for name in reference.removeprefix("#/").split("/"):
            place = place[name]


def test_every_component_is_referred_to() -> None:
    components = dict(DOCUMENT["components"])
    schemes = components.pop("securitySchemes")
    named = {f"#/components/{kind}/{name}" for kind, all_of in components.items() for name in all_of}
    assert named == set(_found(DOCUMENT, "$ref"))
    assert set(schemes) == {name for one in OPERATIONS for way in one.said["security"] for name in way}


def test_every_schema_is_a_json_schema() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    for schema in [*_found(DOCUMENT, "schema"), *DOCUMENT["components"]["schemas"].values()]:
        Draft202012Validator.check_schema(schema)


def test_operations_have_names_of_their_own_that_a_client_can_use() -> None:
    names = [operation.id for operation in OPERATIONS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", name) for name in names)
    assert set(names) == {endpoint.operation_id for endpoint in ENDPOINTS if endpoint.is_documented}


@EACH
def test_an_operation_says_what_it_does(operation: Operation) -> None:
    said = operation.said
    assert re.fullmatch(r"[A-Z][^.]{3,50}", said["summary"]), said["summary"]
    assert said["description"]
    assert len(said["tags"]) == 1
    assert set(said["tags"]) <= set(TAGS)
    in_path = {one["name"] for one in said["parameters"] if one.get("in") == "path"}
    assert in_path == set(re.findall(r"{(\w+)}", operation.path))


@EACH
def test_an_operation_says_all_that_it_may_answer(operation: Operation) -> None:
    statuses = {status: said for status, said in operation.said["responses"].items() if not status.startswith("2")}
    assert len(statuses) < len(operation.said["responses"])
    for status, said in statuses.items():
        headers = {"WWW-Authenticate"} if status == "401" else {"Retry-After"} if int(status) in RETRIED else set()
        if "`rate_limited`" in said["description"]:
            headers |= {"RateLimit-Policy", "RateLimit"}
        assert set(said.get("headers", ())) == headers
        kind = "application/json" if operation.path.startswith("/v2") else MEDIA_TYPE
        assert list(said["content"]) == [kind]
        assert re.findall(r"^- `(\w+)`: [A-Z]", said["description"], re.MULTILINE)
        if kind == MEDIA_TYPE:
            holds(said["content"][kind]["example"], said["content"][kind]["schema"])


def test_every_code_is_listed_and_is_some_operation_s() -> None:
    about = DOCUMENT["info"]["description"]
    assert {code: int(status) for code, status in re.findall(r"\| `(\w+)` \| (\d+) \| ", about)} == STATUS
    listed = {
        code
        for operation in OPERATIONS
        for said in operation.said["responses"].values()
        for code in re.findall(r"^- `(\w+)`", said["description"], re.MULTILINE)
    }
    assert listed == set(STATUS) - OF_THE_SERVICE


def test_the_pages_are_not_among_the_operations() -> None:
    paths = set(DOCUMENT["paths"])
    assert "/metrics" in paths
    assert not [path for path in paths if path == "/" or path.startswith(("/ui", "/static", "/docs", "/openapi"))]


def test_a_value_that_is_not_as_described_is_found() -> None:
    for wrong in ({"code": "not_json"}, {**_problem(), "code": "nonsense"}, {**_problem(), "row": "3"}):
        with pytest.raises(AssertionError):
            holds(wrong, {"$ref": "#/components/schemas/Problem"})


def _problem() -> dict[str, Any]:
    example: dict[str, Any] = DOCUMENT["components"]["schemas"]["Problem"]["examples"][0]
    return example


def _found(value: Any, key: str) -> Iterator[Any]:
    if isinstance(value, dict):
        for name, one in value.items():
            if name == key:
                yield one
            # An example is data: what looks like a key of the document is none there.
            if name not in ("example", "examples"):
                yield from _found(one, key)
    elif isinstance(value, list):
        for one in value:
            yield from _found(one, key)
