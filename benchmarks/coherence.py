"""Costs of a batch that sees every change, and of the alternatives: `python -m benchmarks.coherence`.

Everything runs on a PostgreSQL server of its own on this machine, with `fsync`, so that a round trip is short and a
commit is not. docs/explanation/coherence.md explains the figures. It writes `benchmarks/COHERENCE.md`.
"""

import argparse
import asyncio
import queue
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg
import uvloop

from adapters.storage.postgres_database import PostgresDatabase
from adapters.storage.sqlite_database import SqliteDatabase
from benchmarks import machine
from benchmarks.processes import ROOT
from benchmarks.report import table
from tests.support.postgres_server import PostgresServer

_PACKAGES = ("psycopg", "sqlalchemy", "uvloop")
_WAITERS = (1, 16, 64)
_WRITERS = (1, 8)
# Positions of the WAL: of what was written to memory, and of what is on the disk.
_POSITIONS = ("pg_current_wal_insert_lsn", "pg_current_wal_flush_lsn")
_PROBE = "CREATE TABLE probe (id int PRIMARY KEY, value bigint NOT NULL DEFAULT 0)"
_REVISION = "SELECT revision, access_revision FROM catalog"
_CHANGE = "UPDATE probe SET value = value + 1 WHERE id = %s"
_NOTIFY = f"{_CHANGE.replace('%s', '{id}')}; NOTIFY probe"
_BLOCK = 50
_MICROSECONDS = 1e6
_MILLISECONDS = 1e3

Line = tuple[str, str, str]


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coherence", description=__doc__.partition(":")[0])
    parser.add_argument("--readings", type=int, default=10_000, help="readings of each kind")
    parser.add_argument("--changes", type=int, default=1_000, help="changes that are read after their acknowledgement")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each round of commits")
    options = parser.parse_args()
    server = PostgresServer(durable=True)
    try:
        url = server.new_database()
        dsn = url.replace("+psycopg", "")
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(_PROBE)
            connection.execute("INSERT INTO probe SELECT generate_series(1, 64)")
        lines = [
            *uvloop.run(_readings(url, dsn, options.readings)),
            *_sqlite_readings(options.readings),
            *uvloop.run(_shared_readings(url, dsn, options.readings)),
            *uvloop.run(_stale_readings(url, options.changes)),
            *(_stale_positions(dsn, options.changes, position) for position in _POSITIONS),
            *_late_notifications(dsn, options.changes),
            *_commits(dsn, options.seconds),
        ]
    finally:
        server.close()
    page = (
        "# Costs of coherence\n\nWritten by `make coherence`. PostgreSQL is on the same machine, with `fsync`. "
        f"Measured {machine.moment()}.\n\n"
        + table(["", "", "unit"], lines)
        + "\n\n"
        + table(["", ""], {name: text for name, text in machine.describe(_PACKAGES).items() if name != "wrk"}.items())
        + "\n"
    )
    (ROOT / "benchmarks" / "COHERENCE.md").write_text(page)
    print(page)


async def _readings(url: str, dsn: str, count: int) -> list[Line]:
    """Time one reading after another: that of the service, and a statement on a connection of psycopg."""
    with closing(PostgresDatabase(url)) as database, closing(database.catalog_watch()) as watch:

        async def read() -> None:
            reading = watch.begin_read()
            assert reading is not None
            await reading

        service = await _time_each(read, count)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=0) as connection:

        async def select() -> None:
            await (await connection.execute(_REVISION)).fetchone()

        server = psutil.Process(connection.info.backend_pid)
        began = _cpu_seconds(server)
        statement = await _time_each(select, count)
        on_server = (_cpu_seconds(server) - began) / count * _MICROSECONDS
    return [
        ("the revision row, read by the service: time", service[0], "µs"),
        ("the revision row, read by the service: CPU time of the event loop", service[1], "µs"),
        ("the same row by an asynchronous connection of psycopg: time", statement[0], "µs"),
        ("the same row by an asynchronous connection of psycopg: CPU time of the event loop", statement[1], "µs"),
        ("the same row: CPU time of PostgreSQL", _number(on_server), "µs"),
    ]


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _time_each(read: Callable[[], Awaitable[None]], count: int) -> tuple[str, str]:
    """Return the median time of a reading, and the median of its CPU time in this thread, in microseconds."""
    for _ in range(100):
        await read()
    times: list[float] = []
    cpu: list[float] = []
    # The clock of CPU time takes as long as a reading, so that it is read once for a block of them.
    for _ in range(max(1, count // _BLOCK)):
        block = time.thread_time()
        for _ in range(_BLOCK):
            began = time.perf_counter()
            await read()
            times.append(time.perf_counter() - began)
        cpu.append((time.thread_time() - block) / _BLOCK)
    return _number(median(times) * _MICROSECONDS), _number(median(cpu) * _MICROSECONDS)


def _sqlite_readings(count: int) -> list[Line]:
    """Time the same check on SQLite: `data_version`, which has not changed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(SqliteDatabase(Path(folder))) as database,
        closing(database.catalog_watch()) as watch,
    ):
        watch.revision()
        began = time.thread_time()
        for _ in range(count):
            watch.revision()
        took = (time.thread_time() - began) / count
    return [("on SQLite, `data_version`, if nothing has changed: CPU time", _number(took * _MICROSECONDS), "µs")]


async def _shared_readings(url: str, dsn: str, count: int) -> list[Line]:
    """Time requests that arrive together: with one reading for all of them, and with a statement for each."""
    lines: list[Line] = []
    with closing(PostgresDatabase(url)) as database, closing(database.catalog_watch()) as watch:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=0) as connection:
            for waiters in _WAITERS:

                async def share() -> None:
                    reading = watch.begin_read()
                    assert reading is not None
                    await reading

                async def read_each(waiters: int = waiters) -> None:
                    for _ in range(waiters):
                        await (await connection.execute(_REVISION)).fetchone()

                rounds = max(50, count // waiters)
                for name, read in (("one reading", share), ("a reading for each", read_each)):
                    took = await _time_each(read, rounds)
                    lines.append((f"{waiters} request{'s' * (waiters > 1)} at once, {name}: CPU time", took[1], "µs"))
    return lines


async def _stale_readings(url: str, changes: int) -> list[Line]:
    """Count readings that began after the acknowledgement of a change and did not see it."""
    stale = 0
    with (
        closing(PostgresDatabase(url)) as here,
        closing(PostgresDatabase(url)) as elsewhere,
        closing(here.catalog_watch()) as watch,
    ):
        for number in range(1, changes + 1):
            await asyncio.to_thread(elsewhere.raise_revision, number)
            reading = watch.begin_read()
            assert reading is not None
            await reading
            stale += watch.revision() % 2**48 < number
    return [(f"{changes:,} acknowledged changes, read as the revision row: stale", str(stale), "readings")]


def _stale_positions(dsn: str, changes: int, function: str) -> Line:
    """Count changes that a cache keyed by a position of the WAL does not see after their acknowledgement.

    Another thread reads the position all the time. If it has moved, the thread reads the row and caches it under that
    position. A change is stale if the position at the acknowledgement is one under which the older row is cached.
    """
    current = f"SELECT {function}()::text"
    cached: dict[str, int] = {}
    ended = threading.Event()

    def cache() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not ended.is_set():
                position = _one(connection, current)
                if position not in cached:
                    cached[position] = _one(connection, "SELECT value FROM probe WHERE id = 1")

    thread = threading.Thread(target=cache)
    thread.start()
    stale = 0
    try:
        with psycopg.connect(dsn, autocommit=True) as writer, psycopg.connect(dsn, autocommit=True) as reader:
            for _ in range(changes):
                writer.execute(_CHANGE, [1])
                value = _one(writer, "SELECT value FROM probe WHERE id = 1")
                position = _one(reader, current)
                stale += cached.get(position, value) < value
    finally:
        ended.set()
        thread.join()
    return f"{changes:,} acknowledged changes, cached under `{function}`: stale", str(stale), "readings"


def _late_notifications(dsn: str, changes: int) -> Iterator[Line]:
    """Time from the acknowledgement of a change to the arrival of its notification at another connection."""
    delays: list[float] = []
    with psycopg.connect(dsn, autocommit=True) as listener, psycopg.connect(dsn, autocommit=True) as writer:
        listener.execute("LISTEN probe")
        arrivals: queue.SimpleQueue[float] = queue.SimpleQueue()
        notifications = listener.notifies(stop_after=changes)

        def receive() -> None:
            for _ in notifications:
                arrivals.put(time.perf_counter())

        thread = threading.Thread(target=receive)
        thread.start()
        for _ in range(changes):
            writer.execute(_NOTIFY.format(id=1).encode())
            acknowledged = time.perf_counter()
            delays.append(arrivals.get() - acknowledged)
        thread.join()
    late = [delay for delay in delays if delay > 0]
    yield f"{changes:,} acknowledged changes, of which `NOTIFY` had not arrived yet", str(len(late)), "changes"
    yield "`NOTIFY`, from the acknowledgement to the arrival: p50", _number(median(delays) * _MILLISECONDS, 2), "ms"
    yield (
        "`NOTIFY`, from the acknowledgement to the arrival: p99",
        _number(quantiles(delays, n=100)[98] * _MILLISECONDS, 2),
        "ms",
    )


def _commits(dsn: str, seconds: float) -> Iterator[Line]:
    """Rate of commits by writers that change different rows, with NOTIFY and without."""
    for writers in _WRITERS:
        rates: dict[str, list[float]] = {"plain": [], "with `NOTIFY`": []}
        # They take turns, because the rate of the disk drifts.
        for _ in range(3):
            for name, statement in (("plain", _CHANGE.replace("%s", "{id}")), ("with `NOTIFY`", _NOTIFY)):
                rates[name].append(_commit_rate(dsn, statement, writers=writers, seconds=seconds))
        for name, measured in rates.items():
            yield f"commits by {writers} writer{'s' * (writers > 1)}, {name}", f"{median(measured):,.0f}", "per second"


def _commit_rate(dsn: str, statement: str, *, writers: int, seconds: float) -> float:
    stop = time.perf_counter() + seconds

    def write(number: int) -> int:
        count = 0
        with psycopg.connect(dsn, autocommit=True) as connection:
            while time.perf_counter() < stop:
                connection.execute(statement.format(id=number).encode())
                count += 1
        return count

    with ThreadPoolExecutor(writers) as threads:
        return sum(threads.map(write, range(1, writers + 1))) / seconds


def _one(connection: "psycopg.Connection[tuple[Any, ...]]", statement: str) -> Any:
    row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


if __name__ == "__main__":
    main()
