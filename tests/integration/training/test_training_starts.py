"""Where a training starts: the first loss of the history tells."""

from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from tests.support.service import train
from tests.support.training_oracle import NUMBERS, RANK, A, B, mse, published_delta, rslora_zip

# One step so small that the factors hardly move.
ONE_STEP = {"method": "sgd", "epochs": 1, "batch_size": None, "learning_rate": 1e-9}
PRODUCT = A.double() @ B.double()


def _start(client: httpx.Client, init: object, **body: Any) -> tuple[float, Tensor, dict[str, Any]]:
    """The first loss of a training that starts there, the ΔW that it hardly moved from, and its version."""
    training = ONE_STEP | {"init": init}
    job = train(client, **{"name": "started", "rank": RANK, "data": NUMBERS, "training": training} | body)
    assert job["status"] == "succeeded", job["error"]
    number = job["result"]["version"]
    version = client.get(f"/adapters/started/versions/{number}").json()
    return job["history"][0][1], published_delta(client, "started", number), version


def _same(given: Tensor, wanted: Tensor) -> bool:
    return float((given - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_zero_delta_starts_from_the_base_layer_s_answers(trained: httpx.Client) -> None:
    loss, delta, _ = _start(trained, "zero_delta")
    assert loss == pytest.approx(mse(), rel=1e-6)
    assert float(delta.abs().max()) < 1e-6


def test_randn_starts_from_two_standard_normal_factors(trained: httpx.Client) -> None:
    deltas = [_start(trained, "randn", training=ONE_STEP | {"init": "randn", "seed": seed})[1] for seed in range(3)]
    for seed, delta in enumerate(deltas):
        generator = torch.Generator().manual_seed(seed)
        a_OR, b_RI = torch.randn(3, RANK, generator=generator), torch.randn(RANK, 5, generator=generator)
        assert _same(delta, a_OR.double() @ b_RI.double())


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_factors_are_raw_and_the_job_s_own_scaling_is_in_front(trained: httpx.Client, alpha: float | None) -> None:
    loss, delta, version = _start(
        trained, {"A": A.tolist(), "B": B.tolist()}, **({} if alpha is None else {"alpha": alpha})
    )
    scaling = 1.0 if alpha is None else alpha / RANK
    assert loss == pytest.approx(mse(scaling * PRODUCT), rel=1e-5)
    assert _same(delta, scaling * PRODUCT)
    assert (version["alpha"], version["scaling"]) == (alpha or RANK, scaling)


def test_the_job_shows_the_factors_that_it_starts_from_by_digest(trained: httpx.Client) -> None:
    shown = []
    for factor in (1, 1, 2):
        training = ONE_STEP | {"init": {"A": (factor * A).tolist(), "B": B.tolist()}}
        job = train(trained, name="shown", rank=RANK, data=NUMBERS, training=training)
        shown.append(job["spec"]["training"]["init"])
    assert shown[0] == shown[1] != shown[2]
    assert all(list(init) == ["digest"] and init["digest"].startswith("sha256:") for init in shown)


@pytest.mark.parametrize("alpha", [None, 3.0, 0.5, 6])
def test_an_adapter_starts_it_from_its_delta_whatever_alpha_is_asked_for(
    trained: httpx.Client, alpha: float | None
) -> None:
    assert trained.put("/adapters/parent", json={"A": A.tolist(), "B": B.tolist(), "alpha": 3.0}).status_code in (
        200,
        201,
    )
    loss, delta, version = _start(trained, {"adapter": "parent"}, **({} if alpha is None else {"alpha": alpha}))
    assert loss == pytest.approx(mse(1.5 * PRODUCT), rel=1e-5)
    assert _same(delta, 1.5 * PRODUCT)
    assert version["alpha"] == (alpha or 3.0)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_an_rslora_upload_starts_it_from_its_delta_too(trained: httpx.Client, alpha: float | None) -> None:
    headers = {"Content-Type": "application/zip"}
    assert trained.put("/adapters/rslora", content=rslora_zip(2.5), headers=headers).status_code in (200, 201)
    wanted = PRODUCT * 2.5 / RANK**0.5
    loss, delta, version = _start(trained, {"adapter": "rslora"}, **({} if alpha is None else {"alpha": alpha}))
    assert loss == pytest.approx(mse(wanted), rel=1e-5)
    assert _same(delta, wanted)
    inherited = alpha is None
    assert (version["alpha"], version["rslora"]) == (alpha or 2.5, inherited)


def test_an_adapter_with_a_bias_gives_its_delta_and_not_its_bias(trained: httpx.Client) -> None:
    upload = {"A": A.tolist(), "B": B.tolist(), "bias": [10.0, 20.0, 30.0]}
    assert trained.put("/adapters/biased", json=upload).status_code == 201
    loss, delta, _ = _start(trained, {"adapter": "biased"})
    assert loss == pytest.approx(mse(PRODUCT), rel=1e-5)
    assert _same(delta, PRODUCT)


def test_a_version_of_an_adapter_starts_it_and_the_job_says_which(trained: httpx.Client) -> None:
    for factor in (1, 2):
        body = {"A": (factor * A).tolist(), "B": B.tolist()}
        assert trained.put("/adapters/old", json=body).json()["version"] == factor
    for reference, factor in (("old@1", 1), ("old@2", 2), ("old", 2), ("old@live", 2)):
        training = ONE_STEP | {"init": {"adapter": reference}}
        answer = trained.post("/adapters", json={"name": "x", "rank": RANK, "data": NUMBERS, "training": training})
        assert answer.json()["spec"]["training"]["init"] == {"adapter": f"old@{factor}"}
    assert _same(_start(trained, {"adapter": "old@1"})[1], PRODUCT)


def test_an_adapter_goes_on_training_from_itself(trained: httpx.Client) -> None:
    for _ in range(2):
        training: dict[str, Any] = {"epochs": 20, "init": "zero_delta"}
        if trained.get("/adapters/itself").status_code == 200:
            training["init"] = {"adapter": "itself"}
        job = train(trained, name="itself", rank=RANK, data=NUMBERS, training=training)
    first, second = (
        trained.get(f"/adapters/itself/versions/{number}").json()["metrics"]["train_loss"] for number in (1, 2)
    )
    assert job["history"][0][1] == pytest.approx(first, rel=1e-5)
    assert second < first


@pytest.mark.parametrize(
    ("init", "status", "code", "field"),
    [
        ({"adapter": "rank-1"}, 422, "wrong_shape", "training.init"),
        ({"A": [[1.0]] * 3, "B": [[1.0] * 5]}, 422, "wrong_shape", "training.init"),
        ({"A": [[1.0] * 2] * 2, "B": [[1.0] * 5] * 2}, 422, "wrong_shape", "training.init.A"),
        ({"A": [[1.0] * 2] * 3}, 422, "missing_field", "training.init.B"),
        ({"A": [[1.0] * 2] * 3, "B": [[1.0] * 5] * 2, "bias": [0] * 3}, 422, "unknown_field", "training.init.bias"),
        ({"adapter": "nobody"}, 404, "adapter_not_found", "training.init.adapter"),
        ({"adapter": "rank-1@9"}, 404, "version_not_found", "training.init.adapter"),
        ({"adapter": "../x"}, 422, "invalid_name", "training.init.adapter"),
        ({"adapter": None}, 422, "wrong_type", "training.init.adapter"),
        ({"adapter": "negative"}, 422, "out_of_range", "alpha"),
        ({}, 422, "missing_field", "training.init.A"),
        ("kaiming", 422, "wrong_type", "training.init"),
        (None, 422, "wrong_type", "training.init"),
    ],
    ids=repr,
)
def test_a_start_that_cannot_be_is_refused(
    trained: httpx.Client, init: object, status: int, code: str, field: str
) -> None:
    trained.put("/adapters/rank-1", json={"A": [[1.0]] * 3, "B": [[1.0] * 5]})
    trained.put("/adapters/negative", json={"A": A.tolist(), "B": B.tolist(), "alpha": -2})
    body = {"name": "refused", "rank": RANK, "data": NUMBERS, "training": {"init": init}}
    answer = trained.post("/adapters", json=body)
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["field"]) == (status, code, field), answer.text


def test_an_adapter_of_negative_alpha_starts_it_under_an_alpha_of_its_own(trained: httpx.Client) -> None:
    trained.put("/adapters/negative", json={"A": A.tolist(), "B": B.tolist(), "alpha": -2})
    loss, delta, version = _start(trained, {"adapter": "negative"}, alpha=4)
    assert loss == pytest.approx(mse(-PRODUCT), rel=1e-5)
    assert _same(delta, -PRODUCT)
    assert version["alpha"] == 4
