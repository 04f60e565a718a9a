"""Servers as processes of their own: started, asked, stopped while others are measured, ended with all they started."""

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from benchmarks.failures import BenchFailed

ROOT = Path(__file__).resolve().parent.parent
LORAPLEX = ROOT / ".venv" / "bin" / "loraplex"
_READY_SECONDS = 180.0
_END_SECONDS = 10.0
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class Server:
    """One server and the processes that it started."""

    def __init__(
        self, command: Sequence[str], *, port: int, log: Path, environment: Mapping[str, str], root: Path = ROOT
    ) -> None:
        self.port = port
        self._log = log
        with log.open("ab") as output:
            self.started_at = time.monotonic()
            self._process = psutil.Popen(
                command, cwd=root, env=dict(environment), stdout=output, stderr=output, start_new_session=True
            )

    def wait_until(self, request: bytes) -> float:
        """Seconds from the start until `request` is answered with 200; raises `BenchFailed` with the log's end."""
        while time.monotonic() - self.started_at < _READY_SECONDS:
            if self._process.poll() is not None:
                break
            try:
                if exchange(self.port, request, seconds=10)[0] == 200:
                    return time.monotonic() - self.started_at
            except (OSError, HTTPException):
                pass
            time.sleep(0.02)
        raise BenchFailed(f"{self._log.stem} did not get ready: {self._log.read_text()[-2000:]}")

    def tree(self) -> list[psutil.Process]:
        """Return the current processes of the server."""
        return [self._process, *self._process.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """CPU time of all of them."""
        return sum(sum(process.cpu_times()[:2]) for process in self.tree())

    def rss(self) -> int:
        """Return the resident bytes of all of them."""
        total = 0
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def largest_rss(self) -> int:
        """Resident bytes of the largest of them: the one that answers."""
        return int(max(process.memory_info().rss for process in self.tree()))

    def pause(self) -> None:
        """Take no CPU until `resume`."""
        for process in self.tree():
            process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on."""
        for process in self.tree():
            process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it, and whatever it leaves behind. Some peers' children outlive their parent."""
        if self._process.poll() is not None:
            return
        self.resume()
        family = self.tree()
        self._process.terminate()
        _, alive = psutil.wait_procs(family, timeout=_END_SECONDS)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=_END_SECONDS)


def start_service(
    data_dir: Path, base: str, *, root: Path = ROOT, launcher: Sequence[str] = (), **settings: object
) -> Server:
    """Start `loraplex serve` of the checkout in `root`, with one worker, and no trainer unless `settings` has some.

    `launcher` is a command that runs the one that follows it, such as `prlimit`.
    """
    given = {"base": base, "workers": 1, "trainers": 0, "device": "cpu"} | settings
    ours = {f"LORAPLEX_{name.upper()}": str(value) for name, value in given.items()}
    port = free_port()
    command = [*launcher, str(LORAPLEX), "serve", "--port", str(port), "--data-dir", str(data_dir)]
    # Several services may share a data folder, but not a log.
    log = data_dir.parent / f"loraplex-{port}.log"
    environment = plain_environment() | ours
    if root != ROOT:
        # The packages of .venv, but that checkout's code: its paths come before those of the editable installation.
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (root, root / "client")))
    return Server(command, port=port, log=log, environment=environment, root=root)


def start_peer(name: str, logs: Path, **arguments: object) -> Server:
    """`benchmarks/servers/NAME.py`, under the Python that runs this."""
    port = free_port()
    command = [sys.executable, "-m", f"benchmarks.servers.{name}", "--port", str(port)]
    for key, value in arguments.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    return Server(command, port=port, log=logs / f"{name}-{port}.log", environment=plain_environment())


def plain_environment() -> dict[str, str]:
    """Return an environment with one thread for linear algebra, none of our settings and no proxy."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("LORAPLEX_") and not name.lower().endswith("_proxy")
    }
    return inherited | _ONE_THREAD


def exchange(port: int, request: bytes, *, seconds: float = 60) -> tuple[int, Message, bytes]:
    """Send one whole request on a connection of its own; the status, the headers and the body that came back."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        return converse(connection, request)


def converse(connection: socket.socket, request: bytes) -> tuple[int, Message, bytes]:
    """Send a request on a connection that stays open."""
    connection.sendall(request)
    with HTTPResponse(connection) as response:
        response.begin()
        return response.status, response.headers, response.read()


def get(path: str) -> bytes:
    """Return the bytes of a GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
