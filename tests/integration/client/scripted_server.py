"""A real socket server that answers by script: 429, 503, a hang-up, silence, an event stream that breaks."""

import json
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Script = Callable[[socket.socket], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that came in."""

    line: str
    headers: dict[str, str]
    body: bytes


class Scripted:
    """Answers each request with the next of `scripts`, one a connection, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self._scripts: list[Script] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self.held = threading.Event()
        """Set when the test is over: until then, silence holds a connection."""
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def plan(self, scripts: Sequence[Script]) -> None:
        """What to do with the next connections."""
        self._scripts.extend(scripts)

    def __enter__(self) -> "Scripted":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.held.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                asked = _read(connection)
                if asked is None:
                    continue
                self.asked.append(asked)
                (self._scripts.pop(0) if self._scripts else hang_up)(connection)


def reply(status: int, body: object, *, kind: str = "application/json", **headers: str) -> Script:
    """An answer in JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(content)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return _sends("\r\n".join([*lines, "", ""]).encode() + content)


def problem(status: int, code: str, **headers: str) -> Script:
    """An error as the service itself answers."""
    body = {"type": f"urn:loraplex:{code}", "title": "", "status": status, "detail": f"it is {code}", "code": code}
    return reply(status, body, kind="application/problem+json", **headers)


def stream(*chunks: bytes, end: Script | None = None) -> Script:
    """A stream of events that then breaks off, without the end that it announces, or goes on with `end`."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    sends = _sends(head + body)

    def play(connection: socket.socket) -> None:
        sends(connection)
        if end is not None:
            end(connection)

    return play


def event(name: str, data: dict[str, Any], event_id: str) -> bytes:
    """One event of a job."""
    return f"event: {name}\ndata: {json.dumps(data)}\nid: {event_id}\n\n".encode()


def hang_up(connection: socket.socket) -> None:
    """Close the connection without an answer."""


def stay_silent(server: Scripted) -> Script:
    """Say nothing until the test is over."""

    def play(_connection: socket.socket) -> None:
        server.held.wait(30)

    return play


def _sends(content: bytes) -> Script:
    def play(connection: socket.socket) -> None:
        connection.sendall(content)

    return play


def _read(connection: socket.socket) -> Asked | None:
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = connection.recv(65536)
        if not chunk:
            return None
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    line, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    return Asked(line, headers, body)
