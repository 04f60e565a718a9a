"""Trainings: arrays in every form, inline or as a data set of their own."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from loraplex import (
    AsyncClient,
    Client,
    IdempotencyKeyReused,
    InvalidCombination,
    JobStatus,
    NoStatistics,
    NotFinite,
    OutOfRange,
    UnknownField,
    WrongShape,
    WrongType,
    training_rows,
)

from tests.conftest import Serve
from tests.integration.client.conftest import Connect, Start
from tests.integration.client.scripted_server import Scripted, hang_up, problem, reply
from tests.integration.client.test_retries import JOB

RNG = np.random.default_rng(5)
X, Y = RNG.normal(size=(80, 10)), RNG.normal(size=(80, 2))
CLOSED = {"method": "closed_form"}


def digest(job: Any) -> str:
    """Of the rows as the job has them: the same rows, spec and seed train the same adapter."""
    return str(job.spec["data"]["digest"])


@pytest.mark.parametrize(
    ("targets", "training"),
    [
        (Y, CLOSED),
        (np.arange(80) % 2, {"loss": "cross_entropy", "epochs": 2}),
        (np.array(["no", "yes"])[np.arange(80) % 2], {"loss": "cross_entropy", "epochs": 2}),
        (["no", "yes"] * 40, {"loss": "cross_entropy", "epochs": 2}),
    ],
    ids=["numbers", "classes", "labels", "listed labels"],
)
def test_large_arrays_are_the_same_rows_and_leave_no_data_set(
    start: Start, monkeypatch: pytest.MonkeyPatch, targets: Any, training: dict[str, Any]
) -> None:
    client = start()
    rows = {"inputs": X, "targets": targets, "weights": np.linspace(1, 2, 80)}
    inline = client.train("inline", rank=1, training=training, **rows)
    assert "dataset" not in inline.spec["data"]
    monkeypatch.setattr(training_rows, "INLINE_NUMBERS", 100)
    stored = client.train("stored", rank=1, training=training, **rows)
    assert stored.spec["data"]["dataset"].startswith("loraplex-client-")
    assert list(client.datasets()) == []
    assert digest(inline) == digest(stored)


def test_a_key_goes_with_the_rows_of_a_data_set_too(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_rows, "INLINE_NUMBERS", 100)
    client = start()
    request: dict[str, Any] = {"name": "acme", "rank": 1, "training": CLOSED, "idempotency_key": "nightly"}
    first, again = (client.train(inputs=X, targets=Y, **request) for _ in range(2))
    assert first.id == again.id
    with pytest.raises(IdempotencyKeyReused):
        client.train(inputs=X, targets=Y + 1, **request)
    assert client.train(inputs=X, targets=Y, **request | {"idempotency_key": "weekly"}).id != first.id
    assert list(client.datasets()) == []


def test_arrays_past_some_4_mib_of_json_go_as_a_data_set(start: Start) -> None:
    client = start(trainer=True)
    x, y = np.tile(X, (300, 1)), np.tile(Y, (300, 1))
    job = client.train("acme", rank=2, inputs=x, targets=y, training=CLOSED)
    assert job.spec["data"]["rows"] == 24_000
    assert job.wait(timeout=60).status is JobStatus.SUCCEEDED
    assert client.estimate("acme", rank=2, inputs=x, targets=y, training=CLOSED).memory_bytes > 0
    assert list(client.datasets()) == []


def test_tensors_and_lists_are_the_same_rows(start: Start) -> None:
    client = start()
    x, y = X.astype(np.float32), Y.astype(np.float32)
    forms = [(x, y), (torch.from_numpy(x), torch.from_numpy(y)), (x.tolist(), y.tolist())]
    jobs = [client.train(f"a{n}", rank=1, inputs=a, targets=b, training=CLOSED) for n, (a, b) in enumerate(forms)]
    assert len({digest(job) for job in jobs}) == 1


def test_a_fleet_is_one_adapter_for_each_group_however_its_rows_are_sent(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(trainer=True)
    groups = np.array(["eu", "us"])[np.arange(80) % 2]
    for name in ("small", "large"):
        job = client.train(f"{name}-{{group}}", rank=1, inputs=X, targets=Y, groups=groups, training=CLOSED)
        job.wait(timeout=60)
        assert [(made.name, made.group) for made in job.adapters()] == [(f"{name}-eu", "eu"), (f"{name}-us", "us")]
        monkeypatch.setattr(training_rows, "INLINE_NUMBERS", 100)
    assert client.adapter("small-eu").live.digest == client.adapter("large-eu").live.digest


def test_groups_that_a_split_keeps_together_may_be_large(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_rows, "INLINE_NUMBERS", 100)
    client = start()
    split = {"by": "group", "fraction": 0.25}
    job = client.train("acme", rank=1, inputs=X, targets=Y, groups=np.arange(80) // 20, split=split, training=CLOSED)
    assert job.spec["split"]["held_out"]["rows"] == 20


@pytest.mark.parametrize(
    ("targets", "labels"),
    [([["a"], [], ("a", "bü"), ["bü"]] * 20, ["a", "bü"]), ([[1], [], [1, 2], [np.int64(2)]] * 20, [1, 2])],
    ids=["text", "numbers"],
)
def test_lists_of_labels_are_the_same_rows_inline_and_as_a_data_set(
    start: Start, monkeypatch: pytest.MonkeyPatch, targets: Any, labels: list[Any]
) -> None:
    client = start(max_body_bytes=2**15)
    training = {"loss": "binary_cross_entropy"}
    rows = {"inputs": X[:20], "targets": targets[:20], "weights": np.linspace(1, 2, 20), "labels": labels}
    inline = client.train("inline", rank=1, training=training, **rows)
    assert "dataset" not in inline.spec["data"]
    monkeypatch.setattr(training_rows, "INLINE_NUMBERS", 100)
    stored = client.train("stored", rank=1, training=training, **rows)
    assert stored.spec["labels"] == inline.spec["labels"] == labels
    assert digest(stored) == digest(inline)
    # Ten times the rows are more than a request may have.
    many = {"inputs": np.tile(X, (10, 1)), "targets": targets * 10, "labels": labels}
    assert client.train("many", rank=1, training=training, **many).spec["data"]["rows"] == 800
    with pytest.raises(WrongShape, match="inputs has 80, targets has 79"):
        client.train("fewer", rank=1, inputs=X, targets=targets[1:], training=training)
    assert list(client.datasets()) == []


@pytest.mark.parametrize("targets", [["cat", 1], [1, "2"], [True, 2], ("a", None), [np.True_, 0]], ids=str)
def test_a_list_of_several_kinds_is_not_made_one_of_one(connect: Connect, scripted: Scripted, targets: Any) -> None:
    client = connect(scripted.url)
    for rows in ({"targets": targets}, {"targets": [1, 2], "groups": targets}):
        with pytest.raises(WrongType, match=r"several kinds|None cannot be used"):
            client.train("acme", rank=1, inputs=X[:2], **rows)
    assert scripted.asked == []


def test_documents_to_be_found_may_be_large(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_rows, "INLINE_NUMBERS", 100)
    client = start()
    rows = {"inputs": X, "targets": Y, "corpus": np.concatenate([Y, Y + 1])}
    training = {"loss": "multiple_negatives", "batch_size": 16, "validation_fraction": 0.2}
    assert client.train("acme", rank=1, training=training, **rows).status is JobStatus.QUEUED
    assert list(client.datasets()) == []


def test_a_data_set_that_is_there_is_named_as_the_service_has_it(start: Start) -> None:
    client = start()
    client.put_dataset("people", {"x": X, "y": Y})
    data = {"dataset": "people", "inputs": {"column": "x"}, "targets": {"column": "y"}}
    plan = client.estimate("acme", rank=2, data=data, training=CLOSED)
    assert (plan.adapters, plan.spec["data"]["rows"]) == (1, 80)
    assert client.train("acme", rank=2, data=data, training=CLOSED).spec["data"]["dataset"] == "people@1"
    assert [found.name for found in client.datasets()] == ["people"]
    assert list(client.adapters()) == []


def test_texts_are_trained_on_where_an_encoder_is_at_hand(start: Start) -> None:
    def encode(texts: list[str]) -> Any:
        return [[float(len(text)) + n for n in range(10)] for text in texts]

    client = start(client={"encode": encode})
    job = client.train("acme", rank=1, inputs=["a", "bb", "ccc"], targets=Y[:3])
    other = client.train("acme", rank=1, inputs=encode(["a", "bb", "ccc"]), targets=Y[:3])
    assert job.spec["data"]["digest"] == other.spec["data"]["digest"]


@pytest.mark.parametrize("field", ["inputs", "targets", "weights"])
def test_a_number_that_is_not_finite_is_named_with_its_row_before_anything_is_sent(
    connect: Connect, scripted: Scripted, field: str
) -> None:
    rows = {"inputs": X.copy(), "targets": Y.copy(), "weights": np.ones(80)}
    rows[field][7] = np.nan
    with pytest.raises(NotFinite, match=f"data.{field}, row 7") as failed:
        connect(scripted.url).train("acme", rank=1, **rows)
    assert failed.value.row == 7
    assert scripted.asked == []


def test_what_the_service_refuses_leaves_no_data_set(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_rows, "INLINE_NUMBERS", 100)
    client = start()
    with pytest.raises(OutOfRange, match="epochs") as failed:
        client.train("acme", rank=1, inputs=X, targets=Y, training={"epochs": 0})
    assert failed.value.field == "training.epochs"
    assert list(client.datasets()) == []


def test_a_job_is_not_lost_where_its_rows_cannot_be_deleted(
    connect: Connect, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_rows, "INLINE_NUMBERS", 100)
    stored = {"dataset": "d", "version": 1, "digest": "", "created_at": "", "content_type": "", "rows": 1, "bytes": 1}
    scripted.plan([reply(201, stored), reply(202, JOB), hang_up])
    assert connect(scripted.url).train("acme", rank=1, inputs=X, targets=Y).id == "j1"
    assert [asked.line.split()[0] for asked in scripted.asked] == ["PUT", "POST", "DELETE"]


def test_a_training_that_is_interrupted_takes_its_rows_back(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_rows, "INLINE_NUMBERS", 100)
    busy = problem(503, "not_ready", Retry_After="20")
    scripted.plan([busy, reply(204, b"")])

    async def train() -> None:
        async with AsyncClient(scripted.url, timeout=60) as client:
            async with asyncio.timeout(1):
                await client.train("acme", rank=1, inputs=X, targets=Y)

    with pytest.raises(TimeoutError):
        asyncio.run(train())
    put, delete = (asked.line.split()[:2] for asked in scripted.asked)
    assert (put[0], delete[0]) == ("PUT", "DELETE")
    assert put[1] == delete[1]


def test_rows_come_once(connect: Connect, scripted: Scripted) -> None:
    client = connect(scripted.url)
    for rows in ({}, {"inputs": X, "targets": Y, "data": {"dataset": "people"}}):
        with pytest.raises(InvalidCombination, match="rows come as"):
            client.train("acme", rank=1, **rows)
    with pytest.raises(WrongType, match="no encoder"):
        client.train("acme", rank=1, inputs=["text"], targets=Y[:1])
    assert scripted.asked == []


def test_an_unknown_setting_is_the_services_error(start: Start) -> None:
    with pytest.raises(UnknownField, match=r"did you mean training\.epochs"):
        start().train("acme", rank=1, inputs=X, targets=Y, training={"epoch": 3})


def test_an_update_adds_rows_and_forgets_rows(start: Start) -> None:
    client = start(trainer=True)
    keeping = CLOSED | {"keep_statistics": True, "ridge": np.float64(1.0)}
    whole = client.train("whole", rank=2, inputs=X, targets=Y, training=keeping)
    client.train("acme", rank=2, inputs=X[:60], targets=Y[:60], training=keeping).wait(timeout=60)
    client.update("acme", add={"inputs": X[60:], "targets": Y[60:]}).wait(timeout=60)
    whole.wait(timeout=60)
    x = RNG.normal(size=(5, 10))
    expected = client.predict("whole", x).outputs
    np.testing.assert_allclose(client.predict("acme", x).outputs, expected, rtol=1e-3, atol=1e-4)
    client.update("acme", forget={"inputs": X[60:], "targets": Y[60:]}).wait(timeout=60)
    before = client.predict("acme@1", x).outputs
    np.testing.assert_allclose(client.predict("acme", x).outputs, before, rtol=1e-3, atol=1e-4)
    client.upload("other", A=np.ones((2, 1)), B=np.ones((1, 10)))
    with pytest.raises(NoStatistics):
        client.update("other", add={"inputs": X, "targets": Y})


def test_a_job_of_one_client_may_be_waited_for_by_another(serve: Serve) -> None:
    url = str(serve(trainer=True)[0].base_url)
    with Client(url) as one, Client(url) as other:
        job = one.train("acme", rank=1, inputs=X, targets=Y, training=CLOSED)
        assert other.job(job.id).wait(timeout=60) == one.job(job.id)
