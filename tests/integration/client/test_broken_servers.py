"""Servers that answer nonsense, or for ever: what comes of it is one of the client's own errors, in time."""

import asyncio
import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import pytest
import torch
from loraplex import AsyncClient, BadAnswer, Client, InvalidInput, QueueFull, TimedOut, WrongType

from tests.integration.client.conftest import Connect
from tests.integration.client.scripted_server import Script, Scripted, event, problem, reply, stream
from tests.integration.client.test_adapters import CONFIG, TENSORS, zip_of
from tests.support.deadlines import scaled

ROWS = np.ones((2, 2), np.float32)
RIGHT: dict[str, Any] = {"model_name": "a", "model_version": "1"}


def tensor(shape: object, content: bytes = bytes(8), *, header: bytes | None = None, timing: str = "") -> Script:
    """A binary answer that says to have this shape."""
    head = json.dumps(RIGHT | {"outputs": [{"name": "outputs", "shape": shape}]}).encode() if header is None else header
    length = {"Inference_Header_Content_Length": str(len(head)), "Server_Timing": timing}
    return reply(200, head + content, kind="application/octet-stream", **length)


def drip(connection: socket) -> None:
    """An answer whose end never comes, though something always does."""
    with suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(200):
            connection.sendall(b" ")
            time.sleep(0.05)


@pytest.mark.parametrize(
    "answer",
    [
        tensor([1, 2]),
        tensor([0, 1], b""),
        tensor([], bytes(4)),
        tensor([2, 1, 1]),
        tensor([-1]),
        tensor(None),
        tensor([2, 1], header=b"[" * 100_000),
        tensor([2, 1], header=b'{"outputs": [{"shape": [2, 1]}], "model_name": "a", "model_version": 1e999}'),
    ],
    ids=["rows", "none", "0-d", "3-d", "unknown", "null", "nested", "infinite"],
)
def test_a_tensor_whose_header_lies_is_a_bad_answer(connect: Connect, scripted: Scripted, answer: Script) -> None:
    scripted.plan([answer])
    with pytest.raises(BadAnswer):
        connect(scripted.url).predict("a", ROWS)


def test_times_that_cannot_be_read_leave_the_outputs(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([tensor([2, 1], timing="queue;dur=..., forward;dur=1.5")])
    answer = connect(scripted.url).predict("a", ROWS)
    assert (answer.outputs.shape, answer.queue_ms, answer.forward_ms) == ((2, 1), 0, 1.5)


def test_an_answer_that_drips_is_late(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([drip])
    begin = time.monotonic()
    with pytest.raises(TimedOut):
        connect(scripted.url, timeout=0.5).base()
    assert time.monotonic() - begin < scaled(5)


def test_a_head_that_drips_is_late_on_an_event_loop(scripted: Scripted) -> None:
    def drip_head(connection: socket) -> None:
        with suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            for _ in range(200):
                connection.sendall(b"X: y\r\n")
                time.sleep(0.05)

    async def ask() -> None:
        async with AsyncClient(scripted.url, timeout=0.5) as client:
            await client.base()

    scripted.plan([drip_head])
    with pytest.raises(TimedOut):
        asyncio.run(ask())


def test_the_body_has_the_time_that_its_head_left(connect: Connect, scripted: Scripted) -> None:
    left = threading.Event()

    def late_head(connection: socket) -> None:
        time.sleep(3)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        # Sooner than the four seconds that one read may take.
        connection.settimeout(3.5)
        with suppress(TimeoutError):
            if connection.recv(1) == b"":
                left.set()

    scripted.plan([late_head])
    with pytest.raises(TimedOut):
        connect(scripted.url, timeout=4.0, retries=0).base()
    assert left.wait(10)


def test_a_row_of_an_adapter_that_is_not_there_is_a_bad_answer(connect: Connect, scripted: Scripted) -> None:
    acme = {"name": "acme", "version": 1, "digest": "sha256:1"}
    answers = [{"outputs": [[1.0]], "adapters": [acme], "row_adapters": [place]} for place in (3, 1, -1, "0", [0])]
    scripted.plan([reply(200, answer) for answer in answers])
    for _ in answers:
        with pytest.raises(BadAnswer):
            connect(scripted.url).predict(["acme"], np.ones((1, 2)))


def test_a_date_past_all_dates_is_no_wait(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([problem(429, "queue_full", Retry_After="Thu, 01 Jan 99999999999999999999 00:00:00 GMT")])
    with pytest.raises(QueueFull):
        connect(scripted.url, retries=0).base()


@pytest.mark.parametrize(
    "told",
    [event("status", {"status": "of a newer service"}, "1"), event("progress", {}, "1"), b"data: " + b"[" * 10**5],
    ids=["status", "progress", "nested"],
)
def test_an_event_of_another_kind_is_a_bad_answer(connect: Connect, scripted: Scripted, told: bytes) -> None:
    scripted.plan([stream(told.rstrip() + b"\n\n")])
    with pytest.raises(BadAnswer):
        list(connect(scripted.url).events("j1"))


def test_an_event_id_may_have_any_letters(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([stream('id: é\nevent: log\ndata: {"time": "t", "text": "x"}\n\n'.encode()), reply(204, b"")])
    assert [each.id for each in connect(scripted.url).events("j1")] == ["é"]
    assert scripted.asked[1].headers["last-event-id"] == "é"


@pytest.mark.parametrize("compression", [12, 14], ids=["bzip2", "lzma"])
def test_a_download_packed_otherwise_is_a_bad_answer(
    connect: Connect, scripted: Scripted, tmp_path: Path, compression: int
) -> None:
    archive = zip_of({CONFIG: b"{}", TENSORS: b"x"}, compression=compression)
    scripted.plan([reply(200, archive, kind="application/zip")])
    with pytest.raises(BadAnswer):
        connect(scripted.url).download("a", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_says_where_it_cannot_be_written(connect: Connect, scripted: Scripted, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    scripted.plan([reply(200, zip_of({CONFIG: b"{}", TENSORS: b"x"}), kind="application/zip")])
    with pytest.raises(InvalidInput, match="cannot be written") as failed:
        connect(scripted.url).download("a", tmp_path / "file")
    assert failed.value.field == "folder"


@pytest.mark.parametrize("value", ["Bearer secret\n", " secret", "sec\x00ret"])
def test_a_header_that_cannot_be_sent_is_said_without_what_is_in_it(value: str) -> None:
    with pytest.raises(InvalidInput, match="Authorization") as failed:
        Client(headers={"Authorization": value})
    assert "secret" not in f"{failed.value} {failed.value.given}"


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_time_that_nobody_can_wait_is_refused_for_one_call_too(
    connect: Connect, scripted: Scripted, seconds: float, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="timeout"):
        connect(scripted.url).download("a", tmp_path, timeout=seconds)
    assert scripted.asked == []


def test_tensors_that_are_no_arrays_are_said_and_views_are_read(connect: Connect, scripted: Scripted) -> None:
    client = connect(scripted.url)
    for odd in (torch.ones(2, 2).to_sparse(), torch.ones(2, 2, device="meta")):
        with pytest.raises(WrongType, match="inputs"):
            client.predict("a", odd)
    scripted.plan([tensor([2, 1])])
    negative = torch.complex(torch.zeros(2, 2), torch.ones(2, 2)).conj().imag
    assert negative.is_neg()
    client.predict("a", negative)
    sent = np.frombuffer(scripted.asked[0].body[-16:], "<f4")
    assert sent.tolist() == [-1, -1, -1, -1]
