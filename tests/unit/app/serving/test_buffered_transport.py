"""Answers leave in one write, whole and in order."""

import asyncio

from app.serving.buffered_transport import BufferedTransport, FlushQueue


class _Server(asyncio.Protocol):
    def __init__(self, writes: list[bytes]) -> None:
        self._writes = writes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        joined = BufferedTransport(transport, FlushQueue())
        for data in self._writes:
            joined.write(data)
        joined.close()


async def _received(writes: list[bytes]) -> bytes:
    server = await asyncio.get_running_loop().create_server(lambda: _Server(writes), "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        everything = await reader.read()
        writer.close()
    return everything


def test_what_was_written_arrives_whole_and_in_order_before_the_connection_closes() -> None:
    writes = [b"head", b"x" * 300_000, b"", b"body", b"y" * 70_000, b"end"]

    assert asyncio.run(_received(writes)) == b"".join(writes)


class _Recorder(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))


async def _turns(recorder: _Recorder) -> list[list[bytes]]:
    joined = BufferedTransport(recorder, FlushQueue())
    seen = []
    for writes in ([b"head", b"body"], [b"more"]):
        for data in writes:
            joined.write(data)
        seen.append(list(recorder.sent))
        await asyncio.sleep(0)
        seen.append(list(recorder.sent))
    recorder.closing = True
    joined.write(b"late")
    await asyncio.sleep(0)
    return [*seen, list(recorder.sent)]


def test_the_writes_of_a_turn_leave_as_one_in_the_next_turn_and_none_after_the_connection_was_lost() -> None:
    assert asyncio.run(_turns(_Recorder())) == [
        [],
        [b"headbody"],
        [b"headbody"],
        [b"headbody", b"more"],
        [b"headbody", b"more"],
    ]


async def _flushes(recorder: _Recorder) -> list[list[bytes]]:
    joined = BufferedTransport(recorder, FlushQueue())
    seen = []
    for data in (b"x" * (2**16 - 1), b"y", b"z", b"end"):
        joined.write(data)
        seen.append(list(recorder.sent))
    await asyncio.sleep(0)
    return [*seen, list(recorder.sent)]


def test_more_than_64_kib_of_writes_leave_in_the_same_turn() -> None:
    large = b"x" * (2**16 - 1) + b"yz"

    assert asyncio.run(_flushes(_Recorder())) == [[], [], [large], [large], [large, b"end"]]
