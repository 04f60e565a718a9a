"""Attack the service, and measure what its other clients notice: `python -m benchmarks.attacks`, or `make attacks`.

Beside each attack a probe sends a small `/predict` every 20 ms, each over a connection of its own. The page has the
probe's longest wait, the memory of all processes of the service above idle, and the answers that the attack got. It
writes `benchmarks/ATTACKS.md`. All traffic stays on the loopback interface.
"""

import argparse
import json
import resource
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from benchmarks import machine
from benchmarks.plan import RANK, WIDE
from benchmarks.processes import ROOT, Server, exchange, get, start_service
from benchmarks.progress import say
from benchmarks.report import table
from benchmarks.requests import input_rows, json_request, message
from benchmarks.stores import base_name, make_store_of
from benchmarks.tenants import name_of

_MEBIBYTE = 2**20
_JSON = "Content-Type: application/json"
_PROBE_SECONDS = 0.02
_WATCH_SECONDS = 0.02
_SETTLE_SECONDS = 60.0
_ANSWER_SECONDS = 120.0
_FEW_FILES = ("prlimit", "--nofile=1024:1024")
_PACKAGES = ("torch", "uvicorn", "uvloop", "httptools", "pysimdjson")


@dataclass(frozen=True, slots=True)
class Attack:
    """One way to harm the service, and how the service is started for it."""

    title: str
    run: Callable[[int, "Answers"], None]
    """Called with the service's port."""
    launcher: Sequence[str] = ()
    """Command that starts the service, such as `prlimit`."""


@dataclass(slots=True)
class Answers:
    """Statuses that an attack got; `closed` counts connections that ended without one."""

    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, status: int | str) -> None:
        """Count one answer."""
        with self.lock:
            self.counts[str(status)] += 1


class Probe:
    """A client that sends a small `/predict` again and again, and samples the service's memory."""

    def __init__(self, server: Server, request: bytes) -> None:
        self._server, self._request = server, request
        self._stop = threading.Event()
        self.waits: list[float] = []
        self.answers = Answers()
        self.largest_rss = 0
        self._threads = [threading.Thread(target=self._ask), threading.Thread(target=self._watch)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Probe until the block ends."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def _ask(self) -> None:
        while not self._stop.wait(_PROBE_SECONDS):
            begin = time.monotonic()
            try:
                self.answers.add(exchange(self._server.port, self._request, seconds=_ANSWER_SECONDS)[0])
            except (OSError, HTTPException) as error:
                self.answers.add(type(error).__name__)
            self.waits.append(time.monotonic() - begin)

    def _watch(self) -> None:
        while not self._stop.wait(_WATCH_SECONDS):
            self.largest_rss = max(self.largest_rss, self._server.rss())


def send(port: int, parts: Iterable[bytes], answers: Answers) -> None:
    """Send one request part by part, and count the status of its answer, which may come before its end."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_SECONDS) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
        try:
            head = connection.recv(65_536)
        except OSError:
            head = b""
        answers.add(int(head.split(b" ")[1]) if head.startswith(b"HTTP/1.1 ") else "closed")


def send_together(port: int, requests: Iterable[Iterable[bytes]], answers: Answers) -> None:
    """Send each of the requests from a thread of its own."""
    threads = [threading.Thread(target=send, args=(port, parts, answers)) for parts in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def bodies(method: str, path: str, body: bytes, *, count: int) -> Callable[[int, Answers], None]:
    """Return an attack that sends the same body in `count` requests at once."""
    head = message(path, b"", _JSON).replace(b"POST", method.encode(), 1)
    head = head.replace(b"Content-Length: 0", b"Content-Length: %d" % len(body))
    return lambda port, answers: send_together(port, [(head, body)] * count, answers)


def long_head(port: int, answers: Answers) -> None:
    """Send one header value of 90 MiB."""
    value = b"a" * _MEBIBYTE
    send(port, [b"GET /base HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: ", *[value] * 90, b"\r\n\r\n"], answers)


def many_headers(port: int, answers: Answers) -> None:
    """Send 300 MiB of headers of 1 KiB each."""
    block = b"".join(b"X-%04d: %b\r\n" % (number, b"a" * 1014) for number in range(1024))
    send(port, [b"GET /base HTTP/1.1\r\nHost: 127.0.0.1\r\n", *[block] * 300, b"\r\n"], answers)


def long_url(port: int, answers: Answers) -> None:
    """Send a URL of 90 MiB."""
    send(port, [b"GET /", *[b"a" * _MEBIBYTE] * 90, b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"], answers)


def long_trailers(port: int, answers: Answers) -> None:
    """Send 90 MiB of trailers after a chunked body."""
    head = b"PUT /adapters/x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    block = b"".join(b"X-%04d: %b\r\n" % (number, b"a" * 1014) for number in range(1024))
    send(port, [head, b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", *[block] * 90, b"\r\n"], answers)


def held_bodies(port: int, answers: Answers) -> None:
    """Hold 24 trainings of 60 MiB, all but their last byte, for five seconds, and then end them."""
    body = _valid_training(60 * _MEBIBYTE)
    head = message("/adapters", b"", _JSON)
    head = head.replace(b"Content-Length: 0", b"Content-Length: %d" % len(body))

    def parts() -> Iterator[bytes]:
        yield head
        yield body[:-1]
        time.sleep(5)
        yield body[-1:]

    send_together(port, [parts() for _ in range(24)], answers)


def idle_connections(port: int, answers: Answers) -> None:
    """Open 1,500 connections that send nothing, upload once a second for ten seconds, and close them."""
    factors = {"A": [[0.5]] * WIDE.out_features, "B": [[0.5] * WIDE.in_features]}
    upload = message("/adapters/small", json.dumps(factors).encode(), _JSON).replace(b"POST", b"PUT", 1)
    with ExitStack() as stack:
        for _ in range(1_500):
            with suppress(OSError):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        for _ in range(10):
            send(port, [upload], answers)
            time.sleep(1)


def attacks() -> list[Attack]:
    """Return every attack, in the order of the page."""
    put, train, predict, infer = "/adapters/attack", "/adapters", "/predict", "/v2/models/__base__/infer"
    sixty, four = 60 * _MEBIBYTE, 4 * _MEBIBYTE
    lists = b'{"A":[' + b"[1.5]," * (sixty // 6 - 8) + b"[1.5]]}"
    numbers = b'{"A":[[' + b"1," * (sixty // 2 - 8) + b"1]]}"
    text = b'{"A":"' + b"a" * (sixty - 8) + b'"}'
    nested = b'{"A":' + b"[" * (sixty // 2 - 8) + b"]" * (sixty // 2 - 8) + b"}"
    same_keys = b"{" + b'"A":1,' * (sixty // 6 - 8) + b'"A":1}'
    rows = (
        b'{"name":"attack","rank":4,"data":{"inputs":[' + b"[1.5]," * (sixty // 6 - 16) + b'[1.5]],"targets":[[1.5]]}}'
    )
    valid = _valid_training(sixty)
    empty_lists = b'{"adapter":null,"inputs":[' + b"[]," * (four // 3 - 16) + b"[]]}"
    keys = b"{" + b",".join(b'"%07x":1' % number for number in range(four // 12 - 8)) + b"}"
    infer_lists = b'{"inputs":[' + b"[]," * (four // 3 - 16) + b"[]]}"
    return [
        Attack("one header value of 90 MiB", long_head),
        Attack("300 MiB of headers", many_headers),
        Attack("a URL of 90 MiB", long_url),
        Attack("90 MiB of trailers", long_trailers),
        Attack("2 uploads of 60 MiB of `[1.5],`", bodies("PUT", put, lists, count=2)),
        Attack("2 uploads of 60 MiB of `1,`", bodies("PUT", put, numbers, count=2)),
        Attack("2 uploads of a text of 60 MiB", bodies("PUT", put, text, count=2)),
        Attack("2 uploads of 60 MiB of nested lists", bodies("PUT", put, nested, count=2)),
        Attack("2 uploads of 60 MiB of one key", bodies("PUT", put, same_keys, count=2)),
        Attack("2 trainings of 60 MiB of `[1.5],`", bodies("POST", train, rows, count=2)),
        Attack("2 valid trainings of 60 MiB", bodies("POST", train, valid, count=2)),
        Attack("16 × 4 MiB of `[],` on /predict", bodies("POST", predict, empty_lists, count=16)),
        Attack("16 × 4 MiB of keys on /predict", bodies("POST", predict, keys, count=16)),
        Attack("16 × 4 MiB of `[],` on /v2/…/infer", bodies("POST", infer, infer_lists, count=16)),
        Attack("16 × 4 MiB of keys on /v2/…/infer", bodies("POST", infer, keys, count=16)),
        Attack("24 bodies of 60 MiB held for 5 s", held_bodies),
        Attack("1,500 idle connections, file limit 1,024", idle_connections, launcher=_FEW_FILES),
    ]


def _valid_training(size: int) -> bytes:
    row = input_rows(WIDE)[0].round(6).tolist()
    inputs, targets = json.dumps(row).encode(), json.dumps(row[: WIDE.out_features]).encode()
    count = size // (len(inputs) + len(targets) + 4)
    return (
        b'{"name":"valid","rank":4,"training":{"method":"adamw","epochs":1},"data":{"inputs":[%b],"targets":[%b]}}'
        % (b",".join([inputs] * count), b",".join([targets] * count))
    )


def measure(attack: Attack, root: Path, folder: Path) -> list[str]:
    """Start a service of the checkout in `root`, attack it, and return the line of the page."""
    with ExitStack() as stack:
        store = make_store_of(root, folder / "store", WIDE, tenants=1, rank=RANK)
        server = start_service(store, base_name(WIDE), root=root, launcher=attack.launcher, log_requests="none")
        stack.callback(server.stop)
        server.wait_until(get("/readyz"))
        request = json_request(input_rows(WIDE)[0].tolist(), name_of(0))
        for _ in range(100):
            exchange(server.port, request)
        idle = server.rss()
        probe, answers = Probe(server, request), Answers()
        with probe.running():
            attack.run(server.port, answers)
            time.sleep(1)
        settled, seconds = _settle(server, idle)
    line = [
        f"{max(probe.waits):.3f} s",
        _counts(probe.answers),
        f"{(probe.largest_rss - idle) / _MEBIBYTE:,.0f} MiB",
        f"{(settled - idle) / _MEBIBYTE:,.0f} MiB after {seconds:.0f} s",
        _counts(answers),
    ]
    say(f"{attack.title}: {', '.join(line)}")
    return [attack.title, *line]


def _settle(server: Server, idle: int) -> tuple[int, float]:
    """Wait until memory is within 100 MiB of idle, a minute at most; return it and the seconds waited."""
    begin = time.monotonic()
    while (rss := server.rss()) > idle + 100 * _MEBIBYTE and time.monotonic() - begin < _SETTLE_SECONDS:
        time.sleep(0.5)
    return rss, time.monotonic() - begin


def _counts(answers: Answers) -> str:
    return ", ".join(f"{count} × {status}" for status, count in sorted(answers.counts.items())) or "none"


def main() -> None:
    """Run the attacks and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description="Attack the service.")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout of the service that is attacked")
    parser.add_argument("--only", default="", help="run the attacks whose title contains this, and write no page")
    options = parser.parse_args()
    # The attacker holds as many connections as it opens.
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    lines = []
    for attack in attacks():
        if options.only in attack.title:
            with tempfile.TemporaryDirectory(prefix="loraplex-attacks-") as folder:
                lines.append(measure(attack, options.root, Path(folder)))
    head = ["", "longest wait of the probe", "its answers", "peak above idle", "settled above idle", "the attack got"]
    page = (
        f"# Attacks\n\nWritten by `make attacks`, on {WIDE}, one worker, no trainer. Measured {machine.moment()}.\n\n"
        + table(head, lines)
        + "\n\n"
        + table(["", ""], machine.describe(_PACKAGES).items())
        + "\n"
    )
    if not options.only and options.root == ROOT:
        (ROOT / "benchmarks" / "ATTACKS.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
