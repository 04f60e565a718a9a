"""A Ray cluster of the tests' own: nodes on loopback, each with processes and a small share of this machine."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests.support.deadlines import scaled
from tests.support.external_programs import skip_or_fail
from tests.support.service import eventually, free_port

_SECONDS_TO_START = 60.0
_NODE_BYTES = 2 * 2**30
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # By default, a dead node is found after more than ten seconds.
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "2",
}


class RayCluster:
    """A head node, which Ray Client connects to, and other nodes that `add_node` starts and `kill_node` kills."""

    processes: "list[subprocess.Popen[bytes]]"
    """The first process of each node, that of the head node first."""

    def __init__(self, *, cores: int = 1, environment: Mapping[str, str] | None = None) -> None:
        """Start the head node. environment: variables that the nodes have in addition."""
        if find_spec("ray") is None:
            skip_or_fail("ray is not installed")
        self.token = secrets.token_hex(32)
        # Paths of sockets are short, and those of pytest's folders are not.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self._environment = {**os.environ, **(environment or {}), **self.environment, **_SETTINGS}
        self.processes = []
        self._port, self._client_port = free_port(), free_port()
        self._start(
            "--head",
            f"--port={self._port}",
            f"--ray-client-server-port={self._client_port}",
            f"--temp-dir={self.folder}",
            "--include-dashboard=false",
            f"--num-cpus={cores}",
        )

    @property
    def address(self) -> str:
        """The value of `EXECUTOR`."""
        return f"ray://127.0.0.1:{self._client_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a trainer needs to be let in."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def add_node(self, *, cores: int = 1) -> "subprocess.Popen[bytes]":
        """Start another node; return its first process."""
        return self._start(f"--address=127.0.0.1:{self._port}", f"--num-cpus={cores}")

    def kill_node(self, node: "subprocess.Popen[bytes]") -> None:
        """End every process of a node without a chance to do anything."""
        self.processes.remove(node)
        first = psutil.Process(node.pid)
        # Stopped first, so that none starts another meanwhile.
        first.suspend()
        processes = [first, *first.children(recursive=True)]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes[1:], timeout=scaled(10.0))
        node.wait()

    def close(self) -> None:
        """End all nodes, and remove their files."""
        for node in reversed([*self.processes]):
            self.kill_node(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *options: str) -> "subprocess.Popen[bytes]":
        program = str(Path(sys.executable).with_name("ray"))
        number = len(list(self.folder.glob("node-*")))
        log = self.folder / f"node-{number}"
        command = [
            *(program, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats"),
            *(f"--memory={_NODE_BYTES}", f"--object-store-memory={100 * 2**20}", "--include-log-monitor=false"),
            *options,
        ]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self._environment, cwd=self.folder
            )
        self.processes.append(process)

        def has_started() -> bool:
            assert process.poll() is None, log.read_text()
            return "Ray runtime started" in log.read_text()

        eventually(has_started, seconds=_SECONDS_TO_START, what="a Ray node")
        return process
