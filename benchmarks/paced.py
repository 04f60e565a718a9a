"""An open loop: requests at fixed times, whether the last ones were answered or not; `python -m benchmarks.paced`.

A process of its own, one thread, epoll. A latency counts from the moment when the request was due, also where it had
to wait for a free connection, so that a server which stalls is charged for all that came due meanwhile (no
"coordinated omission"). A timerfd says how many requests are due: it is finer than epoll's own milliseconds.
"""

import argparse
import ctypes
import json
import math
import os
import select
import socket
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

_MONOTONIC = 1
_STOP_WAITING_SECONDS = 5.0
_CHUNK = 2**18


@dataclass(slots=True)
class Tally:
    """What came of the requests."""

    offered: int = 0
    sent: int = 0
    answered: Counter[int] = field(default_factory=Counter)
    good_in_time: int = 0
    """Answers with 200 that came while requests were still offered: only these are goodput."""
    refused_without_retry_after: int = 0
    broken: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    """Of the answers with 200."""


class Connection:
    """One keep-alive connection with at most one request in flight."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.due = 0.0
        self.unsent = memoryview(b"")
        self._received = b""

    def send(self, request: bytes, due: float) -> bool:
        """Begin a request; False where a part of it has yet to be sent."""
        self.due, self._received, self.unsent = due, b"", memoryview(request)
        return self.push()

    def push(self) -> bool:
        """Send on; True once all of it is out."""
        try:
            self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except BlockingIOError:
            return False
        return not self.unsent

    def receive(self) -> tuple[int, bool] | None:
        """Return the status of a complete answer, and whether it has a Retry-After; raise `OSError`."""
        data = self.socket.recv(_CHUNK)
        if not data:
            raise ConnectionError
        self._received = self._received + data if self._received else data
        head_end = self._received.find(b"\r\n\r\n")
        if head_end < 0:
            return None
        head = self._received[:head_end].lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(self._received) < head_end + 4 + length:
            return None
        return int(head[9:12]), b"retry-after:" in head


class PacedClient:
    """Sends `rate` requests a second over up to `connections` connections."""

    def __init__(self, port: int, requests: list[bytes], draws: list[int], *, rate: float, connections: int) -> None:
        self._port, self._requests, self._draws, self._rate = port, requests, draws, rate
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._idle: list[Connection] = []
        self._due: deque[float] = deque()
        for _ in range(connections):
            self._connect()
        self._position = 0
        self.tally = Tally()

    def run(self, seconds: float, *, warm_seconds: float) -> None:
        """Offer for `warm_seconds` unseen and then for `seconds`; answers may come a little later."""
        timer = _timer(1 / self._rate)
        self._epoll.register(timer, select.EPOLLIN)
        begin = time.monotonic()
        offered, until, counted_from = 0, begin + warm_seconds + seconds, begin + warm_seconds
        while (now := time.monotonic()) < until + _STOP_WAITING_SECONDS:
            if now >= until and len(self._idle) == len(self._connections):
                break
            for descriptor, event in self._epoll.poll(0.1):
                if descriptor == timer:
                    os.read(timer, 8)
                else:
                    self._advance(self._connections[descriptor], event, counted_from, until)
            # What is due is computed from the clock: a late wake-up delays requests, and never drops one.
            while (due := begin + offered / self._rate) <= min(time.monotonic(), until):
                self._due.append(due)
                self.tally.offered += due >= counted_from
                offered += 1
            if time.monotonic() >= until:
                self._due.clear()
            while self._due and self._idle:
                self._send(self._idle.pop(), self._due.popleft(), counted_from)

    def _send(self, connection: Connection, due: float, counted_from: float) -> None:
        request = self._requests[self._draws[self._position % len(self._draws)]]
        self._position += 1
        self.tally.sent += due >= counted_from
        if not connection.send(request, due):
            self._epoll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)

    def _advance(self, connection: Connection, event: int, counted_from: float, until: float) -> None:
        try:
            if event & select.EPOLLOUT and connection.unsent and connection.push():
                self._epoll.modify(connection.socket, select.EPOLLIN)
            answer = connection.receive() if event & ~select.EPOLLOUT else None
        except OSError:
            self.tally.broken += 1
            self._epoll.unregister(connection.socket)
            del self._connections[connection.socket.fileno()]
            connection.socket.close()
            self._connect()
            return
        if answer is not None:
            self._idle.append(connection)
            self.tally.good_in_time += answer[0] == 200 and counted_from <= time.monotonic() < until
            if connection.due >= counted_from:
                self._count(connection, *answer)

    def _count(self, connection: Connection, status: int, has_retry_after: bool) -> None:
        self.tally.answered[status] += 1
        if status == 200:
            self.tally.latencies_ms.append(1000 * (time.monotonic() - connection.due))
        elif status == 429 and not has_retry_after:
            self.tally.refused_without_retry_after += 1

    def _connect(self) -> None:
        connection = Connection(self._port)
        self._connections[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket, select.EPOLLIN)
        self._idle.append(connection)


def percentile(values: list[float], percent: float) -> float | None:
    """Return the smallest value that at least `percent` of the values do not exceed; None without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else None


def _timer(interval: float) -> int:
    """Return a descriptor that becomes readable every `interval` seconds (Python 3.11 has no call for it)."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.timerfd_create(_MONOTONIC, os.O_NONBLOCK)
    nanoseconds = max(1, round(interval * 1e9))
    part = (nanoseconds // 10**9, nanoseconds % 10**9)
    if descriptor < 0 or libc.timerfd_settime(descriptor, 0, (ctypes.c_long * 4)(*part, *part), None):
        raise OSError(ctypes.get_errno(), "no timerfd")
    return descriptor


def main() -> None:
    """Offer, and print what came of it as one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name, kind in {"port": int, "rate": float, "connections": int, "seconds": float, "warm-seconds": float}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    given = parser.parse_args()
    lengths = [int(line) for line in (given.folder / "lengths.txt").read_text().split()]
    draws = [int(line) for line in (given.folder / "draws.txt").read_text().split()]
    with (given.folder / "requests.bin").open("rb") as file:
        requests = [file.read(length) for length in lengths]
    client = PacedClient(given.port, requests, draws, rate=given.rate, connections=given.connections)
    cpu, begin = time.process_time(), time.monotonic()
    client.run(given.seconds, warm_seconds=given.warm_seconds)
    share = (time.process_time() - cpu) / (time.monotonic() - begin)
    tally = client.tally
    told = {
        "offered": tally.offered,
        "sent": tally.sent,
        "answered": dict(tally.answered),
        "good_in_time": tally.good_in_time,
        "refused_without_retry_after": tally.refused_without_retry_after,
        "broken": tally.broken,
        "p50_ms": percentile(tally.latencies_ms, 50),
        "p99_ms": percentile(tally.latencies_ms, 99),
        "client_cpu": share,
    }
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
