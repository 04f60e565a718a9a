"""Uploads and what the catalogue makes of them: versions, tombstones, roll back, references."""

from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.conftest import Serve

# The base of `client`: 10 → 2.
ROW = [1.0, -2.0, 0.5, 3.0, 0.25, -1.0, 0.0, 4.0, -0.75, 2.0]


def _factors(factor: float, rank: int = 1) -> dict[str, Any]:
    """Factors of their own for each number; 0 makes ΔW zero."""
    return {"A": [[factor] * rank, [2 * factor] * rank], "B": [[1.0 + k for k in range(10)]] * rank}


def _put(client: httpx.Client, name: str, factor: float, **headers: str) -> httpx.Response:
    return client.put(f"/adapters/{name}", json=_factors(factor), headers=headers)


def _predict(client: httpx.Client, reference: object) -> list[float]:
    answer = client.post("/predict", json={"adapter": reference, "inputs": [ROW]})
    assert answer.status_code == 200, answer.text
    outputs: list[float] = answer.json()["outputs"][0]
    return outputs


def _dense(factor: float) -> list[float]:
    torch.manual_seed(42)
    weight = torch.randn(2, 10).double().numpy()
    delta = np.outer([factor, 2 * factor], 1 + np.arange(10))
    outputs: list[float] = (np.array(ROW) @ (weight + delta).T).tolist()
    return outputs


def _code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def test_the_first_upload_is_version_1_and_live(client: httpx.Client) -> None:
    answer = _put(client, "acme", 1)
    version = answer.json()
    assert answer.status_code == 201
    assert answer.headers["etag"] == f'"{version["digest"]}"'
    assert (version["adapter"], version["version"], version["rank"], version["alpha"]) == ("acme", 1, 1, 1)
    assert (version["source"], version["job"], version["metrics"]) == ("upload", None, None)
    assert version["base"] == client.get("/base").json()["fingerprint"]
    assert client.get("/adapters/acme").json() == {
        "name": "acme",
        "created_at": version["created_at"],
        "aliases": {"live": 1},
        "live": version,
        "versions": 1,
        "problem": None,
    }
    assert client.get("/adapters/acme/versions/1").json() == version
    assert _predict(client, "acme") == pytest.approx(_dense(1), rel=1e-5)


def test_the_bytes_that_are_live_already_make_no_version(client: httpx.Client) -> None:
    first = _put(client, "acme", 1)
    again = _put(client, "acme", 1)
    assert again.status_code == 200
    assert (again.json(), again.headers["etag"]) == (first.json(), first.headers["etag"])
    assert client.get("/adapters/acme").json()["versions"] == 1


def test_bytes_that_an_older_version_has_are_a_version_again(client: httpx.Client) -> None:
    for factor, version in ((1, 1), (2, 2), (1, 3)):
        answer = _put(client, "acme", factor)
        assert (answer.status_code, answer.json()["version"]) == (201, version)
    data = client.get("/adapters/acme/versions").json()["data"]
    assert [entry["version"] for entry in data] == [3, 2, 1]
    assert data[0]["digest"] == data[2]["digest"] != data[1]["digest"]


def test_two_names_with_the_same_bytes_share_a_digest_and_nothing_else(client: httpx.Client) -> None:
    digests = {_put(client, name, 1).json()["digest"] for name in ("acme", "globex")}
    assert len(digests) == 1
    client.delete("/adapters/acme")
    assert _predict(client, "globex") == pytest.approx(_dense(1), rel=1e-5)


def test_a_deleted_name_made_again_goes_on_counting(client: httpx.Client) -> None:
    _put(client, "acme", 1)
    _put(client, "acme", 2)
    assert client.delete("/adapters/acme").status_code == 204
    answer = _put(client, "acme", 1)
    assert (answer.status_code, answer.json()["version"]) == (201, 3)
    shown = client.get("/adapters/acme").json()
    assert (shown["versions"], shown["aliases"]) == (1, {"live": 3})
    assert shown["created_at"] == answer.json()["created_at"]
    assert _put(client, "acme", 5).json()["version"] == 4
    client.delete("/adapters/acme")
    assert _put(client, "acme", 1).json()["version"] == 5
    for gone in (1, 2, 3, 4):
        answer = client.post("/predict", json={"adapter": f"acme@{gone}", "inputs": [ROW]})
        assert _code(answer) == (404, "version_not_found")


def test_a_deleted_adapter_answers_nothing(client: httpx.Client) -> None:
    _put(client, "acme", 1)
    assert _predict(client, "acme") == pytest.approx(_dense(1), rel=1e-5)
    client.delete("/adapters/acme")
    for reference in ("acme", "acme@1", "acme@live"):
        refused = client.post("/predict", json={"adapter": reference, "inputs": [ROW]})
        assert _code(refused) == (404, "adapter_not_found")
        assert refused.json()["field"] == "adapter"
    for method, path in (
        ("GET", "/adapters/acme"),
        ("GET", "/adapters/acme/versions"),
        ("GET", "/adapters/acme/versions/1"),
        ("GET", "/adapters/acme/download"),
        ("DELETE", "/adapters/acme"),
    ):
        assert _code(client.request(method, path)) == (404, "adapter_not_found")
    roll_back = client.put("/adapters/acme/aliases/live", json={"version": 1})
    assert _code(roll_back) == (404, "adapter_not_found")
    assert client.get("/adapters").json()["data"] == []


def test_live_rolls_back_and_forward(client: httpx.Client) -> None:
    for factor in (1, 2, 3):
        _put(client, "acme", factor)
    for version in (1, 3, 2, 2):
        answer = client.put("/adapters/acme/aliases/live", json={"version": version})
        assert (answer.status_code, answer.json()["aliases"]) == (200, {"live": version})
        assert answer.json()["live"]["version"] == version
        assert _predict(client, "acme") == pytest.approx(_dense(version), rel=1e-5)
    assert _code(client.put("/adapters/acme/aliases/live", json={"version": 4})) == (404, "version_not_found")
    assert _predict(client, "acme") == pytest.approx(_dense(2), rel=1e-5)


def test_after_a_roll_back_an_upload_is_compared_with_what_is_live(client: httpx.Client) -> None:
    for factor in (1, 2):
        _put(client, "acme", factor)
    client.put("/adapters/acme/aliases/live", json={"version": 1})
    assert _put(client, "acme", 1).status_code == 200
    answer = _put(client, "acme", 2)
    assert (answer.status_code, answer.json()["version"]) == (201, 3)


def test_a_reference_means_live_a_version_or_an_alias(client: httpx.Client) -> None:
    for factor in (1, 2, 3):
        _put(client, "acme", factor)
    client.put("/adapters/acme/aliases/live", json={"version": 2})
    for reference, factor in (("acme", 2), ("acme@live", 2), ("acme@1", 1), ("acme@3", 3)):
        assert _predict(client, reference) == pytest.approx(_dense(factor), rel=1e-5)
    assert _predict(client, None) == pytest.approx(_dense(0), rel=1e-5)
    assert _code(client.post("/predict", json={"adapter": "acme@canary", "inputs": [ROW]})) == (404, "alias_not_found")


def test_every_row_has_its_own_adapter_and_the_answer_says_which(client: httpx.Client) -> None:
    digests = {name: _put(client, name, factor).json()["digest"] for name, factor in (("acme", 1), ("globex", -2))}
    _put(client, "acme", 5)
    rows = ["globex", None, "acme@1", "acme", "acme@2", "globex@live", None]
    body = {"adapters": rows, "inputs": [ROW] * len(rows)}
    answer = client.post("/predict", json=body).raise_for_status()
    for given, factor in zip(answer.json()["outputs"], (-2, 0, 1, 5, 5, -2, 0), strict=True):
        assert given == pytest.approx(_dense(factor), rel=1e-5)
    adapters, row_adapters = answer.json()["adapters"], answer.json()["row_adapters"]
    named = [None if place is None else (adapters[place]["name"], adapters[place]["version"]) for place in row_adapters]
    assert named == [("globex", 1), None, ("acme", 1), ("acme", 2), ("acme", 2), ("globex", 1), None]
    assert len(adapters) == 3
    assert {entry["digest"] for entry in adapters} >= set(digests.values())
    assert answer.headers["server-timing"].startswith("queue;dur=")


def test_one_adapter_for_all_rows_is_named_once(client: httpx.Client) -> None:
    digest = _put(client, "acme", 1).json()["digest"]
    answer = client.post("/predict", json={"adapter": "acme", "inputs": [ROW] * 3}).json()
    assert answer["adapter"] == {"name": "acme", "version": 1, "digest": digest}
    assert len(answer["outputs"]) == 3
    assert client.post("/predict", json={"adapter": None, "inputs": [ROW]}).json()["adapter"] is None


@pytest.mark.parametrize("names", [("A", "B"), ("lora_B", "lora_A")])
def test_factors_the_wrong_way_round_are_refused_with_the_cure(client: httpx.Client, names: tuple[str, str]) -> None:
    left, right = names
    a_OR, b_RI = _factors(1)["A"], _factors(1)["B"]
    answer = client.put("/adapters/acme", json={left: b_RI, right: a_OR})
    assert _code(answer) == (422, "wrong_shape")
    assert "swapped" in answer.json()["detail"]
    assert client.put("/adapters/acme", json={left: a_OR, right: b_RI}).status_code == 201


@pytest.mark.parametrize(
    "zero", [_factors(0), _factors(1) | {"alpha": 0}, {"A": [[1], [1]], "B": [[0] * 10]}], ids=["A", "alpha", "B"]
)
def test_an_adapter_that_changes_nothing_is_accepted_and_seen(client: httpx.Client, zero: dict[str, Any]) -> None:
    answer = client.put("/adapters/acme", json=zero)
    assert answer.status_code == 201
    assert answer.json()["effect"] == {"relative_norm": 0}
    assert _predict(client, "acme") == _predict(client, None)


def test_the_effect_is_that_of_the_dense_delta(client: httpx.Client) -> None:
    torch.manual_seed(42)
    wanted = np.linalg.norm(np.outer([3, 6], 1 + np.arange(10))) / np.linalg.norm(torch.randn(2, 10).double().numpy())
    assert _put(client, "acme", 3).json()["effect"]["relative_norm"] == pytest.approx(wanted, rel=1e-12)


def test_over_a_zero_base_the_effect_is_unknown(serve: Serve) -> None:
    client, _ = serve(base="zeros:10,2")
    assert _put(client, "acme", 1).json()["effect"] == {"relative_norm": None}


def test_a_version_of_another_base_does_not_answer(serve: Serve) -> None:
    first, _ = serve()
    ours = first.get("/base").json()["fingerprint"]
    _put(first, "acme", 1)
    second, _ = serve(base="random:10,2,43")
    theirs = second.get("/base").json()["fingerprint"]
    refused = second.post("/predict", json={"adapter": "acme", "inputs": [ROW]})
    assert _code(refused) == (409, "base_mismatch")
    assert (refused.json()["given"], refused.json()["expected"]) == (ours, theirs)
    by_row = second.post("/predict", json={"adapters": [None, "acme"], "inputs": [ROW] * 2})
    assert (*_code(by_row), by_row.json()["row"]) == (409, "base_mismatch", 1)
    assert second.get("/adapters/acme").json()["live"]["base"] == ours
    # The same bytes for this base are another version.
    again = _put(second, "acme", 1)
    assert (again.status_code, again.json()["version"], again.json()["base"]) == (201, 2, theirs)
    assert second.post("/predict", json={"adapter": "acme", "inputs": [ROW]}).status_code == 200
    assert _code(second.post("/predict", json={"adapter": "acme@1", "inputs": [ROW]})) == (409, "base_mismatch")
