"""Infer requests byte by byte: what the client of others would not show."""

# N rows · I in_features · O out_features
import json
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from adapters.catalog.adapter_cache import find_adapter
from adapters.names import Reference
from tests.integration.serving.conftest import Running
from tests.support.dense_oracle import answer, relative_error

INFER = "/v2/models/acme/infer"
LENGTH = "Inference-Header-Content-Length"
ROW = [0.5, -1.0, 2.0, 0.25, 1.0, 3.0, -0.5, 0.0, 1.5, 1.0]
KINDS: dict[str, Any] = {"FP32": np.float32, "FP64": np.float64, "FP16": np.float16, "BF16": ml_dtypes.bfloat16}


def _request(x_NI: NDArray[Any], datatype: str, form: str, **more: Any) -> tuple[bytes, dict[str, str]]:
    """A body and its headers: the rows as `binary`, as `flat` JSON or as `nested` JSON."""
    tensor: dict[str, Any] = {"name": "inputs", "shape": list(x_NI.shape), "datatype": datatype}
    content = x_NI.tobytes() if form == "binary" else b""
    if form == "binary":
        tensor["parameters"] = {"binary_data_size": len(content)}
    else:
        tensor["data"] = (x_NI.reshape(-1) if form == "flat" else x_NI).tolist()
    text = json.dumps({"inputs": [tensor]} | more).encode()
    return text + content, {LENGTH: str(len(text))} if form == "binary" else {}


def _ask(models: Running, body: bytes, headers: dict[str, str] | None = None, *, path: str = INFER) -> NDArray[Any]:
    """The outputs of a request, whichever way they come."""
    response = models[0].post(path, content=body, headers=headers or {})
    assert response.status_code == 200, response.text
    length = int(response.headers.get(LENGTH, len(response.content)))
    told = json.loads(response.content[:length])["outputs"][0]
    given = told["data"] if "data" in told else np.frombuffer(response.content[length:], "<f4")
    return np.array(given, np.float32).reshape(told["shape"])


@st.composite
def _rows(draw: st.DrawFn) -> tuple[str, NDArray[Any]]:
    datatype = draw(st.sampled_from(["FP32", "FP64", "FP16"]))
    numbers = st.floats(-1e4, 1e4, width=16) if datatype == "FP16" else st.floats(-1e30, 1e30)
    rows = draw(st.integers(1, 5))
    x_NI = draw(arrays(np.float64, (rows, 10), elements=numbers))
    return datatype, x_NI.astype(KINDS[datatype])


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(rows=_rows(), binary_output=st.booleans(), name=st.sampled_from(["acme", "globex", "__base__"]))
def test_a_request_means_the_same_in_every_form(
    models: Running, rows: tuple[str, NDArray[Any]], binary_output: bool, name: str
) -> None:
    datatype, x_NI = rows
    wanted = (binary_output and {"parameters": {"binary_data_output": True}}) or {}
    path = f"/v2/models/{name}/infer"
    binary, flat, nested = (
        _ask(models, *_request(x_NI, datatype, form, **wanted), path=path) for form in ("binary", "flat", "nested")
    )
    assert binary.tobytes() == flat.tobytes() == nested.tobytes()
    predicted = models[0].post(
        "/predict", json={"adapter": None if name == "__base__" else name, "inputs": x_NI.astype(np.float32).tolist()}
    )
    assert np.array(predicted.json()["outputs"], np.float32).tobytes() == binary.tobytes()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(bits=st.lists(st.integers(0, 0xFFFF), min_size=10, max_size=10))
def test_bf16_is_the_upper_half_of_a_float32(models: Running, bits: list[int]) -> None:
    # With an exponent of at most 2^100, so that every sum is finite.
    x_NI = np.array([[bit & 0x80FF | min(bit & 0x7F00, 0x7100) for bit in bits]], np.uint16).view(ml_dtypes.bfloat16)
    binary = _ask(models, *_request(x_NI, "BF16", "binary"))
    flat = _ask(models, *_request(x_NI.astype(np.float32), "FP32", "flat"))
    assert binary.tobytes() == flat.tobytes()


@pytest.mark.parametrize("padding", range(8))
def test_the_tensor_may_begin_at_any_byte(models: Running, padding: int) -> None:
    x_NI = np.array([ROW, ROW[::-1]], np.float64)
    body, headers = _request(x_NI, "FP64", "binary", id="x" * padding)
    service = models[1]
    wanted = answer(
        service.base, torch.from_numpy(x_NI), find_adapter(service.catalog, Reference("acme"), tenant="default")[1]
    )
    assert relative_error(_ask(models, body, headers), wanted) < 1e-5


def test_a_body_of_rows_alone_is_answered_in_binary(models: Running) -> None:
    raw = struct.pack("<20f", *ROW, *ROW)
    response = models[0].post(INFER, content=raw, headers={LENGTH: "0"})
    assert response.headers["content-type"] == "application/octet-stream"
    both = _ask(models, raw, {LENGTH: "0"})
    assert both.shape == (2, 2)
    assert both[0].tobytes() == _ask(models, *_request(np.array([ROW]), "FP32", "flat"))[0].tobytes()


@pytest.mark.parametrize(
    ("request_level", "output", "binary"),
    [
        (None, None, False),
        (True, None, True),
        (False, None, False),
        (None, {}, False),
        (True, {}, True),
        (None, {"binary_data": True}, True),
        (True, {"binary_data": False}, False),
        (False, {"binary_data": True}, True),
    ],
)
def test_an_output_comes_as_it_is_asked_for(
    models: Running, request_level: bool | None, output: dict[str, bool] | None, binary: bool
) -> None:
    more: dict[str, Any] = {}
    if request_level is not None:
        more["parameters"] = {"binary_data_output": request_level}
    if output is not None:
        more["outputs"] = [{"name": "outputs", "parameters": output}]
    body, _ = _request(np.array([ROW]), "FP32", "nested", **more)
    response = models[0].post(INFER, content=body)
    assert (LENGTH in response.headers) is binary
    kind = "application/octet-stream" if binary else "application/json"
    assert response.headers["content-type"] == kind
    assert response.headers["server-timing"].startswith("queue;dur=")
    assert "x-request-id" in response.headers


def test_what_the_protocol_leaves_free_is_taken(models: Running) -> None:
    plain = _ask(models, *_request(np.array([ROW]), "FP32", "flat"))
    body, headers = _request(
        np.array([ROW], np.float32),
        "FP32",
        "binary",
        id="",
        model_name="acme",
        outputs=[],
        parameters={"priority": 1, "sequence_id": "s", "anything": 0.5, "timeout": 60_000_000},
    )
    assert _ask(models, body, headers | {"Content-Type": "text/plain", "Content-Encoding": "identity"}).tobytes() == (
        plain.tobytes()
    )


def test_the_id_comes_back_as_it_was(models: Running) -> None:
    for theirs in ("7", "", 'a"b\\', "ü\n\0", "😀", "\u2028"):
        body, _ = _request(np.array([ROW]), "FP32", "flat", id=theirs)
        assert models[0].post(INFER, content=body).json()["id"] == theirs
    body, _ = _request(np.array([ROW]), "FP32", "flat")
    assert "id" not in models[0].post(INFER, content=body).json()


def test_headers_that_differ_in_the_numbers_alone_are_not_taken_for_each_other(models: Running) -> None:
    for rows in (1, 2, 3, 2, 1):
        x_NI = np.tile(np.array(ROW, np.float32), (rows, 1))
        assert _ask(models, *_request(x_NI, "FP32", "binary")).shape == (rows, 2)


def test_a_request_in_pieces_is_one_request(models: Running) -> None:
    body, headers = _request(np.array([ROW] * 3, np.float32), "FP32", "binary")
    pieces = (body[begin : begin + 7] for begin in range(0, len(body), 7))
    response = models[0].post(INFER, content=pieces, headers=headers)
    assert response.json()["outputs"][0]["shape"] == [3, 2]


def test_the_page_of_the_api_has_the_calls(models: Running) -> None:
    paths = models[0].get("/openapi.json").json()["paths"]
    assert {"/v2", "/v2/health/ready", "/v2/repository/index", "/v2/models/{name}/versions/{version}/infer"} <= set(
        paths
    )
    assert paths["/v2/models/{name}/infer"]["post"]["requestBody"]
