"""`/predict` on PostgreSQL beside `/predict` on SQLite: `python -m benchmarks.databases`, or `make databases`.

Three services of one worker have the same adapters: on SQLite, on PostgreSQL over loopback, and on PostgreSQL behind a
proxy that adds 1 ms per round trip. They take turns as in `benchmarks.pairs`. The figures are medians over rounds of
the rate on PostgreSQL over that on SQLite, and of the difference of the median latencies. It writes
`benchmarks/DATABASES.md`.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from benchmarks import machine
from benchmarks.bars import median_interval
from benchmarks.layer_servers import touch
from benchmarks.plan import RANK, SMALL, WIDE
from benchmarks.processes import ROOT, Server, get, start_service
from benchmarks.progress import say
from benchmarks.report import table
from benchmarks.requests import Mix, Shape, write_requests
from benchmarks.stores import base_name, make_store
from benchmarks.wrk import Load, load
from tests.support.postgres_server import PostgresServer

_CONNECTIONS = (16, 64, 256)
_TENANTS = 1_000
_DELAY_MS = 1
_WARM_SECONDS = 2.0
_SQLITE, _LOOPBACK, _DELAYED = "SQLite", "PostgreSQL", f"PostgreSQL + {_DELAY_MS} ms"
_WITH_DELAY = (
    "A connection sends its next request after the answer to the last one. With 1 ms more for each, 16 connections "
    "cannot send more than 16,000 requests per second, however fast the service is. Their requests share a batch: they "
    "are answered together and come back together, so that there is nothing else to compute during the reading. With "
    "more connections, or a layer that takes longer, the next requests arrive meanwhile."
)
_PACKAGES = ("torch", "numpy", "uvicorn", "uvloop", "httptools", "sqlalchemy", "psycopg")


def main() -> None:
    """Measure the rounds and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.databases", description="/predict on two databases.")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each service, for each number of connections")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of each load")
    options = parser.parse_args()
    lines: list[Sequence[str]] = []
    for shape in (SMALL, WIDE):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-databases-")))
            servers = _start_all(shape, folder, stack)
            requests = write_requests(folder / "requests", shape, Mix(_TENANTS), binary=False)
            for connections in _CONNECTIONS:
                rounds = [
                    _round(servers, requests, connections, options.seconds, number) for number in range(options.rounds)
                ]
                lines += _lines(shape, connections, rounds)
    heads = ["", "connections", "requests/s", "ratio to SQLite", "95 % interval", "p50, ms", "added at p50, ms"]
    page = (
        "# `/predict` on PostgreSQL\n\nWritten by `make databases`: JSON requests of one row, "
        f"{_TENANTS:,} adapters of rank {RANK}, one worker; the load generator, the service and PostgreSQL share the "
        f"machine. Measured {machine.moment()}.\n\n"
        + table(heads, lines)
        + f"\n\n{_WITH_DELAY}\n\n"
        + table(["", ""], machine.describe(_PACKAGES).items())
        + "\n"
    )
    (ROOT / "benchmarks" / "DATABASES.md").write_text(page)
    print(page)


def _round(
    servers: Mapping[str, Server], requests: Path, connections: int, seconds: float, number: int
) -> Mapping[str, Load]:
    """Load each service once; the order changes from round to round."""
    names = list(servers)
    first = number % len(names)
    loads = {}
    for name in names[first:] + names[:first]:
        servers[name].resume()
        try:
            loads[name] = load(
                servers[name].port, requests, connections=connections, seconds=seconds, start=7_919 * number
            )
        finally:
            servers[name].pause()
    rates = ", ".join(f"{name} {loads[name].requests_per_second:,.0f}" for name in names)
    say(f"{connections} connections, round {number + 1}: {rates} requests/s")
    return loads


def _lines(shape: Shape, connections: int, rounds: Sequence[Mapping[str, Load]]) -> Iterator[Sequence[str]]:
    for name in rounds[0]:
        ratios = [loads[name].requests_per_second / loads[_SQLITE].requests_per_second for loads in rounds]
        added = [loads[name].p50_ms - loads[_SQLITE].p50_ms for loads in rounds]
        low, high = median_interval(ratios)
        is_reference = name == _SQLITE
        yield (
            f"{shape}, {name}",
            str(connections),
            f"{median(loads[name].requests_per_second for loads in rounds):,.0f}",
            "" if is_reference else f"{median(ratios):.3f}",
            "" if is_reference else f"{low:.3f} – {high:.3f}",
            f"{median(loads[name].p50_ms for loads in rounds):.2f}",
            "" if is_reference else f"{median(added):.2f}",
        )


def _start_all(shape: Shape, folder: Path, stack: ExitStack) -> Mapping[str, Server]:
    """Start the services, every adapter in memory, and stop them with SIGSTOP."""
    # The driver is an extra.
    from adapters.storage.postgres_database import PostgresDatabase

    postgres = PostgresServer()
    stack.callback(postgres.close)
    url = postgres.new_database()
    make_store(folder / "sqlite", shape, tenants=_TENANTS, rank=RANK)
    make_store(folder / "postgres", shape, tenants=_TENANTS, rank=RANK, database=PostgresDatabase(url))
    delayed_port = stack.enter_context(_delay(postgres.port))
    delayed_url = url.replace(f":{postgres.port}/", f":{delayed_port}/")
    servers = {
        _SQLITE: start_service(folder / "sqlite", base_name(shape), log_requests="none"),
        _LOOPBACK: _start_on(url, folder, shape),
        _DELAYED: _start_on(delayed_url, folder, shape),
    }
    for server in servers.values():
        stack.callback(server.stop)
    for server in servers.values():
        server.wait_until(get("/readyz"))
        touch(server.port, shape, range(_TENANTS))
        server.pause()
    return servers


def _start_on(url: str, folder: Path, shape: Shape) -> Server:
    return start_service(
        folder / "postgres", base_name(shape), database_url=url, allow_mixed_storage=True, log_requests="none"
    )


@contextmanager
def _delay(port: int) -> Iterator[int]:
    """Run a proxy in front of a port, and yield its own."""
    command = [sys.executable, "-m", "benchmarks.delay_proxy", str(port), str(_DELAY_MS)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdin is not None
        assert proxy.stdout is not None
        yield int(proxy.stdout.readline())
        proxy.stdin.close()


if __name__ == "__main__":
    main()
