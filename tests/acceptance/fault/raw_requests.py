"""HTTP/1.1 over bare asyncio streams: cheap enough to offer more than a service can answer, and free to be slow."""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress

_SECONDS = 60


def post_request(path: str, body: Mapping[str, object]) -> bytes:
    """Return a request with JSON."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class Connection:
    """Connection that sends bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> "Connection":
        """Connect to a service on this machine."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def send(self, content: bytes) -> None:
        """Send some bytes."""
        self._writer.write(content)
        await self._writer.drain()

    async def receive(self) -> tuple[int, bytes]:
        """Return the status and the body of the next answer."""
        async with asyncio.timeout(_SECONDS):
            head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or b"0")
            return int(head.split(b" ", 2)[1]), await self._reader.readexactly(length)

    async def close(self) -> None:
        """Close it."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


async def offer(
    port: int, request: bytes, *, rate: float, seconds: float, connections: int
) -> Counter[tuple[int, bytes]]:
    """Send a request at a rate, also if answers are late; return how often each answer came.

    A request whose turn comes while all connections wait for an answer is counted as `(0, b"")`.
    """
    answers: Counter[tuple[int, bytes]] = Counter()
    idle = [await Connection.open(port) for _ in range(connections)]
    tasks: set[asyncio.Task[None]] = set()

    async def exchange(connection: Connection) -> None:
        await connection.send(request)
        answers[await connection.receive()] += 1
        idle.append(connection)

    loop = asyncio.get_running_loop()
    begin, sent = loop.time(), 0
    while (now := loop.time() - begin) < seconds:
        while sent < rate * now:
            sent += 1
            if idle:
                task = asyncio.create_task(exchange(idle.pop()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            else:
                answers[0, b""] += 1
        await asyncio.sleep(0.001)
    await asyncio.gather(*tasks)
    for connection in idle:
        await connection.close()
    return answers


async def trickle(port: int, content: bytes, *, at_once: int, pause_seconds: float, stop: asyncio.Event) -> int:
    """Send bytes slowly until `stop`, all are sent or the service hangs up; return the status of an answer, or 0."""
    connection = await Connection.open(port)
    try:
        with suppress(ConnectionError):
            for position in range(0, len(content), at_once):
                await connection.send(content[position : position + at_once])
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), pause_seconds)
                if stop.is_set():
                    return 0
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            return (await connection.receive())[0]
        return 0
    finally:
        await connection.close()
