"""No request is answered that was not sent as one, however requests are framed, and both paths answer alike.

`FRAMED_STREAMS=10000` runs the long form.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from adapters.catalog.versions import Publication, Source
from app.http.application import create_app
from app.service import Service
from app.serving import uvicorn_protocol as wire
from app.serving.fast_path import FastPath
from app.settings import LogRequests, Settings
from tests.integration.hostile.framings import IN, MAX_HEAD_BYTES, NOT_OURS, REFUSED, VICTIM, Expected, Maker, Stream
from tests.support.dense_oracle import random_adapter

Answer = tuple[int, dict[bytes, bytes], bytes]

STREAMS = int(os.environ.get("FRAMED_STREAMS", "2500"))
AT_ONCE = 16
SEED = 20
SECONDS = 10
STILL_OPEN = (0, {b"x-request-id": b""}, b"")
_VOLATILE = {b"server-timing", b"x-request-id"}


class _TakesNothing(FastPath):
    """The fast path, if it leaves every request to the application."""

    def may_take(self, *_: object) -> None:
        return None


@asynccontextmanager
async def _listening(service: Service, http: Any) -> AsyncIterator[int]:
    config = uvicorn.Config(create_app(service), http=http, log_config=None, access_log=False, ws="none")
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: http(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    async with server:
        yield server.sockets[0].getsockname()[1]


async def _send(port: int, stream: Stream) -> list[Answer]:
    """All answers to a stream, until the service closes the connection, or `STILL_OPEN` after them if it does not."""
    with socket.socket() as connection:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = bytearray()
        try:
            async with asyncio.timeout(SECONDS):
                await _converse(connection, port, stream, received)
        except TimeoutError:
            return [*_answers(received, stream.expected), STILL_OPEN]
        return _answers(received, stream.expected)


async def _converse(connection: socket.socket, port: int, stream: Stream, received: bytearray) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", port))
    # It may be closed after the last answer while we are still sending. What was answered can be read all the same.
    with suppress(OSError):
        for piece in stream.pieces:
            await loop.sock_sendall(connection, piece)
            for _ in range(3):
                await asyncio.sleep(0)  # The service reads it.
    with suppress(OSError):
        while True:
            if stream.is_cut and len(_answers(received, stream.expected)) >= len(stream.expected):
                connection.shutdown(socket.SHUT_WR)  # The service waits for the rest of the last request.
            part = await loop.sock_recv(connection, 2**16)
            if not part:
                return
            received += part


def _answers(received: bytes | bytearray, expected: Sequence[Expected]) -> list[Answer]:
    """The complete answers in `received`; interim ones are left out."""
    answers: list[Answer] = []
    rest = bytes(received)
    while rest:
        head, end, rest = rest.partition(b"\r\n\r\n")
        if not end:
            break
        line, *fields = head.split(b"\r\n")
        status = int(line.split()[1])
        if status == 100:
            continue
        headers = dict(field.split(b": ", 1) for field in fields)
        has_body = len(answers) >= len(expected) or expected[len(answers)].has_body
        size = int(headers.get(b"content-length", 0)) if has_body else 0
        if len(rest) < size:
            break
        answers.append((status, headers, rest[:size]))
        rest = rest[size:]
    return answers


def _faults(stream: Stream, answers: list[Answer]) -> str:
    """What is wrong with the answers to a stream, or nothing."""
    statuses = [status for status, _, _ in answers]
    if statuses != [expected.status for expected in stream.expected]:
        return f"answered {statuses}"
    for (_, headers, _), expected in zip(answers, stream.expected, strict=True):
        request_id = headers[b"x-request-id"]
        if request_id != expected.request_id if expected.request_id else request_id.startswith(b"r"):
            return f"answered {request_id!r} for {expected}"
        if NOT_OURS.encode() in request_id:
            return f"answered {request_id!r}"
    return ""


def _lasting(answers: list[Answer]) -> list[tuple[int, list[tuple[bytes, bytes]], bytes]]:
    return [
        (status, sorted((name, value) for name, value in headers.items() if name not in _VOLATILE), body)
        for status, headers, body in answers
    ]


async def _try_all(service: Service, through_asgi: Any) -> list[str]:
    made = Maker(SEED)
    faults: list[str] = []
    left, sent = STREAMS, bytearray()

    async def work(ports: Sequence[int]) -> None:
        nonlocal left
        while left and len(faults) < 10:
            left -= 1
            stream = made.stream()
            sent.extend(stream.sent)
            fast, slow = [await _send(port, stream) for port in ports]
            for path, answers in (("fast path", fast), ("ASGI", slow)):
                if fault := _faults(stream, answers):
                    faults.append(f"{path}: {fault}, not {stream.expected}: {stream.pieces}")
            if _lasting(fast) != _lasting(slow):
                faults.append(f"the paths differ: {fast} {slow}: {stream.pieces}")

    async with _listening(service, wire.protocol_factory(service)) as fast, _listening(service, through_asgi) as slow:
        await asyncio.gather(*(work((fast, slow)) for _ in range(AT_ONCE)))
    assert faults or [part for part in REFUSED if part not in sent] == []
    return faults


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(300)  # of the long form half a minute of one core
def test_no_request_is_answered_that_was_not_sent_as_one_and_both_paths_answer_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        data_dir=tmp_path,
        base=f"identity:{IN}",
        log_requests=LogRequests.NONE,
        max_head_bytes=MAX_HEAD_BYTES,
        allowed_hosts="x",
    )
    service = Service(settings)
    adapter = random_adapter(IN, IN, 1, seed=1)
    service.catalog.publish(
        [Publication(name=VICTIM, adapter=adapter, base=service.base, source=Source.UPLOAD, moves_live=True)],
        tenant="default",
    )
    revision = service.catalog.revision()
    with monkeypatch.context() as patched:
        patched.setattr(wire, "FastPath", _TakesNothing)
        through_asgi = wire.protocol_factory(service)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            faults = runner.run(_try_all(service, through_asgi))
        assert faults == [], "\n".join(faults)
        assert service.catalog.revision() == revision
    finally:
        service.close()
