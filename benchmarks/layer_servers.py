"""The servers of one layer: started when first needed, stopped (SIGSTOP) while another is measured."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.failures import BenchFailed
from benchmarks.plan import RANK, Plan
from benchmarks.processes import Server, exchange, get, start_peer, start_service
from benchmarks.requests import Shape, json_request, message
from benchmarks.stores import base_name, make_store, memory_bytes
from benchmarks.tenants import name_of

_TOUCH_AT_ONCE = 500


class LayerServers:
    """Every server by its name; all of them end with the stack."""

    def __init__(self, plan: Plan, shape: Shape, folder: Path, stack: ExitStack) -> None:
        self._plan, self._shape, self._folder, self._stack = plan, shape, folder, stack
        self._running: dict[str, Server] = {}
        self._stores: dict[int, Path] = {}

    @contextmanager
    def running(self, name: str) -> Iterator[Server]:
        """Start one server and wait until it is ready; all others are stopped meanwhile."""
        if name in self._running:
            server = self._running[name]
            server.resume()
            if name.startswith("ours"):
                self._read_files(name)
        else:
            server = self._running[name] = self._start(name)
        try:
            yield server
        finally:
            server.pause()

    def speaks_binary(self) -> bool:
        """Whether this service has the Open Inference Protocol."""
        with self.running("ours-one") as server:
            return exchange(server.port, get("/v2/health/live"))[0] == 200

    def _start(self, name: str) -> Server:
        if name.startswith("ours"):
            server = self._start_ours(name)
            ready = get("/readyz")
        else:
            server = self._start_peer(name)
            ready = json_request([0.5] * self._shape.in_features, name_of(0))
        self._stack.callback(server.stop)
        server.wait_until(ready)
        if name.startswith("ours"):
            # The figures are those of a service that has been up for a while, not of a cold start.
            touch(server.port, self._shape, range(self._tenants(name)))
        return server

    def _start_peer(self, name: str) -> Server:
        # Ray puts sockets below this folder, and a socket's path may have 107 characters.
        arguments = {
            "in_features": self._shape.in_features,
            "out_features": self._shape.out_features,
            "adapters": self._plan.tenants if name == "fastapi_peft" else 0,
            "rank": RANK,
            "folder": self._stack.enter_context(TemporaryDirectory(prefix="lb-", ignore_cleanup_errors=True)),
        }
        return start_peer(name, self._folder, **arguments)

    def _start_ours(self, name: str) -> Server:
        plan = self._plan
        tenants = self._tenants(name)
        if tenants not in self._stores:
            folder = self._folder / f"store-{tenants}"
            self._stores[tenants] = make_store(folder, self._shape, tenants=tenants, rank=RANK)
        room = plan.tenants if name == "ours-short" else 2 * tenants
        budget = room * memory_bytes(self._shape, RANK)
        return start_service(self._stores[tenants], base_name(self._shape), cache_bytes=budget)

    def _read_files(self, name: str) -> None:
        """Have the kernel hold its files as it would hold those of a service that had not been stopped meanwhile."""
        for blob in (self._stores[self._tenants(name)] / "blobs").iterdir():
            blob.read_bytes()

    def _tenants(self, name: str) -> int:
        return {"ours-one": 1, "ours-some": self._plan.tenants}.get(name, self._plan.many_tenants)


def touch(port: int, shape: Shape, numbers: range) -> None:
    """Have each of these tenants answer once, so that it is in memory; raises `BenchFailed` where one does not."""
    for first in range(numbers.start, numbers.stop, _TOUCH_AT_ONCE):
        names = [name_of(number) for number in range(first, min(first + _TOUCH_AT_ONCE, numbers.stop))]
        # Zeros are short: this is about the adapters.
        body = json.dumps({"adapters": names, "inputs": [[0] * shape.in_features] * len(names)}, separators=(",", ":"))
        status, _, answer = exchange(port, message("/predict", body.encode(), "Content-Type: application/json"))
        if status != 200:
            raise BenchFailed(f"/predict with {len(names)} adapters answered {status}: {answer[:500]!r}")
