"""What is sent again, after how long, and what is not."""

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loraplex import (
    AsyncClient,
    BadAnswer,
    CatalogBusy,
    Client,
    IdempotencyKeyReused,
    InternalError,
    InvalidInput,
    NotReady,
    QueueFull,
    StorageFailed,
    TimedOut,
    Unreachable,
)
from loraplex.transport import retry_after, seconds_to_wait

from tests.integration.client.conftest import Connect
from tests.integration.client.scripted_server import Script, Scripted, hang_up, problem, reply, stay_silent
from tests.support.deadlines import scaled
from tests.support.service import free_port

BASE = {
    "in_features": 2,
    "out_features": 1,
    "bias": False,
    "dtype": "float32",
    "device": "cpu",
    "fingerprint": "sha256:0",
    "feature_space": None,
    "source": "x",
    "of_a_newer_service": 1,
}
JOB: dict[str, Any] = {
    "id": "j1",
    "status": "queued",
    "adapter": "acme",
    "created_at": "",
    "started_at": None,
    "finished_at": None,
    "attempt": 0,
    "progress": None,
    "metrics": None,
    "result": None,
    "error": None,
    "spec": {},
}
ROWS: dict[str, Any] = {"inputs": [[1.0, 2.0]], "targets": [[1.0]]}


@pytest.mark.parametrize(
    "failing",
    [
        problem(429, "queue_full"),
        problem(429, "rate_limited"),
        problem(503, "not_ready"),
        problem(503, "catalog_busy"),
        reply(503, b"<html>no backend</html>", kind="text/html"),
        hang_up,
    ],
    ids=["429", "limit", "503", "busy", "proxy", "hang-up"],
)
def test_a_call_that_changes_nothing_is_sent_again(connect: Connect, scripted: Scripted, failing: Script) -> None:
    scripted.plan([failing, failing, reply(200, BASE)])
    assert connect(scripted.url).base().in_features == 2
    assert [asked.line for asked in scripted.asked] == ["GET /base HTTP/1.1"] * 3


@pytest.mark.parametrize("code", ["queue_full", "rate_limited", "not_ready", "catalog_busy"])
def test_a_training_is_sent_again_where_the_service_says_that_it_did_nothing(
    connect: Connect, scripted: Scripted, code: str
) -> None:
    scripted.plan([problem(429 if code in ("queue_full", "rate_limited") else 503, code), reply(202, JOB)])
    assert connect(scripted.url).train("acme", rank=1, **ROWS).id == "j1"
    first, second = scripted.asked
    assert first.body == second.body != b""


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        (hang_up, Unreachable),
        (reply(503, b"no backend", kind="text/plain"), NotReady),
        (reply(429, {"message": "slow down"}), QueueFull),
        (problem(503, "request_timeout"), Exception),
        (problem(503, "storage_failed"), StorageFailed),
        (problem(503, "of_a_newer_service"), NotReady),
        (problem(500, "internal_error"), InternalError),
        (reply(502, b""), InternalError),
    ],
    ids=["hang-up", "proxy's 503", "proxy's 429", "another code", "disk", "newer", "500", "502"],
)
def test_a_change_that_may_have_been_made_is_not_sent_again(
    connect: Connect, scripted: Scripted, failing: Script, error: type[Exception]
) -> None:
    scripted.plan([failing, reply(202, JOB)])
    with pytest.raises(error):
        connect(scripted.url).retry("j1")
    assert len(scripted.asked) == 1


@pytest.mark.parametrize(
    ("call", "failing"),
    [
        ("train", hang_up),
        ("train", reply(503, b"no backend", kind="text/plain")),
        ("train", problem(503, "storage_failed")),
        ("update", hang_up),
        ("evaluate", hang_up),
    ],
    ids=["train", "proxy", "disk", "update", "evaluate"],
)
def test_a_job_that_may_have_been_queued_is_asked_for_again_with_its_key(
    connect: Connect, scripted: Scripted, failing: Script, call: str
) -> None:
    arguments: dict[str, Any] = {
        "train": {"name": "acme", **ROWS},
        "update": {"name": "acme", "add": ROWS},
        "evaluate": {"adapters": "acme", **ROWS},
    }
    running = problem(409, "idempotency_in_progress", Retry_After="0")
    scripted.plan([failing, running, reply(202, JOB, Idempotent_Replayed="true"), reply(202, JOB)])
    client = connect(scripted.url)
    for _ in range(2):
        assert getattr(client, call)(**arguments[call]).id == "j1"
    keys = [asked.headers["idempotency-key"] for asked in scripted.asked]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert len({asked.body for asked in scripted.asked}) == 1


def test_a_job_is_asked_for_by_a_key_of_the_caller_s_own(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([reply(202, JOB), problem(422, "idempotency_key_reused")])
    client = connect(scripted.url)
    assert client.train("acme", idempotency_key="nightly", **ROWS).id == "j1"
    with pytest.raises(IdempotencyKeyReused):
        client.train("other", idempotency_key="nightly", **ROWS)
    assert [asked.headers["idempotency-key"] for asked in scripted.asked] == ["nightly"] * 2
    for key in ("", " x", "a\nb", "\N{SNOWMAN}", "k" * 256):
        with pytest.raises(InvalidInput, match="idempotency key"):
            client.train("acme", idempotency_key=key, **ROWS)
    assert len(scripted.asked) == 2


@pytest.mark.parametrize("call", ["upload", "delete", "roll_back", "cancel", "revert", "retry"])
def test_no_call_that_changes_something_is_sent_again_after_a_lost_connection(
    connect: Connect, scripted: Scripted, call: str
) -> None:
    arguments: dict[str, Any] = {
        "upload": {"name": "acme", "A": [[1.0]], "B": [[1.0, 2.0]]},
        "delete": {"name": "acme"},
        "roll_back": {"name": "acme", "version": 1},
        "cancel": {"job_id": "j1"},
        "revert": {"job_id": "j1"},
        "retry": {"job_id": "j1"},
    }
    with pytest.raises(Unreachable, match="broke"):
        getattr(connect(scripted.url), call)(**arguments[call])
    assert len(scripted.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 304, 307, 308])
def test_an_answer_that_sends_on_is_no_success(connect: Connect, scripted: Scripted, status: int) -> None:
    scripted.plan([reply(status, b"", Location="https://elsewhere/adapters/acme")] * 2)
    client = connect(scripted.url)
    for call in (client.delete, client.adapter):
        with pytest.raises(BadAnswer, match="https://elsewhere/adapters/acme") as failed:
            call("acme")
        assert failed.value.status == status
    assert len(scripted.asked) == 2


def test_a_file_is_read_from_its_beginning_each_time(connect: Connect, scripted: Scripted, tmp_path: Path) -> None:
    file = tmp_path / "people.csv"
    file.write_bytes(b"age\n" + b"41\n" * 300_000)
    scripted.plan([problem(503, "not_ready"), problem(422, "invalid_dataset")])
    with pytest.raises(Exception, match="invalid_dataset"):
        connect(scripted.url).put_dataset("people", file)
    assert [asked.body == file.read_bytes() for asked in scripted.asked] == [True, True]
    assert scripted.asked[0].headers["content-length"] == str(file.stat().st_size)


@pytest.mark.parametrize(("status", "code"), [(503, "not_ready"), (429, "rate_limited")])
def test_retry_after_is_waited_for(scripted: Scripted, status: int, code: str) -> None:
    scripted.plan([problem(status, code, Retry_After="1"), reply(200, BASE)])
    begun = time.monotonic()
    with Client(scripted.url) as client:
        client.base()
    assert time.monotonic() - begun >= 1


def test_no_retry_goes_past_the_time_that_a_call_has(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([problem(503, "catalog_busy", Retry_After="60")] * 3)
    begun = time.monotonic()
    with pytest.raises(CatalogBusy):
        connect(scripted.url, timeout=5.0).base()
    assert time.monotonic() - begun < scaled(4)
    assert len(scripted.asked) == 1


def test_no_more_retries_than_are_asked_for(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([problem(429, "queue_full")] * 9)
    with pytest.raises(QueueFull):
        connect(scripted.url, retries=1).base()
    assert len(scripted.asked) == 2
    with pytest.raises(QueueFull):
        connect(scripted.url, retries=0).base()
    assert len(scripted.asked) == 3


def test_a_service_that_says_nothing_is_not_waited_for_longer_than_asked(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([stay_silent(scripted)])
    begun = time.monotonic()
    with pytest.raises(TimedOut, match=scripted.url):
        connect(scripted.url, timeout=0.5).base()
    assert time.monotonic() - begun < scaled(5)


def test_a_predictions_time_is_told_to_the_service(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([problem(422, "wrong_shape")] * 2)
    with pytest.raises(Exception, match="wrong_shape"):
        connect(scripted.url).predict(None, np.zeros((1, 3)), timeout=2.5)
    assert [asked.headers["x-request-timeout"] for asked in scripted.asked] == ["2.5", "2.5"]


def test_nothing_at_the_address_is_said_with_the_address_and_what_to_do(connect: Connect) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Unreachable, match=url) as failed:
        connect(url, retries=1).base()
    assert "loraplex serve" in str(failed.value.expected)
    assert connect(url).ready() is False


def test_another_server_at_the_address_is_told_from_this_one(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([reply(200, b"<html>hello</html>", kind="text/html"), reply(200, {"other": "api"})])
    client = connect(scripted.url)
    for _ in range(2):
        with pytest.raises(BadAnswer, match="/base"):
            client.base()


def test_being_cancelled_ends_a_pause_between_two_attempts(scripted: Scripted) -> None:
    scripted.plan([problem(503, "not_ready", Retry_After="20")] * 2)

    async def ask() -> None:
        async with AsyncClient(scripted.url) as client:
            async with asyncio.timeout(1):
                await client.base()

    with pytest.raises(TimeoutError):
        asyncio.run(ask())


def test_waits_grow_and_differ_and_are_never_less_than_asked_for() -> None:
    assert [seconds_to_wait(attempt, 0, chance=1) for attempt in range(7)] == [0.25, 0.5, 1, 2, 4, 8, 8]
    assert seconds_to_wait(0, 0, chance=0) == 0.125
    assert seconds_to_wait(0, 3, chance=0) > 3
    assert retry_after({"retry-after": "Fri, 31 Dec 2999 23:59:59 GMT"}) > 1e9
    assert retry_after({"retry-after": "soon"}) == 0
