"""Costs of the catalogue as it grows: `python -m benchmarks.growth [--sizes 10000 100000]`, or `make growth`.

Each size has a catalogue of its own: one fleet of that many adapters, in packs of 64, whose rows are inserted with SQL
because training them would take hours, with as many entries in the audit log. The sizes take turns in rounds, so that
drift of the machine cancels in a ratio. CPU time is measured beside wall time, because other programs do not change it.
It writes `benchmarks/GROWTH.md`. With `--folder`, the catalogues are made there and kept, and those of an earlier run
are used.
"""

import argparse
import gc
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import sqlalchemy as sa

from adapters.access.audit import AuditLog
from adapters.access.idempotency import remove_expired
from adapters.access.usage import HOUR_SECONDS, Usage
from adapters.catalog.catalog import Catalog
from adapters.catalog.counts import count_catalog
from adapters.catalog.versions import Publication, Source
from adapters.jobs.job_adapters import JobAdapter
from adapters.jobs.queue import JobQueue
from adapters.jobs.training_job import Provenance, TrainingJob
from adapters.names import Reference
from adapters.storage.schema import jobs
from adapters.storage.store_identity import CATALOG, connected
from adapters.storage.totals import add_to_totals, find_drift
from adapters.training.evaluation.gate import Gate
from adapters.training.settings import TrainingSpec
from benchmarks import machine
from benchmarks.processes import ROOT, Server, exchange, get, start_service
from benchmarks.progress import say
from benchmarks.report import table
from benchmarks.requests import Shape, message
from benchmarks.stores import as_adapter, base_name, load_base
from benchmarks.tenants import factors

_SHAPE, _RANK, _TENANT = Shape(64, 10), 2, "default"
# The job of the whole catalogue, and one of `_LONG_CHANGE` of its adapters.
_JOB, _ENDED_JOB = "fleet", "ended"
_PACK = 64
# Rows that each long change changes: enough slices for a median, in a catalogue of any size.
_LONG_CHANGE = 10_000
_TEMPLATE = "template"
_NAME = "printf('tenant-%08d', i)"
_FILE = "printf('%012x-%032x', 1, i / 64 + 1)"
_OLD = "2020-01-01T00:00:00.000000Z"
_METRICS = {name: {"loss": 0.125, "accuracy": 0.9375, "rows": 50} for name in ("training", "held_out", "base")}
_LINEAGE = {"loss": "mean_squared_error", "data": {"dataset": "rows@1", "digest": "sha256:" + "0" * 64}} | {
    f"setting_{number}": number / 7 for number in range(20)
}
# What the target bounds as a ratio between the largest and the smallest catalogue.
_BOUNDED = ("list", "prefix", "show", "find", "publish 1", "publish 64", "tally", "census", "start")
_NAMES_SERVED, _NAMES_IN_REQUEST = 1_000_000, 500


class Times(NamedTuple):
    """Milliseconds of a call or of a transaction."""

    wall: float
    cpu: float


@dataclass(slots=True)
class Figures:
    """Times of each operation in each round, and of the transactions of each long change, on one catalogue."""

    calls: dict[str, list[Times]] = field(default_factory=dict)
    transactions: dict[str, list[Times]] = field(default_factory=dict)

    def time(self, name: str, action: Callable[[], object]) -> None:
        """Run an action and keep its time."""
        with _timed(self.calls.setdefault(name, [])):
            action()

    def time_transactions(self, name: str, catalog: Catalog, action: Callable[[], object]) -> None:
        """Run an action and keep the times of its writing transactions, with their commits."""
        write, times = catalog.database.write, self.transactions.setdefault(name, [])

        @contextmanager
        def timed_write() -> Iterator[Any]:
            with _timed(times), write() as connection:
                yield connection

        catalog.database.write = timed_write  # type: ignore[method-assign]
        try:
            action()
        finally:
            catalog.database.write = write  # type: ignore[method-assign]


@contextmanager
def _timed(times: list[Times]) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.thread_time()
    try:
        yield
    finally:
        times.append(Times(1000 * (time.perf_counter() - wall), 1000 * (time.thread_time() - cpu)))


def make_catalog(folder: Path, adapters: int) -> None:
    """Make a data folder with a running job whose fleet has that many adapters, all published and live."""
    with _opened(folder) as (catalog, queue):
        template = Publication(
            name=_TEMPLATE,
            adapter=_adapter(0),
            base=load_base(_SHAPE),
            source=Source.JOB,
            job=_JOB,
            metrics=_METRICS,
            lineage=_LINEAGE,
        )
        (made,) = catalog.publish([template], tenant=_TENANT)
        for job_id in (_ENDED_JOB, _JOB):
            _submit(queue, job_id, [JobAdapter(_TEMPLATE, _TEMPLATE, 1)])
        queue.cancel(_ENDED_JOB, tenant=_TENANT)
    with connected(folder / CATALOG) as connection:
        _insert_rows(connection, adapters)
    pack = folder / "blobs" / f"{1:012x}-{1:032x}"
    pack.write_bytes(_adapter(0).canonical_bytes * _PACK)
    for number in range(1, adapters // _PACK + 1):
        os.link(pack, folder / "blobs" / f"{1:012x}-{number + 1:032x}")
    assert pack.stat().st_size == _PACK * made.version.bytes
    _recount(folder)


def _insert_rows(connection: sqlite3.Connection, adapters: int) -> None:
    connection.execute("PRAGMA cache_size=-400000")
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("BEGIN")
    published = {"version": "1", "digest": "'-'", "moved_live": "1", "outcome": "'better'", "gain": "0.5"}
    of_job = {"position": "i + 1", "name": _NAME, '"group"': _NAME, "metrics": f"'{json.dumps(_METRICS)}'"} | published
    for name, values, condition, rows in (
        ("adapters", {"name": _NAME}, "true", adapters),
        ("versions", {"adapter": _NAME, "file": _FILE, "offset": f"i % {_PACK} * bytes"}, "true", adapters),
        ("aliases", {"adapter": _NAME}, "true", adapters),
        ("job_adapters", of_job, f"job = '{_JOB}'", adapters),
        ("job_adapters", of_job, f"job = '{_ENDED_JOB}'", min(_LONG_CHANGE, adapters)),
        ("audit", {"sequence": "i + 1000", "resource": f"'adapters/' || {_NAME}"}, "sequence = 1", adapters),
    ):
        numbers = f"WITH RECURSIVE numbers(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM numbers WHERE i < {rows - 1})"
        columns = [f'"{row[1]}"' for row in connection.execute(f"PRAGMA table_info({name})")]
        given = {column if column.startswith('"') else f'"{column}"': value for column, value in values.items()}
        selected = ", ".join(given.get(column, column) for column in columns)
        template = f"(SELECT * FROM {name} WHERE {condition} LIMIT 1)"
        statement = f"INSERT INTO {name} ({', '.join(columns)}) SELECT {selected} FROM {template}, numbers"
        connection.execute(f"{numbers} {statement}")
    connection.execute("COMMIT")


def _recount(folder: Path) -> None:
    """Count the rows that were inserted past the catalogue's own statements."""
    with _opened(folder) as (catalog, queue):
        with catalog.database.write() as connection:
            for tenant, differences in find_drift(connection).items():
                add_to_totals(connection, tenant=tenant, **differences)
            connection.execute(sa.update(jobs).values(tally=None))
        claim = queue.claim(base=load_base(_SHAPE).fingerprint)
        assert claim is not None
        # The first change of a job without a tally counts its adapters.
        queue.fail_adapters(claim, [(0, {"code": "diverged"})])


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[Catalog, JobQueue]]:
    folder.mkdir(parents=True, exist_ok=True)
    catalog = Catalog(folder, now=time.time)
    try:
        yield catalog, JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=1e9)
    finally:
        catalog.close()


def _adapter(seed: int):  # type: ignore[no-untyped-def]
    return as_adapter(factors(seed, _SHAPE.in_features, _SHAPE.out_features, _RANK))


def _submit(queue: JobQueue, job_id: str, adapters: list[JobAdapter]) -> None:
    training = TrainingJob(
        spec=TrainingSpec(rank=_RANK, alpha=1.0),
        gate=Gate(),
        labels=None,
        steps=1,
        adapters=len(adapters),
        is_fleet=True,
        provenance=Provenance(data={}),
        description={},
    )
    queue.submit(
        job_id,
        tenant=_TENANT,
        adapter="tenant-{group}",
        adapters=adapters,
        base=load_base(_SHAPE).fingerprint,
        feature_space=None,
        training=training,
        data=b"rows",
        max_queued=10,
    )


def measure_round(folder: Path, adapters: int, figures: Figures, *, seed: str) -> None:
    """Time each operation once, after one that is not counted."""
    middle, base = f"tenant-{adapters // 2:08d}", load_base(_SHAPE)

    def publish(count: int) -> None:
        catalog.publish(
            [
                Publication(name=f"{seed}-{number}", adapter=_adapter(number), base=base, source=Source.UPLOAD)
                for number in range(count)
            ],
            tenant=_TENANT,
        )

    with _opened(folder) as (catalog, queue):
        claim = queue.get(_JOB, tenant=_TENANT)
        actions: dict[str, Callable[[], object]] = {
            "list": lambda: catalog.adapters(tenant=_TENANT),
            "prefix": lambda: catalog.adapters(tenant=_TENANT, prefix=middle[:-1]),
            "show": lambda: catalog.adapter(middle, tenant=_TENANT),
            "find": lambda: catalog.find(Reference(middle), tenant=_TENANT),
            "tally": lambda: queue.tally(claim),
            "census": lambda: count_catalog(catalog.database, base=base.fingerprint, now=0.0),
        }
        for name, action in actions.items():
            action()
            figures.time(name, action)
        publish(1)
        for count in (1, _PACK):
            figures.time_transactions(
                f"publish {count}", catalog, partial(figures.time, f"publish {count}", partial(publish, count))
            )


def measure_start(folder: Path, figures: Figures) -> None:
    """Time a start of the service, until it is ready: the CPU time is that of all its processes."""
    server = start_service(folder, base_name(_SHAPE))
    try:
        seconds = server.wait_until(get("/readyz"))
        figures.calls.setdefault("start", []).append(Times(1000 * seconds, 1000 * server.cpu_seconds()))
    finally:
        server.stop()


def measure_long_changes(folder: Path, figures: Figures) -> None:
    """Time the transactions of every change of many rows: each changes `_LONG_CHANGE` rows."""
    with _opened(folder) as (catalog, queue):
        database = catalog.database
        timed = partial(figures.time_transactions, catalog=catalog)
        rows = [JobAdapter(f"young-{n}", f"{n}", 1, position=n) for n in range(_LONG_CHANGE)]
        timed("submit a fleet", action=lambda: _submit(queue, "young", rows))
        timed("revert a fleet", action=lambda: queue.revert(_ENDED_JOB, tenant=_TENANT))
        claim = queue.claim(base=load_base(_SHAPE).fingerprint)
        assert claim is not None
        timed("fail a fleet", action=lambda: queue.fail(claim, {"code": "diverged"}))
        timed("delete an adapter", action=lambda: catalog.delete("tenant-00000001", tenant=_TENANT))
        timed("sweep", action=catalog.sweep)
        _insert_expired(folder)
        timed("empty the trash", action=catalog.purge_trash)
        timed("trim the audit log", action=lambda: AuditLog(database).remove_before(_OLD[:4] + "-02", tenant=_TENANT))
        timed("remove usage", action=Usage(database, now=time.time).remove_expired)
        timed("remove idempotency keys", action=lambda: remove_expired(database, now=time.time()))


def _insert_expired(folder: Path) -> None:
    """Insert what is due to be removed, past the catalogue's own statements."""
    numbers = f"WITH RECURSIVE numbers(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM numbers WHERE i < {_LONG_CHANGE})"
    with connected(folder / CATALOG) as connection:
        columns = ", ".join(f'"{row[1]}"' for row in connection.execute("PRAGMA table_info(versions)"))
        # Of other versions than those that exist.
        trashed = columns.replace('"version"', "9")
        connection.execute("BEGIN")
        connection.execute(
            f"INSERT INTO trashed_versions ({columns}, deleted_at) SELECT {trashed}, '{_OLD}' FROM"
            f" (SELECT * FROM versions WHERE adapter LIKE 'tenant-%' LIMIT {_LONG_CHANGE})"
        )
        time_of = "strftime('%Y-%m-%dT%H:%M:%fZ', '2020-01-01', {} || ' seconds')"
        connection.execute(
            f"UPDATE audit SET time = {time_of.format('sequence')} WHERE sequence BETWEEN 1000 AND {999 + _LONG_CHANGE}"
        )
        hour = int(time.time() // HOUR_SECONDS) - 100 * 24
        usage = f"'{_TENANT}', 'adapter', {hour}, {_NAME}, 1, 1"
        connection.execute(f"{numbers} INSERT INTO usage SELECT {usage} FROM numbers")
        connection.execute(
            f"{numbers} INSERT INTO idempotency_keys (tenant, key, fingerprint, claim, owner, job, expires_at)"
            f" SELECT '{_TENANT}', {_NAME}, '-', '-', '-', '{_JOB}', {time_of.format('i')} FROM numbers"
        )
        connection.execute("COMMIT")


def measure_memory(folder: Path, adapters: int) -> str:
    """Let one worker answer for a million names; say how much its memory grew."""
    server = start_service(folder, base_name(_SHAPE))
    try:
        server.wait_until(get("/readyz"))
        _predict(server, 0)
        before, sizes = server.largest_rss(), list[tuple[int, int]]()
        for first in range(_NAMES_IN_REQUEST, min(adapters, _NAMES_SERVED), _NAMES_IN_REQUEST):
            _predict(server, first)
            sizes.append((first + _NAMES_IN_REQUEST, server.largest_rss() - before))
    finally:
        server.stop()
    growth = "; ".join(f"{size:,} after {names:,}" for names, size in sizes[:: max(1, len(sizes) // 6)])
    names, last = sizes[-1]
    return (
        f"A worker answered for {names:,} names, each once, {_NAMES_IN_REQUEST} in a request. Its resident memory grew"
        f" by {last:,} bytes since the first request, which is {last / names:.0f} bytes for each name ({growth})."
    )


def _predict(server: Server, first: int) -> None:
    """Ask for one row of each of some adapters."""
    names = [f"tenant-{number:08d}" for number in range(first, first + _NAMES_IN_REQUEST)]
    inputs = [[0.5] * _SHAPE.in_features] * len(names)
    body = json.dumps({"adapters": names, "inputs": inputs}).encode()
    status, *_ = exchange(server.port, message("/predict", body, "Content-Type: application/json"), seconds=60)
    assert status == 200, status


def page(results: dict[int, Figures], memory: str) -> str:
    """Return the page: times by size, ratios, and the longest transactions."""
    smallest, largest = results[min(results)], results[max(results)]
    lines = []
    for name in smallest.calls:
        for kind in ("wall", "cpu"):
            medians = {
                size: median(getattr(one, kind) for one in figures.calls[name]) for size, figures in results.items()
            }
            ratio = median(getattr(one, kind) for one in largest.calls[name]) / medians[min(medians)]
            cells = [f"{value:,.2f}" for value in medians.values()]
            lines.append([f"{name}, {kind}", *cells, f"{ratio:.2f}" if name in _BOUNDED else ""])
    holds = [
        [name, *(_holds(figures.transactions[name]) for figures in results.values())] for name in smallest.transactions
    ]
    sizes = [f"{size:,}" for size in results]
    return (
        "# Costs as the catalogue grows\n\nWritten by `make growth`: milliseconds (medians) by number of adapters, and"
        f" the ratio of the largest to the smallest. Measured {machine.moment()}. `publish` includes the sync of a"
        " blob and of a commit; the CPU time of `start` is that of all processes of the service.\n\n"
        + table(["", *sizes, "ratio"], lines)
        + "\n\n## Write lock\n\nEvery transaction of a change of many rows, from before its lock to behind its commit:"
        f" number of transactions, longest CPU time, and median and longest wall time in ms. Each changes"
        f" {_LONG_CHANGE:,} rows.\n\n"
        + table(["", *sizes], holds)
        + f"\n\n## Memory\n\n{memory}\n\n"
        + table(["", ""], machine.describe(("torch", "numpy")).items())
        + "\n"
    )


def _holds(times: list[Times]) -> str:
    if not times:
        return "none"
    walls = [one.wall for one in times]
    return f"{len(times)}: {max(one.cpu for one in times):.0f}, {median(walls):.0f}, {max(walls):.0f}"


def main() -> None:
    """Measure the sizes and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description="Costs as the catalogue grows.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="adapters")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--page", type=Path, default=ROOT / "benchmarks" / "GROWTH.md")
    parser.add_argument("--folder", type=Path, help="where the catalogues are made, and kept")
    parser.add_argument("--only-make", action="store_true", help="make the catalogues and end")
    options = parser.parse_args()
    # As the processes of the service do: a full collection of what was imported takes a quarter of a second.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
    results = {size: Figures() for size in options.sizes}
    kept = nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory(prefix="loraplex-growth-")
    with kept as root:
        folders = {size: Path(root) / str(size) / "data" for size in options.sizes}
        for size, folder in folders.items():
            if not folder.exists():
                make_catalog(folder, size)
                say(f"growth: made {size:,} adapters")
        if options.only_make:
            return
        run = f"new-{time.time():.0f}"
        for number in range(options.rounds):
            for size, folder in folders.items():
                measure_round(folder, size, results[size], seed=f"{run}-{number}")
        for _ in range(options.starts):
            for size, folder in folders.items():
                measure_start(folder, results[size])
        memory = measure_memory(folders[max(folders)], max(folders))
        say("growth: served every name")
        for size, folder in folders.items():
            measure_long_changes(folder, results[size])
            say(f"growth: changed many rows of {size:,} adapters")
    text = page(results, memory)
    options.page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
