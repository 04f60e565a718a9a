"""Labels in uploads and downloads, and `POST /predict` that answers in probabilities and labels."""

# N rows · C classes of an adapter · T the most probable of them
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from scipy.special import expit, softmax

from app.service import Service
from app.serving import response as labelling
from tests.conftest import Serve
from tests.support.labelled_adapters import LABELS, X_NI, I, O, dense, fill, names_of, settings_for
from tests.support.service import serving

ROWS = X_NI.tolist()
ZIP = {"Content-Type": "application/zip"}
EVERY = pytest.mark.parametrize("name", [*LABELS, None])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Service]]:
    with serving(settings_for(tmp_path_factory.mktemp("labels") / "data")) as (client, service):
        fill(service)
        yield client, service


def _predict(client: httpx.Client, adapter: Any, *wanted: str, **more: Any) -> dict[str, Any]:
    which = {"adapters" if isinstance(adapter, list) else "adapter": adapter}
    answer = client.post("/predict", json=which | {"inputs": ROWS, "return": list(wanted)} | more)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def _probabilities(service: Service, name: str | None) -> Any:
    """(N, C), by scipy."""
    x_NC = dense(service, name)
    return expit(x_NC) if name == "tags" else softmax(x_NC, axis=1)


def _order(service: Service, name: str | None, count: int) -> list[list[int]]:
    """(N, T), by numpy."""
    order: list[list[int]] = np.argsort(-dense(service, name), axis=1)[:, :count].tolist()
    return order


@EVERY
def test_all_probabilities_and_the_most_probable_label(world: tuple[httpx.Client, Service], name: str | None) -> None:
    client, service = world
    told = _predict(client, name, "outputs", "probabilities", "labels")
    plain = client.post("/predict", json={"adapter": name, "inputs": ROWS}).json()
    assert list(told) == ["outputs", "probabilities", "labels", "adapter"]
    assert (told["outputs"], told["adapter"]) == (plain["outputs"], plain["adapter"])
    np.testing.assert_allclose(told["probabilities"], _probabilities(service, name), rtol=1e-4)
    names = names_of(name)
    assert told["labels"] == [names[first] for (first,) in _order(service, name, 1)]


@EVERY
@pytest.mark.parametrize("top_k", range(1, O + 1))
def test_the_most_probable_come_first_with_their_probabilities(
    world: tuple[httpx.Client, Service], name: str | None, top_k: int
) -> None:
    client, service = world
    told = _predict(client, name, "labels", "probabilities", top_k=top_k)
    assert list(told) == ["probabilities", "labels", "adapter"]
    names, order = names_of(name), _order(service, name, top_k)
    assert told["labels"] == [[names[index] for index in row] for row in order]
    wanted = np.take_along_axis(_probabilities(service, name), np.array(order), axis=1)
    assert wanted.shape == (len(ROWS), min(top_k, len(names)))
    np.testing.assert_allclose(told["probabilities"], wanted, rtol=1e-4)


def test_ties_go_to_the_class_with_the_lower_index(serve: Serve) -> None:
    client, _ = serve(base=f"zeros:{I},{O}")
    labels = ["e", "d", "c", "b", "a"]
    body = {"A": [[1], [2], [-1], [2], [1]], "B": [[1] + [0] * (I - 1)], "labels": labels}
    client.put("/adapters/acme", json=body).raise_for_status()
    rows = {"inputs": [[1.0] * I, [-1.0] * I], "return": ["labels"]}
    for name, top, order in (
        ("acme", ["d", "c"], [["d", "b", "e", "a", "c"], ["c", "e", "a", "d", "b"]]),
        (None, [0, 0], [[0, 1, 2, 3, 4]] * 2),
    ):
        for more, wanted in (({}, top), ({"top_k": 1}, [[label] for label in top]), ({"top_k": O}, order)):
            told = client.post("/predict", json={"adapter": name} | rows | more).raise_for_status().json()
            assert told["labels"] == wanted
    tensor = {"name": "inputs", "shape": [2, I], "datatype": "FP32", "data": rows["inputs"]}
    output = {"name": "outputs", "parameters": {"classification": 3}}
    told = client.post("/v2/models/acme/infer", json={"inputs": [tensor], "outputs": [output]}).json()
    assert told["outputs"][0]["data"] == ["2.0:1:d", "2.0:3:b", "1.0:0:e", "1.0:2:c", "-1.0:0:e", "-1.0:4:a"]


@pytest.mark.parametrize("top_k", [None, 1, 4])
def test_each_row_is_answered_in_the_classes_of_its_own_adapter(
    world: tuple[httpx.Client, Service], top_k: int | None
) -> None:
    client, _ = world
    adapters = ["animals", None, "codes@1", "animals@live", "tags", "codes"]
    more = {} if top_k is None else {"top_k": top_k}
    told = _predict(client, adapters, "labels", "probabilities", "outputs", **more)
    plain = client.post("/predict", json={"adapters": adapters, "inputs": ROWS}).json()
    assert {key: told[key] for key in plain} == plain
    for row, reference in enumerate(adapters):
        alone = _predict(client, reference, "labels", "probabilities", inputs=[ROWS[row]], **more)
        assert [told["labels"][row]] == alone["labels"]
        np.testing.assert_allclose(told["probabilities"][row], alone["probabilities"][0], rtol=1e-5)
    assert [len(row) for row in told["probabilities"]] == [min(top_k or O, count) for count in (3, 5, 5, 3, 4, 5)]


@pytest.mark.parametrize(
    ("wanted", "members"),
    [
        (["labels"], {"labels"}),
        (["probabilities"], {"probabilities"}),
        (["labels", "outputs"], {"labels", "outputs"}),
        (["outputs"], {"outputs"}),
    ],
)
def test_nothing_is_answered_but_what_was_asked_for(
    world: tuple[httpx.Client, Service], wanted: list[str], members: set[str]
) -> None:
    assert _predict(world[0], "animals", *wanted).keys() == members | {"adapter"}


def test_to_ask_for_outputs_is_to_ask_for_nothing_else(world: tuple[httpx.Client, Service]) -> None:
    client, _ = world
    plain, asked = (
        client.post("/predict", json={"adapter": "codes", "inputs": ROWS} | more)
        for more in ({}, {"return": ["outputs"]})
    )
    assert plain.content == asked.content


def test_many_rows_of_many_adapters_are_answered_in_their_order(
    world: tuple[httpx.Client, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = world
    body = {
        "adapters": ([*LABELS, None] * 10)[:48],
        "inputs": ROWS * 8,
        "return": ["labels", "probabilities"],
        "top_k": 2,
    }
    at_once = client.post("/predict", json=body).raise_for_status().content
    monkeypatch.setattr(labelling, "MAX_INLINE_NUMBERS", 7 * O)
    assert client.post("/predict", json=body).raise_for_status().content == at_once


def test_labels_that_would_fill_the_memory_are_refused(
    world: tuple[httpx.Client, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = world
    body = {"adapter": "animals", "inputs": ROWS, "return": ["labels"], "top_k": 3}
    monkeypatch.setattr(labelling, "MAX_LABEL_BYTES", 50)
    refused = client.post("/predict", json=body)
    assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (422, "out_of_range", "top_k")
    assert client.post("/predict", json=body | {"inputs": ROWS[:1]}).status_code == 200


@pytest.mark.parametrize("form", ["ours", "peft"])
@pytest.mark.parametrize("labels", [["no", "yes"], [1, 0], [str(k) for k in range(O)]])
def test_an_upload_says_what_its_classes_are_called(serve: Serve, form: str, labels: list[str | int]) -> None:
    client, _ = serve(base=f"random:{I},{O},42", feature_space="minilm@1")
    a, b = [[1.0, 0.5]] * O, [[0.5] * I] * 2
    factors = {"A": a, "B": b} if form == "ours" else {"lora_A": b, "lora_B": a}
    plain = client.put("/adapters/acme", json=factors).raise_for_status().json()
    labelled = client.put("/adapters/acme", json=factors | {"labels": labels}).raise_for_status().json()
    assert (plain["labels"], labelled["labels"], labelled["version"]) == (None, labels, 2)
    assert labelled["digest"] != plain["digest"]
    again = client.put("/adapters/acme", json=factors | {"labels": labels})
    assert (again.status_code, again.json()) == (200, labelled)
    assert client.get("/adapters/acme/versions/2").json() == labelled
    told = client.post("/predict", json={"adapter": "acme", "inputs": [ROWS[0]], "return": ["labels"]}).json()
    assert type(told["labels"][0]) is type(labels[0])

    archive = client.get("/adapters/acme/download").content
    back = client.put("/adapters/globex", content=archive, headers=ZIP).raise_for_status().json()
    assert (back["labels"], back["digest"]) == (labels, labelled["digest"])


def test_a_version_says_what_it_was_trained_from(world: tuple[httpx.Client, Service]) -> None:
    client, _ = world
    assert client.get("/adapters/tags/versions/1").json()["lineage"] == {"loss": "binary_cross_entropy"}
    assert client.get("/adapters/codes").json()["live"]["lineage"] is None


def test_the_page_of_the_api_has_the_fields(world: tuple[httpx.Client, Service]) -> None:
    schemas = world[0].get("/openapi.json").json()["components"]["schemas"]
    asked = schemas["PredictRequest"]["properties"]
    assert {"return", "top_k"} <= asked.keys()
    assert asked["return"]["items"]["enum"] == ["outputs", "probabilities", "labels"]
    assert all("labels" in schemas[upload]["properties"] for upload in ("FactorsUpload", "PeftUpload"))
