"""Triton's classification extension as NVIDIA's own client, as it comes, speaks it."""

# N rows · C classes of an adapter · T the largest of them
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from app.service import Service
from app.serving import response as labelling
from tests.support.labelled_adapters import LABELS, X_NI, I, O, dense, fill, names_of, settings_for
from tests.support.service import serving

World = tuple[httpx.Client, Service]
CLASSIFIED: dict[str, Any] = {"name": "outputs", "parameters": {"classification": 2}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serving(settings_for(tmp_path_factory.mktemp("classes") / "data")) as (client, service):
        fill(service)
        yield client, service


@pytest.fixture
def client(world: World) -> Iterator[triton.InferenceServerClient]:
    url = world[0].base_url
    with triton.InferenceServerClient(f"{url.host}:{url.port}") as client:
        yield client


def _infer(client: triton.InferenceServerClient, name: str, count: int, *, binary: bool, **more: Any) -> Any:
    tensor = triton.InferInput("inputs", list(X_NI.shape), "FP32").set_data_from_numpy(X_NI, binary_data=binary)
    output = triton.InferRequestedOutput("outputs", binary_data=binary, class_count=count)
    return client.infer(name, [tensor], outputs=[output], **more)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("count", [1, 3, O, 1000])
@pytest.mark.parametrize("name", [*LABELS, "__base__"])
def test_the_largest_outputs_come_first_with_index_and_label(
    client: triton.InferenceServerClient, world: World, name: str, count: int, binary: bool
) -> None:
    adapter = None if name == "__base__" else name
    x_NC = dense(world[1], adapter)
    order = np.argsort(-x_NC, axis=1)[:, :count].tolist()
    labels = names_of(adapter)

    result = _infer(client, name, count, binary=binary, request_id='7 "ü')
    told = result.get_response()
    (output,) = told["outputs"]
    assert (told["model_name"], told["model_version"], told["id"]) == (name, "1", '7 "ü')
    assert (output["name"], output["datatype"], output["shape"]) == ("outputs", "BYTES", [6, min(count, len(labels))])
    assert ("data" in output) is not binary
    elements = result.as_numpy("outputs")
    assert elements.shape == (6, min(count, len(labels)))
    for row, (found, wanted) in enumerate(zip(elements.tolist(), order, strict=True)):
        for element, index in zip(found, wanted, strict=True):
            text = element.decode() if binary else element
            value, *rest = text.split(":", 2)
            assert float(value) == pytest.approx(x_NC[row, index], rel=1e-4, abs=1e-5)
            named = [] if adapter is None or LABELS[adapter] is None else [str(labels[index])]
            assert rest == [str(index), *named]


def test_values_are_the_outputs_to_the_last_digit(client: triton.InferenceServerClient, world: World) -> None:
    plain = world[0].post("/predict", json={"adapter": "plain", "inputs": X_NI.tolist()}).json()["outputs"]
    for binary in (True, False):
        elements = _infer(client, "plain", O, binary=binary).as_numpy("outputs")
        for row, found in zip(plain, elements.tolist(), strict=True):
            texts = [element.decode() if binary else element for element in found]
            values = {int(text.split(":")[1]): np.float32(text.split(":")[0]) for text in texts}
            assert [values[index] for index in range(O)] == np.array(row, np.float32).tolist()


def test_both_forms_say_the_same(client: triton.InferenceServerClient) -> None:
    binary, text = (_infer(client, "animals", 3, binary=binary).as_numpy("outputs") for binary in (True, False))
    assert [element.decode() for element in binary.reshape(-1)] == text.reshape(-1).tolist()


def test_many_rows_are_in_their_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = {"name": "inputs", "shape": [48, I], "datatype": "FP32", "data": np.tile(X_NI, (8, 1)).tolist()}
    body = {"inputs": [tensor], "outputs": [CLASSIFIED]}
    at_once = world[0].post("/v2/models/animals/infer", json=body).raise_for_status().content
    monkeypatch.setattr(labelling, "MAX_INLINE_NUMBERS", 7 * O)
    again = world[0].post("/v2/models/animals/infer", json=body).raise_for_status().content
    assert again == at_once
    assert len(json.loads(again)["outputs"][0]["data"]) == 48 * 2


def test_a_request_without_the_wish_is_answered_in_numbers_again(world: World) -> None:
    tensor = {"name": "inputs", "shape": [1, I], "datatype": "FP32", "data": X_NI[0].tolist()}
    path = "/v2/models/animals/infer"
    for outputs, datatype in (([CLASSIFIED], "BYTES"), ([{"name": "outputs"}], "FP32"), ([CLASSIFIED], "BYTES")):
        told = world[0].post(path, json={"inputs": [tensor], "outputs": outputs}).raise_for_status().json()
        assert told["outputs"][0]["datatype"] == datatype


def test_labels_that_would_fill_the_memory_are_refused(
    client: triton.InferenceServerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelling, "MAX_LABEL_BYTES", 50)
    with pytest.raises(InferenceServerException, match=r"outputs\.parameters\.classification") as refused:
        _infer(client, "animals", 3, binary=True)
    assert refused.value.status() == "422"


def test_the_server_says_that_it_has_the_extension(client: triton.InferenceServerClient) -> None:
    assert "classification" in client.get_server_metadata()["extensions"]
