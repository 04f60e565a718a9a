"""The Open Inference Protocol's own OpenAPI file, with Schemathesis as an independent client of it.

The file is from https://github.com/kserve/open-inference-protocol (specification/protocol/open_inference_rest.yaml),
and the text beside it is inference_rest.md. `_corrected` and `_for_the_model` list where the file is wrong or says less
than the text, and where this service deviates from it.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.integration.serving.conftest import Running
from tests.support.external_programs import shared_file

VERSION_SEGMENT = "/versions/{MODEL_VERSION}"
METADATA, MODEL = "/v2/", "/v2/models/{MODEL_NAME}"
SERVER_READS = [METADATA, "/v2", "/v2/health/live", "/v2/health/ready"]
MODEL_READS = [f"{MODEL}{version}{end}" for version in ("", VERSION_SEGMENT) for end in ("", "/ready")]
INFERS = [f"{MODEL}/infer", f"{MODEL}{VERSION_SEGMENT}/infer"]
ACME, BASE = ({"MODEL_NAME": name, "MODEL_VERSION": "1"} for name in ("acme", "__base__"))
ROWS, COLUMNS = 3, 10
NUMBER = {"type": "number"}
FINITE = NUMBER | {"minimum": -1000, "maximum": 1000}
"""The model accepts only numbers that are finite in the request's data type, and FP16 ends at 65504."""
PARAMETER_TYPES = ("string", "number", "boolean")

Document = dict[str, Any]


def _bounded(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run, without a data base of failures from earlier ones."""
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=examples,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def document() -> Document:
    """The file, corrected."""
    return _corrected(yaml.safe_load(shared_file("open_inference_rest.yaml").read_text("utf-8")))


def _corrected(document: Document) -> Document:
    """The document as the protocol's text and this service mean it."""
    # Path parameters are written `${MODEL_NAME}`, as in a shell. In OpenAPI the dollar would be a part of the path.
    paths = {path.replace("${", "{"): item for path, item in document["paths"].items()}
    # The text makes the version optional; the file has only the paths with one.
    for path in [path for path in paths if VERSION_SEGMENT in path]:
        item = deepcopy(paths[path])
        item["parameters"] = [one for one in item["parameters"] if one["name"] != "MODEL_VERSION"]
        paths[path.replace(VERSION_SEGMENT, "")] = item
    # The text has the server's metadata at `v2`, the file at `/v2/`.
    paths["/v2"] = deepcopy(paths[METADATA])
    # The file documents 400 for two operations and no other error. The service answers 404 for what does not exist and
    # 422 for what it does not accept, in the shape that the file calls metadata_model_error_response.
    error = {"schema": {"$ref": "#/components/schemas/metadata_model_error_response"}}
    for item in paths.values():
        for method in {"get", "post"} & set(item):
            item[method]["responses"]["4XX"] = {"description": "An error", "content": {"application/json": error}}
    return document | {"paths": paths}


def _for_the_model(document: Document, number: Document) -> Document:
    """The document with only the requests that a model of this service accepts.

    The file leaves the number, names and shapes of tensors to the model, and does not say what an unknown field means;
    the service refuses it. The text makes the values of parameters strings, numbers and booleans.
    """
    document = deepcopy(document)
    schemas = document["components"]["schemas"]
    schemas["parameters"] |= {"additionalProperties": {"anyOf": [{"type": kind} for kind in PARAMETER_TYPES]}}
    by_rows = [
        {"shape": _constant([1, COLUMNS]), "data": _list(number, COLUMNS)},
        {"shape": _constant([ROWS, COLUMNS]), "data": _list(number, ROWS * COLUMNS)},
        {"shape": _constant([ROWS, COLUMNS]), "data": _list(_list(number, COLUMNS), ROWS)},
    ]
    tensor = schemas["request_input"]
    known = tensor["properties"] | {"name": _constant("inputs"), "datatype": {"enum": ["FP32", "FP64", "FP16"]}}
    schemas["request_input"] = {
        "anyOf": [tensor | {"properties": known | shape, "additionalProperties": False} for shape in by_rows]
    }
    schemas["request_output"] |= {"additionalProperties": False}
    schemas["request_output"]["properties"]["name"] = _constant("outputs")
    request = schemas["inference_request"] | {"additionalProperties": False}
    request["properties"]["inputs"] |= {"minItems": 1, "maxItems": 1}
    request["properties"]["outputs"] |= {"maxItems": 1}
    schemas["inference_request"] = request
    for path in INFERS:
        document["paths"][path]["post"]["requestBody"]["required"] = True
    return document


def _constant(value: Any) -> Document:
    return {"enum": [value]}


def _list(items: Document, length: int) -> Document:
    return {"type": "array", "items": items, "minItems": length, "maxItems": length}


def _answers(
    running: Running,
    document: Document,
    path: str,
    names: Mapping[str, str] | None = None,
    *,
    mode: GenerationMode = GenerationMode.POSITIVE,
    examples: int = 1,
    are_accepted: bool = True,
) -> list[tuple[Any, Any]]:
    """The requests that Schemathesis makes of one operation, each with its answer, which is as the document says.

    `names` fixes the model and its version. `are_accepted` says that a request which fits the document has to succeed.
    """
    operation = schemathesis.openapi.from_dict(document)[path]["POST" if path in INFERS else "GET"]
    fixed = {name: value for name, value in (names or {}).items() if f"{{{name}}}" in path}
    base_url = str(running[0].base_url).rstrip("/")
    exchanges: list[tuple[Any, Any]] = []

    @_bounded(examples)
    @given(operation.as_strategy(mode, path_parameters=fixed or None))
    def exchange(case: Any) -> None:
        excluded = [] if are_accepted else [positive_data_acceptance]
        exchanges.append((case, case.call_and_validate(base_url, excluded_checks=excluded)))

    exchange()
    return exchanges


@pytest.mark.parametrize("path", SERVER_READS)
def test_the_server_is_shown(models: Running, document: Document, path: str) -> None:
    ((_, answer),) = _answers(models, document, path)
    assert answer.status_code == 200


@pytest.mark.parametrize("names", [ACME, BASE], ids=["adapter", "base"])
@pytest.mark.parametrize("path", MODEL_READS)
def test_a_model_is_shown(models: Running, document: Document, path: str, names: Mapping[str, str]) -> None:
    ((_, answer),) = _answers(models, document, path, names)
    assert answer.status_code == 200


@pytest.mark.parametrize("path", MODEL_READS)
def test_any_name_has_an_answer_of_the_document(models: Running, document: Document, path: str) -> None:
    for _, answer in _answers(models, document, path, examples=20, are_accepted=False):
        assert answer.status_code in (404, 422)


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("path", INFERS)
def test_any_request_has_an_answer_of_the_document(
    models: Running, document: Document, path: str, mode: GenerationMode
) -> None:
    for names in (ACME, None):
        _answers(models, document, path, names, mode=mode, examples=15, are_accepted=False)


@pytest.mark.parametrize("names", [ACME, BASE], ids=["adapter", "base"])
@pytest.mark.parametrize("path", INFERS)
def test_a_request_that_fits_the_model_is_answered(
    models: Running, document: Document, path: str, names: Mapping[str, str]
) -> None:
    exchanges = _answers(models, _for_the_model(document, FINITE), path, names, examples=40)
    for case, answer in exchanges:
        assert answer.status_code == 200
        (tensor,) = answer.json()["outputs"]
        assert tensor["shape"][0] == case.body["inputs"][0]["shape"][0]
        assert len(tensor["data"]) == math.prod(tensor["shape"])
        assert answer.json().get("id") == case.body.get("id")
    # All kinds of requests were made.
    tensors = [case.body["inputs"][0] for case, _ in exchanges]
    assert {tensor["datatype"] for tensor in tensors} == {"FP32", "FP64", "FP16"}
    assert {len(tensor["data"]) for tensor in tensors} == {COLUMNS, ROWS, ROWS * COLUMNS}


@pytest.mark.parametrize("path", INFERS)
def test_a_request_that_does_not_fit_the_model_is_refused(models: Running, document: Document, path: str) -> None:
    narrowed = _for_the_model(document, NUMBER)
    for _, answer in _answers(models, narrowed, path, ACME, mode=GenerationMode.NEGATIVE, examples=30):
        assert answer.status_code in (400, 422)
