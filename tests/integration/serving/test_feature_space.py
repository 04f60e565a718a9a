"""Two encoders of the same width: no shape tells them apart, and so a name does."""

import httpx
import pytest

from tests.conftest import Serve

SPACE, OTHER = "minilm-l6-v2@1", "minilm-l6-v2@2"
FACTORS = {"A": [[1.0], [2.0]], "B": [[1.0] * 10]}
PREDICT = {"adapter": "acme", "inputs": [[1.0] * 10]}


def _code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def test_a_version_is_made_for_the_feature_space_that_is_served(serve: Serve) -> None:
    client, _ = serve(feature_space=SPACE)
    assert client.put("/adapters/acme", json=FACTORS).json()["feature_space"] == SPACE
    assert client.get("/base").json()["feature_space"] == SPACE
    assert client.post("/predict", json=PREDICT).status_code == 200


@pytest.mark.parametrize("now", [OTHER, None])
def test_a_version_of_another_feature_space_does_not_answer(serve: Serve, now: str | None) -> None:
    first, _ = serve(feature_space=SPACE)
    first.put("/adapters/acme", json=FACTORS)
    second, _ = serve(feature_space=now)
    refused = second.post("/predict", json=PREDICT)
    assert _code(refused) == (409, "feature_space_mismatch")
    assert refused.json()["given"] == SPACE
    start = {"name": "child", "rank": 1, "data": {"inputs": [[1.0] * 10], "targets": [[1.0, 1.0]]}}
    trained = second.post("/adapters", json=start | {"training": {"init": {"adapter": "acme"}}})
    assert _code(trained) == (409, "feature_space_mismatch")


def test_a_version_made_under_none_makes_no_claim(serve: Serve) -> None:
    first, _ = serve()
    first.put("/adapters/acme", json=FACTORS)
    second, _ = serve(feature_space=SPACE)
    assert second.post("/predict", json=PREDICT).status_code == 200
    assert second.put("/adapters/acme", json=FACTORS).json()["version"] == 2


@pytest.mark.parametrize(
    ("ours", "theirs", "status"),
    [(SPACE, SPACE, 200), (SPACE, OTHER, 409), (SPACE, "", 409), (None, SPACE, 409), ("encodeur-é", "encodeur-é", 200)],
)
def test_a_request_may_say_which_encoder_its_inputs_come_from(
    serve: Serve, ours: str | None, theirs: str, status: int
) -> None:
    client, _ = serve(feature_space=ours)
    assert client.put("/adapters/acme", json=FACTORS).status_code == 201
    headers = [(b"X-Feature-Space", theirs.encode())]
    for answer in (
        client.post("/predict", json=PREDICT, headers=headers),
        client.put("/adapters/acme", json=FACTORS, headers=headers),
    ):
        assert answer.status_code == status
        if status == 409:
            assert _code(answer) == (409, "feature_space_mismatch")


def test_a_download_names_its_feature_space_and_is_refused_in_another(serve: Serve) -> None:
    first, _ = serve(feature_space=SPACE)
    digest = first.put("/adapters/acme", json=FACTORS).json()["digest"]
    archive, headers = first.get("/adapters/acme/download").content, {"Content-Type": "application/zip"}
    same = first.put("/adapters/acme", content=archive, headers=headers)
    assert (same.status_code, same.json()["digest"]) == (200, digest)
    second, _ = serve(feature_space=OTHER)
    assert _code(second.put("/adapters/new", content=archive, headers=headers)) == (409, "feature_space_mismatch")
