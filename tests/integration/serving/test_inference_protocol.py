"""The Open Inference Protocol as NVIDIA's own client, as it comes, speaks it."""

# N rows · I in_features · O out_features
import asyncio
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from adapters.catalog.adapter_cache import find_adapter
from adapters.names import Reference
from tests.conftest import Serve
from tests.integration.serving.conftest import Running
from tests.support.dense_oracle import Float64, answer, relative_error

TOLERANCE = 1e-5
KINDS: dict[str, Any] = {"FP32": np.float32, "FP64": np.float64, "FP16": np.float16, "BF16": ml_dtypes.bfloat16}
LESS_THAN_NO_CLASSES = triton.InferRequestedOutput("outputs", class_count=-1)
X_NI = np.random.default_rng(7).normal(size=(5, 10))


@pytest.fixture
def client(models: Running) -> Iterator[triton.InferenceServerClient]:
    """NVIDIA's client of the shared service."""
    with triton.InferenceServerClient(_address(models)) as client:
        yield client


def _address(models: Running) -> str:
    url = models[0].base_url
    return f"{url.host}:{url.port}"


def _input(x_NI: NDArray[Any] = X_NI, datatype: str = "FP32", *, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("inputs", list(x_NI.shape), datatype)
    return tensor.set_data_from_numpy(x_NI.astype(KINDS[datatype]), binary_data=binary)


def _wanted(models: Running, name: str, x_NI: NDArray[Any], version: int | None = None) -> Float64:
    """What the dense layer answers in float64."""
    service = models[1]
    adapter = (
        None
        if name == "__base__"
        else find_adapter(service.catalog, Reference(name, version=version), tenant="default")[1]
    )
    return answer(service.base, torch.from_numpy(x_NI.astype(np.float64)), adapter)


def test_the_server_says_what_it_is(client: triton.InferenceServerClient) -> None:
    told = client.get_server_metadata()
    assert told["name"] == "loraplex"
    assert told["version"]
    assert "binary_tensor_data" in told["extensions"]
    assert client.is_server_live()
    assert client.is_server_ready()


def test_the_server_is_described_with_and_without_a_slash_at_the_end(models: Running) -> None:
    http, _ = models
    described = [http.get(path) for path in ("/v2", "/v2/")]
    assert [answer.status_code for answer in described] == [200, 200]
    assert described[0].content == described[1].content
    assert described[0].headers["content-type"] == described[1].headers["content-type"]
    for method in ("HEAD", "POST", "DELETE"):
        without, with_slash = (http.request(method, path) for path in ("/v2", "/v2/"))
        assert without.status_code == with_slash.status_code == 405
        assert without.headers["allow"] == with_slash.headers["allow"]


def test_a_server_that_stops_is_live_and_not_ready(serve: Serve) -> None:
    running = serve()
    running[1].draining = True
    with triton.InferenceServerClient(_address(running)) as client:
        assert client.is_server_live()
        assert not client.is_server_ready()
    refused = running[0].get("/v2/health/ready")
    assert (refused.status_code, refused.json()) == (503, {"error": "the service is stopping"})
    assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(("name", "version"), [("__base__", ""), ("__base__", "1"), ("acme", ""), ("acme", "1")])
def test_a_model_says_what_it_takes(client: triton.InferenceServerClient, name: str, version: str) -> None:
    assert client.is_model_ready(name, version)
    assert client.get_model_metadata(name, version) == {
        "name": name,
        "versions": ["1"] if name == "__base__" else ["1", "2"],
        "platform": "loraplex",
        "inputs": [{"name": "inputs", "datatype": "FP32", "shape": [-1, 10]}],
        "outputs": [{"name": "outputs", "datatype": "FP32", "shape": [-1, 2]}],
    }


def test_the_configuration_batches_rows(client: triton.InferenceServerClient) -> None:
    told = client.get_model_config("acme")
    assert (told["name"], told["platform"], told["max_batch_size"]) == ("acme", "loraplex", 64)
    assert told["input"] == [{"name": "inputs", "data_type": "TYPE_FP32", "dims": [10]}]
    assert told["output"] == [{"name": "outputs", "data_type": "TYPE_FP32", "dims": [2]}]
    assert client.get_model_config("acme", "1") == told


@pytest.mark.parametrize(("name", "version"), [("nobody", ""), ("acme", "3"), ("acme", "01"), ("draft", "")])
def test_what_is_not_there_is_not_ready(client: triton.InferenceServerClient, name: str, version: str) -> None:
    assert not client.is_model_ready(name, version)
    for ask in (client.get_model_metadata, client.get_model_config):
        with pytest.raises(InferenceServerException) as refused:
            ask(name, version)
        assert refused.value.status() == "404"
        assert name in refused.value.message()


def test_a_version_that_is_not_live_answers_by_its_number(
    client: triton.InferenceServerClient, models: Running
) -> None:
    assert client.is_model_ready("draft", "1")
    result = client.infer("draft", [_input()], model_version="1")
    assert relative_error(result.as_numpy("outputs"), _wanted(models, "draft", X_NI, 1)) < TOLERANCE


@pytest.mark.parametrize("binary_output", [True, False])
@pytest.mark.parametrize(
    ("datatype", "binary"),
    [("FP32", True), ("FP64", True), ("FP16", True), ("BF16", True), ("FP32", False), ("FP64", False), ("FP16", False)],
)
@pytest.mark.parametrize("name", ["__base__", "acme", "globex"])
def test_every_datatype_is_answered(
    client: triton.InferenceServerClient, models: Running, name: str, datatype: str, binary: bool, binary_output: bool
) -> None:
    outputs = [triton.InferRequestedOutput("outputs", binary_data=binary_output)]
    result = client.infer(name, [_input(X_NI, datatype, binary=binary)], outputs=outputs, request_id="7 ü")
    told = result.get_response()
    assert (told["model_name"], told["id"]) == (name, "7 ü")
    assert told["model_version"] == ("2" if name == "acme" else "1")
    assert ("data" in told["outputs"][0]) is not binary_output
    given = result.as_numpy("outputs")
    assert (given.shape, given.dtype) == ((5, 2), np.float32)
    wanted = _wanted(models, name, X_NI.astype(KINDS[datatype]).astype(np.float32))
    assert relative_error(given, wanted) < TOLERANCE


@pytest.mark.parametrize("version", [1, 2])
def test_a_version_answers_by_its_number(client: triton.InferenceServerClient, models: Running, version: int) -> None:
    result = client.infer("acme", [_input()], model_version=str(version))
    assert result.get_response()["model_version"] == str(version)
    assert relative_error(result.as_numpy("outputs"), _wanted(models, "acme", X_NI, version)) < TOLERANCE


def test_requests_in_flight_together_get_their_own_answers(models: Running) -> None:
    x_KNI = np.random.default_rng(8).normal(size=(24, 3, 10))
    names = ["acme", "globex", "__base__"] * 8
    with triton.InferenceServerClient(_address(models), concurrency=8) as client:
        pending = [client.async_infer(name, [_input(x_NI)]) for name, x_NI in zip(names, x_KNI, strict=True)]
        for name, x_NI, one in zip(names, x_KNI, pending, strict=True):
            result = one.get_result()
            assert result.get_response()["model_name"] == name
            wanted = _wanted(models, name, x_NI.astype(np.float32))
            assert relative_error(result.as_numpy("outputs"), wanted) < TOLERANCE


def test_the_asyncio_client_is_answered_too(models: Running) -> None:
    async def ask() -> Any:
        async with triton_aio.InferenceServerClient(_address(models)) as client:
            return await client.infer("acme", [_input()])

    given = asyncio.run(ask()).as_numpy("outputs")
    assert relative_error(given, _wanted(models, "acme", X_NI)) < TOLERANCE


def test_the_index_names_every_model(client: triton.InferenceServerClient, models: Running) -> None:
    ready = [
        {"name": name, "version": version, "state": "READY", "reason": ""}
        for name, version in (("__base__", "1"), ("acme", "2"), ("globex", "1"))
    ]
    draft = {"name": "draft", "version": "", "state": "UNAVAILABLE", "reason": "no version is live"}
    assert client.get_model_repository_index() == [*ready[:2], draft, ready[2]]
    assert models[0].get("/v2/repository/index").json() == [*ready[:2], draft, ready[2]]
    assert models[0].post("/v2/repository/index", json={"ready": True}).json() == ready


def test_a_model_of_another_base_is_not_ready_and_says_why(serve: Serve) -> None:
    first, _ = serve()
    first.put("/adapters/acme", json={"A": [[1.0], [2.0]], "B": [[1.0] * 10]}).raise_for_status()
    running = serve(base="random:10,2,7")
    with triton.InferenceServerClient(_address(running)) as client:
        assert not client.is_model_ready("acme")
        with pytest.raises(InferenceServerException, match="made for the base layer") as refused:
            client.infer("acme", [_input()])
        assert refused.value.status() == "409"
        _, entry = client.get_model_repository_index()
        assert entry["state"] == "UNAVAILABLE"
        assert "made for the base layer" in entry["reason"]
        assert client.infer("__base__", [_input()]).as_numpy("outputs").shape == (5, 2)


def test_a_deleted_model_is_gone_and_a_new_one_is_there_at_once(serve: Serve) -> None:
    http, service = serve()
    with triton.InferenceServerClient(_address((http, service))) as client:
        assert not client.is_model_ready("acme")
        http.put("/adapters/acme", json={"A": [[1.0], [2.0]], "B": [[1.0] * 10]}).raise_for_status()
        assert client.infer("acme", [_input()]).get_response()["model_version"] == "1"
        http.delete("/adapters/acme").raise_for_status()
        with pytest.raises(InferenceServerException) as refused:
            client.infer("acme", [_input()])
        assert (refused.value.status(), refused.value.message()) == ("404", "there is no adapter 'acme'")


@pytest.mark.parametrize(
    ("says", "status", "name", "tensor", "more"),
    [
        ("there is no adapter 'nobody'", "404", "nobody", _input(), {}),
        ("'acme' has no version 9", "404", "acme", _input(), {"model_version": "9"}),
        ("expected [rows, 10]", "422", "acme", _input(X_NI[:, :9]), {}),
        ("row 2, column 4: not a finite", "422", "acme", _input(np.where(X_NI[2, 4] == X_NI, np.nan, X_NI)), {}),
        ("outputs.name is other", "422", "acme", _input(), {"outputs": [triton.InferRequestedOutput("other")]}),
        ("Content-Encoding is gzip", "415", "acme", _input(), {"request_compression_algorithm": "gzip"}),
        ("classification is -1", "422", "acme", _input(), {"outputs": [LESS_THAN_NO_CLASSES]}),
    ],
)
def test_an_error_names_its_culprit(
    client: triton.InferenceServerClient, says: str, status: str, name: str, tensor: Any, more: dict[str, Any]
) -> None:
    with pytest.raises(InferenceServerException) as refused:
        client.infer(name, [tensor], **more)
    assert refused.value.status() == status
    assert says in refused.value.message()


@pytest.mark.parametrize("name", ["-x", ".x", "a~b", "x" * 129])
@pytest.mark.parametrize("version", ["", "/versions/1"])
@pytest.mark.parametrize(("method", "call"), [("GET", ""), ("GET", "/ready"), ("GET", "/config"), ("POST", "/infer")])
def test_a_bad_name_is_answered_with_the_rule_for_names(
    models: Running, method: str, call: str, version: str, name: str
) -> None:
    answer = models[0].request(method, f"/v2/models/{name}{version}{call}", json={} if method == "POST" else None)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    assert "must be 1 to 128 characters" in answer.json()["error"]
    assert "is not a name" not in answer.json()["error"]


def test_models_are_not_loaded_or_unloaded_by_hand(client: triton.InferenceServerClient) -> None:
    for ask in (client.load_model, client.unload_model, client.get_inference_statistics):
        with pytest.raises(InferenceServerException) as refused:
            ask("acme")
        assert refused.value.status() == "404"
        assert "/v2/" in refused.value.message()
