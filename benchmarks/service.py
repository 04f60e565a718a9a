"""Requests a second over HTTP: loraplex and what one would otherwise use, one load at a time, in rounds."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.answers import check_answer
from benchmarks.layer_servers import LayerServers
from benchmarks.plan import RANK, Plan
from benchmarks.processes import Server, exchange
from benchmarks.progress import say
from benchmarks.requests import Mix, Shape, input_rows, nth_request, write_requests
from benchmarks.service_rows import Row, rows_of
from benchmarks.stores import load_base
from benchmarks.wrk import load

MAIN = 16
"""The number of connections that the bars are about."""
_WARM_SECONDS = 2.0
_CHECKED_REQUEST = 3


def measure(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """Return a record for each measurement, on all layers."""
    records: list[dict[str, Any]] = []
    for shape in (*plan.service_shapes, *plan.more_service_shapes):
        every = shape in plan.service_shapes
        connections = plan.connections if every else {MAIN: plan.more_rounds}
        with ExitStack() as stack:
            bench = _LayerBench(plan, shape, folder / f"{shape.in_features}-{shape.out_features}", stack)
            rows = bench.those_that_can(rows_of(plan, every=every))
            for number in range(max(connections.values())):
                records += bench.round(number, rows, [c for c, rounds in connections.items() if number < rounds])
    return records


class _LayerBench:
    """One layer's servers, requests and right answers."""

    def __init__(self, plan: Plan, shape: Shape, folder: Path, stack: ExitStack) -> None:
        folder.mkdir(parents=True)
        self._plan, self._shape, self._folder = plan, shape, folder
        self._servers = LayerServers(plan, shape, folder, stack)
        self._weight_OI = load_base(shape).weight_OI.numpy()
        self._rows_NI = input_rows(shape)
        self._requests: dict[tuple[Mix, bool], Path] = {}

    def those_that_can(self, rows: list[Row]) -> list[Row]:
        """Without the binary lines of a service that has no binary form, which is said aloud."""
        if self._servers.speaks_binary():
            return rows
        say(f"{self._shape}: no binary lines, this service does not speak the Open Inference Protocol")
        return [row for row in rows if not (row.binary and row.server.startswith("ours"))]

    def round(self, number: int, rows: list[Row], connections: list[int]) -> Iterator[dict[str, Any]]:
        """Each line once with each number of connections; another one comes first each round."""
        turn = number * 5 % len(rows)
        for row in rows[turn:] + rows[:turn]:
            folder = self._requests_of(row)
            with self._servers.running(row.server) as server:
                self._check(row, server, folder)
                if number == 0:
                    load(server.port, folder, connections=MAIN, seconds=_WARM_SECONDS)
                for count in connections:
                    yield self._measure(row, server, folder, count, number)

    def _measure(self, row: Row, server: Server, folder: Path, connections: int, number: int) -> dict[str, Any]:
        before, begin = server.cpu_seconds(), time.monotonic()
        start = 7_919 * number + 104_729 * connections
        seconds = self._plan.load_seconds if connections == MAIN else self._plan.side_load_seconds
        measured = load(server.port, folder, connections=connections, seconds=seconds, start=start)
        cpu = (server.cpu_seconds() - before) / (time.monotonic() - begin)
        say(f"{self._shape} {row.key}, {connections} connections: {measured.requests_per_second:.0f} requests/s")
        key = {"layer": str(self._shape), "row": row.key, "connections": connections, "round": number}
        return key | asdict(measured) | {"server_cpu": cpu}

    def _requests_of(self, row: Row) -> Path:
        key = (row.mix, row.binary)
        if key not in self._requests:
            folder = self._folder / f"requests-{len(self._requests)}"
            self._requests[key] = write_requests(folder, self._shape, row.mix, binary=row.binary)
        return self._requests[key]

    def _check(self, row: Row, server: Server, folder: Path) -> None:
        if row.server == "echo":
            return
        check_answer(
            exchange(server.port, nth_request(folder, _CHECKED_REQUEST)),
            who=f"{row.key} on {self._shape}",
            weight_OI=self._weight_OI,
            row_I=self._rows_NI[_CHECKED_REQUEST % len(self._rows_NI)],
            shape=self._shape,
            mix=row.mix,
            number=_CHECKED_REQUEST,
            rank=RANK,
            binary=row.binary,
        )
